"""Tables and figures of a study, from its CSV alone.

    python -m reference.study_report --csv=runs/study/study.csv --out=runs/study

prints Markdown and draws into the folder. Differences are between runs of the
same seed, which see the same images in the same order from the same parameters.
"""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags
from matplotlib import pyplot as plt

from reference import study
from reference.benchmarks import figures, measure

Row = dict[str, Any]
Group = tuple[str, int]

# What a variant is compared with, and what the comparison is about.
COMPARISONS = (
  ('conadv', 'vanilla', 'ConAdv against vanilla'),
  ('advprop', 'vanilla', 'AdvProp against vanilla'),
  ('conadv_reuse', 'vanilla', 'reused gradient against vanilla'),
  ('conadv_reuse', 'conadv', 'reused gradient against an attack pass'),
  (
    'conadv_reuse_same_peak',
    'conadv',
    'the same with the peak of the attack pass',
  ),
  ('conadv', 'advprop', 'staleness 1 against 0'),
  ('conadv', 'advprop_same_peak', 'the same with the peak of staleness 1'),
  (
    'conadv_peak_of_advprop',
    'advprop',
    'the same with the peak of staleness 0',
  ),
  ('conadv_tau_4', 'conadv', 'staleness 4 against 1'),
  ('conadv_fraction', 'conadv', 'a fifth attacked against all'),
  ('augmentation', 'vanilla', 'augmentation against vanilla'),
  ('conadv_augmentation', 'augmentation', 'ConAdv on top of augmentation'),
  ('batch_augment', 'vanilla', 'batch augmentation against vanilla'),
  ('sam', 'vanilla', 'SAM against vanilla'),
  ('vrgd', 'vanilla', 'VRGD against vanilla'),
)
_NO_BREAK = '\N{NO-BREAK SPACE}'
# Points of accuracy below the best, in the figure of time.
_SHOWN = 12.0
_WHAT_AN_ABLATION_CHANGES = (
  'method',
  'staleness',
  'epsilon',
  'targets',
  'adversarial_fraction',
  'augmentation',
)


def read(path: Path) -> list[Row]:
  """The rows, numbers as such; what a row does not have is left out."""
  return [
    {name: measure.to_number(text) for name, text in row.items() if text}
    for row in study.read_rows(path)
  ]


def finals(rows: Iterable[Row]) -> dict[Group, list[Row]]:
  """The rows measured on the test images by (variant, batch size), by seed.

  Raises:
    ValueError: when a seed stands twice, as the mean would mix two studies.
  """
  groups: dict[Group, list[Row]] = {}
  for row in sorted(
    (x for x in rows if x['kind'] == 'final'), key=lambda x: x['seed']
  ):
    group = groups.setdefault((row['variant'], int(row['batch_size'])), [])
    if group and group[-1]['seed'] == row['seed']:
      raise ValueError(
        f'A mean is over seeds. {row["variant"]} at batch '
        f'{row["batch_size"]:.0f} has two rows of seed {row["seed"]:.0f}. '
        'Likely the config changed between two runs in one work folder: keep '
        'the rows of one `epochs`, `train_images` and `peak`.'
      )
    group.append(row)
  return groups


def values(rows: Iterable[Row], name: str) -> list[float]:
  """A column of the rows that have it."""
  return [row[name] for row in rows if name in row]


def mean_text(numbers: Sequence[float], scale: float, digits: int) -> str:
  """Mean and sample standard deviation, as 87.42 ± 0.15 on one line."""
  if not numbers:
    return ''
  mean = f'{scale * statistics.fmean(numbers):.{digits}f}'
  if len(numbers) == 1:
    return mean
  spread = f'{scale * statistics.stdev(numbers):.{digits}f}'
  return f'{mean}{_NO_BREAK}±{_NO_BREAK}{spread}'


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
  """Markdown."""
  return '\n'.join(
    '| ' + ' | '.join(line) + ' |'
    for line in (header, ['---'] * len(header), *lines)
  )


def accuracy_table(groups: dict[Group, list[Row]], batch_size: int) -> str:
  """A line for each variant at a batch size."""
  lines = []
  plain = statistics.median(
    values(groups.get(('vanilla', batch_size), []), 'seconds_a_step') or [1.0]
  )
  for (variant, size), rows in groups.items():
    if size != batch_size:
      continue
    seconds = values(rows, 'seconds_a_step')
    lines.append(
      (
        f'`{variant}`',
        f'{rows[0]["peak"]:g}',
        f'{len(values(rows, "accuracy"))}',
        mean_text(values(rows, 'accuracy'), 100, 2),
        mean_text(values(rows, 'train_accuracy'), 100, 2),
        mean_text(values(rows, 'gap'), 100, 2),
        mean_text(values(rows, 'robust_accuracy'), 100, 1),
        mean_text(values(rows, 'top_eigenvalue'), 1, 1),
        f'{statistics.median(seconds) / plain:.2f}' if seconds else '',
        mean_text(values(rows, 'loss_main'), 1, 3),
        mean_text(values(rows, 'loss_adversarial'), 1, 3),
      )
    )
  return table(
    (
      'variant',
      'peak',
      'n',
      'test, %',
      'training, %',
      'gap',
      'PGD-20, %',
      'eigenvalue',
      's / plain',
      'clean loss',
      'adversarial loss',
    ),
    lines,
  )


