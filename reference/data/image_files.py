"""Finds the JPEGs of a data set, in folders or in ImageNet's two tar files."""

import hashlib
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from reference.data import sources

TRAIN_TAR = 'ILSVRC2012_img_train.tar'
HELD_OUT_TAR = 'ILSVRC2012_img_val.tar'


class ImageFile(NamedTuple):
  """A JPEG: a file, or the part of a tar file that holds one.

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
  """

  classes: list[str]
  train: list[ImageFile]
  held_out: list[ImageFile]


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
    ValueError: when they are no longer there.
  """
  try:
    with open(image.path, 'rb') as file:
      file.seek(image.offset)
      data = file.read(image.size)
  except OSError as error:
    raise ValueError(
      f'Images must stay where they are until all are prepared. {image.path} '
      f'can no longer be read: {error}. Likely it was moved or is not yours to '
      f'read: `ls -l {image.path}`.'
    ) from error
  if len(data) < image.size:
    raise ValueError(
      f'Images must not change until all are prepared. {image.name} had '
      f'{image.size} bytes and has {len(data)}. Likely it is still being '
      'copied: wait, and run the same command again.'
    )
  return data


def list_folder(folder: Path) -> Listing:
  """The images of a folder that `sources.jpeg_folder` accepts."""
  source = sources.jpeg_folder(str(folder))

  def describe(records: Sequence[tuple[str, int]]) -> list[ImageFile]:
    return [
      ImageFile(
        os.path.relpath(path, folder), path, 0, os.path.getsize(path), label
      )
      for path, label in records
    ]

  classes = {
    label: os.path.basename(os.path.dirname(path))
    for path, label in source.train
  }
  return Listing(
    [classes[label] for label in range(source.num_classes)],
    describe(source.train),
    describe(source.held_out),
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
            raise ValueError(
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
    raise ValueError(
      f'A tar file must be whole and not compressed. {path} is not: {error}. '
      f'Likely the download broke off: `md5sum {path}`.'
    ) from error


def _jpegs(path: Path, start: int, size: int) -> Iterator[tuple[str, int, int]]:
  members = _members(path, start, size)
  return (x for x in members if x[0].lower().endswith(sources.EXTENSIONS))


def _list_train(path: Path) -> tuple[list[str], list[ImageFile]]:
  """Classes and images of a tar file that holds a tar file for each class."""
  inner = {
    PurePosixPath(name).stem: (start, size)
    for name, start, size in _members(path, 0, path.stat().st_size)
    if name.endswith('.tar')
  }
  classes, images = sorted(inner), []
  for label, class_name in enumerate(classes):
    found = [
      ImageFile(f'train/{class_name}/{name}', str(path), start, size, label)
      for name, start, size in sorted(_jpegs(path, *inner[class_name]))
    ]
    if not found:
      raise ValueError(
        f'Every class must have an image. {class_name}.tar in {path} holds no '
        f'.jpg or .jpeg file. Likely the download broke off: `md5sum {path}`.'
      )
    images += found
  if not classes:
    raise ValueError(
      f'The training tar file must hold a tar file for each class. {path} '
      'holds none. Likely it is another file of that name: '
      f'`tar -tf {path} | head`.'
    )
  return classes, images


def list_tars(folder: Path, held_out_labels: Path | None) -> Listing:
  """The images of ImageNet's two tar files, which stay packed.

  Args:
    folder: holds both under their official names.
    held_out_labels: a text file with the class of each held-out image, such as
      n01440764, a line each, the images sorted by name.

  Raises:
    ValueError: for a tar file that is damaged or not of this form, or labels
      that do not match.
  """
  if held_out_labels is None:
    raise ValueError(
      'The held-out tar file has no classes, so their file must be given. '
      'Given `--held_out_labels` none. Add '
      '`--held_out_labels=/path/to/labels.txt`, a line such as n01440764 for '
      'each image, the images sorted by name.'
    )
  classes, train = _list_train(folder / TRAIN_TAR)
  labels = held_out_labels.read_text().split()
  path = folder / HELD_OUT_TAR
  members = sorted(_jpegs(path, 0, path.stat().st_size))
  if len(labels) != len(members) or set(labels) != set(classes):
    strange = sorted(set(labels) - set(classes))[:3]
    absent = sorted(set(classes) - set(labels))[:3]
    raise ValueError(
      'Every held-out image must have a line with its class, and every class '
      f'an image. {held_out_labels} has {len(labels)} lines for '
      f'{len(members)} images in {path}; not in training: {strange}; without '
      f'an image: {absent}. Likely these are the numbers of the development '
      'kit, which count the classes in another order: write the names, such as '
      'n01440764.'
    )
  numbers = {name: label for label, name in enumerate(classes)}
  held_out = [
    ImageFile(f'held_out/{name}', str(path), start, size, numbers[label])
    for (name, start, size), label in zip(members, labels, strict=True)
  ]
  return Listing(classes, train, held_out)


def list_images(source: Path, held_out_labels: Path | None) -> Listing:
  """The images of ImageNet's tar files if `source` holds them, or a folder's.

  Raises:
    ValueError: when they are not of the form that either must have.
  """
  if (source / TRAIN_TAR).exists() and (source / HELD_OUT_TAR).exists():
    return list_tars(source, held_out_labels)
  return list_folder(source)
