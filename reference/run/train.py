"""The training run, stage by stage."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference.data import input_pipeline, jpeg, sources
from reference.run import (
  absa,
  agreement,
  checkpoint,
  checks,
  evaluation,
  hosts,
  initial,
  lock,
  loop,
  methods,
  metrics,
  models,
  own_model,
  step,
  stopping,
  storage,
)


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
  shardings = jax.tree.map(lambda x: x.sharding, state)
  jitted = jax.jit(
    step.make_step(grad_fn, tx, schedule, config, mesh),
    donate_argnums=0,
    out_shardings=(shardings, None),
  )
  return jitted.lower(state, describe_batch(config, mesh)).compile()


def announce(
  config: ml_collections.ConfigDict,
  source: sources.Source,
  mesh: Mesh,
  about: agreement.About,
  *,
  done: int,
  steps: int,
) -> None:
  """Prints what is about to run, and how it came to be."""
  print(
    f'{config.name}, {config.method}: {len(source.train)} training and '
    f'{len(source.held_out)} held-out images in {source.num_classes} '
    f'classes; batches of {config.batch_size} on {mesh.size} '
    f'{jax.default_backend()} device(s), {config.accumulate} '
    f'micro-batch(es) each; {done} of {steps} steps done.',
    *agreement.lines(about),
    sep='\n',
    flush=True,
  )


def report(
  record: metrics.Record, workdir: Path, *, skipped: jpeg.Skipped
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


def _part() -> dict[str, int]:
  """Which rows of every batch this process makes."""
  return {'host': jax.process_index(), 'hosts': jax.process_count()}


@dataclasses.dataclass(frozen=True)
class _Job:
  """What the stages of a run share.

  Attributes:
    config: of the run.
    workdir: its folder.
    software: versions of all that computes, at the start.
    mesh: the devices.
    place: splits a batch over them.
    source: the images.
    dataset: what a checkpoint says of them.
    model: of the classes of the source.
    tx: the optimizer.
    schedule: its learning rate.
    steps: of the whole run.
    grad_fn: of the method.
    skipped: unreadable images for training; grows while they are read.
    held_out_skipped: likewise those for evaluation.
  """

  config: ml_collections.ConfigDict
  workdir: Path
  software: dict[str, str]
  mesh: Mesh
  place: Callable[[dict[str, np.ndarray]], step.Batch]
  source: sources.Source
  dataset: dict[str, Any]
  model: models.Model
  tx: optax.GradientTransformation
  schedule: optax.Schedule
  steps: int
  grad_fn: conadv.GradientFunction | conadv.Diffusion
  skipped: jpeg.Skipped
  held_out_skipped: jpeg.Skipped

  def train_batches(self) -> grain.DatasetIterator:
    """This process's rows of the batches, from the first on."""
    return input_pipeline.train_batches(
      self.source,
      self.config,
      skipped=self.skipped,
      images=methods.METHODS[self.config.method].images,
      **_part(),
    )

  def begin(
    self, batches: grain.DatasetIterator, init_from: Path | None
  ) -> tuple[step.TrainState, agreement.About]:
    """The newest checkpoint's state, or a new one, and how it came to be."""
    common = self.config, self.model, self.tx, self.grad_fn, self.mesh
    about = agreement.About(
      checkpoint.comparable(self.config),
      self.dataset,
      [],
      names=self.source.names,
    )
    # Of a run that resumes, one state is in memory, not two.
    described = describe_state(*common)
    restored = checkpoint.restore(
      self.workdir, described, batches, self.software
    )
    if restored is not None:
      state, stored = restored
      return state, agreement.go_on(stored, about, int(state.step))
    start = None
    if init_from is not None:
      start, origin = initial.fit(
        init_from,
        self.config,
        self.source.classes,
        make_model=lambda n: make_model(self.config, num_classes=n),
      )
      about = about._replace(init_from=origin)
    first = [self.place(next(batches)) for _ in range(self.grad_fn.staleness)]
    return make_state(*common, first, described, start), about

  def make_evaluation(self) -> Callable[[step.TrainState], dict[str, float]]:
    """A function that counts the right answers on the held-out images."""
    evaluate_on = evaluation.make_evaluation(
      self.model, self.config, self.place
    )

    def evaluate(state: step.TrainState) -> dict[str, float]:
      held_out = input_pipeline.held_out_batches(
        self.source,
        self.config,
        # What a device holds at once.
        batch_size=self.config.batch_size // self.config.accumulate,
        skipped=self.held_out_skipped,
        **_part(),
      )
      return evaluate_on(state, held_out) | {
        'held_out_skipped': sum(hosts.gather(len(self.held_out_skipped)))
      }

    return evaluate

  def take_steps(
    self,
    state: step.TrainState,
    batches: grain.DatasetIterator,
    *,
    evaluate: Callable[[step.TrainState], dict[str, float]],
    save: Callable[[step.TrainState], None],
    stop: Callable[[int], bool],
    record: metrics.Record,
    changes: int,
  ) -> int:
    """Takes the steps that are left, or those until a stop; how many in all."""
    after_step = None
    if methods.METHODS[self.config.method].gradient == 'absa':
      after_step = absa.make_growth(
        self.model, self.config, self.source, self.place, self.mesh, **_part()
      )
    return loop.run_steps(
      self.config,
      state,
      steps=self.steps,
      train_step=make_step(
        self.config, self.tx, self.schedule, self.grad_fn, state, self.mesh
      ),
      next_batch=lambda: self.place(next(batches)),
      evaluation=evaluate,
      after_step=after_step,
      save=save,
      stop=stop,
      record=record,
      skipped=self.skipped,
      changes=changes,
      workdir=self.workdir,
    )


