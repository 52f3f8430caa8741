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
from absl import logging
from sklearn import datasets, model_selection

from reference.command import Mistake
from reference.data import jpeg, layouts, named, shards

_DIGITS_HELD_OUT = 360
# The file names of MNIST and of what takes its place.
_IDX_SPLITS = ('train', 't10k')
_IDX_IMAGES, _IDX_LABELS = 'images-idx3-ubyte.gz', 'labels-idx1-ubyte.gz'


def read_pair(record: tuple[Any, int]) -> tuple[np.ndarray, int]:
  """Reads a record that is an array, or an encoded image, and its label."""
  image, label = record
  if isinstance(image, bytes):
    image = jpeg.decode(image, f'image with CRC {zlib.crc32(image):08x}')
  return image, label


class Source(NamedTuple):
  """Training and held-out records, and how one is read.

  Attributes:
    train: records of the training images, of any form.
    held_out: records of the images that training never sees.
    classes: a label is a place among these names.
    read: takes a record to `(image, label)`, uint8 (H, W, C) and int; raises
      `jpeg.BadImageError`. Called from several threads and processes. That of
      records that are such pairs need not be given.
    fingerprint: the same for the same images wherever they lie, and another one
      where a class or an image is another; see `fingerprint`.
    names: of the classes, by label, where those are keys such as n01440764;
      else empty.
  """

  train: Sequence[Any]
  held_out: Sequence[Any]
  classes: tuple[str, ...]
  read: Callable[[Any], tuple[np.ndarray, int]] = read_pair
  fingerprint: str = ''
  names: Sequence[str] = ()

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
  names = [
    [(str(place), label) for place, (_, label) in enumerate(split)]
    for split in (train, held_out)
  ]
  return Source(
    train, held_out, classes, fingerprint=fingerprint(classes, *names)
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
  raise Mistake(
    f'A gzipped idx file of uint8 with {axes} axes must hold what its header '
    f'says. Given {path}, which does not. Likely its copy broke off: copy it '
    'again.'
  )


def idx_folder(folder: str) -> Source:
  """Grey images in the four gzipped idx files of MNIST and Fashion-MNIST.

  Raises:
    Mistake: when a file is not there or is damaged.
  """
  names = [
    f'{split}-{kind}'
    for split in _IDX_SPLITS
    for kind in (_IDX_IMAGES, _IDX_LABELS)
  ]
  missing = [name for name in names if not (Path(folder) / name).exists()]
  if missing:
    raise Mistake(
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


def _read_file(record: tuple[str, int]) -> tuple[np.ndarray, int]:
  path, label = record
  return jpeg.decode(jpeg.read_file(path), path), label


def _of_files(found: layouts.Layout) -> Source:
  """Records are `(path, label)`. What is not read is logged."""
  for note in layouts.notes(found.left_out):
    logging.warning('%s', note)
  names = [
    [(os.path.basename(path), label) for path, label in split]
    for split in (found.train, found.held_out)
  ]
  return Source(
    found.train,
    found.held_out,
    tuple(found.classes),
    _read_file,
    fingerprint(found.classes, *names),
    found.names,
  )


def jpeg_folder(folder: str) -> Source:
  """A folder of images in a form that `layouts` knows.

  Raises:
    Mistake: when the folder is of no such form.
  """
  return _of_files(layouts.find(folder))


def class_folders(folder: str) -> Source:
  """Held-out images alone, as CLASS/*.jpg.

  Raises:
    Mistake: when the folder is of no such form.
  """
  return _of_files(layouts.find_classes(folder))


def _read_record(
  index: int,
  *,
  records: grain.sources.ArrayRecordDataSource,
  paths: Sequence[Path],
  starts: Sequence[int],
) -> tuple[np.ndarray, int]:
  shard = bisect.bisect(starts, index) - 1
  # Damage is named by where it is, as shards hold no file names.
  name = f'{paths[shard]}[{index - starts[shard]}]'
  try:
    data, label = shards.unpack(records[index])
  except RuntimeError as error:
    # ArrayRecord's word for a checksum that is wrong.
    raise jpeg.BadImageError(name, f'a damaged record: {error}') from error
  return jpeg.decode(data, name), label


def array_record(folder: str) -> Source:
  """The shards that `reference.prepare_data` wrote.

  Records are numbers, those of the held-out images after the training ones.

  Raises:
    Mistake: when the shards are not complete or one is damaged.
  """
  manifest = shards.read_manifest(Path(folder))
  if manifest is None:
    state = (
      'holds none. Likely the path is that of the images: `python -m '
      f'reference.prepare_data --source={folder} --target=/path/to/shards`.'
      if os.path.isdir(folder)
      else 'is no folder. Likely it is misspelt or its disk is not mounted: '
      f'`ls -d {folder}`.'
    )
    raise Mistake(
      'A folder of shards must hold the manifest that prepare_data writes. '
      f'Given {folder!r}, which {state}'
    )
  paths, counts = [], []
  for split in shards.SPLITS:
    paths += shards.paths(Path(folder), manifest, split)
    counts += manifest.counts[split]
  for path, count in zip(paths, counts, strict=True):
    found = shards.count_records(path) if path.exists() else None
    if found != count:
      state = 'is not there' if found is None else f'holds {found} of {count}'
      raise Mistake(
        f'All shards must be there with all their images. {path} {state}. '
        'Likely their preparation was stopped or the copy broke off: run '
        f'prepare_data with `--target={folder}` again, which writes what is '
        'not whole, or copy it again.'
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
    names=manifest.names,
  )


def _read_checked(
  record: Any,
  *,
  read: Callable[[Any], tuple[np.ndarray, int]],
  name: str,
  channels: int,
  classes: int,
) -> tuple[np.ndarray, int]:
  """Reads a record of the user's own.

  Raises:
    Mistake: when its image or its label is of another form.
  """
  image, label = read(record)
  dtype, shape = getattr(image, 'dtype', type(image).__name__), np.shape(image)
  if dtype != np.uint8 or len(shape) != 3:
    raise Mistake(
      'A source reads images as uint8 arrays of height, width and channels. '
      f'Given {name!r}, with one of {dtype} and shape {shape}. Likely '
      '`np.uint8(np.rint(255 * image))`, or `image[..., None]` if grey.'
    )
  if shape[2] != channels:
    raise Mistake(
      '`data.mean` and `data.std` have a value for each channel of the images. '
      f'Given {channels}, and {name!r} with an image of {shape[2]}. Likely '
      f'`--config.data.mean="{(0.5,) * shape[2]}" '
      f'--config.data.std="{(0.25,) * shape[2]}"`.'
    )
  if not 0 <= label < classes:
    raise Mistake(
      f'Labels are places among the {classes} classes, from 0. Given {name!r}, '
      f'with a label {label}. Likely they are counted from 1: `label - 1`.'
    )
  return image, label


def _own(config: ml_collections.ConfigDict) -> Source:
  """The source that a function of the user's own returns.

  Raises:
    Mistake: when it is none, is empty, or its first record that can be read is
      of another form; later for every other record, when it is read.
  """
  source = named.load(config.source, 'data.source')(config)
  if not isinstance(source, Source):
    raise Mistake(
      'A function that `data.source` names returns a `Source`. Given '
      f'{config.source!r}, which returns a {type(source).__name__}. Write '
      '`return sources.Source(train, held_out, classes)`, each a sequence.'
    )
  if not (len(source.train) and len(source.held_out) and len(source.classes)):
    raise Mistake(
      'A source has training images, held-out images and classes. Given '
      f'{config.source!r}, with {len(source.train)}, {len(source.held_out)} '
      f'and {len(source.classes)}. Likely its folder is empty or misspelt.'
    )
  read = functools.partial(
    _read_checked,
    read=source.read,
    name=config.source,
    channels=len(config.mean),
    classes=len(source.classes),
  )
  skipped = (jpeg.BadImageError,) if config.on_bad_image == 'skip' else ()
  for record in source.train:
    with contextlib.suppress(*skipped):
      read(record)
      break
  counts = [f'{len(source.train)} and {len(source.held_out)} images']
  return source._replace(
    read=read,
    classes=tuple(map(str, source.classes)),
    fingerprint=source.fingerprint
    or fingerprint([*map(str, source.classes), *counts], [], []),
  )


_KINDS = {
  'idx_folder': idx_folder,
  'jpeg_folder': jpeg_folder,
  'array_record': array_record,
}


def open_source(config: ml_collections.ConfigDict) -> Source:
  """The source that `config.source` names.

  Args:
    config: the `data` part of a config. A source that is named as
      `package.module:function` is what that function returns for it.
  """
  if ':' in config.source:
    return _own(config)
  if config.source == 'digits':
    return digits()
  return _KINDS[config.source](os.path.expanduser(config.get('folder', '')))
