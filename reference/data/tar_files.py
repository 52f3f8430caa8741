"""The images of ImageNet's two tar files, which stay packed."""

import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from reference.command import Mistake
from reference.data import class_names, labels, layouts
from reference.data.image_files import ImageFile, Listing

TRAIN_TAR = 'ILSVRC2012_img_train.tar'
HELD_OUT_TAR = 'ILSVRC2012_img_val.tar'


def members(
  path: Path, start: int, size: int
) -> Iterator[tuple[str, int, int]]:
  """Name, offset and size of each file in a tar file, or in one inside it.

  Args:
    path: of the file that holds it.
    start: its first byte there.
    size: in bytes.

  Raises:
    Mistake: when it is damaged, or a member is no plain file of its folder.
  """
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
  for member in members(path, start, size):
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
  for name, start, size in members(path, 0, path.stat().st_size):
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


def list_images(folder: Path, held_out_labels: Path | None) -> Listing:
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
  files = _images(path, 0, path.stat().st_size, left_out)
  found = labels.of_images(
    label_file, [PurePosixPath(name).name for name, _, _ in files], classes
  )
  left_out[f'lines of {label_file} without an image'] = found.unused
  held_out = [
    ImageFile(f'held_out/{name}', str(path), start, size, label)
    for (name, start, size), label in zip(files, found.labels, strict=True)
  ]
  names = class_names.find([folder], classes)
  return Listing(classes, train, held_out, left_out, label_file, names)
