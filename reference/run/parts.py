"""The parts of a run: mesh, model, optimizer, first state, compiled step."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference.run import checks, methods, models, own_model, step


def make_mesh(batch_size: int, *, accumulate: int = 1) -> Mesh:
  """All devices along one axis, 'data'.

  Raises:
    ValueError: when the batch does not divide evenly over them.
  """
  checks.check_batch(batch_size, jax.device_count(), accumulate=accumulate)
  # In the order of the processes, so that each holds a contiguous part.
  return Mesh(
    np.asarray(sorted(jax.devices(), key=lambda x: (x.process_index, x.id))),
    ('data',),
    axis_types=(AxisType.Auto,),
  )


def make_placement(
  mesh: Mesh,
) -> Callable[[dict[str, np.ndarray]], dict[str, jax.Array]]:
  """A function that splits a batch over the devices.

  It takes this process's part of the batch.
  """
  sharding = NamedSharding(mesh, P('data'))

  def place(batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {
      name: jax.make_array_from_process_local_data(sharding, array)
      for name, array in batch.items()
    }

  return place


def describe_batch(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> dict[str, jax.ShapeDtypeStruct]:
  """Shapes, dtypes and shardings of a batch, split over the devices."""
  size, channels = config.data.size, len(config.data.mean)
  sharding = NamedSharding(mesh, P('data'))

  def describe(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(
      (config.batch_size, *shape), dtype, sharding=sharding
    )

  return {
    'label': describe((), jnp.int32),
    **{
      name: describe((size, size, channels), jnp.uint8)
      for name in methods.METHODS[config.method].images
    },
  }


def make_model(
  config: ml_collections.ConfigDict, *, num_classes: int
) -> models.Model:
  """The model that `config.model` describes: the user's own, or a ResNet."""
  if config.model.get('build'):
    return own_model.build(config.model, num_classes)
  return models.ResNet(
    num_classes=num_classes,
    stage_sizes=tuple(config.model.stage_sizes),
    filters=config.model.filters,
    block=config.model.block,
    stem=config.model.stem,
    dtype=jnp.dtype(config.model.dtype),
    # A config of before has none.
    padding=config.model.get('padding', 'same'),
  )


def make_optimizer(
  config: ml_collections.ConfigDict, *, images: int, groups: int = 1
) -> tuple[optax.GradientTransformation, optax.Schedule, int]:
  """LARS, its schedule, and the number of steps.

  Args:
    config: of the run.
    images: in an epoch of training.
    groups: whose gradients a step averages.
  """
  steps = math.ceil(config.epochs * images / config.batch_size)
  warmup = round(config.lars.warmup_epochs * images / config.batch_size)
  checks.check_warmup(config, warmup=warmup, steps=steps)
  checks.check_plain_steps(
    config, plain=plain_steps(config, images), steps=steps
  )
  schedule = conadv.polynomial_warmup(
    config.lars.peak,
    warmup,
    steps,
    power=config.lars.power,
    end=config.lars.end,
  )
  method = methods.METHODS[config.method]
  is_absa = method.gradient == 'absa'
  tx = conadv.lars(
    # The step multiplies ABSA's updates by the schedule.
    1.0 if is_absa else schedule,
    weight_decay=config.lars.weight_decay,
    momentum=config.lars.momentum,
  )
  if is_absa:
    tx = conadv.adaptive_multi_steps(tx)
  if method.compares == 'gsnr':
    tx = optax.chain(conadv.scale_by_gsnr(), tx)
  if method.compares == 'agvm':
    tx = conadv.agvm(tx, groups=groups, **config.methods.agvm)
  if method.agents:
    # LARS has norms, which are those of one agent.
    tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  return tx, schedule, steps