def _open_job(
  config: ml_collections.ConfigDict,
  workdir: Path,
  software: dict[str, str],
  mesh: Mesh,
  accept: Collection[str],
) -> _Job:
  """Opens the images and makes what is made of a config; checks both."""
  source = sources.open_source(config.data)
  checks.check_classes(config, source.num_classes)
  dataset = agreement.describe(source)
  hosts.check_alike({**dataset, 'classes': source.num_classes})
  checkpoint.check_dataset(workdir, dataset, accept=accept)
  model = make_model(config, num_classes=source.num_classes)
  tx, schedule, steps = make_optimizer(
    config, images=len(source.train), groups=methods.groups(config, mesh)
  )
  return _Job(
    config,
    workdir,
    software,
    mesh,
    make_placement(mesh),
    source,
    dataset,
    model,
    tx,
    schedule,
    steps,
    methods.make_gradient(model, config, mesh),
    skipped={},
    held_out_skipped={},
  )


def _evaluate_alone(
  config: ml_collections.ConfigDict,
  state: step.TrainState,
  evaluate: Callable[[step.TrainState], dict[str, float]],
  record: metrics.Record,
  done: int,
) -> None:
  """Adds the last row of a run that had no step left."""
  if hosts.is_first():
    print('The run is complete: it is only evaluated.')
  last = (
    record.rows.pop()
    # A damaged record may lack it.
    if record.rows and record.rows[-1]['step'] == done
    else {'step': done, 'epoch': config.epochs}
  )
  metrics.add(record, {**last, **evaluate(state)})


def train(
  config: ml_collections.ConfigDict,
  workdir: Path,
  *,
  accept: Collection[str] = (),
  init_from: Path | None = None,
) -> metrics.Row:
  """Trains, from the newest checkpoint in the work folder if there is one.

  Args:
    config: of the run; see `reference/configs`.
    workdir: receives checkpoints, metrics and the figure.
    accept: what may be another than in the checkpoint, as it is on purpose:
      'schedule', 'devices', 'data'.
    init_from: a work folder or an export, whose model a new run begins with.

  Returns:
    The last row of the metrics: held-out accuracy and all else by name.

  Raises:
    Mistake: for a config that cannot run, for a work folder of another, or
      where another run is, or that cannot be written to.
    FloatingPointError: when a loss or a norm is no longer finite.
    SystemExit: with status 128 plus the number of the signal that stopped the
      run, once the step under way is done and saved.
  """
  # Now, as files may change while the run goes on.
  software = hosts.software()
  hosts.check_alike(
    {
      'workdir': str(workdir),
      'init_from': str(init_from),
      **checkpoint.fields(config),
      **software,
    }
  )
  checks.check_choices(config)
  checks.check_numbers(config)
  checks.check_channels(config)
  mesh = make_mesh(config.batch_size, accumulate=config.accumulate)
  checks.check_on(config, mesh)
  with contextlib.ExitStack() as stack:
    storage.check_shared(workdir)
    held = stack.enter_context(lock.hold(workdir))
    stop = stack.enter_context(stopping.watch(held.release))
    checkpoint.check_config(workdir, config, accept=accept)
    if init_from is not None:
      checkpoint.check_init_from(workdir, init_from)
    job = _open_job(config, workdir, software, mesh, accept)
    batches = job.train_batches()
    stack.callback(batches.close)
    state, about = job.begin(batches, init_from)
    done = int(state.step)
    manager = stack.enter_context(
      checkpoint.open_manager(workdir, keep=config.run.keep)
    )
    writes = hosts.is_first()
    if writes:
      announce(config, job.source, mesh, about, done=done, steps=job.steps)
    record = metrics.open_record(
      workdir,
      last_step=done,
      write=writes,
      writers=metrics.make_writer(config, workdir) if writes else (),
    )
    stack.callback(metrics.close, record)
    evaluate = job.make_evaluation()

    def save(state: step.TrainState) -> None:
      if writes:
        held.check()
      checkpoint.save(manager, state, batches, about, software)

    if done >= job.steps:
      _evaluate_alone(config, state, evaluate, record, done)
    else:
      stop.saves = True
      done = job.take_steps(
        state,
        batches,
        evaluate=evaluate,
        save=save,
        stop=stop.reached,
        record=record,
        changes=len(about.changes),
      )
    if done < job.steps:
      checkpoint.finish(manager)
      number = stop.by()
      if writes:
        print(
          f'Stopped by {number.name} after step {done} of {job.steps}. It is '
          f'saved in {workdir}/checkpoints; the same command resumes from '
          'there.',
          flush=True,
        )
      raise SystemExit(128 + number)
    if writes:
      report(record, workdir, skipped=job.skipped | job.held_out_skipped)
  return record.rows[-1]
