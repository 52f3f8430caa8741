"""How fast the input pipeline is beside a bare decode of the same JPEGs.

  python -m reference.benchmarks.input --folder=/path/that/holds/train/and/val

Programs take turns: libjpeg-turbo decoding the files in memory by a thread for
each core, and nothing else; the pipeline from files to uint8 batches with one
random crop of each image; the same with two, the second under AutoAugment; and
both on JPEGs of 8 x 8 pixels, where what does not depend on pixels is left:
Python, Grain and the draws. Nearly all of that holds Python's lock, of which a
process has one, so it bounds what any number of threads can reach.

Printed are images a second and core by the clock, and the time of a core that
an image takes, as medians with quartiles, and both ratios to the decode. On an
idle machine the two agree; where others work beside, the second is the one to
read. Then each stage is timed alone, by a thread on each core. What a program
takes above the sum is Python, Grain, and memory that is no longer in the cache.

Last comes what one process delivers at most, by threads and by worker processes
whose images it takes over, and how many processes and cores a TPU v3 host needs
to keep its eight cores at work.

Without a folder it makes JPEGs of ImageNet's usual size, 500 x 375 pixels and
about 110 KB, from two photographs that come with scikit-learn. With
`--short_side=288` all of it is of the smaller files that `prepare_data` makes.
"""

import collections
import contextlib
import functools
import math
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent import futures
from contextlib import AbstractContextManager
from importlib import resources
from pathlib import Path

import ml_collections
import numpy as np
import simplejpeg
from absl import flags

from reference import command
from reference.configs import jpeg_folder
from reference.data import augment, autoaugment, input_pipeline, jpeg, sources

_FOLDER = flags.DEFINE_string(
  'folder', None, 'Holds train/CLASS/*.jpg; by default JPEGs are made.'
)
_FILES = flags.DEFINE_integer(
  'files', 500, 'At most so many are read.', lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 15, 'Turns of each program.', lower_bound=1
)
_IMAGES = flags.DEFINE_integer(
  'images', 640, 'Images in a turn.', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 64, 'Images in a batch.', lower_bound=1
)
_SIZE = flags.DEFINE_integer('size', 224, 'Side of the crops.', lower_bound=1)
_SHORT_SIDE = flags.DEFINE_integer(
  'short_side', None, 'As of prepare_data; by default files as they are.'
)
_QUALITY = flags.DEFINE_integer('quality', 92, 'As of prepare_data.')

ONE, TWO = 'one view', 'two, AutoAugment'
TINY_ONE, TINY_TWO = 'one, 8 x 8', 'two, 8 x 8'
BOTH = ('image', 'image_augmented')
# Images a second that a TPU v3 host takes: 96 for each of its eight cores in a
# step, whose seconds `reference.aot` estimates.
NEEDED = {
  'conadv': (ONE, 8 * 96 / 0.207),
  'conadv_reuse': (ONE, 8 * 96 / 0.153),
  'conadv_autoaugment': (TWO, 8 * 96 / 0.281),
}
_CORES = os.cpu_count() or 1
_IMAGENET = 1_281_167

# Makes a given number of images.
Run = Callable[[int], None]


def main() -> None:
  """Finds or makes the images, takes turns, prints."""
  if _IMAGES.value % _BATCH_SIZE.value:
    raise command.Mistake(
      'A turn is of whole batches. Given '
      f'--images={_IMAGES.value} and --batch_size={_BATCH_SIZE.value}. Take '
      f'`--images={10 * _BATCH_SIZE.value}`.'
    )
  with tempfile.TemporaryDirectory() as made:
    source = choose_files(_FOLDER.value or make_images(Path(made) / 'usual'))
    if _SHORT_SIDE.value:
      source = shrink_files(source, Path(made), _SHORT_SIDE.value)
    sizes = [os.path.getsize(path) for path, _ in source.train]
    print(f'{np.mean(sizes) / 1e3:.0f} KB an image')
    tiny = sources.jpeg_folder(make_images(Path(made) / 'tiny', (8, 8)))
    config, tiny_config = make_config(), make_config()
    tiny_config.data.size = 8
    programs = {
      'decode': lambda: decoding(source),
      ONE: lambda: reading(source, config, BOTH[:1]),
      TWO: lambda: reading(source, config, BOTH),
      TINY_ONE: lambda: reading(tiny, tiny_config, BOTH[:1]),
      TINY_TWO: lambda: reading(tiny, tiny_config, BOTH),
    }
    spent = take_turns(programs)
    report_programs(spent, files=len(source.train))
    report_stages(time_stages(source, config), spent)
    taking = {
      ONE: time_taking(source, config, BOTH[:1]),
      TWO: time_taking(source, config, BOTH),
    }
    report_host(spent, taking)


