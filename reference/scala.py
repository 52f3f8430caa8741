"""Text at a large batch, noise at its embedding: `python -m reference.scala`.

A small transformer learns which module of Python's library a line is from. It
is trained by LAMB, without noise, with ConAdv at the embedding, and in the
manner of ScaLA: the noise is light, takes one step of ascent, and sets in after
a part of the run. Each has as many trials, of the rate and of a number of its
own, with seed 0 and judged by lines that no run trains on or reports.

References:
  Zhang et al., `ScaLA: Accelerating Adaptation of Pre-Trained Transformer-Based
  Language Models via Efficient Large-Batch Adversarial Noise
  <https://arxiv.org/abs/2201.12469>`_, 2022
"""

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags

from reference import command
from reference.study import record, results, text
from reference.tools import tables

# What differs from the defaults of a run; and a number of its own, with other
# values.
NOISES: dict[str, tuple[dict[str, Any], str, tuple[float, ...]]] = {
  'none': ({'epsilon': 0.0}, 'dropout', (0.2, 0.3)),
  'conadv': ({'start': 0.0, 'staleness': 1}, 'epsilon', (0.25, 1.0)),
  'scala': ({}, 'epsilon', (0.25, 1.0)),
  # Scala's noise without its ascent.
  'drawn': ({'ascent': False}, 'epsilon', (0.25, 1.0)),
}


def runs(
  noise: str,
  batch_size: int,
  *,
  epochs: int,
  rates: Sequence[float],
  seeds: int,
) -> list[tables.Row]:
  """Trials of a noise with seed 0, and the best of them seed by seed."""
  fields, own, values = NOISES[noise]
  start = text.Run(batch_size, epochs, rates[0], **fields)
  tried: dict[text.Run, dict[str, Any]] = {}

  def best_of(more: Iterable[text.Run]) -> text.Run:
    tried.update({x: text.measure(x, seed=0, final=False) for x in more})
    return max(tried, key=lambda run: tried[run]['accuracy'])

  best = best_of(start._replace(rate=rate) for rate in rates)
  changed: list[dict[str, Any]] = [{own: value} for value in values]
  best = best_of(best._replace(**change) for change in changed)
  rows = [text.measure(best, seed=seed, final=True) for seed in range(seeds)]
  return [{'noise': noise, **row} for row in [*tried.values(), *rows]]


def print_table(rows: Sequence[tables.Row]) -> None:
  """Means and standard deviations over seeds, and differences seed by seed."""
  groups: dict[tuple[Any, Any], list[tables.Row]] = {}
  for row in rows:
    if row['kind'] == 'final':
      groups.setdefault((row['batch_size'], row['noise']), []).append(row)

  def mean_of(group: Sequence[tables.Row], column: str, digits: int) -> str:
    scale = 100 if column == 'accuracy' else 1
    return tables.mean_text([scale * float(x[column]) for x in group], digits)

  lines = []
  for (batch_size, noise), group in groups.items():
    own = NOISES[noise][1]
    plain = groups.get((batch_size, 'none'), [])
    gains = [100 * x for x in results.differences(group, plain)]
    gain = ''
    if noise != 'none' and gains:
      gain = f'{statistics.fmean(gains):+.1f}'
      if len(gains) > 1:
        gain += f' ± {tables.standard_error(gains):.1f}'
    lines.append(
      {
        'batch': f'{batch_size:,.0f}',
        'noise': noise,
        'rate': f'{group[0]["rate"]:g}',
        'own number': f'{own} {group[0][own]:g}',
        'seeds': f'{len(group)}',
        'loss, trained on': mean_of(group, 'train_loss', 3),
        'loss, held out': mean_of(group, 'loss', 3),
        'accuracy, %': mean_of(group, 'accuracy', 1),
        'points over none, standard error': gain,
      }
    )
  tables.print_markdown(lines)


def main() -> None:
  """Runs, prints, writes."""
  about = {
    'command': ' '.join(['python -m reference.scala', *sys.argv[1:]]),
    **record.describe_machine(jax.devices()),
  }
  rows: list[tables.Row] = []
  for batch_size in _BATCH.value:
    for noise in _NOISE.value:
      rows += [
        {**row, **about}
        for row in runs(
          noise,
          batch_size,
          epochs=_EPOCHS.value,
          rates=_RATES.value,
          seeds=_SEEDS.value,
        )
      ]
      # What is done is kept when the rest is interrupted.
      tables.write_csv(Path(_OUT.value), rows)
  print_table(rows)


if __name__ == '__main__':
  _BATCH = flags.DEFINE_multi_integer(
    'batch_size', [128, 1024], 'Lines a step.', lower_bound=1
  )
  _NOISE = command.define_names('noise', NOISES, 'Of the table.')
  _RATES = flags.DEFINE_multi_float(
    'rate', [0.005, 0.01, 0.02, 0.04], "LAMB's peak, a trial.", lower_bound=0.0
  )
  _EPOCHS = flags.DEFINE_integer(
    'epochs', 15, 'Passes over the lines.', lower_bound=1
  )
  _SEEDS = flags.DEFINE_integer(
    'seeds', 3, 'How many runs of each.', lower_bound=1
  )
  _OUT = flags.DEFINE_string('out', 'runs/text/runs.csv', 'Receives the rows.')
  command.run(main)