def shardings(
  config: ml_collections.ConfigDict, state: step.TrainState, mesh: Mesh
) -> step.TrainState:
  """Where a state lies: the queue is split like the batch, most else not.

  Args:
    config: of the run.
    state: arrays, or their shapes.
    mesh: the devices.
  """
  everywhere = NamedSharding(mesh, P())
  of_groups = NamedSharding(mesh, P('data'))
  if methods.METHODS[config.method].agents:
    alone = jax.tree.map(lambda _: of_groups, state)
    return alone._replace(step=everywhere, key=everywhere)
  queue = NamedSharding(mesh, P(None, 'data'))
  of_images = queue
  if config.queue_memory == 'host':
    of_images = queue.with_memory_kind('pinned_host')

  def of_part(part: Any) -> Any:
    if isinstance(part, conadv.ConAdvState):
      return conadv.ConAdvState(
        jax.tree.map(lambda _: everywhere, part.slot),
        # Labels are small, and TPUs write no part of a vector on the host.
        jax.tree.map(lambda x: of_images if x.ndim > 2 else queue, part.queue),
      )
    if isinstance(part, conadv.PerGroup):
      return jax.tree.map(lambda _: of_groups, part)
    return everywhere

  return jax.tree.map(
    of_part,
    state,
    is_leaf=lambda x: isinstance(x, conadv.ConAdvState | conadv.PerGroup),
  )


def describe_state(
  config: ml_collections.ConfigDict,
  model: models.Model,
  tx: optax.GradientTransformation,
  grad_fn: conadv.GradientFunction | conadv.Diffusion,
  mesh: Mesh,
) -> step.TrainState:
  """Shapes, dtypes and shardings of the state that `make_state` makes."""
  batches = [describe_batch(config, mesh)] * grad_fn.staleness
  state = jax.eval_shape(
    step.make_state(model, tx, grad_fn, config, mesh),
    jax.random.key(0),
    batches,
  )
  return jax.tree.map(
    lambda x, sharding: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=sharding
    ),
    state,
    shardings(config, state, mesh),
  )


def make_state(
  config: ml_collections.ConfigDict,
  model: models.Model,
  tx: optax.GradientTransformation,
  grad_fn: conadv.GradientFunction | conadv.Diffusion,
  mesh: Mesh,
  first_batches: list[step.Batch],
  described: step.TrainState,
  start: dict[tuple[str, ...], np.ndarray] | None = None,
) -> step.TrainState:
  """The state before the first step, on all devices, as it is described."""
  init_fn = step.make_state(model, tx, grad_fn, config, mesh)
  # Made where it belongs: a queue for the host may be too large to be made on
  # the device and moved.
  where = jax.tree.map(lambda x: x.sharding, described)
  return jax.jit(init_fn, out_shardings=where)(
    jax.random.key(config.seed), first_batches, start
  )


def make_step(
  config: ml_collections.ConfigDict,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  grad_fn: conadv.GradientFunction | conadv.Diffusion,
  state: step.TrainState,
  mesh: Mesh,
) -> jax.stages.Compiled:
  """The compiled step, which replaces the state in place.

  Compiled ahead of the run, it cannot compile again during it: a batch of
  another shape is an error. Of the state only shapes, dtypes and shardings
  are read, so that it compiles for devices that are not there too.
  """
  step_fn = step.make_step(grad_fn, tx, schedule, config, mesh)
  return _compile(step_fn, config, state, mesh)


def plain_steps(config: ml_collections.ConfigDict, images: int) -> int:
  """How many steps `config.plain_epochs` are, of so many images an epoch."""
  return round(config.get('plain_epochs', 0.0) * images / config.batch_size)


def make_plain_step(
  config: ml_collections.ConfigDict,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  model: models.Model,
  state: step.TrainState,
  mesh: Mesh,
) -> jax.stages.Compiled:
  """The compiled step of `config.plain_epochs`, on the state of the method."""
  step_fn = step.make_plain_step(model, tx, schedule, config, mesh)
  return _compile(step_fn, config, state, mesh)


def _compile(
  step_fn: Callable[..., tuple[step.TrainState, step.Metrics]],
  config: ml_collections.ConfigDict,
  state: step.TrainState,
  mesh: Mesh,
) -> jax.stages.Compiled:
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(step_fn, donate_argnums=0, out_shardings=(shardings, None))
  return jitted.lower(state, describe_batch(config, mesh)).compile()
