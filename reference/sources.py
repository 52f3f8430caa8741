"""Which images there are: the records that the input pipeline reads."""

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from sklearn import datasets, model_selection

from reference import jpeg

_EXTENSIONS = ('.jpg', '.jpeg')
_DIGITS_HELD_OUT = 360


class Source(NamedTuple):
  """Training and held-out records, and how one is read.

  Attributes:
    train: records of the training images, of any form.
    held_out: records of the images that training never sees.
    read: takes a record to `(image, label)`, uint8 (H, W, C) and int; raises
      `jpeg.BadImageError`. Called from several threads.
    num_classes: labels are 0 to num_classes - 1.
  """

  train: Sequence[Any]
  held_out: Sequence[Any]
  read: Callable[[Any], tuple[np.ndarray, int]]
  num_classes: int


def digits() -> Source:
  """Scikit-learn's digits: 1,437 and 360 images of 8 x 8 x 1, ten classes."""
  data = datasets.load_digits()
  # Sixteen levels, stretched to the range that every other source has.
  images = np.rint(data.images[..., None] * (255 / 16)).astype(np.uint8)
  train, held_out, train_labels, held_out_labels = (
    model_selection.train_test_split(
      images,
      data.target.tolist(),
      test_size=_DIGITS_HELD_OUT,
      stratify=data.target,
      random_state=0,
    )
  )
  return Source(
    train=list(zip(train, train_labels, strict=True)),
    held_out=list(zip(held_out, held_out_labels, strict=True)),
    read=lambda record: record,
    num_classes=10,
  )


def _folders(folder: str) -> list[str]:
  with os.scandir(folder) as entries:
    return sorted(entry.name for entry in entries if entry.is_dir())


def _split_records(folder: str, classes: list[str]) -> list[tuple[str, int]]:
  records = []
  for label, name in enumerate(classes):
    class_folder = os.path.join(folder, name)
    files = sorted(
      file
      for file in os.listdir(class_folder)
      if file.lower().endswith(_EXTENSIONS)
    )
    if not files:
      raise ValueError(
        'Every class folder must hold at least one .jpg or .jpeg file. Given '
        f'{class_folder}, which holds none. Likely the unpacking broke off, or '
        f'the folder is no class: `rm -r {class_folder}`.'
      )
    records += [(os.path.join(class_folder, file), label) for file in files]
  return records


def _read_file(record: tuple[str, int]) -> tuple[np.ndarray, int]:
  path, label = record
  with open(path, 'rb') as file:
    return jpeg.decode(file.read(), path), label


def jpeg_folder(folder: str) -> Source:
  """JPEGs as `train/CLASS/*.jpg` and `val/CLASS/*.jpg` (or `test/`).

  A class's label is its place among the sorted folder names. Records are
  `(path, label)`.

  Raises:
    ValueError: when the folders are not of that form, the two splits name
      different classes, or a class holds no image.
  """
  train = os.path.join(folder, 'train')
  held_outs = [os.path.join(folder, name) for name in ('val', 'test')]
  found = [path for path in held_outs if os.path.isdir(path)]
  if not os.path.isdir(train) or not found:
    raise ValueError(
      'A folder of JPEGs must hold train/CLASS/*.jpg, and val/ or test/ of the '
      f'same form. Given {folder!r}, in which '
      f'{"no val/ or test/" if os.path.isdir(train) else "no train/"} is. '
      'Likely the path is one level off: '
      '`--config.data.folder=/path/to/the/folder/that/holds/train`.'
    )
  classes, held_out_classes = _folders(train), _folders(found[0])
  if not classes:
    raise ValueError(
      'Images must lie in a folder for each class, train/CLASS/*.jpg. Given '
      f'{train}, which holds no folder. Move the images of each class: `mkdir '
      f'{train}/cat && mv {train}/cat*.jpg {train}/cat/`.'
    )
  if classes != held_out_classes:
    raise ValueError(
      'Training and held-out images must have the same class folders. In '
      f'{found[0]} are missing: '
      f'{sorted(set(classes) - set(held_out_classes))}; not in {train}: '
      f'{sorted(set(held_out_classes) - set(classes))}. Likely the unpacking '
      'of one broke off or a folder is misspelt: '
      f'`diff <(ls {train}) <(ls {found[0]})`.'
    )
  return Source(
    train=_split_records(train, classes),
    held_out=_split_records(found[0], classes),
    read=_read_file,
    num_classes=len(classes),
  )


def open_source(config: ml_collections.ConfigDict) -> Source:
  """The source that `config.source` names.

  Args:
    config: the `data` part of a config.
  """
  if config.source == 'digits':
    return digits()
  return jpeg_folder(config.folder)