def make_images(folder: Path, shape: tuple[int, int] = (375, 500)) -> str:
  """Writes 200 JPEGs of this height and width and returns their folder."""
  rng = np.random.default_rng(0)
  photographs = [
    jpeg.decode(path.read_bytes(), path.name)
    for path in resources.files('sklearn.datasets.images').iterdir()
    if path.name.endswith('.jpg')
  ]
  for index in range(200):
    photograph = photographs[index % len(photographs)]
    top = rng.integers(photograph.shape[0] - shape[0])
    left = rng.integers(photograph.shape[1] - shape[1])
    window = photograph[top : top + shape[0], left : left + shape[1]]
    data = simplejpeg.encode_jpeg(np.ascontiguousarray(window), quality=95)
    for split in ('train', 'val'):
      path = folder / split / 'photograph' / f'{index}.jpg'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  return str(folder)


def choose_files(folder: str) -> sources.Source:
  """The folder with so many training images, drawn at random."""
  source = sources.jpeg_folder(folder)
  order = np.random.default_rng(0).permutation(len(source.train))
  return source._replace(train=[source.train[i] for i in order[: _FILES.value]])


def shrink_files(
  source: sources.Source, folder: Path, short_side: int
) -> sources.Source:
  """The same images with fewer pixels, in a folder."""
  train = []
  for index, (path, label) in enumerate(source.train):
    smaller = folder / f'{index}.jpg'
    smaller.write_bytes(
      jpeg.shrink(
        Path(path).read_bytes(),
        path,
        short_side=short_side,
        quality=_QUALITY.value,
      )
    )
    train.append((str(smaller), label))
  return source._replace(train=train)


def make_config() -> ml_collections.ConfigDict:
  """The config of a run on ImageNet, with a thread for each core."""
  config = jpeg_folder.get_config()
  config.batch_size = _BATCH_SIZE.value
  config.data.size = _SIZE.value
  config.data.crop = 'random_resized'
  config.run.threads = _CORES
  return config


def decoding(source: sources.Source) -> AbstractContextManager[Run]:
  """A decode of files in memory by a thread for each core."""
  datas = [Path(path).read_bytes() for path, _ in source.train]

  def decode_part(first: int, count: int) -> None:
    for index in range(first, count, _CORES):
      data = datas[index % len(datas)]
      simplejpeg.decode_jpeg(data, colorspace='RGB', strict=False)

  def run(count: int) -> None:
    with futures.ThreadPoolExecutor(_CORES) as threads:
      list(threads.map(decode_part, range(_CORES), [count] * _CORES))

  return contextlib.nullcontext(run)


