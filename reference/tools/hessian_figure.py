"""The spectral density of the Hessian of a trained model, as a figure.

    python -m reference.tools.hessian_figure --workdir=runs/digits_conadv

It reads the newest checkpoint of the work folder, whose config must be given as
it was to `reference.main`, and takes the loss of one training batch, with the
main branch's norm layers in evaluation mode.
"""

from pathlib import Path
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import ml_collections
import numpy as np
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from conadv_optax import hessian
from reference import command
from reference.data import input_pipeline, sources
from reference.run import (
  agreement,
  checkpoint,
  models,
  objective,
  parts,
  step,
  trained,
)

_FLOOR = 1e-6


def load(
  config: ml_collections.ConfigDict, workdir: Path
) -> tuple[models.Model, Any, Any, step.Batch]:
  """The model, its parameters and statistics, and a training batch.

  Raises:
    Mistake: when the work folder holds no checkpoint, or one of another
      config.
  """
  place = parts.make_placement(parts.make_mesh(config.batch_size))
  source = sources.open_source(config.data)
  batches = input_pipeline.train_batches(source, config, skipped={})
  batch = place(next(batches))
  batches.close()
  newest = checkpoint.read_about(workdir)
  if newest is not None:
    _, about = newest
    # Trained anywhere, it is looked at here.
    there = {
      name: about.config[name]
      for name in ('processes', 'devices')
      if name in about.config
    }
    fields = checkpoint.comparable(config) | there
    agreement.check_config(workdir, *newest, fields, ())
  found = trained.load(workdir)
  model = parts.make_model(config, num_classes=source.num_classes)
  return model, found.params, found.batch_stats, batch


def analyse(
  config: ml_collections.ConfigDict,
  model: models.Model,
  params: Any,
  batch_stats: Any,
  batch: step.Batch,
  *,
  degree: int,
  probes: int,
  micro_batches: int,
) -> hessian.Spectrum:
  """The spectral density of the Hessian; its last node is the largest value."""
  loss_fn = objective.make_evaluation_loss(model, config)
  # As one array: what Lanczos does to a vector is compiled for every leaf.
  flat, unravel = jax.flatten_util.ravel_pytree(params)

  @jax.jit
  def spectrum(flat: jax.Array, batch: step.Batch) -> hessian.Spectrum:
    matvec = hessian.operator(
      lambda flat, batch: loss_fn(unravel(flat), batch_stats, batch),
      flat,
      batch,
      micro_batches=micro_batches,
      denominator=objective.count_images,
    )
    return hessian.spectral_density(
      matvec, flat, key=jax.random.key(0), degree=degree, probes=probes
    )

  return spectrum(flat, batch)


def plot(axes: Axes, spectrum: hessian.Spectrum) -> None:
  """The density of the eigenvalues on a logarithmic axis."""
  low, high = float(spectrum.nodes.min()), float(spectrum.nodes.max())
  margin = 0.02 * max(high - low, 1.0)
  # Several points to each Gaussian, whose width is a few thousandths at least.
  grid = np.linspace(low - margin, high + margin, 2000, dtype=np.float32)
  density = hessian.smoothed_density(spectrum, jnp.asarray(grid))
  drawn = np.maximum(density, _FLOOR)
  axes.semilogy(grid, drawn, color='tab:blue')
  axes.fill_between(grid, _FLOOR, drawn, color='tab:blue', alpha=0.2)
  axes.set(xlabel='eigenvalue', ylabel='density', ylim=(_FLOOR, None))
  axes.grid(alpha=0.3)
  axes.spines[['top', 'right']].set_visible(False)


def draw(path: Path, spectrum: hessian.Spectrum, *, title: str = '') -> None:
  """Writes the plot as an image."""
  figure = Figure(figsize=(6, 3.6), layout='constrained')
  axes = figure.subplots()
  plot(axes, spectrum)
  axes.set_title(title)
  figure.savefig(path, dpi=150)


def main() -> None:
  """Loads, analyses, draws."""
  workdir = Path(_WORKDIR.value)
  spectrum = analyse(
    _CONFIG.value,
    *load(_CONFIG.value, workdir),
    degree=_DEGREE.value,
    probes=_PROBES.value,
    micro_batches=_MICRO_BATCHES.value,
  )
  draw(workdir / 'spectrum.png', spectrum, title=workdir.name)
  print(
    f'The spectrum goes from {float(spectrum.nodes.min()):.4g} to '
    f'{float(spectrum.nodes.max()):.4g}.\n  figure  {workdir}/spectrum.png'
  )


if __name__ == '__main__':
  # Here, because `reference.main` defines flags of the same names.
  _CONFIG = command.define_config(
    Path(__file__).parents[1] / 'configs' / 'digits.py'
  )
  _WORKDIR = flags.DEFINE_string(
    'workdir', 'runs/digits_conadv', 'The work folder of the run.'
  )
  _DEGREE = flags.DEFINE_integer(
    'degree', 64, 'Products of a probe.', lower_bound=1
  )
  _PROBES = flags.DEFINE_integer('probes', 4, 'Random starts.', lower_bound=1)
  _MICRO_BATCHES = flags.DEFINE_integer(
    'micro_batches', 1, 'Parts of a batch.', lower_bound=1
  )
  command.run(main)
