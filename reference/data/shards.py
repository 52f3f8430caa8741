"""The prepared form of a data set: ArrayRecord shards and a manifest.

A file under its final name is whole: it is written under another one and
renamed once it is on the disk. The manifest is there before the first shard, so
that what is missing can be told.
"""

import contextlib
import json
import os
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from array_record.python import array_record_module

from reference.command import Mistake

SPLITS = ('train', 'held_out')
_MANIFEST = 'manifest.json'
# One image a group, for random access; JPEGs cannot be compressed further.
_OPTIONS = 'group_size:1,uncompressed'
_LABEL = struct.Struct('<i')


class Manifest(NamedTuple):
  """What a folder of shards holds once it is complete.

  Attributes:
    digest: of the names, sizes and labels of the images it is made from.
    classes: a label is a place in this list.
    counts: the number of images in each shard, by split.
    skipped: the unreadable images that are left out, with the reason.
    fingerprint: of the images that are not, as `sources.fingerprint` makes it.
    encoding: how they were made smaller, '' where they are as they were.
    names: of the classes, by label, where a file said them; else empty.
  """

  digest: str
  classes: list[str]
  counts: dict[str, list[int]]
  skipped: dict[str, str]
  fingerprint: str = ''
  encoding: str = ''
  names: Sequence[str] = ()


def pack(data: bytes, label: int) -> bytes:
  """The record of a JPEG and its label."""
  return _LABEL.pack(label) + data


def unpack(record: bytes) -> tuple[bytes, int]:
  """The JPEG and the label of a record."""
  [label] = _LABEL.unpack_from(record)
  return record[_LABEL.size :], label


def paths(folder: Path, manifest: Manifest, split: str) -> list[Path]:
  """Where the shards of a split are, or will be."""
  number = len(manifest.counts[split])
  return [
    folder / f'{split}-{index:05d}-of-{number:05d}.array_record'
    for index in range(number)
  ]


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
  """Another name to write a file under, which then takes its place.

  Raises:
    OSError: when writing fails; nothing is left under either name.
  """
  unfinished = path.with_suffix('.unfinished')
  try:
    # A link that lies here would lead the writer out of the folder.
    unfinished.unlink(missing_ok=True)
    yield unfinished
    with unfinished.open('rb') as file:
      os.fsync(file.fileno())
    os.replace(unfinished, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
      os.fsync(folder)
    finally:
      os.close(folder)
  # ArrayRecord's errors are RuntimeErrors with the system's words.
  except (OSError, RuntimeError) as error:
    raise OSError(
      f'A file must fit on the disk and be allowed there. {path} could not be '
      f'written: {error}. What was finished before stays. Likely the disk is '
      f'full, `df -h {path.parent}`: free some space and run the same command '
      'again.'
    ) from error
  finally:
    with contextlib.suppress(OSError):
      unfinished.unlink(missing_ok=True)


def write_manifest(folder: Path, manifest: Manifest) -> None:
  """Writes the manifest, whole or not at all."""
  with _replacing(folder / _MANIFEST) as path:
    path.write_text(json.dumps(manifest._asdict(), indent=1))


def read_manifest(folder: Path) -> Manifest | None:
  """The manifest of a folder, None where there is none.

  Raises:
    Mistake: for a damaged one.
  """
  path = folder / _MANIFEST
  try:
    return Manifest(**json.loads(path.read_text()))
  except FileNotFoundError:
    return None
  except (TypeError, ValueError) as error:
    raise Mistake(
      f'A manifest must be as prepare_data wrote it. {path} is not: {error}. '
      'Likely a copy broke off: copy the folder again, or prepare another, '
      f'`--target={folder}_2`.'
    ) from error


def write_shard(path: Path, records: Iterable[bytes]) -> None:
  """Writes a shard, whole or not at all.

  Raises:
    OSError: when writing fails, on a full disk for example.
  """
  with _replacing(path) as unfinished:
    writer = array_record_module.ArrayRecordWriter(str(unfinished), _OPTIONS)
    try:
      for record in records:
        writer.write(record)
    except BaseException:
      # The cause is worth more than that the rest could not be written either.
      with contextlib.suppress(RuntimeError):
        writer.close()
      raise
    writer.close()


def count_records(path: Path) -> int:
  """The number of records in a shard, 0 where it is damaged."""
  reader = array_record_module.ArrayRecordReader(str(path))
  count = reader.num_records()
  # It raises where the shard is damaged, which the count has told.
  with contextlib.suppress(RuntimeError):
    reader.close()
  return count
