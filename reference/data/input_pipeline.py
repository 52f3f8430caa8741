"""From records to batches: order, augmentation and batching, by Grain.

Order and augmentation depend on the seed and the epoch alone, and the
iterator's state is a position in them, so that a resumed run sees what an
uninterrupted one would have seen. Of several hosts each reads its own part of
every batch; put together in order, the parts are the batch of a single host.
Batches are uint8; they are normalised on the device.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import logging

from reference.command import Mistake
from reference.data import augment, autoaugment, jpeg, pieces, sources

TRAIN_CROPS: dict[str, Callable[..., np.ndarray]] = {
  'resize': lambda image, size, rng: augment.resize(image, size),
  'pad': augment.pad_crop,
  'random_resized': augment.random_resized_crop,
}
EVAL_CROPS: dict[str, Callable[..., np.ndarray]] = {
  'resize': augment.resize,
  'center': augment.center_crop,
}


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
  if not 0 <= host < hosts:
    raise Mistake(
      f'Hosts are numbered 0 to hosts - 1. Given host {host} of {hosts}. '
      'Likely counted from 1: `host=jax.process_index(), '
      'hosts=jax.process_count()`.'
    )
  if batch_size % hosts:
    nearest = max(1, round(batch_size / hosts)) * hosts
    raise Mistake(
      'Every host reads the same share of a batch, so `batch_size` must be a '
      f'multiple of the number of hosts. Given {batch_size} on {hosts} hosts. '
      f'Take the nearest: `--config.batch_size={nearest}`.'
    )


def _check_level_factor(level_factor: float) -> None:
  if not 0 <= level_factor <= 1:
    raise Mistake(
      "`data.level_factor` multiplies AutoAugment's levels and is from 0 to 1. "
      f'Given {level_factor}. Likely meant as a level, 0 to 10: '
      '`--config.data.level_factor=0.8`.'
    )


def _check_workers(workers: int) -> None:
  if workers < 0:
    raise Mistake(
      '`run.workers` is the number of worker processes that make training '
      f'images, 0 for none. Given {workers}. Take the threads of this process, '
      '`--config.run.workers=0`.'
    )


def _receiver(
  skipped: jpeg.Skipped, count: int
) -> Callable[[jpeg.Skipped], None]:
  """What records and logs the unreadable ones of a split's `count` images."""

  def receive(found: jpeg.Skipped) -> None:
    for path, reason in found.items():
      if path not in skipped:
        skipped[path] = reason
        logging.warning('Skipped %s: %s.', path, reason)
      if len(skipped) == count:
        # Otherwise the search for a first readable image would never end.
        raise Mistake(
          f'At least one of {count} images must be readable, and none is; the '
          f'last: {jpeg.BadImageError(path, reason)}'
        )

  return receive


def _train_row(
  number: int,
  rng: np.random.Generator,
  *,
  records: Sequence[Any],
  read: Callable[[Any], tuple[np.ndarray, int]],
  images: Sequence[str],
  crop: Callable[..., np.ndarray],
  size: int,
  flip: bool,
  level_factor: float,
) -> pieces.Element:
  """One crop for each of `images`, in turn, all of the same decoded pixels."""
  pixels, label = read(records[number])
  row: pieces.Element = {'label': np.int32(label)}
  for name in images:
    image = crop(pixels, size, rng)
    if flip:
      image = augment.flip(image, rng)
    if name == 'image_augmented':
      image = autoaugment.auto_augment(image, rng, level_factor=level_factor)
    row[name] = image
  return row


def _eval_row(
  number: int,
  rng: np.random.Generator,
  *,
  records: Sequence[Any],
  read: Callable[[Any], tuple[np.ndarray, int]],
  crop: Callable[[np.ndarray, int], np.ndarray],
  size: int,
  padding: pieces.Element,
) -> pieces.Element:
  """A held-out image, or the padding where there are no more."""
  del rng
  if number >= len(records):
    return padding
  image, label = read(records[number])
  return {
    'image': crop(image, size),
    'label': np.int32(label),
    'mask': np.bool_(True),
  }


