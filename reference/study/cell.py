"""One cell of a study: a run of the main job's step on images in memory."""

import functools
import itertools
import operator
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference.command import Mistake
from reference.data import augment, jpeg, sources
from reference.run import (
  checks,
  evaluation,
  loop,
  methods,
  objective,
  parts,
  step,
)
from reference.study import sharpness
from reference.tools import predictions

# Fields that a compiled step takes as numbers: cells that differ in these and
# in the seed share it.
TRACED = ('lars.peak', 'attack.epsilon')
# Far from the numbers that split the same key for model, attack and steps.
_AUGMENTATION = 1000
_EVALUATION_BATCH = 1000
Numbers = dict[str, np.float32]
Row = dict[str, Any]


class Split(NamedTuple):
  """Images, uint8 (N, H, W, C), and their labels, int32 (N,)."""

  images: Any
  labels: Any


class Data(NamedTuple):
  """What is trained on, what tunes the peak, and what is reported."""

  train: Split
  validation: Split
  test: Split
  num_classes: int


class Program(NamedTuple):
  """The compiled functions of all cells that differ in `TRACED` and the seed.

  Attributes:
    init: `(numbers, key, train, indices)` to the first state, with indices of
      the first batches, int32 (staleness, batch).
    step: `(numbers, state, key, train, position, indices)` to the next state
      and its metrics, with the number of the newest batch and its indices.
    plain_step: likewise, of the plain epochs.
    train: the images, on the device.
    staleness: how many batches `init` takes.
    steps: of a run.
    plain_steps: how many of them are plain, the first.
  """

  init: Callable[..., step.TrainState]
  step: Callable[..., tuple[step.TrainState, step.Metrics]]
  plain_step: Callable[..., tuple[step.TrainState, step.Metrics]]
  train: Split
  staleness: int
  steps: int
  plain_steps: int


class Measures(NamedTuple):
  """What a trained model is measured by; the same for all cells.

  Attributes:
    evaluate: `(state, batches)` to the accuracy, as the main job counts it.
    attack: `(params, batch_stats, batch, key)` to the batch after PGD-20.
    sharpness: `(params, batch_stats, batch)` to columns.
  """

  evaluate: Callable[..., dict[str, float]]
  attack: Callable[..., step.Batch]
  sharpness: Callable[..., dict[str, float]]


def load(config: ml_collections.ConfigDict) -> Data:
  """The images of a study.

  The validation images and those that are trained on stand in this order in a
  fixed shuffle of the source's training images; its held-out ones are the test
  images, shuffled too where they stand class by class.

  Raises:
    Mistake: when there are fewer images than asked for, one cannot be read, or
      the config is for others.
  """
  checks.check_channels(config)
  if config.data.eval_crop != 'resize':
    raise Mistake(
      'A study makes all of its images smaller alike. Given data.eval_crop='
      f'{config.data.eval_crop!r}. Take `--config.data.eval_crop=resize`.'
    )
  source = sources.open_source(config.data)
  order = np.random.default_rng(0).permutation(len(source.train))
  held, used = config.study.validation_images, config.study.train_images
  if held + used > len(order):
    raise Mistake(
      '`study.train_images` and `study.validation_images` share the training '
      f'images. Given {used} and {held} of {len(order)}. Take fewer: '
      f'`--config.study.train_images={len(order) - held}`.'
    )

  def split(records: list[Any]) -> Split:
    size, channels = config.data.size, len(config.data.mean)
    images = np.zeros((len(records), size, size, channels), np.uint8)
    labels = np.zeros(len(records), np.int32)
    for i, record in enumerate(records):
      try:
        image, labels[i] = source.read(record)
      except jpeg.BadImageError as error:
        raise Mistake(
          f'A study reads past no image. {error.path} cannot be read: '
          f'{error.reason}. Likely the copy broke off: copy it again.'
        ) from error
      images[i] = augment.resize(image, size)
    return Split(images, labels)

  test = split(list(source.held_out))
  # As in folders. Some measures take the first of them, for a sample of all.
  if (np.diff(test.labels) >= 0).all():
    mixed = np.random.default_rng(0).permutation(len(test.labels))
    test = Split(test.images[mixed], test.labels[mixed])
  return Data(
    train=split([source.train[i] for i in order[held : held + used]]),
    validation=split([source.train[i] for i in order[:held]]),
    test=test,
    num_classes=source.num_classes,
  )


def batches_of(split: Split) -> list[step.Batch]:
  """All images of a split, for evaluation, in batches of one size."""
  count = len(split.labels)
  size = min(_EVALUATION_BATCH, count)
  batches = []
  for start in range(0, count, size):
    at = np.arange(start, start + size)
    # What stands after the last image does not count.
    images, labels = split.images[at % count], split.labels[at % count]
    batches.append({'image': images, 'label': labels, 'mask': at < count})
  return batches


