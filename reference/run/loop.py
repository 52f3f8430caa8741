"""The loop over the steps that are left."""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import ml_collections

from reference import command
from reference.data import jpeg
from reference.run import hosts, metrics, progress, step

# An average over steps already, which may be infinite: where the gradient is
# lost in the noise.
_RUNNING = ('noise_scale',)


class Diverged(command.Mistake, FloatingPointError):
  """A loss or a norm that is no longer finite."""


def fetch(
  values: step.Metrics, *, done: int, workdir: Path
) -> dict[str, float]:
  """Reads the metrics of a step from the device, once it has run.

  Those of a branch whose pass had no turn are left out: its loss is NaN, and
  that of the step does not count it.

  Raises:
    Diverged: when one is infinite or not a number, which stops a run before
      what has diverged is saved.
  """
  read = {name: float(x) for name, x in jax.device_get(values).items()}
  if math.isfinite(read['loss']):
    for name in [x for x in read if x.startswith('loss_')]:
      if math.isnan(read[name]):
        del read[name], read[name.replace('loss_', 'accuracy_')]
  bad = {
    name: x
    for name, x in read.items()
    if not math.isfinite(x) and name not in _RUNNING
  }
  if bad:
    raise Diverged(
      f'Losses and norms must stay finite. At step {done}: {bad}. Likely the '
      'learning rate is too high or its warm-up too short: lower '
      '`--config.lars.peak`, raise `--config.lars.warmup_epochs`, and take '
      f'another --workdir. The last good checkpoint stays in {workdir}.'
    )
  return read


def average(rows: Sequence[dict[str, float]]) -> dict[str, float]:
  """The mean of each metric over the steps that have it."""
  names = dict.fromkeys(name for row in rows for name in row)
  return {
    name: statistics.fmean(row[name] for row in rows if name in row)
    for name in names
  }


def run_steps(
  config: ml_collections.ConfigDict,
  state: step.TrainState,
  *,
  steps: int,
  step_after: Callable[
    [int], Callable[..., tuple[step.TrainState, step.Metrics]]
  ],
  next_batch: Callable[[], step.Batch],
  evaluation: Callable[[step.TrainState], dict[str, float]],
  after_step: Callable[[step.TrainState, int], step.TrainState] | None,
  save: Callable[[step.TrainState], None],
  stop: Callable[[int], bool],
  record: metrics.Record,
  skipped: jpeg.Skipped,
  changes: int,
  workdir: Path,
) -> int:
  """Takes the steps that are left, and records, evaluates and saves.

  Args:
    config: of the run.
    state: to start from; it is donated.
    steps: of the whole run.
    step_after: the compiled step that follows so many.
    next_batch: the next batch, on the devices.
    evaluation: the held-out metrics of a state.
    after_step: takes the state and the number of steps done to the state that
      goes on.
    save: writes a checkpoint of a state.
    stop: says after each step, by the number of steps done, whether to save
      and leave.
    record: receives a row for every log, evaluation or checkpoint: the means
      over the steps since the row before.
    skipped: the unreadable training images of this process since its start.
    changes: how many were accepted where the run resumed; a row says so from
      the first on.
    workdir: named in the error when the loss is no longer finite.

  Returns:
    The number of steps done, fewer than `steps` after a stop.
  """
  done = int(state.step)
  bar = progress.make_bar(done=done, steps=steps, batch_size=config.batch_size)
  unread: step.Metrics | None = None
  window: list[dict[str, float]] = []
  started = time.perf_counter()
  with bar:
    while done < steps:
      state, values = step_after(done)(state, next_batch())
      # Read a step late, so that the device has work meanwhile.
      if unread is not None:
        window.append(fetch(unread, done=done, workdir=workdir))
      unread = values
      done += 1
      if after_step is not None:
        state = after_step(state, done)
      bar.update(config.batch_size)
      log_now, evaluate_now, save_now = (
        done % every == 0 or done == steps
        for every in (
          config.run.log_every,
          config.run.evaluate_every,
          config.run.checkpoint_every,
        )
      )
      stop_now = stop(done)
      if not (log_now or evaluate_now or save_now or stop_now):
        continue

      window.append(fetch(unread, done=done, workdir=workdir))
      seconds = time.perf_counter() - started
      row: dict[str, float] = {
        'step': done,
        'epoch': done / steps * config.epochs,
        **average(window),
        **{name: x for name, x in window[-1].items() if name in _RUNNING},
        'images_per_second': len(window) * config.batch_size / seconds,
        'skipped_since_start': sum(hosts.gather(len(skipped))),
        **({'changes': changes} if changes else {}),
      }
      if evaluate_now:
        row |= evaluation(state)
      progress.tell(bar, row, steps=steps)
      metrics.add(record, row)
      if save_now or stop_now:
        save(state)
      if stop_now:
        break
      unread, window, started = None, [], time.perf_counter()
  return done