def differences(first: Sequence[Row], second: Sequence[Row]) -> list[float]:
  """Of the test accuracies, seed by seed."""
  others = {row['seed']: row['accuracy'] for row in second if 'accuracy' in row}
  return [
    row['accuracy'] - others[row['seed']]
    for row in first
    if 'accuracy' in row and row['seed'] in others
  ]


def comparison_table(groups: dict[Group, list[Row]]) -> str:
  """The claims: differences of test accuracy and their spread."""
  lines = []
  for batch_size in sorted({size for _, size in groups}):
    for first, second, claim in COMPARISONS:
      found = differences(
        groups.get((first, batch_size), []),
        groups.get((second, batch_size), []),
      )
      if not found:
        continue
      error = (
        f'{100 * statistics.stdev(found) / math.sqrt(len(found)):.2f}'
        if len(found) > 1
        else ''
      )
      lines.append(
        (
          claim,
          f'{batch_size:,}',
          f'{len(found)}',
          f'{100 * statistics.fmean(found):+.2f}',
          error,
          f'{100 * min(found):+.2f} to {100 * max(found):+.2f}',
        )
      )
  return table(
    (
      'test accuracy, points',
      'batch',
      'seeds',
      'mean difference',
      'its standard error',
      'from seed to seed',
    ),
    lines,
  )


def trial_table(rows: Iterable[Row]) -> str:
  """Validation accuracy of every peak that was tried."""
  tried: dict[Group, list[str]] = {}
  for row in sorted(rows, key=lambda row: row['peak']):
    if row['kind'] == 'trial':
      accuracy = f'{100 * row["accuracy"]:.2f}' if 'accuracy' in row else '-'
      group = row['variant'], int(row['batch_size'])
      tried.setdefault(group, []).append(f'{row["peak"]:g}: {accuracy}')
  return table(
    ('variant', 'batch', 'peak: validation, %'),
    [
      (f'`{variant}`', f'{batch_size:,}', ', '.join(cells))
      for (variant, batch_size), cells in tried.items()
    ],
  )


def ablation(
  groups: dict[Group, list[Row]], parent: str, *fields: str
) -> list[list[Row]]:
  """At the largest batch, what is like the parent but in these fields.

  That is with the parent's peak: another would have an effect of its own.
  """
  largest = max(size for _, size in groups)
  like = groups.get((parent, largest))
  if like is None:
    return []
  same = ['peak', *(x for x in _WHAT_AN_ABLATION_CHANGES if x not in fields)]
  return sorted(
    (
      rows
      for (_, size), rows in groups.items()
      if size == largest
      and all(rows[0].get(name) == like[0].get(name) for name in same)
    ),
    key=lambda rows: [str(rows[0].get(x, '')).zfill(6) for x in fields],
  )


def effects(groups: dict[Group, list[Row]]) -> dict[str, list[list[Row]]]:
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


def effect_table(found: list[list[Row]]) -> str:
  """A line for each variant of an ablation."""
  return table(
    (
      'variant',
      'staleness',
      'epsilon',
      'peak',
      'n',
      'test, %',
      'training, %',
      'adversarial loss',
    ),
    [
      (
        f'`{rows[0]["variant"]}`',
        f'{rows[0]["staleness"]:.0f}',
        f'{rows[0]["epsilon"]:g}',
        f'{rows[0]["peak"]:g}',
        f'{len(values(rows, "accuracy"))}',
        mean_text(values(rows, 'accuracy'), 100, 2),
        mean_text(values(rows, 'train_accuracy'), 100, 2),
        mean_text(values(rows, 'loss_adversarial'), 1, 3),
      )
      for rows in found
    ],
  )


def _points(rows: Sequence[Row]) -> tuple[float, float]:
  numbers = [100 * x for x in values(rows, 'accuracy')]
  spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
  return statistics.fmean(numbers), spread


def _colors(names: Sequence[str]) -> dict[str, Any]:
  palette = plt.get_cmap('tab20')
  return {name: palette(i % palette.N) for i, name in enumerate(names)}


def draw_accuracy(figure: Any, groups: dict[Group, list[Row]]) -> None:
  """Test accuracy over batch size, a line for each variant."""
  axes = figure.subplots()
  sizes = sorted({size for _, size in groups})
  everywhere = [
    name
    for name in dict.fromkeys(variant for variant, _ in groups)
    if all((name, size) in groups for size in sizes)
  ]
  for place, (name, color) in enumerate(_colors(everywhere).items()):
    means, spreads = zip(
      *(_points(groups[name, size]) for size in sizes), strict=True
    )
    # Side by side, so that the bars can be told apart.
    at = [size * 1.03 ** (place - len(everywhere) / 2) for size in sizes]
    axes.errorbar(
      at, means, spreads, color=color, label=name, marker='o', capsize=2
    )
  axes.set_xscale('log')
  axes.set_xticks(sizes, [f'{size:,}' for size in sizes])
  axes.minorticks_off()
  axes.set_xlabel('batch size')
  axes.set_ylabel('test accuracy (%)')
  axes.legend(
    frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5)
  )


