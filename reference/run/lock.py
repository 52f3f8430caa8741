"""A work folder takes one run at a time.

Each run keeps a file of its own in the folder, which says who it is, and which
it touches while it lives. Who comes writes its file first and reads the others
then, so that of two who come at once at least one sees the other, and removing
the file of a dead run can never hit that of a living one.
"""

import contextlib
import datetime
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from reference import command
from reference.run import hosts

_FILES = 'lock_*.json'
# Seconds between two signs of life.
_BEAT = 10.0
# On another host a run is dead that gives no sign for so long. What gcsfuse and
# NFS know of a file may be a minute old.
_SILENT = 90.0
# By the storage's clock; the clocks of hosts that mount a bucket may differ.
_LONG_DEAD = 300.0


class Owner(NamedTuple):
  """Who runs in a folder.

  Attributes:
    host: its name.
    process: its number on that host.
    since: when it came, for people.
    started: when that process started, in the kernel's own unit.
    place: where the number means this process and no other.
  """

  host: str
  process: int
  since: str
  started: str
  place: str


def _place() -> str:
  """The running kernel and the process numbers that this process sees.

  Containers may share a kernel and a host's name, and hosts a name.
  """
  try:
    boot = Path('/proc/sys/kernel/random/boot_id').read_text().strip()
    return f'{boot} {os.readlink("/proc/self/ns/pid")}'
  except OSError:
    return socket.gethostname()


def _started(process: int) -> str:
  """When a process started; '' where the kernel does not tell."""
  try:
    status = Path(f'/proc/{process}/stat').read_text()
  except OSError:
    return ''
  state, *rest = status.rpartition(')')[2].split()
  # One that ended stays as a zombie until its parent asks for it.
  return 'ended' if state in 'ZX' else rest[18]


def _is_running(owner: Owner) -> bool:
  """Whether a process of this place still is the one that it was."""
  try:
    os.kill(owner.process, 0)
  except ProcessLookupError:
    return False
  except PermissionError:
    # Of another user.
    pass
  # The number may have gone to another process since.
  return _started(owner.process) in (owner.started, '')


def _this() -> Owner:
  return Owner(
    host=socket.gethostname(),
    process=os.getpid(),
    since=datetime.datetime.now().astimezone().isoformat(timespec='seconds'),
    started=_started(os.getpid()),
    place=_place(),
  )


def _look(path: Path) -> tuple[Owner | None, float]:
  """Who wrote a lock, if it can be read, and the time of its last sign."""
  with path.open() as file:
    touched = os.fstat(file.fileno()).st_mtime
    try:
      return Owner(**json.load(file)), touched
    except (ValueError, TypeError):
      # It is being written, or a kill cut it off.
      return None, touched


def _find_alive(path: Path, own: Path) -> Owner | None:
  """Who wrote a lock, if it lives; waits for a sign where it must.

  Args:
    path: of the lock.
    own: the lock of this run, to compare times by the storage's clock.
  """
  first: float | None = None
  deadline = time.monotonic() + _SILENT
  while True:
    try:
      owner, touched = _look(path)
    except FileNotFoundError:
      return None
    if owner is not None and owner.place == _place():
      return owner if _is_running(owner) else None
    if first is None:
      first = touched
      os.utime(own)
      if own.stat().st_mtime - touched > _LONG_DEAD:
        return None
      where = 'another host' if owner is None else owner.host
      print(
        f'A run on {where} did not say that it ended: waiting up to '
        f'{_SILENT:.0f} s for a sign of life.',
        flush=True,
      )
    elif touched != first and owner is not None:
      return owner
    if time.monotonic() > deadline:
      return None
    time.sleep(min(1.0, _SILENT / 10))


def _refusal(workdir: Path, owner: Owner) -> str:
  return (
    f'A work folder takes one run at a time. Given {workdir}, where process '
    f'{owner.process} on {owner.host} has been running since {owner.since}. '
    'Likely the same command was started twice: let that one go on; or stop '
    f'it, which saves, `kill {owner.process}` on {owner.host}; or take another '
    f'folder, `--workdir={workdir}_2`.'
  )


class Lock:
  """The lock of this run."""

  def __init__(self, workdir: Path):
    self._workdir = workdir
    self._path = workdir / f'lock_{uuid.uuid4().hex[:8]}.json'
    self._ended = threading.Event()

  def take(self) -> str:
    """Takes the folder.

    Returns:
      Why it is refused; empty where it is not.
    """
    reason = self._enter()
    if not reason:
      threading.Thread(target=self._beat, daemon=True).start()
    return reason

  def _enter(self) -> str:
    try:
      self._path.write_text(json.dumps(_this()._asdict(), indent=2) + '\n')
      owner = self._remove_dead()
    except BaseException:
      self.release()
      raise
    if owner is None:
      return ''
    self.release()
    return _refusal(self._workdir, owner)

  def _remove_dead(self) -> Owner | None:
    """Removes the locks of runs that are dead; returns one that lives."""
    for path in self._workdir.glob(_FILES):
      if path == self._path:
        continue
      owner = _find_alive(path, self._path)
      if owner is not None:
        return owner
      path.unlink(missing_ok=True)
    return None

  def _beat(self) -> None:
    while not self._ended.wait(_BEAT):
      # Storage that is out of reach is for the run itself to meet.
      with contextlib.suppress(OSError):
        os.utime(self._path)

  def check(self) -> None:
    """Refuses to write where another run took the folder over.

    Raises:
      Mistake: when one did, as this was silent for so long. It may have ended
        since.
    """
    if self._path.exists():
      return
    reason = self._enter()
    self.release()
    raise command.Mistake(
      reason
      or 'A run whose lock is gone writes no more, as another may have gone on '
      f'in its place. Given {self._workdir}, without {self._path.name}. Likely '
      f'this host was silent for more than {_SILENT:.0f} s: start the same '
      'command again, which resumes from the newest checkpoint.'
    )

  def release(self) -> None:
    """Gives the folder back."""
    self._ended.set()
    self._path.unlink(missing_ok=True)


@contextlib.contextmanager
def hold(workdir: Path) -> Iterator[Lock]:
  """Holds a folder, which is there, for all processes of this run.

  Yields:
    The lock, which the first process took.

  Raises:
    Mistake: on every process, where another run holds it.
  """
  held = Lock(workdir)
  reason = hosts.gather(held.take() if hosts.is_first() else '')[0]
  if reason:
    raise command.Mistake(reason)
  try:
    yield held
  finally:
    held.release()
