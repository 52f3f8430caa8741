"""Figures for light and for dark pages."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot as plt

CLEAN, ADVERSARIAL, OTHER = '#2f7fd1', '#e0762a', '#8a8a8a'


def save(
  stem: Path, draw: Callable[..., None], *args: Any, size: tuple[float, float]
) -> None:
  """Writes `stem`-light.svg and -dark.svg, on transparent ground."""
  for theme, style in (('light', 'default'), ('dark', 'dark_background')):
    with (
      plt.style.context(style),
      matplotlib.rc_context(
        {
          'axes.spines.right': False,
          'axes.spines.top': False,
          'font.size': 10,
          'svg.hashsalt': stem.name,
        }
      ),
    ):
      figure = plt.figure(figsize=size, layout='constrained')
      draw(figure, *args)
      stem.parent.mkdir(parents=True, exist_ok=True)
      figure.savefig(
        stem.parent / f'{stem.name}-{theme}.svg',
        transparent=True,
        metadata={'Date': None},
      )
      plt.close(figure)
