"""The training run, stage by stage."""

import contextlib
import dataclasses
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import grain
import jax
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh

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
  parts,
  step,
  stopping,
  storage,
)


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
    described = parts.describe_state(*common)
    restored = checkpoint.restore(
      self.workdir, described, batches, self.software
    )
    if restored is not None:
      state, stored = restored
      return state, agreement.go_on(stored, about, int(state.step))
    start = None
    if init_from is not None:
      # A host may lack the model, or read an older one.
      start, origin = hosts.on_all(
        lambda: initial.fit(
          init_from,
          self.config,
          self.source.classes,
          make_model=lambda n: parts.make_model(self.config, num_classes=n),
        )
      )
      hosts.check_alike({**origin, 'weights': initial.digest(start)})
      about = about._replace(init_from=origin)
    first = [self.place(next(batches)) for _ in range(self.grad_fn.staleness)]
    return parts.make_state(*common, first, described, start), about

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
    common = self.config, self.tx, self.schedule
    take = plain = parts.make_step(*common, self.grad_fn, state, self.mesh)
    first = parts.plain_steps(self.config, len(self.source.train))
    if int(state.step) < first:
      plain = parts.make_plain_step(*common, self.model, state, self.mesh)
    return loop.run_steps(
      self.config,
      state,
      steps=self.steps,
      step_after=lambda done: plain if done < first else take,
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
) -> _Job:
  """Opens the images and makes what is made of a config; checks both."""
  # A host may lack the images.
  source = hosts.on_all(lambda: sources.open_source(config.data))
  checks.check_classes(config, source.num_classes)
  dataset = agreement.describe(source)
  hosts.check_alike({**dataset, 'classes': source.num_classes})
  # A host may lack the file of a model of the user's own.
  model = hosts.on_all(
    lambda: parts.make_model(config, num_classes=source.num_classes)
  )
  tx, schedule, steps = parts.make_optimizer(
    config, images=len(source.train), groups=methods.groups(config, mesh)
  )
  return _Job(
    config,
    workdir,
    software,
    mesh,
    parts.make_placement(mesh),
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
      'accept': sorted(accept),
      **checkpoint.fields(config),
      **software,
    }
  )
  checks.check_choices(config)
  checks.check_numbers(config)
  checks.check_channels(config)
  mesh = parts.make_mesh(config.batch_size, accumulate=config.accumulate)
  checks.check_on(config, mesh)
  with contextlib.ExitStack() as stack:
    storage.check_shared(workdir)
    held = stack.enter_context(lock.hold(workdir))
    stop = stack.enter_context(stopping.watch(held.release))
    newest = checkpoint.read_about(workdir)
    if newest is not None:
      fields = checkpoint.comparable(config)
      agreement.check_config(workdir, *newest, fields, accept)
      if init_from is not None:
        agreement.check_init_from(workdir, *newest, init_from)
    job = _open_job(config, workdir, software, mesh)
    if newest is not None:
      agreement.check_dataset(workdir, *newest, job.dataset, accept)
    batches = job.train_batches()
    stack.callback(batches.close)
    state, about = job.begin(batches, init_from)
    done = int(state.step)
    manager = stack.enter_context(
      checkpoint.open_manager(workdir, keep=config.run.keep)
    )
    writes = hosts.is_first()
    writers = hosts.on_all(
      lambda: metrics.make_writer(config, workdir) if writes else ()
    )
    if writes:
      announce(config, job.source, mesh, about, done=done, steps=job.steps)
    record = metrics.open_record(
      workdir,
      last_step=done,
      write=writes,
      writers=writers,
      check=held.check,
    )
    stack.callback(metrics.close, record)
    evaluate = job.make_evaluation()

    def save(state: step.TrainState) -> None:
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
