"""Why the adversarial loss is lower with a reused gradient: two causes apart.

    python -m reference.study.reused_loss \\
      --config=reference/configs/study_fashion_mnist.py

A step with a reused gradient trains on the very images whose adversarial copies
the next step trains on, and its attack is another one: from the clean image,
away from the true label. Here `conadv_reuse` is trained at the largest batch of
a study. From a few of its epochs on, copies of each batch are made by either
attack, and their loss is taken with the parameters that made them, after a step
that trains on these images, and after a step from the same parameters that
trains on others.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from absl import flags

import conadv_optax as conadv
from reference import command
from reference.run import loop, methods, objective, parts, step
from reference.study import cell as study_cell
from reference.study import grid
from reference.tools import tables

BranchLoss = Callable[[Any, step.Batch], jax.Array]

REUSED, PASS = 'reused gradient', 'attack pass'


def make_losses(config: ml_collections.ConfigDict, num_classes: int) -> Any:
  """Losses on the adversarial branch, as the step trains on it.

  Returns:
    Two functions: `craft(state, batch, key)` makes the copies of a batch by the
    name of the attack, and `losses(state, copies)` their losses by that name.
  """
  model = parts.make_model(config, num_classes=num_classes)
  loss_fn = objective.make_loss(model, config)
  pgd, fgsm = methods.make_attacks(config, num_classes)

  def branch_loss(
    state: step.TrainState, branch: str, *, name: str = 'adversarial'
  ) -> BranchLoss:
    batch_stats = conadv.dual_bn.select(state.model_state, branch)
    return lambda params, batch: loss_fn(
      params, batch_stats, batch, branch=name
    )[0]

  @jax.jit
  def craft(
    state: step.TrainState, batch: step.Batch, key: jax.Array
  ) -> dict[str, step.Batch]:
    return {
      name: conadv.perturb(
        branch_loss(state, branch, name=loss),
        conadv.dual_bn.select(state.params, branch),
        batch,
        attack=attack,
        inputs=methods.make_inputs(config),
        key=key,
      )
      for name, attack, branch, loss in (
        (REUSED, fgsm, 'main', 'main'),
        (PASS, pgd, 'adversarial', 'attack'),
      )
    }

  @jax.jit
  def losses(
    state: step.TrainState, copies: dict[str, step.Batch]
  ) -> dict[str, jax.Array]:
    params = conadv.dual_bn.select(state.params, 'adversarial')
    loss = branch_loss(state, 'adversarial')
    return {name: loss(params, batch) for name, batch in copies.items()}

  return craft, losses


def run(
  config: ml_collections.ConfigDict,
  data: study_cell.Data,
  device: jax.Device,
  epochs: Sequence[int],
) -> Iterator[tables.Row]:
  """Trains, and yields the means over one epoch's batches at each of `epochs`.

  Args:
    config: of one cell, whose method is `conadv_reuse` with a staleness of 1.
    data: of the study.
    device: on which all is done.
    epochs: whose batches are looked at, counted from 1.
  """
  if max(epochs) > config.epochs:
    raise command.Mistake(
      '`epochs` are those of the run whose batches are looked at. Given '
      f'{list(epochs)} of {config.epochs:g}. Likely the run was made shorter '
      f'alone: `--epochs={config.epochs:.0f}`.'
    )
  program = study_cell.make_program(config, data, device)
  craft, losses = make_losses(config, data.num_classes)
  numbers = study_cell.numbers_of(config)
  key = jax.device_put(
    jax.random.key(config.seed), program.train.labels.sharding
  )
  order = study_cell.order_of(
    config.seed, len(data.train.labels), config.batch_size
  )
  first = np.asarray([next(order)], np.int32)
  state = program.init(numbers, key, program.train, first)
  rows = [next(order) for _ in range(program.steps + 1)]

  def advance(
    state: step.TrainState, done: int, row: np.ndarray
  ) -> tuple[step.TrainState, step.Metrics]:
    # The step gives its state's memory away.
    state = jax.tree.map(jax.numpy.copy, state)
    position = np.int32(done + program.staleness)
    return program.step(numbers, state, key, program.train, position, row)

  found: dict[int, list[dict[str, Any]]] = {epoch: [] for epoch in epochs}
  for done in range(program.steps):
    after, values = advance(state, done, rows[done])
    loop.fetch(values, done=done + 1, workdir=Path())
    epoch = 1 + int(done * config.epochs / program.steps)
    if epoch in found:
      images, labels = program.train
      batch = {'image': images[rows[done]], 'label': labels[rows[done]]}
      copies = craft(state, batch, jax.random.fold_in(key, done))
      elsewhere, _ = advance(state, done, rows[done + 1])
      found[epoch].append(
        {
          'before': losses(state, copies),
          'after a step on them': losses(after, copies),
          'after a step on others': losses(elsewhere, copies),
        }
      )
    state = after
  for epoch, batches in found.items():
    for attack in (REUSED, PASS):
      yield {
        'epoch': epoch,
        'seed': config.seed,
        'peak': config.lars.peak,
        'batch_size': config.batch_size,
        'attack': attack,
        **{
          when: statistics.fmean(float(x[when][attack]) for x in batches)
          for when in batches[0]
        },
      }


def print_table(rows: Sequence[tables.Row]) -> None:
  """Means over the seeds, in Markdown."""
  groups: dict[tuple[Any, Any], list[tables.Row]] = {}
  for row in rows:
    groups.setdefault((row['epoch'], row['attack']), []).append(row)
  whens = [x for x in rows[0] if x.startswith(('before', 'after'))]
  lines = []
  for (epoch, attack), group in groups.items():
    line = {
      'epoch': f'{epoch:g}',
      'copies by': attack,
      'seeds': f'{len(group)}',
    }
    for when in whens:
      values = [float(row[when]) for row in group]
      line[when] = tables.mean_text(values, 3)
    lines.append(line)
  tables.print_markdown(lines)


def main() -> None:
  """Runs every seed, prints, writes."""
  config, [device, *_] = _CONFIG.value, jax.devices()
  data = study_cell.load(config)
  rows: list[tables.Row] = []
  for seed in range(config.study.seeds):
    cell = grid.Cell(
      'conadv_reuse',
      max(config.study.batch_sizes),
      _PEAK.value,
      seed,
      final=True,
    )
    of_cell = grid.cell_config(config, cell)
    rows += run(of_cell, data, device, _EPOCHS.value)
  tables.write_csv(Path(_OUT.value), rows)
  print_table(rows)


if __name__ == '__main__':
  _CONFIG = command.define_config(
    Path(__file__).parents[1] / 'configs' / 'study_fashion_mnist.py'
  )
  _PEAK = flags.DEFINE_float('peak', 16.0, 'The largest learning rate.')
  _EPOCHS = flags.DEFINE_multi_integer(
    'epochs', [20, 40, 60], 'Whose batches are looked at.', lower_bound=1
  )
  _OUT = flags.DEFINE_string(
    'out', 'runs/study/reused_loss.csv', 'Receives the rows.'
  )
  command.run(main)
