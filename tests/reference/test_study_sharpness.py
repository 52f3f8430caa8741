"""Sharpness of a trained model, of a loss whose Hessian is known."""

import jax
import jax.numpy as jnp
import numpy as np

from reference.study import sharpness


def test_the_measures_of_a_quadratic():
  scales = {'a': jnp.array([1.0, 9.0]), 'b': jnp.array([[2.0], [0.5]])}
  minimum = {'a': jnp.array([30.0, 40.0]), 'b': jnp.zeros((2, 1))}

  def loss_fn(params, batch_stats, batch):
    squares = jax.tree.map(
      lambda c, w, at: jnp.sum(c * (w - at) ** 2), scales, params, minimum
    )
    return 0.5 * batch_stats * jnp.mean(batch) * sum(jax.tree.leaves(squares))

  measure = sharpness.make_sharpness(loss_fn)
  batch = jnp.array([1.0, 3.0])
  # Twice, as the second run finds what the first compiled.
  for factor in (0.5, 2.0):
    found = measure(minimum, jnp.float32(factor), batch)
    curvature = factor * 2.0
    np.testing.assert_allclose(
      found['top_eigenvalue'], 9 * curvature, rtol=1e-5
    )
    np.testing.assert_allclose(
      found['hessian_trace'], 12.5 * curvature, rtol=1e-5
    )
    radius = sharpness.RADIUS * 50
    rise = 0.5 * 9 * curvature * radius**2
    np.testing.assert_allclose(found['sharpness'], rise, rtol=0.01)
