"""From images to shards: all are decoded first, then written, one by one."""

import contextlib
import fcntl
import functools
import itertools
import math
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent import futures
from pathlib import Path
from typing import NamedTuple

import tqdm

from reference.command import Mistake
from reference.data import (
  image_files,
  inspection,
  jpeg,
  layouts,
  shards,
  sources,
  tar_files,
  webdataset,
)

# About 450 MB of ImageNet: what a kill can cost, and 313 files.
_IMAGES_PER_SHARD = 4096
# So many wait for the writer.
_AT_ONCE = 64
# What ArrayRecord adds to an image, generously; measured: 2.3 KB.
_OVERHEAD = 4096
_SHOWN = 20

Images = Sequence[image_files.ImageFile]


@contextlib.contextmanager
def _alone(target: Path) -> Iterator[None]:
  """Keeps other processes out, until this one ends, however it ends."""
  folder = os.open(target, os.O_RDONLY)
  try:
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise Mistake(
        f'One process prepares a folder. Another is at work on {target}. Wait '
        'for it, or take another folder: `--target=/path/to/another`.'
      ) from error
    yield
  finally:
    os.close(folder)


class Smaller(NamedTuple):
  """How images are made smaller.

  Attributes:
    short_side: of those whose shorter side has more pixels.
    quality: of the JPEGs that these become, 1 to 100.
  """

  short_side: int
  quality: int

  def __str__(self) -> str:
    return f'short side {self.short_side}, quality {self.quality}'


def _plan(
  listing: image_files.Listing,
  *,
  on_bad_image: str,
  images_per_shard: int,
  encoding: str,
) -> shards.Manifest:
  """Checks all images and divides the readable ones into shards."""
  unreadable = inspection.find_unreadable([*listing.train, *listing.held_out])
  if unreadable and on_bad_image == 'stop':
    named = [f'  {name}: {reason}' for name, reason in unreadable.items()]
    more = len(named) - _SHOWN
    raise Mistake(
      f'Images must be whole. {len(unreadable)} of '
      f'{len(listing.train) + len(listing.held_out)} are not:\n'
      + '\n'.join(named[:_SHOWN])
      + (f'\n  and {more} more' if more > 0 else '')
      + '\nLikely the copy broke off: copy them again, or leave them out, '
      '`--on_bad_image=skip`.'
    )
  counts = {}
  readable = [_readable(listing, split, unreadable) for split in shards.SPLITS]
  for split, images in zip(shards.SPLITS, readable, strict=True):
    total = len(images)
    if total == 0:
      of_split = [unreadable[x.name] for x in getattr(listing, split)]
      reason = of_split[-1] if of_split else 'there is no image of it'
      raise Mistake(
        f'Both splits must have a readable image. {split!r} has none; the last '
        f'reason: {reason}. Likely the files are no images: `file '
        '/path/to/one.jpg`.'
      )
    counts[split] = [
      min(images_per_shard, total - start)
      for start in range(0, total, images_per_shard)
    ]
  files = [
    [(Path(x.name).name, x.label) for x in images] for images in readable
  ]
  # Other pixels under the same names are another set of images.
  names = [*listing.classes, encoding] if encoding else listing.classes
  return shards.Manifest(
    image_files.digest(listing),
    listing.classes,
    counts,
    unreadable,
    sources.fingerprint(names, *files),
    encoding,
    listing.names,
  )


def _readable(
  listing: image_files.Listing, split: str, skipped: dict[str, str]
) -> list[image_files.ImageFile]:
  return [
    image for image in getattr(listing, split) if image.name not in skipped
  ]


def _check_target(target: Path) -> None:
  """Refuses a folder without manifest that holds something."""
  # A kill while the manifest is written leaves it unfinished.
  found = sorted(
    name
    for name in os.listdir(target)
    if not (name.endswith('.unfinished') or layouts.is_hidden(name))
  )
  if found:
    raise Mistake(
      'Shards must go to a new or empty folder, or to one where they were '
      f'begun. {target} holds {found[0]!r} and no manifest. Likely the path is '
      f'wrong: `--target={target}/shards`.'
    )


def _check_space(target: Path, images: Images, smaller: Smaller | None) -> None:
  # A byte for each pixel of a square, twice of what a smaller JPEG takes.
  most = smaller.short_side**2 if smaller else math.inf
  needed = sum(min(image.size, most) + _OVERHEAD for image in images)
  free = shutil.disk_usage(target).free
  if needed > free:
    raise Mistake(
      f'The shards must fit on the disk. {needed / 1e6:,.0f} MB are needed and '
      f'{free / 1e6:,.0f} MB are free at {target}. Free some, take another '
      'disk, `--target=/other/disk/shards`, or smaller images, '
      '`--short_side=288`.'
    )


