"""A few JPEGs, as files and as the records they must become."""

import io
import itertools
import tarfile

import grain
import numpy as np
from PIL import Image

from reference.data import preparation

CLASSES = ('n01', 'n02', 'n10')
PER_SHARD = 4
# Ten training and three held-out images.
SHARDS = [
  'held_out-00000-of-00001.array_record',
  'train-00000-of-00003.array_record',
  'train-00001-of-00003.array_record',
  'train-00002-of-00003.array_record',
]


def make_jpeg(seed, size=(10, 12)):
  pixels = np.random.default_rng(seed).integers(256, size=(*size, 3))
  file = io.BytesIO()
  Image.fromarray(pixels.astype(np.uint8)).save(file, 'JPEG')
  return file.getvalue()


def make_tar(files, *, compressed=False):
  """A tar file of bytes by name; a `TarInfo` in their place is added as is."""
  file = io.BytesIO()
  with tarfile.open(
    fileobj=file, mode='w:gz' if compressed else 'w'
  ) as archive:
    for name, data in files.items():
      member = data if isinstance(data, tarfile.TarInfo) else tarfile.TarInfo()
      member.name = name
      if member is data:
        archive.addfile(member)
      else:
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
  return file.getvalue()


def make_images():
  """Bytes by split, class and name."""
  seeds = itertools.count()
  counts = {'train': (3, 5, 2), 'val': (1, 1, 1)}
  return {
    f'{split}/{name}/{index}.JPEG': make_jpeg(next(seeds))
    for split, numbers in counts.items()
    for name, number in zip(CLASSES, numbers, strict=True)
    for index in range(number)
  }


def write_images(folder):
  """The images as a folder, which is returned."""
  for name, data in make_images().items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  return folder


def prepare(source, target, **options):
  return preparation.prepare(
    source, target, images_per_shard=PER_SHARD, **options
  )


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def contents(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def identity(folder):
  """Changes for a file that is written anew, even with the same content."""
  return {
    path.name: (path.stat().st_ino, path.stat().st_mtime_ns)
    for path in folder.iterdir()
  }


def records(folder, split):
  """Label and JPEG of every record, read without the code under test."""
  paths = sorted(str(path) for path in folder.glob(f'{split}-*.array_record'))
  data = grain.sources.ArrayRecordDataSource(paths)
  found = [data[index] for index in range(len(data))]
  return [(int.from_bytes(x[:4], 'little'), x[4:]) for x in found]


def expected(split):
  return [
    (CLASSES.index(name.split('/')[1]), data)
    for name, data in make_images().items()
    if name.startswith(split)
  ]


def break_two(source):
  for name in ('train/n02/1.JPEG', 'val/n10/0.JPEG'):
    path = source / name
    path.write_bytes(path.read_bytes()[:-50])
