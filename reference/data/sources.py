"""Which images there are: the records that the input pipeline reads."""

import bisect
import contextlib
import functools
import gzip
import hashlib
import itertools
import math
import os
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import ml_collections
import numpy as np
from sklearn import datasets, model_selection

from reference.data import jpeg, shards

EXTENSIONS = ('.jpg', '.jpeg')
_DIGITS_HELD_OUT = 360
# The file names of MNIST and of what takes its place.
_IDX_SPLITS = ('train', 't10k')
_IDX_IMAGES, _IDX_LABELS = 'images-idx3-ubyte.gz', 'labels-idx1-ubyte.gz'


class Source(NamedTuple):
  """Training and held-out records, and how one is read.

  Attributes:
    train: records of the training images, of any form.
    held_out: records of the images that training never sees.
    read: takes a record to `(image, label)`, uint8 (H, W, C) and int; raises
      `jpeg.BadImageError`. Called from several threads.
    classes: a label is a place among these names.
    fingerprint: the same for the same images wherever they lie, and another one
      where a class or an image is another; see `fingerprint`.
  """

  train: Sequence[Any]
  held_out: Sequence[Any]
  read: Callable[[Any], tuple[np.ndarray, int]]
  classes: tuple[str, ...]
  fingerprint: str = ''

  @property
  def num_classes(self) -> int:
    """Labels are 0 to this, less one."""
    return len(self.classes)


def fingerprint(
  classes: Sequence[str],
  train: Iterable[tuple[str, int]],
  held_out: Iterable[tuple[str, int]],
) -> str:
  """Tells a set of images from others, by names alone.

  Args:
    classes: their names, by label.
    train: file name, without its folders, and label of each training image.
    held_out: the same of each held-out image.

  Returns:
    A SHA-256, in which the order of the images does not count.
  """
  total = hashlib.sha256()
  for part in (
    classes,
    *(
      sorted(f'{label}/{name}' for name, label in x) for x in (train, held_out)
    ),
  ):
    lines = ''.join(f'{line}\n' for line in (*part, ''))
    total.update(lines.encode('utf-8', 'surrogateescape'))
  return total.hexdigest()


def _in_memory(
  train: list[tuple[np.ndarray, int]], held_out: list[tuple[np.ndarray, int]]
) -> Source:
  """Images that have a place in place of a name, and a number for a class."""
  classes = tuple(map(str, range(1 + max(label for _, label in train))))
  named = [
    [(str(place), label) for place, (_, label) in enumerate(split)]
    for split in (train, held_out)
  ]
  return Source(
    train,
    held_out,
    lambda record: record,
    classes,
    fingerprint(classes, *named),
  )


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
  return _in_memory(
    list(zip(train, train_labels, strict=True)),
    list(zip(held_out, held_out_labels, strict=True)),
  )


def _read_idx(path: Path, axes: int) -> np.ndarray:
  data = b''
  with contextlib.suppress(EOFError, OSError, zlib.error), gzip.open(path) as f:
    data = f.read()
  # Two zeros, 8 for uint8, the number of axes, and each axis's length.
  header = 4 * (1 + axes)
  if len(data) >= header:
    magic, *shape = np.frombuffer(data[:header], '>i4').tolist()
    if magic == 0x0800 + axes and len(data) - header == math.prod(shape):
      return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
  raise ValueError(
    f'A gzipped idx file of uint8 with {axes} axes must hold what its header '
    f'says. Given {path}, which does not. Likely its copy broke off: `rm '
    f'{path}`, and copy it again.'
  )


