"""The figures of the benchmarks, each for light and for dark pages."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from reference.benchmarks import schedule
from reference.benchmarks.measure import Figures
from reference.tools import pages

_COLORS = {
  'training forward': ('#7fb2e5', 'training, forward'),
  'training backward': (pages.CLEAN, 'training, backward'),
  'attack forward': ('#f0b083', 'attack, forward'),
  'attack backward': (pages.ADVERSARIAL, 'attack, backward'),
  'attack pixels': ('#9c4508', 'attack, backward to the pixels'),
  'other': (pages.OTHER, 'all else'),
}
# Of the schedule's figure, and the roles of each.
_SHOWN = {
  'plain': ('plain',),
  'ConAdv': ('ConAdv',),
  'reuse': ('reuse',),
  'fraction 0.2': ('fraction 0.2',),
  # The compiler lists the branch of a false condition first.
  'concurrent equal share': ('concurrent: attacker', 'concurrent: trainers'),
}


# Plain steps that the figure of the cost has room for.
_LONGEST = 4.0


def draw_cost(stem: Path, results: Sequence[Figures]) -> None:
  """Time, FLOPs and memory of each row, over those of the plain step."""
  rows: list[Any] = [x for x in results if 'alone' not in str(x['row'])]
  has_seconds = all('seconds_ratio' in x for x in rows)
  column = 'seconds_ratio' if has_seconds else 'megacycles_ratio'

  def draw(figure: Any) -> None:
    time, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    places = np.arange(len(rows))
    middle, low, high = (
      np.array([x.get(f'{column}{end}', x[column]) for x in rows])
      for end in ('', '_low', '_high')
    )
    time.barh(
      places,
      middle,
      xerr=(middle - low, high - middle),
      color=pages.CLEAN,
      ecolor=pages.OTHER,
      label='time' if has_seconds else 'cycles',
    )
    time.plot(
      [x.get('flops_ratio', math.nan) for x in rows],
      places,
      linestyle='',
      marker='D',
      color=pages.ADVERSARIAL,
      label='FLOPs',
    )
    # So that a row which is many times slower does not hide the others.
    time.set_xlim(0, _LONGEST)
    for place in places[middle > _LONGEST]:
      time.text(
        _LONGEST,
        place,
        f'{middle[place]:.0f} ',
        ha='right',
        va='center',
        color='white',
      )
    time.set_yticks(places, [x['row'] for x in rows])
    time.invert_yaxis()
    time.set_xlabel('of the plain step')
    time.legend(frameon=False)
    memory.barh(
      places, [x['memory_bytes_ratio'] for x in rows], color=pages.OTHER
    )
    memory.set_xlabel('memory, of that of the plain step')
    for axes in (time, memory):
      axes.axvline(1, color=pages.OTHER, linewidth=0.8)

  pages.save(stem, draw, size=(9, 0.6 + 0.32 * len(rows)))


def draw_schedule(stem: Path, results: Sequence[Figures]) -> None:
  """What a core runs when, by the compiler's own schedule."""
  lanes = []
  for row in results:
    roles = schedule.from_text(str(row['schedule']))
    lanes += list(zip(_SHOWN.get(str(row['row']), ()), roles, strict=False))

  def draw(figure: Any) -> None:
    axes: Axes = figure.subplots()
    for place, (_, runs) in enumerate(lanes):
      start = 0.0
      for kind, cycles in runs:
        axes.barh(place, cycles, left=start, color=_COLORS[kind][0])
        start += cycles
    axes.set_yticks(range(len(lanes)), [name for name, _ in lanes])
    axes.invert_yaxis()
    axes.set_xlabel("millions of cycles of a core, by the compiler's estimate")
    axes.legend(
      handles=[
        Patch(color=color, label=label) for color, label in _COLORS.values()
      ],
      frameon=False,
      ncols=3,
      loc='lower center',
      bbox_to_anchor=(0.5, 1),
    )

  pages.save(stem, draw, size=(9, 1.2 + 0.4 * len(lanes)))


def draw_growth(stem: Path, results: Sequence[Figures]) -> None:
  """Time, FLOPs and memory of each sweep, over those of its first point."""
  sweeps = list(dict.fromkeys(str(x['sweep']) for x in results))

  def draw(figure: Any) -> None:
    for axes, sweep in zip(
      figure.subplots(1, len(sweeps), squeeze=False)[0], sweeps, strict=True
    ):
      rows: list[Any] = [x for x in results if x['sweep'] == sweep]
      for name in dict.fromkeys(x['row'] for x in rows):
        color = {
          'plain': pages.OTHER,
          'ConAdv': pages.ADVERSARIAL,
          'reuse': pages.CLEAN,
        }[name]
        points = [x for x in rows if x['row'] == name]
        sizes = [x['size'] for x in points]
        axes.plot(
          sizes,
          [x['seconds_ratio'] for x in points],
          marker='.',
          color=color,
          label=f'{name}, time',
        )
        axes.plot(
          sizes,
          [x['memory_bytes_ratio'] for x in points],
          linestyle=':',
          color=color,
          label=f'{name}, memory',
        )
      axes.set_xscale('log', base=2)
      axes.set_xticks(sizes, [f'{size:.0f}' for size in sizes])
      axes.set_xlabel(sweep)
      axes.set_ylim(0)
      axes.legend(frameon=False, fontsize=8)
      axes.set_title(f'over that at {sweep} = {sizes[0]:.0f}', fontsize=9)

  pages.save(stem, draw, size=(10, 3.4))