def _find_missing(
  target: Path, listing: image_files.Listing, manifest: shards.Manifest
) -> dict[Path, Images]:
  """The shards that are not there or not whole, and the images of each."""
  missing: dict[Path, Images] = {}
  for split in shards.SPLITS:
    images = iter(_readable(listing, split, manifest.skipped))
    paths = shards.paths(target, manifest, split)
    for path, count in zip(paths, manifest.counts[split], strict=True):
      part = list(itertools.islice(images, count))
      if not path.exists() or shards.count_records(path) != count:
        missing[path] = part
  return missing


def _record(image: image_files.ImageFile, smaller: Smaller | None) -> bytes:
  """What a shard holds of an image."""
  try:
    data = image_files.read(image)
    if smaller:
      data = jpeg.shrink(data, image.name, **smaller._asdict())
  except jpeg.BadImageError as error:
    raise Mistake(
      'Images must stay as they are until all are prepared. '
      f'{image.name}: {error.reason}. Likely it was moved or is still being '
      f'copied: `ls -l {image.path}`, and run the same command again.'
    ) from error
  return shards.pack(data, image.label)


def _write(
  missing: dict[Path, Images], *, total: int, smaller: Smaller | None
) -> None:
  left = sum(map(len, missing.values()))
  make = functools.partial(_record, smaller=smaller)
  with (
    futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    tqdm.tqdm(
      total=total, initial=total - left, desc='write', unit='img'
    ) as bar,
  ):

    def records(images: Images) -> Iterator[bytes]:
      for start in range(0, len(images), _AT_ONCE):
        for record in threads.map(make, images[start : start + _AT_ONCE]):
          yield record
          bar.update()

    for path, images in missing.items():
      shards.write_shard(path, records(images))


def list_images(
  source: Path, held_out_labels: Path | None
) -> image_files.Listing:
  """The images of a folder, or of the tar files that it holds.

  Raises:
    Mistake: when they are not of a form that is known.
  """
  names = (tar_files.TRAIN_TAR, tar_files.HELD_OUT_TAR)
  if all((source / name).exists() for name in names):
    return tar_files.list_images(source, held_out_labels)
  archives = webdataset.find(source)
  if archives and not (source / 'train').is_dir():
    return webdataset.list_images(archives)
  return image_files.list_folder(source, held_out_labels)


def prepare(
  source: Path,
  target: Path,
  *,
  held_out_labels: Path | None = None,
  on_bad_image: str = 'stop',
  smaller: Smaller | None = None,
  images_per_shard: int = _IMAGES_PER_SHARD,
) -> shards.Manifest:
  """Writes the shards that are not there yet.

  Args:
    source: as `list_images` takes it.
    target: a new or empty folder, or one that a stopped run left.
    held_out_labels: for images without class folders, and tar files.
    on_bad_image: 'stop' refuses unreadable images, 'skip' leaves them out.
    smaller: None keeps the images as they are.
    images_per_shard: of all but the last shard of a split.

  Raises:
    Mistake: for images or a target that are not as they must be, before
      anything is written.
    OSError: when the disk is full; the finished shards stay.
  """
  listing = list_images(source, held_out_labels)
  print(inspection.describe(listing), flush=True)
  encoding = str(smaller or '')
  target.mkdir(parents=True, exist_ok=True)
  with _alone(target):
    manifest = shards.read_manifest(target)
    if manifest is None:
      _check_target(target)
      _check_space(target, [*listing.train, *listing.held_out], smaller)
      manifest = _plan(
        listing,
        on_bad_image=on_bad_image,
        images_per_shard=images_per_shard,
        encoding=encoding,
      )
      shards.write_manifest(target, manifest)
    elif manifest.digest != image_files.digest(listing):
      raise Mistake(
        f'A folder of shards belongs to one set of images. {target} was begun '
        f'from others than {source} holds now. Likely images were added or '
        f'removed since: take another folder, `--target={target}_2`.'
      )
    elif manifest.encoding != encoding:
      raise Mistake(
        'The images of a folder of shards are all as they were, or all made '
        f'smaller in one way. {target} was begun with '
        f'{manifest.encoding or "the former"}, and given is '
        f'{encoding or "the former"}. Take the same `--short_side` and '
        f'`--quality`, or another folder, `--target={target}_2`.'
      )
    elif listing.names and manifest.names != listing.names:
      # Names that came later.
      manifest = manifest._replace(names=listing.names)
      shards.write_manifest(target, manifest)
    missing = _find_missing(target, listing, manifest)
    _check_space(target, list(itertools.chain(*missing.values())), smaller)
    _write(
      missing, total=sum(map(sum, manifest.counts.values())), smaller=smaller
    )
  return manifest
