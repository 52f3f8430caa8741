"""Example images with what they are and what a model takes them for."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

_COLUMNS = 8
_LONGEST = 18
_RIGHT, _WRONG = '#1b7a3d', '#b3261e'


class Example(NamedTuple):
  """An image, float (H, W, C) from 0 to 1, and names of classes.

  Two classes may have one name, so `right` says whether they are the same.
  """

  pixels: np.ndarray
  label: str
  predicted: str
  confidence: float
  right: bool


def _short(name: str) -> str:
  return name if len(name) <= _LONGEST else f'{name[: _LONGEST - 1]}…'


def draw(path: Path, sections: Mapping[str, Sequence[Example]]) -> None:
  """Writes a figure of the sections, one below the other, with their titles.

  Below each image stands its label, and the prediction with its probability.
  """
  filled = {title: shown for title, shown in sections.items() if shown}
  heights = [math.ceil(len(shown) / _COLUMNS) for shown in filled.values()]
  figure = Figure(
    figsize=(1.5 * _COLUMNS, 2.0 * sum(heights) + 0.4 * len(heights)),
    layout='constrained',
  )
  parts = figure.subfigures(
    len(filled), 1, squeeze=False, height_ratios=heights
  )
  for part, height, (title, shown) in zip(
    parts[:, 0], heights, filled.items(), strict=True
  ):
    part.suptitle(title, x=0.01, ha='left', fontsize=11, fontweight='bold')
    grid = part.subplots(height, _COLUMNS, squeeze=False).ravel()
    for axes in grid:
      axes.set_axis_off()
    for axes, example in zip(grid, shown, strict=False):
      grey = example.pixels.shape[-1] == 1
      axes.imshow(
        example.pixels[..., 0] if grey else example.pixels,
        cmap='gray',
        vmin=0.0,
        vmax=1.0,
      )
      below = dict(transform=axes.transAxes, ha='center', va='top', fontsize=8)
      axes.text(0.5, -0.03, _short(example.label), **below)
      axes.text(
        0.5,
        -0.17,
        f'→ {_short(example.predicted)} ({example.confidence:.0%})',
        color=_RIGHT if example.right else _WRONG,
        **below,
      )
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=130, bbox_inches='tight', pad_inches=0.15)
