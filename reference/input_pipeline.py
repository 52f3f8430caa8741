"""From records to batches: order, augmentation and batching, by Grain.

Order and augmentation depend on the seed and the epoch alone, and the
iterator's state is a position in them, so that a resumed run sees what an
uninterrupted one would have seen. Of several hosts each reads its own part of
every batch; put together in order, the parts are the batch of a single host.
Batches are uint8; they are normalised on the device. Few threads and a short
buffer read faster than Grain's defaults of 16 and 500. A thread more makes
batch t + 1 while step t runs.

The threads of a process share Python's lock. Where that is too little, the
threads are those of worker processes, between which nothing is shared: what was
unreadable travels with the rows that were made beside it.
"""

import functools
import math
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grain
import ml_collections
import numpy as np
from absl import flags, logging

from reference import augment, autoaugment, jpeg, sources

Element = dict[str, Any]
# Unreadable images by path, with the reason.
Skipped = dict[str, str]
# Rows of a batch, and what was unreadable among them.
Piece = tuple[list[Element], Skipped]

# At most so many rows of a batch are one task for a thread.
_PIECE = 32
# Arrays smaller than this reach the parent by a pipe, not by shared memory.
_SMALL = 4096

TRAIN_CROPS: dict[str, Callable[..., np.ndarray]] = {
  'resize': lambda image, size, rng: augment.resize(image, size),
  'pad': augment.pad_crop,
  'random_resized': augment.random_resized_crop,
}
EVAL_CROPS: dict[str, Callable[..., np.ndarray]] = {
  'resize': augment.resize,
  'center': augment.center_crop,
}


class _Pieces(grain.MapDataset):
  """A host's rows of all batches, some at a time.

  So one task for a thread makes several images, and what Grain does for each
  element is shared by them.
  """

  def __init__(
    self,
    numbers: grain.MapDataset,
    make_row: Callable[[int, np.random.Generator], Element],
    config: ml_collections.ConfigDict,
    *,
    batch_size: int,
    replacement: Element | None,
    host: int,
    hosts: int,
  ):
    super().__init__(numbers)
    share = batch_size // hosts
    self._make_row = make_row
    self._seed = config.seed
    self._batch_size = batch_size
    self._first = host * share
    self._rows = max(x for x in range(1, _PIECE + 1) if share % x == 0)
    self._pieces = share // self._rows
    self._on_bad_image = config.data.on_bad_image
    self._replacement = replacement

  def __len__(self) -> int:
    return len(self._parent) // self._batch_size * self._pieces

  def __getitem__(self, index: int) -> Piece:
    batch, piece = divmod(index, self._pieces)
    start = batch * self._batch_size + self._first + piece * self._rows
    positions = range(start, start + self._rows)
    # All at once: after a decode, which fills the caches, one generator takes
    # three times as long to make.
    numbers = [self._parent[position] for position in positions]
    rngs = [np.random.default_rng((self._seed, x)) for x in positions]
    rows: list[Element] = []
    skipped: Skipped = {}
    for number, rng in zip(numbers, rngs, strict=True):
      try:
        rows.append(self._make_row(number, rng))
      except jpeg.BadImageError as error:
        if self._on_bad_image == 'stop':
          raise
        skipped[error.path] = error.reason
        if self._replacement is not None:
          rows.append(self._replacement)
    return rows, skipped


def _stack(rows: Sequence[Element]) -> Element:
  names = list(rows[0]) if rows else []
  return {name: np.stack([row[name] for row in rows]) for name in names}


def _pack(piece: Piece) -> tuple[Element, Skipped]:
  """A piece as few large arrays, which travel between processes."""
  rows, skipped = piece
  return _stack(rows), skipped


def _unpack(packed: tuple[Element, Skipped]) -> Piece:
  """The piece again. Its rows are views of memory shared with a worker."""
  arrays, skipped = packed
  arrays = {name: np.asarray(array) for name, array in arrays.items()}
  count = len(arrays['label']) if arrays else 0
  rows = [{name: x[i] for name, x in arrays.items()} for i in range(count)]
  return rows, skipped


