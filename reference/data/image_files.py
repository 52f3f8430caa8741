"""Images as parts of files, which are opened one by one."""

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from reference.data import jpeg, layouts


class ImageFile(NamedTuple):
  """An image: a file, or the part of a tar file that holds one.

  Attributes:
    name: tells it from others; never opened.
    path: of the file that its bytes are in.
    offset: of its first byte there.
    size: in bytes.
    label: of its class.
  """

  name: str
  path: str
  offset: int
  size: int
  label: int


class Listing(NamedTuple):
  """All images of a data set.

  Attributes:
    classes: a label is a place in this list.
    train: the training images.
    held_out: the images that training never sees.
    left_out: names of what is not read, by what it is.
    label_file: as that of a `Layout`.
    names: likewise.
  """

  classes: list[str]
  train: list[ImageFile]
  held_out: list[ImageFile]
  left_out: layouts.LeftOut
  label_file: Path | None = None
  names: Sequence[str] = ()


def digest(listing: Listing) -> str:
  """A fingerprint of the names, sizes and labels in their order."""
  total = hashlib.sha256()
  for image in (*listing.train, *listing.held_out):
    line = f'{image.name}\0{image.size}\0{image.label}\n'
    total.update(line.encode('utf-8', 'surrogateescape'))
  return total.hexdigest()


def read(image: ImageFile) -> bytes:
  """The bytes of an image.

  Raises:
    BadImageError: when they are not there.
  """
  try:
    with open(image.path, 'rb') as file:
      file.seek(image.offset)
      data = file.read(image.size)
  except OSError as error:
    raise jpeg.BadImageError.of_file(image.name, error) from error
  if len(data) < image.size:
    raise jpeg.BadImageError(
      image.name, f'it had {image.size} bytes and has {len(data)}'
    )
  return data


def _describe(records: layouts.Records, folder: Path) -> list[ImageFile]:
  """Images of files. One that cannot be opened has no bytes."""
  found = []
  for path, label in records:
    size = 0
    with contextlib.suppress(OSError):
      size = os.path.getsize(path)
    name = os.path.relpath(path, folder)
    found.append(ImageFile(name, path, 0, size, label))
  return found


def list_folder(folder: Path, held_out_labels: Path | None = None) -> Listing:
  """The images of a folder in a form that `layouts` knows."""
  found = layouts.find(str(folder), held_out_labels)
  return Listing(
    found.classes,
    _describe(found.train, folder),
    _describe(found.held_out, folder),
    found.left_out,
    found.label_file,
    found.names,
  )