def order_of(seed: int, images: int, batch_size: int) -> Iterator[np.ndarray]:
  """Which images stand in each batch: epoch after epoch, each shuffled."""
  left = np.zeros(0, np.int32)
  epoch = 0
  while True:
    while len(left) < batch_size:
      rng = np.random.default_rng((seed, epoch))
      left = np.concatenate([left, rng.permutation(images).astype(np.int32)])
      epoch += 1
    yield left[:batch_size]
    left = left[batch_size:]


def _check(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses what the main job refuses, and images that it makes on the host."""
  checks.check_choices(config)
  checks.check_numbers(config)
  checks.check_batch(config.batch_size, mesh.size, accumulate=config.accumulate)
  checks.check_on(config, mesh)
  method = methods.METHODS[config.method]
  crop, flip = config.data.crop, config.data.flip
  if method.copies and crop != 'resize':
    raise Mistake(
      f'`{config.method}` crops its copies itself. Given data.crop={crop!r}, '
      'which would crop them twice. Take `--config.data.crop=resize`.'
    )
  if not method.copies and (
    crop not in ('pad', 'resize') or (crop == 'resize' and flip)
  ):
    raise Mistake(
      'A study augments on the device: `data.crop` is pad, with or without '
      f'flips, or resize without. Given {crop!r} with flip={flip}. Likely it '
      'is the config of another job: `--config.data.crop=pad`.'
    )
  if method.agents or method.gradient == 'absa':
    raise Mistake(
      'A study trains one model, on batches of one size. Given '
      f'method={config.method!r}. Take the main job: `python -m reference.main '
      f'--config.method={config.method}`.'
    )
  if method.images != ('image',):
    raise Mistake(
      'A study has no AutoAugment, which is made on the host. Given '
      f'method={config.method!r}. Take the padded crops and flips of the '
      'device, `--config.data.crop=pad`.'
    )


def numbers_of(config: ml_collections.ConfigDict) -> Numbers:
  """The fields of `TRACED`."""
  numbers = {}
  for name in TRACED:
    part, field = name.split('.')
    numbers[name] = np.float32(config[part][field])
  return numbers


def make_program(
  config: ml_collections.ConfigDict, data: Data, device: jax.Device
) -> Program:
  """Compiles the main job's first state and step, for images on a device.

  Raises:
    Mistake: for a config that cannot run.
  """
  mesh = Mesh(np.asarray([device]), ('data',), axis_types=(AxisType.Auto,))
  _check(config, mesh)
  model = parts.make_model(config, num_classes=data.num_classes)
  images = len(data.train.labels)
  groups = methods.groups(config, mesh)

  def parts_of(numbers: Any) -> tuple[Any, Any, Any]:
    # The numbers are traced, which a config with types refuses.
    traced = ml_collections.ConfigDict(config.to_dict(), type_safe=False)
    traced.update_from_flattened_dict(numbers)
    tx, schedule, _ = parts.make_optimizer(traced, images=images, groups=groups)
    return tx, schedule, methods.make_gradient(model, traced, mesh)

  def batch_of(
    key: jax.Array, split: Split, position: Any, indices: jax.Array
  ) -> step.Batch:
    batch = {'image': split.images[indices], 'label': split.labels[indices]}
    if config.data.crop == 'pad':
      key = jax.random.fold_in(key, _AUGMENTATION)
      key = jax.random.fold_in(key, position)
      batch = methods.make_augmentation(config)(key, batch)
    return batch

  def init_fn(
    numbers: Any, key: jax.Array, split: Split, indices: jax.Array
  ) -> step.TrainState:
    tx, _, grad_fn = parts_of(numbers)
    first = [
      batch_of(key, split, i, indices[i]) for i in range(indices.shape[0])
    ]
    return step.make_state(model, tx, grad_fn, config, mesh)(key, first)

  def step_fn(
    numbers: Any,
    state: step.TrainState,
    key: jax.Array,
    split: Split,
    position: jax.Array,
    indices: jax.Array,
    *,
    is_plain: bool,
  ) -> tuple[step.TrainState, step.Metrics]:
    tx, schedule, grad_fn = parts_of(numbers)
    batch = batch_of(key, split, position, indices)
    rest = tx, schedule, config, mesh
    take = (
      step.make_plain_step(model, *rest)
      if is_plain
      else step.make_step(grad_fn, *rest)
    )
    return take(state, batch)

  _, _, steps = parts.make_optimizer(config, images=images, groups=groups)
  staleness = methods.make_gradient(model, config, mesh).staleness
  numbers, key = numbers_of(config), jax.random.key(0)
  indices = np.zeros((staleness, config.batch_size), np.int32)
  on_device = NamedSharding(mesh, P())
  split, key = jax.device_put((data.train, key), on_device)
  # Compiled here, they cannot compile again, as in the main job.
  init = jax.jit(init_fn, out_shardings=on_device)
  compiled_init = init.lower(numbers, key, split, indices).compile()
  state = compiled_init(numbers, key, split, indices)
  batch = np.int32(0), np.zeros(config.batch_size, np.int32)

  def compile_step(*, is_plain: bool) -> Any:
    jitted = jax.jit(
      functools.partial(step_fn, is_plain=is_plain),
      donate_argnums=1,
      out_shardings=(on_device, None),
    )
    return jitted.lower(numbers, state, key, split, *batch).compile()

  of_method = plain = compile_step(is_plain=False)
  plain_steps = parts.plain_steps(config, images)
  if plain_steps:
    plain = compile_step(is_plain=True)
  return Program(
    compiled_init, of_method, plain, split, staleness, steps, plain_steps
  )


def make_measures(
  config: ml_collections.ConfigDict, num_classes: int
) -> Measures:
  """The measures of a study."""
  model = parts.make_model(config, num_classes=num_classes)
  loss_fn = objective.make_evaluation_loss(model, config)
  adversary = predictions.Adversary(config.study.robust_epsilon / 255, 20)
  attack = jax.jit(predictions.attack(config, model, adversary))

  evaluate = evaluation.make_evaluation(model, config, lambda batch: batch)
  return Measures(evaluate, attack, sharpness.make_sharpness(loss_fn))


def run(
  config: ml_collections.ConfigDict,
  program: Program,
  measures: Measures,
  data: Data,
  *,
  final: bool,
) -> Row:
  """Trains a cell, and measures it.

  Args:
    config: of the cell.
    program: for it.
    measures: of the study.
    data: of the study.
    final: whether it is measured on the test images, and in every way, or is a
      trial, of which the accuracy on the validation images is all.

  Returns:
    The results by column; of a run that diverges its last step as 'diverged'
    and no accuracy.
  """
  started = time.perf_counter()
  place = program.train.labels.sharding
  key = jax.device_put(jax.random.key(config.seed), place)
  measured_on = data.test if final else data.validation
  held_out = jax.device_put(batches_of(measured_on), place)
  numbers, steps = numbers_of(config), program.steps
  order = order_of(config.seed, len(data.train.labels), config.batch_size)
  first = [next(order) for _ in range(program.staleness)]
  indices = np.asarray(first, np.int32).reshape(-1, config.batch_size)
  state = program.init(numbers, key, program.train, indices)

  row: Row = {'steps': steps, 'staleness': program.staleness}
  curve: list[str] = []
  elapsed: list[float] = []
  read: list[dict[str, float]] = []
  every = config.study.evaluate_every
  epochs = [*np.arange(0, config.epochs, every), config.epochs]
  ends = sorted({round(steps * epoch / config.epochs) for epoch in epochs})
  for begin, end in itertools.pairwise(ends):
    begun = time.perf_counter()
    pending = []
    for done in range(begin, end):
      position = np.int32(done + program.staleness)
      is_plain = done < program.plain_steps
      take = program.plain_step if is_plain else program.step
      state, values = take(
        numbers, state, key, program.train, position, next(order)
      )
      pending.append(values)
    try:
      read += [
        loop.fetch(values, done=done, workdir=Path())
        for done, values in enumerate(pending, begin + 1)
      ]
    except FloatingPointError:
      return row | {
        'diverged': end,
        'seconds': time.perf_counter() - started,
      }
    elapsed.append(time.perf_counter() - begun)
    accuracy = measures.evaluate(state, held_out)['held_out_accuracy']
    curve.append(f'{end * config.epochs / steps:.4g}:{accuracy:.4f}')

  trained = jax.device_put(batches_of(data.train), place)
  fitted = measures.evaluate(state, trained)['held_out_accuracy']
  seconds = sum(elapsed) / steps
  # Steps of two kinds have no middle.
  if not program.plain_steps:
    taken = (end - begin for begin, end in itertools.pairwise(ends))
    seconds = statistics.median(map(operator.truediv, elapsed, taken))
  last_epoch = read[-max(1, round(steps / config.epochs)) :]
  row |= {
    'accuracy': accuracy,
    'accuracy_by_epoch': ' '.join(curve),
    'train_accuracy': fitted,
    'gap': fitted - accuracy,
    'seconds_a_step': seconds,
  }
  means = loop.average(last_epoch)
  for name in ('loss_main', 'loss_adversarial', 'noise_scale'):
    if name in means:
      row[name] = means[name]
  if final:
    row |= _measure(config, measures, state, data, place)
  return row | {'seconds': time.perf_counter() - started}


def _measure(
  config: ml_collections.ConfigDict,
  measures: Measures,
  state: step.TrainState,
  data: Data,
  place: jax.sharding.Sharding,
) -> Row:
  """Robustness, and for the first seeds sharpness."""
  params = conadv.dual_bn.main(state.params)
  batch_stats = conadv.dual_bn.main(state.model_state)
  row: Row = {}
  if count := config.study.robust_images:
    part = Split(*(array[:count] for array in data.test))
    batches = jax.device_put(batches_of(part), place)
    key = jax.random.key(0)
    attacked = [measures.attack(params, batch_stats, x, key) for x in batches]
    result = measures.evaluate(state, attacked)
    row['robust_accuracy'] = result['held_out_accuracy']
    row['robust_images'] = result['held_out_images']
  if config.seed < config.study.sharpness_seeds:
    batch = jax.device_put(batches_of(data.train)[0], place)
    row |= measures.sharpness(params, batch_stats, batch)
  return row