class _Batches(grain.DatasetIterator):
  """The rows of pieces, in their order, in batches.

  The state is the piece and the row in it that come next, and knows nothing of
  threads and workers: a run may resume with others.
  """

  def __init__(
    self,
    open_pieces: Callable[[int], grain.DatasetIterator],
    batch_size: int,
    receive: Callable[[Skipped], None],
  ):
    super().__init__()
    self._open_pieces = open_pieces
    self._batch_size = batch_size
    self._receive = receive
    self._piece, self._row = 0, 0
    self._pieces: grain.DatasetIterator | None = None
    self._rows: list[Element] | None = None

  def __next__(self) -> Element:
    if self._pieces is None:
      self._pieces = self._open_pieces(self._piece)
    rows: list[Element] = []
    while missing := self._batch_size - len(rows):
      if self._rows is None:
        self._rows, skipped = next(self._pieces)
        self._receive(skipped)
      end = self._row + missing
      rows += self._rows[self._row : end]
      self._row = end
      if end >= len(self._rows):
        self._rows, self._row, self._piece = None, 0, self._piece + 1
    # The only copy of pixels that no worker made.
    return _stack(rows)

  def get_state(self) -> dict[str, int]:
    return {'piece': self._piece, 'row': self._row}

  def set_state(self, state: dict[str, int]) -> None:
    self._stop()
    self._piece, self._row = state['piece'], state['row']

  def close(self) -> None:
    super().close()
    self._stop()

  def _stop(self) -> None:
    if self._pieces is not None:
      self._pieces.close()
    self._pieces = self._rows = None


def _start_worker(index: int, workers: int) -> None:
  """Leaves it to the parent when this worker ends."""
  del index, workers
  # A scheduler sends them to all processes, and the parent needs one more batch
  # to stop at the end of a step.
  signal.signal(signal.SIGTERM, signal.SIG_IGN)
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  parent = multiprocessing.parent_process()
  assert parent is not None

  def leave_with_parent() -> None:
    parent.join()
    os._exit(1)

  threading.Thread(target=leave_with_parent, daemon=True).start()


def _check_hosts(batch_size: int, host: int, hosts: int) -> None:
  if not 0 <= host < hosts:
    raise ValueError(
      f'Hosts are numbered 0 to hosts - 1. Given host {host} of {hosts}. '
      'Likely counted from 1: `host=jax.process_index(), '
      'hosts=jax.process_count()`.'
    )
  if batch_size % hosts:
    nearest = max(1, round(batch_size / hosts)) * hosts
    raise ValueError(
      'Every host reads the same share of a batch, so `batch_size` must be a '
      f'multiple of the number of hosts. Given {batch_size} on {hosts} hosts. '
      f'Take the nearest: `--config.batch_size={nearest}`.'
    )


def _check_level_factor(level_factor: float) -> None:
  if not 0 <= level_factor <= 1:
    raise ValueError(
      "`data.level_factor` multiplies AutoAugment's levels and is from 0 to 1. "
      f'Given {level_factor}. Likely meant as a level, 0 to 10: '
      '`--config.data.level_factor=0.8`.'
    )


def _check_workers(workers: int) -> None:
  if workers < 0:
    raise ValueError(
      '`run.workers` is the number of worker processes that make training '
      f'images, 0 for none. Given {workers}. Take the threads of this process, '
      '`--config.run.workers=0`.'
    )


def _receiver(skipped: Skipped, count: int) -> Callable[[Skipped], None]:
  """What records and logs the unreadable ones of a split's `count` images."""

  def receive(found: Skipped) -> None:
    for path, reason in found.items():
      if path not in skipped:
        skipped[path] = reason
        logging.warning('Skipped %s: %s.', path, reason)
      if len(skipped) == count:
        # Otherwise the search for a first readable image would never end.
        raise ValueError(
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
) -> Element:
  """One crop for each of `images`, in turn, all of the same decoded pixels."""
  pixels, label = read(records[number])
  row: Element = {'label': np.int32(label)}
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
  padding: Element,
) -> Element:
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


def _batched(
  pieces: _Pieces,
  config: ml_collections.ConfigDict,
  *,
  rows: int,
  workers: int,
  receive: Callable[[Skipped], None],
) -> grain.DatasetIterator:
  """Batches of a host's `rows`, made ahead by threads."""
  threads = config.run.threads
  if workers and not flags.FLAGS.is_parsed():
    # In a program without flags; Grain reads one of its own for workers.
    flags.FLAGS.mark_as_parsed()

  def open_pieces(first: int) -> grain.DatasetIterator:
    rest = pieces.slice(slice(first, None))
    made = (rest.map(_pack) if workers else rest).to_iter_dataset(
      grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
    )
    made = grain.experimental.WithOptionsIterDataset(
      made, grain.experimental.DatasetOptions(min_shm_size=_SMALL)
    )
    if workers:
      made = made.mp_prefetch(
        grain.MultiprocessingOptions(workers, per_worker_buffer_size=1),
        worker_init_fn=_start_worker,
      ).map(_unpack)
    return iter(made)

  return grain.experimental.ThreadPrefetchDatasetIterator(
    _Batches(open_pieces, rows, receive),
    prefetch_buffer_size=1,
  )


def train_batches(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  *,
  skipped: Skipped,
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
    ValueError: when the hosts do not divide the batch, or for a `level_factor`
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
  return _batched(
    _Pieces(
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
  skipped: Skipped,
  host: int = 0,
  hosts: int = 1,
) -> Iterator[Element]:
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
    ValueError: when the hosts do not divide the batch.
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
  iterator = _batched(
    _Pieces(
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
