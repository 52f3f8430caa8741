"""The training run, stage by stage."""

import contextlib
import difflib
import math
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference import (
  checkpoint,
  evaluate,
  input_pipeline,
  loop,
  metrics,
  models,
  sources,
  step,
)

_CHOICES = {
  'method': tuple(step.METHODS),
  'data.source': ('digits', 'jpeg_folder', 'array_record'),
  'data.crop': tuple(input_pipeline.TRAIN_CROPS),
  'data.eval_crop': tuple(input_pipeline.EVAL_CROPS),
  'data.on_bad_image': ('skip', 'stop'),
  'model.block': tuple(models.BLOCKS),
  'model.stem': ('small', 'imagenet'),
}


def check_choices(config: ml_collections.ConfigDict) -> None:
  """Refuses a field that names what does not exist.

  Raises:
    ValueError: naming the allowed values and the nearest.
  """
  for field, allowed in _CHOICES.items():
    given = config
    for name in field.split('.'):
      given = given[name]
    if given not in allowed:
      nearest = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.0)
      raise ValueError(
        f'`{field}` must be one of {", ".join(allowed)}. Given {given!r}. '
        f'Likely misspelt: `--config.{field}={nearest[0]}`.'
      )


def check_channels(config: ml_collections.ConfigDict) -> None:
  """Refuses AutoAugment of images that are not RGB.

  Raises:
    ValueError: naming what else to take.
  """
  channels = len(config.data.mean)
  if 'image_augmented' in step.METHODS[config.method].images and channels != 3:
    raise ValueError(
      'AutoAugment is for RGB images, of which `data.mean` has three values. '
      f'Given {config.method!r} and {channels}. Likely the images are grey: '
      'take a method without it, `--config.method=conadv`, or RGB images, '
      '`--config=reference/configs/jpeg_folder.py`.'
    )


def make_mesh(batch_size: int) -> Mesh:
  """All devices along one axis, 'data'.

  Raises:
    ValueError: when the batch does not divide evenly over them.
  """
  devices = jax.device_count()
  if batch_size % devices:
    nearest = max(devices, round(batch_size / devices) * devices)
    raise ValueError(
      'Every device takes the same share of a batch, so `batch_size` must be a '
      f'multiple of the number of devices. Given {batch_size} on {devices} '
      f'devices. Take the nearest: `--config.batch_size={nearest}`.'
    )
  return jax.make_mesh((devices,), ('data',), axis_types=(AxisType.Auto,))


