"""The figure shows the density that was asked for, of a checkpoint's model."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure

from conadv_optax import hessian
from reference.configs import digits
from reference.run import checkpoint, train
from reference.tools import hessian_figure


def test_figure_has_a_peak_at_each_eigenvalue(tmp_path, monkeypatch):
  figures = []
  savefig = Figure.savefig

  def keep(figure, *args, **kwargs):
    figures.append(figure)
    savefig(figure, *args, **kwargs)

  monkeypatch.setattr(Figure, 'savefig', keep)
  spectrum = hessian.Spectrum(
    jnp.array([[-1.0, 0.0, 6.0]]), jnp.array([[0.2, 0.5, 0.3]])
  )
  path = tmp_path / 'spectrum.png'
  hessian_figure.draw(path, spectrum, title='A known one')
  assert path.read_bytes().startswith(b'\x89PNG')
  (axes,) = figures[0].axes
  assert axes.get_yscale() == 'log'
  assert axes.get_title() == 'A known one'
  grid, density = axes.lines[0].get_data()
  is_peak = (density[1:-1] > density[:-2]) & (density[1:-1] >= density[2:])
  peaks = grid[1:-1][is_peak]
  np.testing.assert_allclose(peaks, [-1, 0, 6], atol=2e-3)
  heights = density[1:-1][is_peak]
  np.testing.assert_allclose(
    heights / heights.sum(), [0.2, 0.5, 0.3], atol=0.01
  )


def test_figure_of_a_zero_matrix(tmp_path):
  spectrum = hessian.Spectrum(jnp.zeros((1, 3)), jnp.full((1, 3), 1 / 3))
  hessian_figure.draw(tmp_path / 'zero.png', spectrum)
  assert (tmp_path / 'zero.png').stat().st_size > 1000


@pytest.mark.slow
def test_a_trained_model_is_loaded_and_analysed(tmp_path, monkeypatch):
  config = digits.get_config()
  config.update_from_flattened_dict(
    {
      'method': 'advprop',
      'batch_size': 16,
      'epochs': 1.5 * 16 / 1437,
      'lars.warmup_epochs': 16 / 1437,
    }
  )
  config.model = {'build': 'digit_steps:Small'}
  with pytest.raises(ValueError, match='holds neither'):
    hessian_figure.load(config, tmp_path)
  train.train(config, tmp_path)
  # As where more devices trained.
  monkeypatch.setattr(
    hessian_figure.checkpoint,
    'comparable',
    lambda config, real=checkpoint.comparable: {**real(config), 'devices': 1},
  )
  model, params, batch_stats, batch = hessian_figure.load(config, tmp_path)
  spectrum = hessian_figure.analyse(
    config,
    model,
    params,
    batch_stats,
    batch,
    degree=20,
    probes=1,
    micro_batches=2,
  )

  mean, std = config.data.mean[0], config.data.std[0]
  images = ((np.asarray(batch['image']) / 255 - mean) / std).astype('float32')

  def loss(params):
    logits = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      train=False,
    )
    picked = jnp.take_along_axis(
      jax.nn.log_softmax(logits), batch['label'][:, None], 1
    )
    return -jnp.mean(picked)

  flat, unravel = jax.flatten_util.ravel_pytree(params)
  dense = jax.jit(jax.hessian(lambda flat: loss(unravel(flat))))(flat)
  expected = np.linalg.eigvalsh(dense)[-1]
  np.testing.assert_allclose(spectrum.nodes.max(), expected, rtol=0.01)
  assert spectrum.nodes.shape == (1, 20)
