"""Tables and figures of a study, from its CSV alone.

    python -m reference.study.report --csv=runs/study/study.csv --out=runs/study

prints Markdown and draws into the folder. Differences are between runs of the
same seed, which see the same images in the same order from the same parameters.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from reference import command
from reference.study import plots, results
from reference.tools import pages, tables

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
  (
    'conadv_augmentation',
    'augmentation_same_peak',
    'the same with equal peaks',
  ),
  ('augmentation_same_peak', 'vanilla', 'that augmentation against vanilla'),
  ('advprop_augmentation', 'augmentation', 'AdvProp on top of augmentation'),
  (
    'conadv_augmentation',
    'advprop_augmentation',
    'staleness 1 against 0, both with augmentation',
  ),
  ('batch_augment', 'vanilla', 'batch augmentation against vanilla'),
  ('fast_advprop', 'vanilla', 'Fast AdvProp against vanilla'),
  (
    'fast_advprop_35',
    'vanilla',
    'Fast AdvProp on 0.35 of each batch against vanilla',
  ),
  (
    'fast_advprop_50',
    'vanilla',
    'Fast AdvProp on half of each batch against vanilla',
  ),
  (
    'fast_advprop_35',
    'conadv',
    'Fast AdvProp on 0.35 of each batch against ConAdv',
  ),
  (
    'fast_advprop_50',
    'conadv',
    'Fast AdvProp on half of each batch against ConAdv',
  ),
  ('sam', 'vanilla', 'SAM against vanilla'),
  ('vrgd', 'vanilla', 'VRGD against vanilla'),
  ('micro_batches', 'vanilla', 'micro-batches against vanilla'),
  ('vrgd', 'micro_batches', 'VRGD against micro-batches'),
  ('agvm', 'micro_batches', 'AGVM against micro-batches'),
  ('short_warmup', 'vanilla', 'a tenth of the warm-up against all of it'),
  ('legw', 'vanilla', 'LEGW against the tuned peak'),
  ('sam', 'conadv', 'SAM against ConAdv'),
  ('conadv_sam', 'conadv', 'SAM on top of ConAdv'),
  ('conadv_vrgd', 'conadv', 'VRGD on top of ConAdv'),
)
_NO_BREAK = '\N{NO-BREAK SPACE}'


def mean_text(numbers: Sequence[float], scale: float, digits: int) -> str:
  """Mean and sample standard deviation, as 87.42 ± 0.15 on one line."""
  if not numbers:
    return ''
  text = tables.mean_text([scale * x for x in numbers], digits)
  return text.replace(' ', _NO_BREAK)


def error_text(differences: Sequence[float]) -> str:
  """The standard error of their mean, in points."""
  if len(differences) < 2:
    return ''
  return f'{100 * tables.standard_error(differences):.2f}'


def table(lines: Sequence[Mapping[str, str]]) -> str:
  """Markdown; nothing of no lines."""
  if not lines:
    return ''
  header = list(lines[0])
  cells = header, ['---'] * len(header), *(line.values() for line in lines)
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in cells)


def accuracy_table(groups: results.Groups, batch_size: int) -> str:
  """A line for each variant at a batch size."""
  lines = []
  here = {name: x for (name, size), x in groups.items() if size == batch_size}
  slowdowns = results.slowdowns(here)
  for variant, rows in here.items():
    lines.append(
      {
        'variant': f'`{variant}`',
        'peak': results.chosen(rows[0]),
        'n': f'{len(results.values(rows, "accuracy"))}',
        'test, %': mean_text(results.values(rows, 'accuracy'), 100, 2),
        'training, %': mean_text(
          results.values(rows, 'train_accuracy'), 100, 2
        ),
        'gap': mean_text(results.values(rows, 'gap'), 100, 2),
        'PGD-20, %': mean_text(results.values(rows, 'robust_accuracy'), 100, 1),
        'eigenvalue': mean_text(results.values(rows, 'top_eigenvalue'), 1, 1),
        's / plain': f'{slowdowns[variant]:.2f}'
        if variant in slowdowns
        else '',
        'clean loss': mean_text(results.values(rows, 'loss_main'), 1, 3),
        'adversarial loss': mean_text(
          results.values(rows, 'loss_adversarial'), 1, 3
        ),
      }
    )
  return table(lines)


def comparison_table(groups: results.Groups) -> str:
  """The claims: differences of test accuracy and their spread."""
  lines = []
  for batch_size in results.batch_sizes(groups):
    for first, second, claim in COMPARISONS:
      found = results.differences(
        groups.get((first, batch_size), []),
        groups.get((second, batch_size), []),
      )
      if not found:
        continue
      span = f'{100 * min(found):+.2f} to {100 * max(found):+.2f}'
      lines.append(
        {
          'test accuracy, points': claim,
          'batch': f'{batch_size:,}',
          'seeds': f'{len(found)}',
          'mean difference': f'{100 * statistics.fmean(found):+.2f}',
          'its standard error': error_text(found),
          'from seed to seed': span,
        }
      )
  return table(lines)


def price_table(groups: results.Groups, batch_size: int) -> str:
  """What each variant gains at a batch size, and what it costs."""
  found = results.priced(groups, batch_size)
  plain, whole = (found.get(name, []) for name in ('vanilla', 'conadv'))
  of_all = statistics.fmean(results.differences(whole, plain) or [0])
  seconds = results.slowdowns(found)
  lines = []
  for variant, rows in found.items():
    gains = results.differences(rows, plain)
    gain = 100 * statistics.fmean(gains or [0])
    lines.append(
      {
        'variant': f'`{variant}`',
        'arithmetic / plain': f'{results.price(rows[0]):.2f}',
        's / plain': f'{seconds[variant]:.2f}' if variant in seconds else '',
        'points over vanilla': f'{gain:+.2f}' if gains else '',
        'standard error': error_text(gains),
        "% of ConAdv's gain": f'{gain / of_all:.0f}'
        if gains and of_all
        else '',
      }
    )
  return table(lines)


def sharpness_table(groups: results.Groups) -> str:
  """A line for each variant and batch size that has measures of sharpness."""
  return table(
    [
      {
        'variant': f'`{variant}`',
        'batch': f'{batch_size:,}',
        'peak': results.chosen(rows[0]),
        'n': f'{len(results.values(rows, "hessian_trace"))}',
        'test, %': mean_text(results.values(rows, 'accuracy'), 100, 2),
        'eigenvalue': mean_text(results.values(rows, 'top_eigenvalue'), 1, 1),
        'trace': mean_text(results.values(rows, 'hessian_trace'), 1, 0),
        'rise': f'{statistics.fmean(results.values(rows, "sharpness")):.2g}',
      }
      for (variant, batch_size), rows in groups.items()
      if results.values(rows, 'hessian_trace')
    ]
  )


def trial_table(rows: Iterable[results.Row]) -> str:
  """Validation accuracy of every peak that was tried."""
  tried: dict[results.Group, list[str]] = {}
  for row in sorted(rows, key=lambda row: row['peak']):
    if row['kind'] == 'trial':
      accuracy = f'{100 * row["accuracy"]:.2f}' if 'accuracy' in row else '-'
      group = row['variant'], int(row['batch_size'])
      tried.setdefault(group, []).append(f'{results.chosen(row)}: {accuracy}')
  return table(
    [
      {
        'variant': f'`{variant}`',
        'batch': f'{batch_size:,}',
        'peak: validation, %': ', '.join(cells),
      }
      for (variant, batch_size), cells in tried.items()
    ]
  )


def effect_table(found: list[list[results.Row]]) -> str:
  """A line for each variant of an ablation."""
  return table(
    [
      {
        'variant': f'`{rows[0]["variant"]}`',
        'staleness': f'{rows[0]["staleness"]:.0f}',
        'epsilon': f'{rows[0]["epsilon"]:g}',
        'peak': f'{rows[0]["peak"]:g}',
        'n': f'{len(results.values(rows, "accuracy"))}',
        'test, %': mean_text(results.values(rows, 'accuracy'), 100, 2),
        'training, %': mean_text(
          results.values(rows, 'train_accuracy'), 100, 2
        ),
        'adversarial loss': mean_text(
          results.values(rows, 'loss_adversarial'), 1, 3
        ),
      }
      for rows in found
    ]
  )


def report(rows: Sequence[results.Row]) -> str:
  """All tables, as Markdown."""
  groups = results.finals(rows)
  parts = []
  sizes = results.batch_sizes(groups)
  for batch_size in sizes:
    parts += [f'### Batch {batch_size:,}', accuracy_table(groups, batch_size)]
  parts += ['### Differences', comparison_table(groups)]
  if groups:
    if results.has_prices(groups):
      for batch_size in sizes:
        heading = f'### Price, batch {batch_size:,}'
        parts += [heading, price_table(groups, batch_size)]
    for name, found in results.effects(groups).items():
      if len(found) > 1:
        parts += [f'### Effect of {name}', effect_table(found)]
  if any('hessian_trace' in row for row in rows):
    parts += ['### Sharpness', sharpness_table(groups)]
  if any(row['kind'] == 'trial' for row in rows):
    parts += ['### Trials', trial_table(rows)]
  return '\n\n'.join(parts)


def draw(
  rows: Sequence[results.Row],
  folder: Path,
  prices: Mapping[str, dict[str, float]] | None = None,
) -> None:
  """All figures, each for light and for dark pages.

  Args:
    rows: of the study.
    folder: receives them.
    prices: further prices of variants, by what they are measured in.
  """
  groups = results.finals(x for x in rows if 'accuracy' in x)
  if not groups:
    return
  name = next(iter(groups.values()))[0]['study']

  def save(
    what: str,
    draw: Callable[..., None],
    *args: Any,
    width: float,
    height: float = 3.6,
  ) -> None:
    pages.save(folder / f'{name}_{what}', draw, *args, size=(width, height))

  sizes = results.batch_sizes(groups)
  has_prices = results.has_prices(groups)
  if len(sizes) > 1 and not has_prices:
    save('accuracy', plots.accuracy, groups, width=7.5)
  # A line of the legend is a fifth of an inch high.
  height = max(3.6, 0.2 * len({variant for variant, _ in groups}))
  save('time', plots.time, groups, width=9.5, height=height)
  for size in sizes if has_prices else ():
    variants = results.priced(groups, size)
    measures = {
      'arithmetic': {name: results.price(x[0]) for name, x in variants.items()},
      'seconds': results.slowdowns(variants),
      **(prices or {}),
    }
    what = f'price_{size}'
    save(what, plots.price, variants, measures, width=11, height=5)
  plain = groups.get(('vanilla', sizes[-1]), [])
  for field in ('staleness', 'epsilon'):
    found = results.effects(groups)[field]
    if len(found) > 1:
      save(field, plots.effect, found, field, plain, width=7.5)


def main() -> None:
  """Reads, prints, draws."""
  rows = results.read(Path(_CSV.value))
  if not rows:
    raise command.Mistake(
      f'A report is of a study that has begun. Given {_CSV.value}, which is '
      'not there or holds no row. Likely the study has another work folder: '
      '`--csv=WORKDIR/study.csv`.'
    )
  print(report(rows))
  draw(rows, Path(_OUT.value))


if __name__ == '__main__':
  _CSV = flags.DEFINE_string('csv', 'runs/study/study.csv', 'What study wrote.')
  _OUT = flags.DEFINE_string('out', 'runs/study', 'Receives the figures.')
  command.run(main)
