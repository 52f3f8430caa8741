"""The plots of a study, each on a figure that it is given."""

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib import pyplot as plt

from reference.study import results
from reference.tools import pages

# Points of accuracy below the best that a figure shows.
_SHOWN_OVER_TIME, _SHOWN_OVER_PRICE = 12.0, 3.0


def _points(rows: Sequence[results.Row]) -> tuple[float, float]:
  numbers = [100 * x for x in results.values(rows, 'accuracy')]
  spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
  return statistics.fmean(numbers), spread


def _colors(names: Sequence[str]) -> dict[str, Any]:
  palette = plt.get_cmap('tab20')
  return {name: palette(i % palette.N) for i, name in enumerate(names)}


def _marker(place: int) -> str:
  """Another one where the palette begins anew."""
  return 'os^'[place // 20]


def _show_near(axes: Any, best: float, points: float) -> None:
  """Leaves out what is far below the best, and would hide the differences."""
  low, _ = axes.get_ylim()
  axes.set_ylim(max(low, best - points), best + 0.5)


def accuracy(figure: Any, groups: results.Groups) -> None:
  """Test accuracy over batch size, a line for each variant."""
  axes = figure.subplots()
  sizes = results.batch_sizes(groups)
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


def time(figure: Any, groups: results.Groups) -> None:
  """Mean test accuracy over seconds of training, at each batch size."""
  sizes = results.batch_sizes(groups)
  names = list(dict.fromkeys(name for name, size in groups if size == sizes[0]))
  colors = _colors(names)
  for axes, size in zip(
    figure.subplots(1, len(sizes), sharey=True, squeeze=False)[0],
    sizes,
    strict=True,
  ):
    for place, name in enumerate(names):
      rows = [
        x for x in groups.get((name, size), []) if 'accuracy_by_epoch' in x
      ]
      # Steps of two kinds have no one time.
      if not rows or rows[0].get('plain_epochs'):
        continue
      seconds = statistics.median(results.values(rows, 'seconds_a_step'))
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
        marker=_marker(place),
        markersize=4,
      )
    axes.set_title(f'batch {size:,}', fontsize=10)
    axes.set_xlabel('seconds of training')
  best = max(max(x.get_ydata()) for axes in figure.axes for x in axes.lines)
  # What is far below is the warm-up.
  _show_near(figure.axes[0], best, _SHOWN_OVER_TIME)
  figure.axes[0].set_ylabel('test accuracy (%)')
  figure.axes[-1].legend(
    frameon=False, fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5)
  )


def price(
  figure: Any,
  groups: dict[str, list[results.Row]],
  prices: dict[str, dict[str, float]],
) -> None:
  """Test accuracy over what a step costs, by several measures.

  Args:
    figure: to draw on.
    groups: the rows of each variant.
    prices: of each measure, that of the variants that have one.
  """
  colors = _colors(list(groups))
  panels = figure.subplots(1, len(prices), sharey=True, squeeze=False)[0]
  for axes, (measure, costs) in zip(panels, prices.items(), strict=True):
    for place, (name, rows) in enumerate(groups.items()):
      if name not in costs:
        continue
      mean, spread = _points(rows)
      axes.errorbar(
        costs[name],
        mean,
        spread / len(rows) ** 0.5,
        color=colors[name],
        label=name,
        marker=_marker(place),
        capsize=2,
      )
    axes.set_xlabel(f'{measure} / plain')
  best = max(_points(rows)[0] for rows in groups.values())
  _show_near(panels[0], best, _SHOWN_OVER_PRICE)
  panels[0].set_ylabel('test accuracy (%), with standard error')
  panels[0].figure.legend(
    *panels[0].get_legend_handles_labels(),
    frameon=False,
    fontsize=8,
    loc='outside right center',
  )


def effect(
  figure: Any,
  found: list[list[results.Row]],
  field: str,
  plain: list[results.Row],
) -> None:
  """Test and training accuracy over one field, with the plain run's."""
  for axes, column in zip(
    figure.subplots(1, 2), ('accuracy', 'train_accuracy'), strict=True
  ):
    numbers = [
      [100 * x for x in results.values(rows, column)] for rows in found
    ]
    places = range(len(found))
    for place, points in zip(places, numbers, strict=True):
      axes.plot(
        [place] * len(points), points, '.', color=pages.ADVERSARIAL, alpha=0.5
      )
    axes.plot(
      places,
      [statistics.fmean(points) for points in numbers],
      marker='_',
      markersize=14,
      linestyle='',
      color=pages.ADVERSARIAL,
      label='ConAdv, mean',
    )
    if plain:
      axes.axhline(
        100 * statistics.fmean(results.values(plain, column)),
        color=pages.CLEAN,
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