def train_batches(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  *,
  skipped: jpeg.Skipped,
  images: Sequence[str] = ('image',),
  host: int = 0,
  hosts: int = 1,
) -> grain.DatasetIterator:
  """Endless training batches, of which each host makes its own rows.

  The rows of all hosts, put together in order, are the batch of a single host,
  whatever their number. An unreadable image shifts what follows on the host
  that met it and on no other; still every image comes once an epoch.

  Args:
    source: where the images are.
    config: of the run; its seed and the epoch decide all randomness.
    skipped: receives the unreadable images that this host met.
    images: what to make of each, by name: 'image', a random crop, perhaps
      flipped; 'image_augmented', another one of the same JPEG, to which
      AutoAugment is applied.
    host: number of this host.
    hosts: how many read together, each `b = batch_size / hosts` rows.

  Returns:
    An iterator, whose state can be saved, over `{'label': int32 (b,)}` and the
    images by name, uint8 (b, H, W, C). The state is this host's, and fits the
    same number of hosts.

  Raises:
    Mistake: when the hosts do not divide the batch, or for a `level_factor`
      that is not from 0 to 1.
  """
  # Grey images, which AutoAugment does not take, need not have it.
  level_factor = config.data.get('level_factor', 1.0)
  _check_level_factor(level_factor)
  _check_workers(config.run.workers)
  _check_hosts(config.batch_size, host, hosts)
  numbers = (
    grain.MapDataset.range(len(source.train))
    .seed(config.seed)
    .shuffle()
    .repeat()
  )
  make_row = functools.partial(
    _train_row,
    records=source.train,
    read=source.read,
    images=images,
    crop=TRAIN_CROPS[config.data.crop],
    size=config.data.size,
    flip=config.data.flip,
    level_factor=level_factor,
  )
  return pieces.batched(
    pieces.Pieces(
      numbers,
      make_row,
      config,
      batch_size=config.batch_size,
      replacement=None,
      host=host,
      hosts=hosts,
    ),
    config,
    rows=config.batch_size // hosts,
    workers=config.run.workers,
    receive=_receiver(skipped, len(source.train)),
  )


def held_out_batches(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  *,
  batch_size: int,
  skipped: jpeg.Skipped,
  host: int = 0,
  hosts: int = 1,
) -> Iterator[pieces.Element]:
  """Every readable held-out image once, in batches of one shape.

  All hosts make the same number of batches. A row without an image, because
  there are no more or because it is unreadable, is masked.

  Args:
    source: where the images are.
    config: of the run.
    batch_size: of all hosts together; that of training, or less where a device
      holds less at once.
    skipped: receives the unreadable images that this host met.
    host: number of this host.
    hosts: how many read together, each `b = batch_size / hosts` rows.

  Yields:
    `{'image': uint8 (b, H, W, C), 'label': int32 (b,), 'mask': bool (b,)}`.

  Raises:
    Mistake: when the hosts do not divide the batch.
  """
  _check_hosts(batch_size, host, hosts)
  batches = math.ceil(len(source.held_out) / batch_size)
  size = config.data.size
  padding = {
    'image': np.zeros((size, size, len(config.data.mean)), np.uint8),
    'label': np.int32(0),
    'mask': np.bool_(False),
  }
  make_row = functools.partial(
    _eval_row,
    records=source.held_out,
    read=source.read,
    crop=EVAL_CROPS[config.data.eval_crop],
    size=size,
    padding=padding,
  )
  numbers = grain.MapDataset.range(batches * batch_size)
  iterator = pieces.batched(
    pieces.Pieces(
      numbers,
      make_row,
      config,
      batch_size=batch_size,
      replacement=padding,
      host=host,
      hosts=hosts,
    ),
    config,
    rows=batch_size // hosts,
    # They would take longer to start than to make so few images.
    workers=0,
    receive=_receiver(skipped, len(source.held_out)),
  )
  try:
    yield from iterator
  finally:
    iterator.close()
