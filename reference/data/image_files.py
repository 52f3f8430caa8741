"""Finds the images of a data set, in folders or in ImageNet's two tar files."""

import contextlib
import hashlib
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from reference.command import Mistake
from reference.data import jpeg, labels, layouts

TRAIN_TAR = 'ILSVRC2012_img_train.tar'
HELD_OUT_TAR = 'ILSVRC2012_img_val.tar'


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
  """

  classes: list[str]
  train: list[ImageFile]
  held_out: list[ImageFile]
  left_out: layouts.LeftOut


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
  )


def _members(
  path: Path, start: int, size: int
) -> Iterator[tuple[str, int, int]]:
  """Name, offset and size of each file in a tar file, or in one inside it."""
  try:
    with path.open('rb') as file:
      file.seek(start)
      with tarfile.open(fileobj=file, mode='r:') as archive:
        for member in archive:
          if member.isdir():
            continue
          name = PurePosixPath(member.name)
          if not member.isfile() or name.is_absolute() or '..' in name.parts:
            raise Mistake(
              'A tar file of images must hold plain files, and none outside of '
              f'its folder. {path} holds {member.name!r}, which is no such '
              'file. Likely it is not the official one: compare its checksum '
              f'with the published one, `md5sum {path}`.'
            )
          yield member.name, member.offset_data, member.size
        # Python's reader takes what it cannot read for the end.
        file.seek(archive.offset)
        mark = file.read(tarfile.BLOCKSIZE)
        is_inside = archive.offset + tarfile.BLOCKSIZE <= start + size
        if not is_inside or mark != bytes(tarfile.BLOCKSIZE):
          raise tarfile.ReadError(f'no member nor end at {archive.offset}')
  except tarfile.TarError as error:
    raise Mistake(
      f'A tar file must be whole and not compressed. {path} is not: {error}. '
      f'Likely the download broke off: `md5sum {path}`.'
    ) from error


def _images(
  path: Path, start: int, size: int, left_out: layouts.LeftOut
) -> list[tuple[str, int, int]]:
  """The images in a tar file, or in one inside it, sorted by name."""
  found = []
  for member in _members(path, start, size):
    name = PurePosixPath(member[0])
    if any(map(layouts.is_hidden, name.parts)):
      left_out.setdefault('hidden or of the system', []).append(member[0])
    elif name.suffix.lower() in layouts.EXTENSIONS:
      found.append(member)
    else:
      left_out.setdefault('of another kind', []).append(member[0])
  return sorted(found)


def _list_train(
  path: Path, left_out: layouts.LeftOut
) -> tuple[list[str], list[ImageFile]]:
  """Classes and images of a tar file that holds a tar file for each class."""
  inner = {}
  for name, start, size in _members(path, 0, path.stat().st_size):
    member = PurePosixPath(name)
    if layouts.is_hidden(member.name) or member.suffix != '.tar':
      left_out.setdefault('beside the classes', []).append(name)
    else:
      inner[member.stem] = start, size
  classes, images = sorted(inner), []
  for label, class_name in enumerate(classes):
    found = [
      ImageFile(f'train/{class_name}/{name}', str(path), start, size, label)
      for name, start, size in _images(path, *inner[class_name], left_out)
    ]
    if not found:
      raise Mistake(
        f'Every class must have an image. {class_name}.tar in {path} holds no '
        f'{", ".join(layouts.EXTENSIONS)} file. Likely the download broke off: '
        f'`md5sum {path}`.'
      )
    images += found
  if not classes:
    raise Mistake(
      f'The training tar file must hold a tar file for each class. {path} '
      'holds none. Likely it is another file of that name: '
      f'`tar -tf {path} | head`.'
    )
  return classes, images


def list_tars(folder: Path, held_out_labels: Path | None) -> Listing:
  """The images of ImageNet's two tar files, which stay packed.

  Args:
    folder: holds both under their official names.
    held_out_labels: in a form that `labels` knows; None takes the development
      kit or Kaggle's file, where it lies beside them.

  Raises:
    Mistake: for a tar file that is damaged or not of this form, or labels that
      do not match.
  """
  label_file = held_out_labels or labels.find([folder])
  if label_file is None:
    raise Mistake(
      'The held-out tar file has no classes, so their file must be given. '
      'Given `--held_out_labels` none. Put ILSVRC2012_devkit_t12.tar.gz beside '
      'it, or add `--held_out_labels=/path/to/labels.txt`, a line such as '
      'n01440764 for each image, the images sorted by name.'
    )
  left_out: layouts.LeftOut = {}
  classes, train = _list_train(folder / TRAIN_TAR, left_out)
  path = folder / HELD_OUT_TAR
  members = _images(path, 0, path.stat().st_size, left_out)
  found = labels.of_images(
    label_file, [PurePosixPath(name).name for name, _, _ in members], classes
  )
  left_out[f'lines of {label_file} without an image'] = found.unused
  held_out = [
    ImageFile(f'held_out/{name}', str(path), start, size, label)
    for (name, start, size), label in zip(members, found.labels, strict=True)
  ]
  return Listing(classes, train, held_out, left_out)


def list_images(source: Path, held_out_labels: Path | None) -> Listing:
  """The images of ImageNet's tar files if `source` holds them, or a folder's.

  Raises:
    Mistake: when they are not of the form that either must have.
  """
  if (source / TRAIN_TAR).exists() and (source / HELD_OUT_TAR).exists():
    return list_tars(source, held_out_labels)
  return list_folder(source, held_out_labels)