@contextlib.contextmanager
def reading(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  images: Sequence[str],
) -> Iterator[Run]:
  """The pipeline of a training run, already at work."""
  # As long as ImageNet: Grain's shuffle takes 30 times as long for 200 numbers.
  files, read = source.train, source.read
  source = source._replace(
    train=range(_IMAGENET),
    read=lambda number: read(files[number % len(files)]),
  )
  batches = input_pipeline.train_batches(
    source, config, skipped={}, images=images
  )

  def run(count: int) -> None:
    for _ in range(count // config.batch_size):
      next(batches)

  try:
    # What was made ahead while nobody waited does not count.
    run(3 * config.batch_size)
    yield run
  finally:
    batches.close()


def take_turns(
  programs: dict[str, Callable[[], AbstractContextManager[Run]]],
) -> dict[str, np.ndarray]:
  """Microseconds an image by the clock and of the cores, (rounds, 2).

  Each round has an order of its own, so that none always follows the same.
  """
  rng = np.random.default_rng(0)
  spent: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
  unit = 1e6 / _IMAGES.value
  threads = threading.active_count()
  for _ in range(_ROUNDS.value):
    for name in rng.permutation(list(programs)):
      with programs[name]() as run:
        clock, cores = time.perf_counter(), time.process_time()
        run(_IMAGES.value)
        clock = time.perf_counter() - clock
        cores = time.process_time() - cores
      spent[name].append((unit * clock, unit * cores))
      # Threads finish what they have begun, which would slow the next program.
      while threading.active_count() > threads:
        time.sleep(0.01)
  return {name: np.array(values) for name, values in spent.items()}


def report_programs(spent: dict[str, np.ndarray], *, files: int) -> None:
  """The table of the programs; the decode is the unit."""
  print(
    f'{files} files, {_CORES} cores, {_ROUNDS.value} rounds of {_IMAGES.value} '
    'images\n'
    f'{"":18}{"images/s a core":>16}{"quartiles":>14}{"/ decode":>10}'
    f'{"us of a core":>16}{"quartiles":>14}{"/ decode":>10}'
  )
  base = np.median(spent['decode'], axis=0)
  for name, values in spent.items():
    rates = 1e6 / (_CORES * values[:, 0])
    columns = []
    for column, ratio in zip(
      (rates, values[:, 1]), base / np.median(values, axis=0), strict=True
    ):
      low, middle, high = np.percentile(column, [25, 50, 75])
      columns.append(
        f'{middle:16.0f}{f"{low:.0f}-{high:.0f}":>14}{ratio:10.2f}'
      )
    print(f'{name:18}' + ''.join(columns))


def time_stages(
  source: sources.Source, config: ml_collections.ConfigDict
) -> dict[str, tuple[float, int, int]]:
  """Each stage's microseconds of a core an image, with all cores at it.

  With it stands how often one view and two views take it.
  """
  rng = np.random.default_rng(0)
  size, batch_size = config.data.size, config.batch_size
  paths = [path for path, _ in source.train]
  datas = [Path(path).read_bytes() for path in paths]
  images = [jpeg.decode(*x) for x in zip(datas, paths, strict=True)]
  crops = [augment.random_resized_crop(image, size, rng) for image in images]

  def stack() -> None:
    for start in range(0, len(crops), batch_size):
      np.stack(crops[start : start + batch_size])

  def read(path: str) -> bytes:
    with open(path, 'rb') as file:
      return file.read()

  def crop(image: np.ndarray) -> np.ndarray:
    return augment.random_resized_crop(image, size, rng)

  def flip(image: np.ndarray) -> np.ndarray:
    return augment.flip(image, rng)

  def auto_augment(image: np.ndarray) -> np.ndarray:
    return autoaugment.auto_augment(image, rng)

  # Keeps nothing, as the pipeline does.
  run_through: Callable[..., object] = functools.partial(
    collections.deque, maxlen=0
  )
  stages: dict[str, tuple[Callable[[], object], int, int]] = {
    'read': (lambda: run_through(map(read, paths)), 1, 1),
    'decode': (lambda: run_through(map(jpeg.decode, datas, paths)), 1, 1),
    'crop and resize': (lambda: run_through(map(crop, images)), 1, 2),
    'flip': (lambda: run_through(map(flip, crops)), 1, 2),
    'AutoAugment': (lambda: run_through(map(auto_augment, crops)), 0, 1),
    'stack': (stack, 1, 2),
  }

  def time_of(stage: Callable[[], object]) -> float:
    start = time.thread_time()
    stage()
    return 1e6 * (time.thread_time() - start) / len(images)

  def median_of(stage: Callable[[], object]) -> float:
    times = threads.map(time_of, [stage] * 5 * _CORES)
    return float(np.median(list(times)))

  # In threads beside the main one, whose memory the C library gives back to the
  # system and gets again for each image.
  with futures.ThreadPoolExecutor(_CORES) as threads:
    return {
      name: (median_of(stage), one, two)
      for name, (stage, one, two) in stages.items()
    }


def report_stages(
  stages: dict[str, tuple[float, int, int]], spent: dict[str, np.ndarray]
) -> None:
  """Where the time of a core goes, for one view and for two."""
  print(f'\n{"us of a core":18}{ONE:>18}{TWO:>18}')
  rest = np.array([np.median(spent[name][:, 1]) for name in (ONE, TWO)])
  for name, (microseconds, *times) in stages.items():
    columns = microseconds * np.array(times)
    rest -= columns
    print(f'{name:18}' + ''.join(f'{x:18.0f}' for x in columns))
  print(f'{"all else":18}' + ''.join(f'{x:18.0f}' for x in rest))


def time_taking(
  source: sources.Source,
  config: ml_collections.ConfigDict,
  images: Sequence[str],
) -> float:
  """Microseconds of this process for an image that a worker process makes."""
  config = config.copy_and_resolve_references()
  config.run.workers = _CORES
  config.run.threads = 1
  with reading(source, config, images) as run:
    start = time.process_time()
    run(_IMAGES.value)
    return 1e6 * (time.process_time() - start) / _IMAGES.value


def report_host(spent: dict[str, np.ndarray], taking: dict[str, float]) -> None:
  """What one process can deliver, and what a TPU v3 host needs."""
  cores = {name: float(np.median(x[:, 1])) for name, x in spent.items()}
  locked = {ONE: cores[TINY_ONE], TWO: cores[TINY_TWO]}
  print(f'\n{"images/s of a process, at most":34}{ONE:>18}{TWO:>18}')
  for name, times in (('by threads', locked), ('from workers', taking)):
    rates = ''.join(f'{1e6 / times[views]:18,.0f}' for views in (ONE, TWO))
    print(f'{name:34}{rates}')
  print(
    f'\n{"a v3 host needs":20}{"images/s":>10}{"of its lock":>13}'
    f'{"processes":>11}{"cores":>8}'
  )
  for method, (views, rate) in NEEDED.items():
    share = rate * locked[views] / 1e6
    print(
      f'{method:20}{rate:10,.0f}{share:13.2f}{math.ceil(share):11}'
      f'{rate * cores[views] / 1e6:8.1f}'
    )


if __name__ == '__main__':
  command.run(main)
