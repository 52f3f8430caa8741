"""Rows of batches, made ahead by threads and by worker processes.

Few threads and a short buffer read faster than Grain's defaults of 16 and 500.
A thread more makes batch t + 1 while step t runs.

The threads of a process share Python's lock. Where that is too little, the
threads are those of worker processes, between which nothing is shared: what was
unreadable travels with the rows that were made beside it.
"""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import flags

from reference.data import jpeg

Element = dict[str, Any]
# Rows of a batch, and what was unreadable among them.
Piece = tuple[list[Element], jpeg.Skipped]

# At most so many rows of a batch are one task for a thread.
_PIECE = 32
_LEFT_TO_THE_RUN = (
  signal.SIGINT,
  signal.SIGTERM,
  signal.SIGHUP,
  signal.SIGUSR1,
)
# Arrays smaller than this reach the parent by a pipe, not by shared memory.
_SMALL = 4096
# Within which all workers are there, once the first batch is asked for.
_START_SECONDS = 0.5
# How many workers this process has, or is about to start.
_opened = 0


class Pieces(grain.MapDataset):
  """A host's rows of all batches, some at a time.

  So one task for a thread makes several images, and what Grain does for each
  element is shared by them.
  """

  def __init__(
    self,
    numbers: grain.MapDataset,
    make_row: Callable[[int, np.random.Generator], Element],
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    replacement: Element | None,
    host: int,
    hosts: int,
  ):
    super().__init__(numbers)
    share = batch_size // hosts
    self._make_row = make_row
    self._seed = config.seed
    self._batch_size = batch_size
    self._first = host * share
    self._rows = max(x for x in range(1, _PIECE + 1) if share % x == 0)
    self._pieces = share // self._rows
    self._on_bad_image = config.data.on_bad_image
    self._replacement = replacement

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * self._pieces

  def __getitem__(self, index: int) -> Piece:
    batch, piece = divmod(index, self._pieces)
    start = batch * self._batch_size + self._first + piece * self._rows
    positions = range(start, start + self._rows)
    # All at once: after a decode, which fills the caches, one generator takes
    # three times as long to make.
    numbers = [self._parent[position] for position in positions]
    rngs = [np.random.default_rng((self._seed, x)) for x in positions]
    rows: list[Element] = []
    skipped: jpeg.Skipped = {}
    for number, rng in zip(numbers, rngs, strict=True):
      try:
        rows.append(self._make_row(number, rng))
      except jpeg.BadImageError as error:
        if self._on_bad_image == 'stop':
          raise
        skipped[error.path] = error.reason
        if self._replacement is not None:
          rows.append(self._replacement)
    return rows, skipped


def _stack(rows: Sequence[Element]) -> Element:
  names = list(rows[0]) if rows else []
  return {name: np.stack([row[name] for row in rows]) for name in names}


def _pack(piece: Piece) -> tuple[Element, jpeg.Skipped]:
  """A piece as few large arrays, which travel between processes."""
  rows, skipped = piece
  return _stack(rows), skipped


def _unpack(packed: tuple[Element, jpeg.Skipped]) -> Piece:
  """The piece again. Its rows are views of memory shared with a worker."""
  arrays, skipped = packed
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  count = len(arrays['label']) if arrays else 0
  rows = [{name: x[i] for name, x in arrays.items()} for i in range(count)]
  return rows, skipped


def _leave_signals_to_the_run() -> None:
  """Blocks them in this thread, which is Grain's, and in what it starts.

  A scheduler or a terminal sends them to all processes, and the run needs one
  more batch to stop at the end of a step.
  """
  signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_RUN)
  # It unblocks some of them as it starts.
  resource_tracker.ensure_running()
  signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_THE_RUN)


class _Batches(grain.DatasetIterator):
  """The rows of pieces, in their order, in batches.

  The state is the piece and the row in it that come next, and knows nothing of
  threads and workers: a run may resume with others.
  """

  def __init__(
    self,
    open_pieces: Callable[[int], grain.DatasetIterator],
    batch_size: int,
    receive: Callable[[jpeg.Skipped], None],
  ):
    super().__init__()
    self._open_pieces = open_pieces
    self._batch_size = batch_size
    self._receive = receive
    self._piece, self._row = 0, 0
    self._pieces: grain.DatasetIterator | None = None
    self._rows: list[Element] | None = None

  def __next__(self) -> Element:
    if self._pieces is None:
      _leave_signals_to_the_run()
      self._pieces = self._open_pieces(self._piece)
    rows: list[Element] = []
    while missing := self._batch_size - len(rows):
      if self._rows is None:
        self._rows, skipped = next(self._pieces)
        self._receive(skipped)
      end = self._row + missing
      rows += self._rows[self._row : end]
      self._row = end
      if end >= len(self._rows):
        self._rows, self._row, self._piece = None, 0, self._piece + 1
    # The only copy of pixels that no worker made.
    return _stack(rows)

  def get_state(self) -> dict[str, int]:
    return {'piece': self._piece, 'row': self._row}

  def set_state(self, state: dict[str, int]) -> None:
    self._stop()
    self._piece, self._row = state['piece'], state['row']

  def close(self) -> None:
    super().close()
    self._stop()

  def _stop(self) -> None:
    if self._pieces is not None:
      self._pieces.close()
    self._pieces = self._rows = None


def _start_worker(index: int, workers: int) -> None:
  """Leaves it to the parent when this worker ends."""
  del index, workers
  parent = multiprocessing.parent_process()
  assert parent is not None

  def leave_with_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()


def _find_workers() -> list[int]:
  """The workers of this process, also those that only start.

  Of these `multiprocessing` does not know yet.
  """
  workers = []
  # Where the system has no such folder none is found.
  for process in Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      command = (process / 'cmdline').read_bytes()
      state = (process / 'stat').read_text().rpartition(')')[2].split()
      if int(state[1]) == os.getpid() and b'multiprocessing.spawn' in command:
        workers.append(int(process.name))
  return workers


def end_workers() -> None:
  """Kills the workers of this process, to be called right before its end.

  One that only starts would tell by a traceback that its parent no longer
  writes what it is to do.
  """
  deadline = time.monotonic() + _START_SECONDS
  workers = _find_workers()
  while len(workers) < _opened and time.monotonic() < deadline:
    workers = _find_workers()
  # At once, so that nobody here tells of one that is gone.
  for worker in workers:
    with contextlib.suppress(ProcessLookupError):
      os.kill(worker, signal.SIGKILL)


def batched(
  pieces: Pieces,
  config: ml_collections.ConfigDict,
  *,
  rows: int,
  workers: int,
  receive: Callable[[jpeg.Skipped], None],
) -> grain.DatasetIterator:
  """Batches of a host's `rows`, made ahead by threads."""
  threads = config.run.threads
  if workers and not flags.FLAGS.is_parsed():
    # In a program without flags; Grain reads one of its own for workers.
    flags.FLAGS.mark_as_parsed()

  def open_pieces(first: int) -> grain.DatasetIterator:
    global _opened
    _opened = workers
    rest = pieces.slice(slice(first, None))
    made = (rest.map(_pack) if workers else rest).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    made = grain.experimental.WithOptionsIterDataset(
      made, grain.experimental.DatasetOptions(min_shm_size=_SMALL)
    )
    if workers:
      made = made.mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
        worker_init_fn=_start_worker,
      ).map(_unpack)
    return iter(made)

  return grain.experimental.ThreadPrefetchDatasetIterator(
    _Batches(open_pieces, rows, receive),
    prefetch_buffer_size=1,
  )
