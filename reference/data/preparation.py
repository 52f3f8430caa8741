"""From JPEGs to shards: all are decoded first, then written, one by one."""

import collections
import fcntl
import itertools
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent import futures
from contextlib import contextmanager
from pathlib import Path

import tqdm

from reference.data import image_files, jpeg, shards, sources

# About 450 MB of ImageNet: what a kill can cost, and 313 files.
_IMAGES_PER_SHARD = 4096
# What ArrayRecord adds to an image, generously; measured: 2.3 KB.
_OVERHEAD = 4096
_SHOWN = 20

Images = Sequence[image_files.ImageFile]


@contextmanager
def _alone(target: Path) -> Iterator[None]:
  """Keeps other processes out, until this one ends, however it ends."""
  folder = os.open(target, os.O_RDONLY)
  try:
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise ValueError(
        f'One process prepares a folder. Another is at work on {target}. Wait '
        'for it, or take another folder: `--target=/path/to/another`.'
      ) from error
    yield
  finally:
    os.close(folder)


def _reason(image: image_files.ImageFile) -> str | None:
  """Why an image cannot be decoded, None where it can."""
  try:
    jpeg.decode(image_files.read(image), image.name)
  except jpeg.BadImageError as error:
    return error.reason
  return None


def describe(listing: image_files.Listing) -> str:
  """Counts in words, in which a class that is cut short can be seen."""
  lines = [f'{len(listing.classes)} classes.']
  for split in shards.SPLITS:
    counts = collections.Counter(x.label for x in getattr(listing, split))
    (least, few), (most, many) = (
      (listing.classes[label], counts[label])
      for label in (
        min(counts, key=counts.__getitem__),
        max(counts, key=counts.__getitem__),
      )
    )
    lines.append(
      f'{split}: {counts.total():,} images, {few:,} ({least}) to {many:,} '
      f'({most}) a class.'
    )
  return '\n'.join(lines)


def find_unreadable(images: Images) -> dict[str, str]:
  """Decodes every image; names the damaged ones, with the reason."""
  unreadable = {}
  with (
    futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    tqdm.tqdm(total=len(images), desc='check', unit='img') as bar,
  ):
    # In parts, as each image that waits for a thread takes memory.
    for start in range(0, len(images), _IMAGES_PER_SHARD):
      part = images[start : start + _IMAGES_PER_SHARD]
      for image, reason in zip(part, threads.map(_reason, part), strict=True):
        if reason is not None:
          unreadable[image.name] = reason
        bar.update()
  return unreadable


def _plan(
  listing: image_files.Listing, *, on_bad_image: str, images_per_shard: int
) -> shards.Manifest:
  """Checks all images and divides the readable ones into shards."""
  unreadable = find_unreadable([*listing.train, *listing.held_out])
  if unreadable and on_bad_image == 'stop':
    named = [f'  {name}: {reason}' for name, reason in unreadable.items()]
    more = len(named) - _SHOWN
    raise ValueError(
      f'Images must be whole JPEGs. {len(unreadable)} of '
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
      raise ValueError(
        f'Both splits must have a readable image. {split!r} has none; the last '
        f'reason: {list(unreadable.values())[-1]}. Likely the files are no '
        'JPEGs: `file /path/to/one.jpg`.'
      )
    counts[split] = [
      min(images_per_shard, total - start)
      for start in range(0, total, images_per_shard)
    ]
  named = [
    [(Path(x.name).name, x.label) for x in images] for images in readable
  ]
  return shards.Manifest(
    image_files.digest(listing),
    listing.classes,
    counts,
    unreadable,
    sources.fingerprint(listing.classes, *named),
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
    name for name in os.listdir(target) if not name.endswith('.unfinished')
  )
  if found:
    raise ValueError(
      'Shards must go to a new or empty folder, or to one where they were '
      f'begun. {target} holds {found[0]!r} and no manifest. Likely the path is '
      f'wrong: `--target={target}/shards`.'
    )


def _check_space(target: Path, images: Images) -> None:
  needed = sum(image.size + _OVERHEAD for image in images)
  free = shutil.disk_usage(target).free
  if needed > free:
    raise ValueError(
      f'The shards must fit on the disk. {needed / 1e6:,.0f} MB are needed and '
      f'{free / 1e6:,.0f} MB are free at {target}. Free some, or take another '
      'disk: `--target=/other/disk/shards`.'
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


def _write(missing: dict[Path, Images], *, total: int) -> None:
  left = sum(map(len, missing.values()))
  with tqdm.tqdm(
    total=total, initial=total - left, desc='write', unit='img'
  ) as bar:

    def records(images: Images) -> Iterator[bytes]:
      for image in images:
        yield shards.pack(image_files.read(image), image.label)
        bar.update()

    for path, images in missing.items():
      shards.write_shard(path, records(images))


def prepare(
  source: Path,
  target: Path,
  *,
  held_out_labels: Path | None = None,
  on_bad_image: str = 'stop',
  images_per_shard: int = _IMAGES_PER_SHARD,
) -> shards.Manifest:
  """Writes the shards that are not there yet.

  Args:
    source: as `image_files.list_images` takes it.
    target: a new or empty folder, or one that a stopped run left.
    held_out_labels: for tar files.
    on_bad_image: 'stop' refuses unreadable images, 'skip' leaves them out.
    images_per_shard: of all but the last shard of a split.

  Raises:
    ValueError: for images or a target that are not as they must be, before
      anything is written.
    OSError: when the disk is full; the finished shards stay.
  """
  listing = image_files.list_images(source, held_out_labels)
  print(describe(listing), flush=True)
  target.mkdir(parents=True, exist_ok=True)
  with _alone(target):
    manifest = shards.read_manifest(target)
    if manifest is None:
      _check_target(target)
      _check_space(target, [*listing.train, *listing.held_out])
      manifest = _plan(
        listing, on_bad_image=on_bad_image, images_per_shard=images_per_shard
      )
      shards.write_manifest(target, manifest)
    elif manifest.digest != image_files.digest(listing):
      raise ValueError(
        f'A folder of shards belongs to one set of images. {target} was begun '
        f'from others than {source} holds now. Likely images were added or '
        f'removed since: take another folder, `--target={target}_2`.'
      )
    missing = _find_missing(target, listing, manifest)
    _check_space(target, list(itertools.chain(*missing.values())))
    _write(missing, total=sum(map(sum, manifest.counts.values())))
  return manifest