def make_placement(
  mesh: Mesh,
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """A function that splits a batch from the host over the devices."""
  sharding = NamedSharding(mesh, P('data'))

  def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {
      name: jax.make_array_from_process_local_data(sharding, array)
      for name, array in batch.items()
    }

  return place


def make_model(
  config: ml_collections.ConfigDict, *, num_classes: int
) -> models.ResNet:
  """The ResNet that `config.model` describes."""
  return models.ResNet(
    num_classes=num_classes,
    stage_sizes=tuple(config.model.stage_sizes),
    filters=config.model.filters,
    block=config.model.block,
    stem=config.model.stem,
    dtype=jnp.dtype(config.model.dtype),
  )


def make_optimizer(
  config: ml_collections.ConfigDict, *, images: int
) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
  """LARS, its schedule, and the number of steps.

  Args:
    config: of the run.
    images: in an epoch of training.
  """
  steps = math.ceil(config.epochs * images / config.batch_size)
  schedule = conadv.polynomial_warmup(
    config.lars.peak,
    round(config.lars.warmup_epochs * images / config.batch_size),
    steps,
    power=config.lars.power,
    end=config.lars.end,
  )
  tx = conadv.lars(
    schedule,
    weight_decay=config.lars.weight_decay,
    momentum=config.lars.momentum,
  )
  return tx, schedule, steps


def make_state(
  config: ml_collections.ConfigDict,
  model: models.ResNet,
  tx: optax.GradientTransformation,
  grad_fn: conadv.GradientFunction,
  mesh: Mesh,
  first_batches: list[step.Batch],
) -> step.TrainState:
  """The state before the first step, on all devices."""
  init_fn = jax.jit(step.make_state(model, tx, grad_fn, config))
  state = init_fn(jax.random.key(config.seed), first_batches)
  # The queue is split like the batch already; all else is on every device.
  everywhere = NamedSharding(mesh, P())
  return jax.device_put(state._replace(conadv_state=None), everywhere)._replace(
    conadv_state=state.conadv_state
  )


def make_step(
  config: ml_collections.ConfigDict,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  grad_fn: conadv.GradientFunction,
  state: step.TrainState,
  place: Callable[[dict[str, np.ndarray]], step.Batch],
) -> Callable[..., tuple[step.TrainState, step.Metrics]]:
  """The compiled step, which replaces the state in place.

  Compiled ahead of the run, it cannot compile again during it: a batch of
  another shape is an error.
  """
  size, channels = config.data.size, len(config.data.mean)
  shape = (config.batch_size, size, size, channels)
  batch = {
    'label': np.zeros(config.batch_size, np.int32),
    **{
      name: np.zeros(shape, np.uint8)
      for name in step.METHODS[config.method].images
    },
  }
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(
    step.make_step(grad_fn, tx, schedule, config),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  return jitted.lower(state, place(batch)).compile()


def report(
  record: metrics.Record, workdir: Path, *, skipped: input_pipeline.Skipped
) -> None:
  """Draws the curves, and prints the result and where everything is."""
  final = record.rows[-1]
  metrics.draw(workdir / 'curves.png', record.rows)
  for path, reason in skipped.items():
    print(f'Skipped {path}: {reason}.')
  print(
    f'{final["held_out_accuracy"]:.2%} of {final["held_out_images"]:.0f} '
    f'held-out images right after {final["step"]:.0f} steps.\n'
    f'  curves       {workdir}/curves.png\n'
    f'  metrics      {record.path}\n'
    f'  TensorBoard  {workdir}/tensorboard\n'
    f'  checkpoints  {workdir}/checkpoints'
  )


def train(config: ml_collections.ConfigDict, workdir: Path) -> metrics.Row:
  """Trains, from the newest checkpoint in the work folder if there is one.

  Args:
    config: of the run; see `reference/configs`.
    workdir: receives checkpoints, metrics and the figure.

  Returns:
    The last row of the metrics: held-out accuracy and all else by name.

  Raises:
    ValueError: for a config that cannot run, or a work folder of another.
    FloatingPointError: when a loss or a norm is no longer finite.
  """
  check_choices(config)
  check_channels(config)
  mesh = make_mesh(config.batch_size)
  place = make_placement(mesh)
  skipped: input_pipeline.Skipped = {}
  held_out_skipped: input_pipeline.Skipped = {}
  with contextlib.ExitStack() as stack:
    manager = stack.enter_context(checkpoint.open_manager(workdir, config))
    source = sources.open_source(config.data)
    batches = input_pipeline.train_batches(
      source,
      config,
      skipped=skipped,
      images=step.METHODS[config.method].images,
    )
    stack.callback(batches.close)

    model = make_model(config, num_classes=source.num_classes)
    tx, schedule, steps = make_optimizer(config, images=len(source.train))
    grad_fn = conadv.data_parallel(step.make_gradient(model, config), mesh)
    first_batches = [place(next(batches)) for _ in range(grad_fn.staleness)]
    state = make_state(config, model, tx, grad_fn, mesh, first_batches)
    if manager.latest_step() is not None:
      state = checkpoint.restore(manager, state, batches)
    done = int(state.step)
    print(
      f'{config.name}, {config.method}: {len(source.train)} training and '
      f'{len(source.held_out)} held-out images in {source.num_classes} '
      f'classes; batches of {config.batch_size} on {mesh.size} '
      f'{jax.default_backend()} device(s); {done} of {steps} steps done.',
      flush=True,
    )

    record = metrics.open_record(workdir, last_step=done)
    stack.callback(record.writer.close)
    evaluate_on = evaluate.make_evaluation(model, config, place)

    def evaluation(state: step.TrainState) -> dict[str, float]:
      held_out = input_pipeline.held_out_batches(
        source, config, skipped=held_out_skipped
      )
      return evaluate_on(state, held_out) | {
        'held_out_skipped': len(held_out_skipped)
      }

    if done < steps:
      loop.run_steps(
        config,
        state,
        steps=steps,
        train_step=make_step(config, tx, schedule, grad_fn, state, place),
        next_batch=lambda: place(next(batches)),
        evaluation=evaluation,
        save=lambda state: checkpoint.save(manager, state, batches, config),
        record=record,
        skipped=skipped,
        workdir=workdir,
      )
    else:
      print('The run is complete: it is only evaluated.')
      last = (
        record.rows.pop()
        if record.rows
        else {'step': done, 'epoch': config.epochs}
      )
      metrics.add(record, {**last, **evaluation(state)})
    report(record, workdir, skipped=skipped | held_out_skipped)
  return record.rows[-1]