def idx_folder(folder: str) -> Source:
  """Grey images in the four gzipped idx files of MNIST and Fashion-MNIST.

  Raises:
    ValueError: when a file is not there or is damaged.
  """
  names = [
    f'{split}-{kind}'
    for split in _IDX_SPLITS
    for kind in (_IDX_IMAGES, _IDX_LABELS)
  ]
  missing = [name for name in names if not (Path(folder) / name).exists()]
  if missing:
    raise ValueError(
      f'A folder of idx files must hold {", ".join(names)}. Given {folder!r}, '
      f'in which {", ".join(missing)} is missing. For Fashion-MNIST on Debian: '
      '`apt-get install dataset-fashion-mnist`; elsewhere '
      'https://github.com/zalandoresearch/fashion-mnist has the files, and '
      '`--config.data.folder=` says where they are.'
    )

  def records(split: str) -> list[tuple[np.ndarray, int]]:
    images = _read_idx(Path(folder) / f'{split}-{_IDX_IMAGES}', 3)
    labels = _read_idx(Path(folder) / f'{split}-{_IDX_LABELS}', 1)
    return list(zip(images[..., None], labels.tolist(), strict=True))

  return _in_memory(*map(records, _IDX_SPLITS))


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
      if file.lower().endswith(EXTENSIONS)
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
  with open(path, 'rb', buffering=0) as file:
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
      '`--config.data.folder=/path/to/the/folder/that/holds/train`, or '
      '`--source=` of prepare_data.'
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
  records = [_split_records(split, classes) for split in (train, found[0])]
  named = [
    [(os.path.basename(path), label) for path, label in split]
    for split in records
  ]
  return Source(
    *records, _read_file, tuple(classes), fingerprint(classes, *named)
  )


def _read_record(
  index: int,
  *,
  records: grain.sources.ArrayRecordDataSource,
  paths: Sequence[Path],
  starts: Sequence[int],
) -> tuple[np.ndarray, int]:
  data, label = shards.unpack(records[index])
  shard = bisect.bisect(starts, index) - 1
  # Damage is named by where it is, as shards hold no file names.
  return jpeg.decode(data, f'{paths[shard]}[{index - starts[shard]}]'), label


def array_record(folder: str) -> Source:
  """The shards that `reference.prepare_data` wrote.

  Records are numbers, those of the held-out images after the training ones.

  Raises:
    ValueError: when the shards are not complete or one is damaged.
  """
  manifest = shards.read_manifest(Path(folder))
  if manifest is None:
    raise ValueError(
      'A folder of shards must hold the manifest that prepare_data writes. '
      f'Given {folder!r}, which holds none. Likely the path is that of the '
      f'images: `python -m reference.prepare_data --source={folder} '
      '--target=/path/to/shards`.'
    )
  paths, counts = [], []
  for split in shards.SPLITS:
    paths += shards.paths(Path(folder), manifest, split)
    counts += manifest.counts[split]
  for path, count in zip(paths, counts, strict=True):
    found = shards.count_records(path) if path.exists() else None
    if found != count:
      state = 'is not there' if found is None else f'holds {found} of {count}'
      raise ValueError(
        f'All shards must be there with all their images. {path} {state}. '
        'Likely their preparation was stopped or the copy broke off: `rm -f '
        f'{path}`, and run prepare_data with `--target={folder}` again.'
      )
  starts = list(itertools.accumulate(counts, initial=0))
  trained = sum(manifest.counts['train'])
  return Source(
    train=range(trained),
    held_out=range(trained, starts[-1]),
    read=functools.partial(
      _read_record,
      records=grain.sources.ArrayRecordDataSource(paths),
      paths=paths,
      starts=starts[:-1],
    ),
    classes=tuple(manifest.classes),
    # Shards of before it was kept have the other one.
    fingerprint=manifest.fingerprint or manifest.digest,
  )


def open_source(config: ml_collections.ConfigDict) -> Source:
  """The source that `config.source` names.

  Args:
    config: the `data` part of a config.
  """
  if config.source == 'digits':
    return digits()
  if config.source == 'idx_folder':
    return idx_folder(config.folder)
  if config.source == 'array_record':
    return array_record(config.folder)
  return jpeg_folder(config.folder)
