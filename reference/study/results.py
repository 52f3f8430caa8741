"""What the rows of a study say: groups of seeds, and what is compared."""

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from reference.command import Mistake
from reference.study import record
from reference.tools import tables

Row = record.Row
# A variant at a batch size, and its rows by seed.
Group = tuple[str, int]
Groups = dict[Group, list[Row]]

_WHAT_AN_ABLATION_CHANGES = (
  'method',
  'staleness',
  'epsilon',
  'targets',
  'adversarial_fraction',
  'every',
  'adversarial_downscale',
  'attack_downscale',
  'dtype',
  'copies',
  'micro_batches',
  'augmentation',
  'plain_epochs',
)


class Price(NamedTuple):
  """What a step of a method is made of.

  Forward, backward to the weights and backward to the inputs are a third of a
  plain step each, and an attack pass has no gradient of the weights.

  Attributes:
    training: plain steps of an attacked example, beside those of a clean one.
    attack: plain steps of its attack.
    gradients: how often a step trains, at several points.
  """

  training: float = 0.0
  attack: float = 0.0
  gradients: float = 1.0


_CONADV = Price(training=1.0, attack=2 / 3)
_PRICES = {
  'vanilla': Price(),
  'advprop': _CONADV,
  'conadv': _CONADV,
  'conadv_reuse': Price(training=1.0),
  # What is attacked is no longer clean; its attack has all gradients.
  'fast_advprop': Price(attack=1.0),
  'sam': Price(gradients=2.0),
  # At one step in five.
  'looksam': Price(gradients=1.2),
  'ssam': Price(gradients=2.0),
  'gradient_norm_penalty': Price(gradients=2.0),
  'extrapolate': Price(),
  'vrgd': Price(),
  'agvm': Price(),
  'batch_augment': Price(),
  'conadv_sam': _CONADV._replace(gradients=2.0),
  'conadv_vrgd': _CONADV,
}
# What columns were, before a study had them.
_BEFORE = {
  'every': 1.0,
  'adversarial_downscale': 1.0,
  'attack_downscale': 1.0,
  'dtype': 'float32',
  'copies': 1.0,
  'micro_batches': 1.0,
  'plain_epochs': 0.0,
}


def read(path: Path) -> list[Row]:
  """The rows, numbers as such; what a row does not have is left out."""
  return [
    {
      **_BEFORE,
      **{name: tables.to_number(text) for name, text in row.items() if text},
    }
    for row in record.read_rows(path)
  ]


def finals(rows: Iterable[Row]) -> Groups:
  """The rows measured on the test images by (variant, batch size), by seed.

  Raises:
    Mistake: when a seed stands twice, as the mean would mix two studies.
  """
  groups: Groups = {}
  for row in sorted(
    (x for x in rows if x['kind'] == 'final'), key=lambda x: x['seed']
  ):
    group = groups.setdefault((row['variant'], int(row['batch_size'])), [])
    if group and group[-1]['seed'] == row['seed']:
      raise Mistake(
        f'A mean is over seeds. {row["variant"]} at batch '
        f'{row["batch_size"]:.0f} has two rows of seed {row["seed"]:.0f}. '
        'Likely the config changed between two runs in one work folder: keep '
        'the rows of one `epochs`, `train_images` and `peak`.'
      )
    group.append(row)
  return groups


def batch_sizes(groups: Groups) -> list[int]:
  """All of a study, in order."""
  return sorted({size for _, size in groups})


def values(rows: Iterable[Row], name: str) -> list[float]:
  """A column of the rows that have it."""
  return [row[name] for row in rows if name in row]


def differences(first: Sequence[Row], second: Sequence[Row]) -> list[float]:
  """Of the test accuracies, seed by seed."""
  others = {row['seed']: row['accuracy'] for row in second if 'accuracy' in row}
  return [
    row['accuracy'] - others[row['seed']]
    for row in first
    if 'accuracy' in row and row['seed'] in others
  ]


def has_prices(groups: Groups) -> bool:
  """Whether a study is of prices: that of all its variants is known."""
  return all(
    row['method'] in _PRICES and row['augmentation'] == 'resize'
    for row, *_ in groups.values()
  )


def price(row: Row) -> float:
  """Plain steps that a step costs by arithmetic, on average over a run."""
  of = _PRICES[row['method']]
  share = row['adversarial_fraction'] / row['every']
  share /= row['adversarial_downscale'] ** 2
  trained = row['copies'] + share * of.training
  whole = (
    of.gradients * trained + share * of.attack / row['attack_downscale'] ** 2
  )
  plain = row['plain_epochs'] / row['epochs']
  return plain + (1 - plain) * whole


def priced(groups: Groups, batch_size: int) -> dict[str, list[Row]]:
  """The rows of each variant at a batch size, the cheapest first."""
  found = {
    variant: rows
    for (variant, size), rows in groups.items()
    if size == batch_size
  }
  return dict(sorted(found.items(), key=lambda item: price(item[1][0])))


def chosen(row: Row) -> str:
  """The peak of a row, and its variant's own number where it was changed."""
  field, _, value = row.get('setting', '').partition('=')
  own = f', {field.rpartition(".")[2]}={value}' if field else ''
  return f'{row["peak"]:g}{own}'


def slowdowns(found: dict[str, list[Row]]) -> dict[str, float]:
  """Median seconds of a step over those of the plain one, by variant."""
  seconds = {
    name: statistics.median(values(rows, 'seconds_a_step'))
    for name, rows in found.items()
    if values(rows, 'seconds_a_step')
  }
  if 'vanilla' not in seconds:
    return {}
  return {name: x / seconds['vanilla'] for name, x in seconds.items()}


def ablation(groups: Groups, parent: str, *fields: str) -> list[list[Row]]:
  """At the largest batch, what is like the parent but in these fields.

  That is with the parent's peak: another would have an effect of its own.
  """
  largest = max(size for _, size in groups)
  like = groups.get((parent, largest))
  if like is None:
    return []
  same = [
    'peak',
    'setting',
    *(x for x in _WHAT_AN_ABLATION_CHANGES if x not in fields),
  ]
  return sorted(
    (
      rows
      for (_, size), rows in groups.items()
      if size == largest
      and all(rows[0].get(name) == like[0].get(name) for name in same)
    ),
    key=lambda rows: [str(rows[0].get(x, '')).zfill(6) for x in fields],
  )


def effects(groups: Groups) -> dict[str, list[list[Row]]]:
  """What the figures and tables of single fields show."""
  return {
    'staleness': [
      rows
      for rows in ablation(groups, 'conadv', 'staleness', 'method')
      if rows[0]['method'] in ('advprop', 'conadv')
    ],
    'epsilon': ablation(groups, 'conadv', 'epsilon'),
    'targets': ablation(groups, 'conadv', 'targets'),
    'reuse': ablation(groups, 'conadv_reuse', 'staleness', 'epsilon'),
  }
