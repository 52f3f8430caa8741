"""Signals that stop a run: the step under way is finished and saved.

They are received by a thread. The main one may be compiling, or wait for
another process, for minutes; and the KeyboardInterrupt that Python raises there
has crashed JAX when the program left.
"""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import jax
import tqdm
from jax.experimental import multihost_utils

from reference.data import pieces
from reference.run import hosts

# A terminal's Ctrl-C, a scheduler's request, a terminal that is closed, and
# what Slurm's `--signal=USR1@60` sends.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


def _say(text: str) -> None:
  # Above the progress bar, if there is one.
  tqdm.tqdm.write(text)
  sys.stdout.flush()


class Stop:
  """Whether to stop, and by which signal.

  Attributes:
    saves: whether steps are taken, so that a signal waits for one to be saved.
  """

  def __init__(self, at_end: Callable[[], None]):
    self.saves = False
    self._at_end = at_end
    self._first: int | None = None

  def receive(self, number: int) -> None:
    """Decides what a signal to this process does."""
    name = signal.Signals(number).name
    together = jax.distributed.is_initialized()
    if not (self.saves or together):
      self._end(
        number,
        f'Stopped by {name} before a step was taken: there is nothing to save. '
        'The same command goes on.',
      )
    elif self._first is None:
      self._first = number
      _say(
        f'{name}: the step under way is finished and saved, then the run ends. '
        'Ctrl-C again ends it at once.'
      )
      if together:
        # JAX took this one when it connected the processes, and tells all.
        os.kill(os.getpid(), signal.SIGTERM)
    elif number == signal.SIGINT:
      # Other signals are repeated by schedulers, and by wrappers that pass on
      # what their whole group was sent.
      self._end(
        number,
        f'Ended by {name} at once. The same command goes on from the newest '
        'checkpoint.',
      )

  def _end(self, number: int, text: str) -> None:
    def leave() -> None:
      pieces.end_workers()
      os._exit(128 + number)

    # Nothing is unwound, as the main thread may be anywhere; nor may storage or
    # a terminal that does not answer keep it.
    threading.Timer(1.0, leave).start()
    self._at_end()
    _say(text)
    leave()

  def reached(self, done: int) -> bool:
    """Whether to save and leave after this step, the same on all hosts.

    Args:
      done: the number of steps done; to be called after every one.
    """
    if jax.distributed.is_initialized():
      # A signal to one process reaches all, and they stop at a step that none
      # has passed yet.
      return multihost_utils.reached_preemption_sync_point(done)
    return self._first is not None

  def by(self) -> signal.Signals:
    """The signal that stopped the run, the same on all hosts."""
    first = next(filter(None, hosts.gather(self._first)), signal.SIGTERM)
    return signal.Signals(first)


def _taken() -> list[signal.Signals]:
  """The signals that Python receives here."""
  return [
    number
    for number in SIGNALS
    # What nohup, or a shell in the background, told it to ignore stays so.
    if signal.getsignal(number) != signal.SIG_IGN
    and not (number == signal.SIGTERM and jax.distributed.is_initialized())
  ]


@contextlib.contextmanager
def watch(at_end: Callable[[], None]) -> Iterator[Stop]:
  """Turns signals into a stop at the end of a step.

  Args:
    at_end: called before the process is ended at once.

  Yields:
    What the signals asked for.
  """
  stop = Stop(at_end)
  reader, writer = os.pipe()
  os.set_blocking(writer, False)

  def receive() -> None:
    while number := os.read(reader, 1)[0]:
      stop.receive(number)

  thread = threading.Thread(target=receive, daemon=True)
  # The numbers of signals arrive there at once, whatever the main thread does.
  before = signal.set_wakeup_fd(writer)
  handlers = {x: signal.signal(x, lambda *_: None) for x in _taken()}
  thread.start()
  try:
    yield stop
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
    signal.set_wakeup_fd(before)
    os.write(writer, b'\0')
    thread.join()
    os.close(reader)
    os.close(writer)
