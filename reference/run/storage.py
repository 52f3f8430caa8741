"""The storage of a work folder: what it must do, and what it did not."""

import contextlib
import errno
import logging
import os
import re
import shutil
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import absl.logging

from reference import command
from reference.run import hosts

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# As TensorStore has it, which writes the arrays.
_TENSORSTORE = re.compile(r"os_error_code='(\d+)'")


def _errno(error: BaseException | None) -> int | None:
  """The system's number of what a failure began with, if there is one."""
  while error is not None:
    if isinstance(error, OSError) and error.errno:
      return error.errno
    if found := _TENSORSTORE.search(str(error)):
      return int(found[1])
    error = error.__cause__ or error.__context__
  return None


def _advice(number: int, folder: Path) -> str:
  if number in _FULL:
    return f'Likely the disk is full, or your part of it: `df -h {folder}`.'
  if number == errno.EROFS:
    return f'It is mounted read-only: `findmnt --target {folder}` says where.'
  if number in (errno.EACCES, errno.EPERM):
    return (
      'Likely root mounted the storage and owns it: run on every host `sudo '
      'chown "$USER" /mnt/runs`.'
    )
  return 'Likely the path is mistyped, `--workdir=`, or the storage is away.'


def tell_once() -> None:
  """Keeps to itself what Orbax and TensorStore print of a failed write.

  That is a thousand lines. The error is raised too, here or where Orbax is
  asked next.
  """
  absl.logging.get_absl_logger().addFilter(
    lambda record: (
      record.levelno < logging.ERROR or '/orbax/' not in record.pathname
    )
  )
  # Orbax writes many arrays at once, and waits for none once one has failed.
  logging.getLogger('asyncio').addFilter(
    lambda record: 'exception was never retrieved' not in record.getMessage()
  )
  others = sys.unraisablehook

  def tell(unraisable: Any) -> None:
    # TensorStore, which answers all of them.
    if str(unraisable.exc_value) != 'Event loop is closed':
      others(unraisable)

  sys.unraisablehook = tell


@contextlib.contextmanager
def explained(folder: Path) -> Iterator[None]:
  """Says in one sentence that a folder could not be written to.

  Raises:
    Mistake: in place of what the system, or a library over it, raised.
  """
  try:
    yield
  except Exception as error:
    number = _errno(error)
    if number is None or isinstance(error, command.Mistake):
      raise
    raise command.Mistake(
      f'The run could not write to {folder}: {os.strerror(number)}. '
      f'{_advice(number, folder)} The checkpoints that are there are whole: '
      'mend it, and the same command resumes from the newest of them.'
    ) from error


def _make_as_orbax_does(folder: Path) -> str:
  """Makes a folder with a file in it, under another name that it then changes.

  Returns:
    What went wrong and how to mend it; empty where nothing did.
  """
  unfinished = folder.with_name(f'{folder.name}.unfinished')
  try:
    unfinished.mkdir(parents=True)
    # An empty file has a place on a full disk too.
    with (unfinished / 'file').open('wb') as file:
      file.write(bytes(2**11))
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    return (
      f'The work folder must be writable. Given {folder.parent}: '
      f'{error.strerror}. {_advice(error.errno or 0, folder.parent)}'
    )
  try:
    unfinished.rename(folder)
  except OSError as error:
    return (
      'The work folder must lie where folders that hold files can be renamed, '
      f'as that is how a checkpoint becomes whole. Given {folder.parent}: '
      f'{error}. Likely it is a mounted bucket whose namespace is flat: take '
      'NFS, or make another bucket, `gcloud storage buckets create gs://NAME '
      '--location=REGION --uniform-bucket-level-access '
      '--enable-hierarchical-namespace`.'
    )
  finally:
    shutil.rmtree(unfinished, ignore_errors=True)
  return ''


def check_shared(folder: Path) -> None:
  """Makes a folder, and refuses one that cannot hold checkpoints of all.

  Raises:
    Mistake: on every process, when the first cannot write there or rename
      what it wrote, or naming those that do not see it.
  """
  probe = folder / f'.seen_by_all_{hosts.gather(uuid.uuid4().hex)[0]}'
  failure = hosts.gather(
    _make_as_orbax_does(probe) if hosts.is_first() else ''
  )[0]
  if failure:
    raise command.Mistake(failure)
  # Path.exists raises where a folder on the way may not be read.
  seen = hosts.gather(os.path.exists(probe))
  if hosts.is_first():
    shutil.rmtree(probe)
  if not all(seen):
    blind = [index for index, sees in enumerate(seen) if not sees]
    raise command.Mistake(
      'The work folder must lie on storage that all hosts share, as each '
      f'writes its part of a checkpoint. {folder} of process 0 is not seen by '
      f'process(es) {blind}. Likely it is a local disk: mount a file share on '
      'every host, `sudo mount ADDRESS:/runs /mnt/runs`, and take '
      '`--workdir=/mnt/runs/1`.'
    )
