"""From records to batches: order, augmentation and batching, by Grain.

Order and augmentation depend on the seed and the epoch alone, and the
iterator's state is a position in them, so that a resumed run sees what an
uninterrupted one would have seen. Batches are uint8; they are normalised on
the device. Few threads and a short buffer read faster than Grain's defaults of
16 and 500. A thread more makes batch t + 1 while step t runs.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import logging

from reference import augment, autoaugment, jpeg, sources

Element = dict[str, Any]
# Unreadable images by path, with the reason. Several threads write to it.
Skipped = dict[str, str]

TRAIN_CROPS: dict[str, Callable[..., np.ndarray]] = {
  'resize': lambda image, size, rng: augment.resize(image, size),
  'pad': augment.pad_crop,
  'random_resized': augment.random_resized_crop,
}
EVAL_CROPS: dict[str, Callable[..., np.ndarray]] = {
  'resize': augment.resize,
  'center': augment.center_crop,
}


def _read(
  record: Any,
  *,
  source: sources.Source,
  on_bad_image: str,
  skipped: Skipped,
  count: int,
) -> tuple[np.ndarray, int] | None:
  """The record's image and label, or None (which Grain leaves out)."""
  try:
    return source.read(record)
  except jpeg.BadImageError as error:
    if on_bad_image == 'stop':
      raise
    if error.path not in skipped:
      skipped[error.path] = error.reason
      logging.warning('Skipped %s: %s.', error.path, error.reason)
    if len(skipped) == count:
      # Otherwise the search for a first readable image would never end.
      raise ValueError(
        f'At least one of {count} images must be readable, and none is; the '
        f'last: {error}'
      ) from error
    return None


def _reader(
  source: sources.Source,
  records: Sequence[Any],
  config: ml_collections.ConfigDict,
  skipped: Skipped,
) -> Callable[[Any], tuple[np.ndarray, int] | None]:
  """What reads one of the records of a split."""
  return functools.partial(
    _read,
    source=source,
    on_bad_image=config.data.on_bad_image,
    skipped=skipped,
    count=len(records),
  )


def _train_element(
  record: tuple[np.ndarray, int],
  rng: np.random.Generator,
  *,
  config: ml_collections.ConfigDict,
  images: Sequence[str],
) -> Element:
  """One crop for each of `images`, in turn, all of the same decoded pixels."""
  pixels, label = record
  element: Element = {'label': np.int32(label)}
  for name in images:
    image = TRAIN_CROPS[config.crop](pixels, config.size, rng)
    if config.flip:
      image = augment.flip(image, rng)
    if name == 'image_augmented':
      image = autoaugment.auto_augment(
        image, rng, level_factor=config.level_factor
      )
    element[name] = image
  return element


def _eval_element(
  record: tuple[np.ndarray, int], *, config: ml_collections.ConfigDict
) -> Element:
  image, label = record
  image = EVAL_CROPS[config.eval_crop](image, config.size)
  return {'image': image, 'label': np.int32(label)}


def _read_options(config: ml_collections.ConfigDict) -> grain.ReadOptions:
  return grain.ReadOptions(
    num_threads=config.run.threads,
    prefetch_buffer_size=4 * config.run.threads,
  )


def train_batches(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  *,
  skipped: Skipped,
  images: Sequence[str] = ('image',),
) -> grain.DatasetIterator:
  """Endless training batches.

  Args:
    source: where the images are.
    config: of the run; its seed and the epoch decide all randomness.
    skipped: receives the unreadable images.
    images: what to make of each, by name: 'image', a random crop, perhaps
      flipped; 'image_augmented', another one of the same JPEG, to which
      AutoAugment is applied.

  Returns:
    An iterator, whose state can be saved, over `{'label': int32 (B,)}` and the
    images by name, uint8 (B, H, W, C).
  """
  batches = (
    grain.MapDataset.source(source.train)
    .seed(config.seed)
    .shuffle()
    .repeat()
    .map(_reader(source, source.train, config, skipped))
    .random_map(
      functools.partial(_train_element, config=config.data, images=images)
    )
    .to_iter_dataset(_read_options(config))
    .batch(config.batch_size)
  )
  return iter(
    grain.experimental.ThreadPrefetchIterDataset(
      batches, prefetch_buffer_size=1
    )
  )


def held_out_batches(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  *,
  skipped: Skipped,
) -> Iterator[Element]:
  """Every readable held-out image once, in batches of one shape.

  Args:
    source: where the images are.
    config: of the run; the last batch is padded to its `batch_size`, B.
    skipped: receives the unreadable images.

  Yields:
    `{'image': uint8 (B, H, W, C), 'label': int32 (B,), 'mask': bool (B,)}`,
    the mask False where the batch was padded.
  """
  batches = iter(
    grain.MapDataset.source(source.held_out)
    .map(_reader(source, source.held_out, config, skipped))
    .map(functools.partial(_eval_element, config=config.data))
    .to_iter_dataset(_read_options(config))
    .batch(config.batch_size)
  )
  size = config.batch_size
  try:
    for batch in batches:
      count = len(batch['label'])
      padded = {
        name: np.pad(array, [(0, size - count)] + [(0, 0)] * (array.ndim - 1))
        for name, array in batch.items()
      }
      yield {**padded, 'mask': np.arange(size) < count}
  finally:
    batches.close()
