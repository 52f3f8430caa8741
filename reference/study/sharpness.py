"""How sharp the minimum is in which a trained model lies."""

from collections.abc import Callable
from typing import Any

import jax
import jax.flatten_util
import optax

import conadv_optax as conadv
from conadv_optax import hessian
from reference.run import objective

# Of the ball in which the loss may rise, as a share of the parameters' norm.
RADIUS = 0.002


def make_sharpness(
  loss_fn: Callable[[Any, Any, objective.Batch], jax.Array],
) -> Callable[[Any, Any, objective.Batch], dict[str, float]]:
  """The measures of a loss, as `(params, batch_stats, batch)` to columns.

  They are the largest eigenvalue of the Hessian, its trace, and how much the
  loss can rise in a small ball.
  """

  def of_flat(
    unravel: Callable[[jax.Array], Any], batch_stats: Any
  ) -> Callable[[jax.Array, objective.Batch], jax.Array]:
    return lambda flat, batch: loss_fn(unravel(flat), batch_stats, batch)

  def product(
    flat: jax.Array,
    vector: jax.Array,
    unravel: Callable[[jax.Array], Any],
    batch_stats: Any,
    batch: objective.Batch,
  ) -> jax.Array:
    return hessian.operator(of_flat(unravel, batch_stats), flat, batch)(vector)

  compiled = jax.jit(product, static_argnums=2)

  def measure(
    params: Any, batch_stats: Any, batch: objective.Batch
  ) -> dict[str, float]:
    # As one array: what Lanczos does to a vector is compiled for every leaf.
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def matvec(vector: jax.Array) -> jax.Array:
      with jax.disable_jit(False):
        return compiled(flat, vector, unravel, batch_stats, batch)

    key = jax.random.key(0)
    # XLA for CPUs is slow at convolutions in a loop: the loops run in Python.
    with jax.disable_jit():
      pairs = hessian.top_eigenpairs(matvec, flat, 1, key=key)
      trace = hessian.trace(matvec, flat, key=key)
      rise = conadv.sharpness(
        of_flat(unravel, batch_stats),
        flat,
        batch,
        RADIUS * optax.tree.norm(flat),
        key=key,
      )
    return {
      'top_eigenvalue': float(pairs.values[0]),
      'hessian_trace': float(trace.mean),
      'sharpness': float(rise.value),
    }

  return measure