def draw_time(figure: Any, groups: dict[Group, list[Row]]) -> None:
  """Mean test accuracy over seconds of training, at each batch size."""
  sizes = sorted({size for _, size in groups})
  names = list(dict.fromkeys(name for name, size in groups if size == sizes[0]))
  colors = _colors(names)
  for axes, size in zip(
    figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0],
    sizes,
    strict=True,
  ):
    for name in names:
      rows = [
        x for x in groups.get((name, size), []) if 'accuracy_by_epoch' in x
      ]
      if not rows:
        continue
      seconds = statistics.median(values(rows, 'seconds_a_step'))
      curves = [
        [
          tuple(map(float, point.split(':')))
          for point in row['accuracy_by_epoch'].split()
        ]
        for row in rows
      ]
      scale = seconds * rows[0]['steps'] / rows[0]['epochs']
      axes.plot(
        [scale * epoch for epoch, _ in curves[0]],
        [
          100 * statistics.fmean(accuracy for _, accuracy in points)
          for points in zip(*curves, strict=True)
        ],
        color=colors[name],
        label=name,
        marker='.',
      )
    axes.set_title(f'batch {size:,}', fontsize=10)
    axes.set_xlabel('seconds of training')
  low, high = figure.axes[0].get_ylim()
  # What is far below is the warm-up, and would hide the differences.
  figure.axes[0].set_ylim(max(low, high - _SHOWN), high)
  figure.axes[0].set_ylabel('test accuracy (%)')
  figure.axes[-1].legend(
    frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5)
  )


def draw_effect(
  figure: Any, found: list[list[Row]], field: str, plain: list[Row]
) -> None:
  """Test and training accuracy over one field, with the plain run's."""
  for axes, column in zip(
    figure.subplots(1, 2), ('accuracy', 'train_accuracy'), strict=True
  ):
    numbers = [[100 * x for x in values(rows, column)] for rows in found]
    places = range(len(found))
    for place, points in zip(places, numbers, strict=True):
      axes.plot(
        [place] * len(points), points, '.', color=figures.ADVERSARIAL, alpha=0.5
      )
    axes.plot(
      places,
      [statistics.fmean(points) for points in numbers],
      marker='_',
      markersize=14,
      linestyle='',
      color=figures.ADVERSARIAL,
      label='ConAdv, mean',
    )
    if plain:
      axes.axhline(
        100 * statistics.fmean(values(plain, column)),
        color=figures.CLEAN,
        label='vanilla, mean',
        linewidth=1,
      )
    axes.set_xticks(places, [f'{rows[0][field]:g}' for rows in found])
    axes.set_xlabel(field)
  test, training = figure.axes
  test.set_ylabel('test accuracy (%)')
  training.set_ylabel('training accuracy (%)')
  handles, labels = test.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    frameon=False,
    fontsize=8,
    loc='outside upper center',
    ncols=len(labels),
  )


def report(rows: Sequence[Row]) -> str:
  """All tables, as Markdown."""
  groups = finals(rows)
  parts = []
  for batch_size in sorted({size for _, size in groups}):
    parts += [f'### Batch {batch_size:,}', accuracy_table(groups, batch_size)]
  parts += ['### Differences', comparison_table(groups)]
  if groups:
    for name, found in effects(groups).items():
      if len(found) > 1:
        parts += [f'### Effect of {name}', effect_table(found)]
  parts += ['### Trials', trial_table(rows)]
  return '\n\n'.join(parts)


def draw(rows: Sequence[Row], folder: Path) -> None:
  """All figures, each for light and for dark pages."""
  groups = finals(x for x in rows if 'accuracy' in x)
  if not groups:
    return
  name = next(iter(groups.values()))[0]['study']

  def save(
    what: str, draw: Callable[..., None], *args: Any, width: float
  ) -> None:
    figures.save(folder / f'{name}_{what}', draw, *args, size=(width, 3.6))

  save('accuracy', draw_accuracy, groups, width=7.5)
  save('time', draw_time, groups, width=9.5)
  plain = groups.get(('vanilla', max(size for _, size in groups)), [])
  for field in ('staleness', 'epsilon'):
    found = effects(groups)[field]
    if len(found) > 1:
      save(field, draw_effect, found, field, plain, width=7.5)


def main(argv: list[str]) -> None:
  """Reads, prints, draws."""
  if len(argv) > 1:
    raise app.UsageError(f'Everything is a flag; given {argv[1:]}.')
  rows = read(Path(_CSV.value))
  print(report(rows))
  draw(rows, Path(_OUT.value))


if __name__ == '__main__':
  _CSV = flags.DEFINE_string('csv', 'runs/study/study.csv', 'What study wrote.')
  _OUT = flags.DEFINE_string('out', 'runs/study', 'Receives the figures.')
  app.run(main)
