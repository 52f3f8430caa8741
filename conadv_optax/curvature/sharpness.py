r"""Sharpness: how much the loss can rise in a ball around the parameters.

References:
  Keskar et al., `On Large-Batch Training for Deep Learning: Generalization Gap
  and Sharp Minima <https://arxiv.org/abs/1609.04836>`_, 2017
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.micro_batches import Denominator, mean_over
from conadv_optax.core.numeric import check_count, check_scalar, unit
from conadv_optax.core.types import Batch, LossFn
from conadv_optax.curvature.points import float32_point, value_and_grad
from conadv_optax.curvature.vectors import random_like


class Sharpness(NamedTuple):
  """The loss at the parameters, and the largest found around them.

  Attributes:
    loss: scalar, at least float32, the loss at the parameters.
    largest: scalar like it, the largest loss found in the ball, at least
      `loss`.
    value: scalar like it, `(largest - loss) / (1 + |loss|)`.
  """

  loss: jax.Array
  largest: jax.Array
  value: jax.Array


def sharpness(
  loss_fn: LossFn,
  params: Any,
  batch: Batch,
  radius: ArrayLike,
  *,
  key: jax.Array,
  steps: int = 20,
  micro_batches: int = 1,
  denominator: Denominator | None = None,
) -> Sharpness:
  r"""The largest loss in an L2 ball, by projected gradient ascent.

  .. math::

    \phi = \frac{\max_{\|\delta\|_2 \le \rho} L(\theta + \delta) - L(\theta)}
    {1 + |L(\theta)|}

  The ascent starts on the sphere, along the gradient plus a tenth of a random
  direction (at a minimum there is nothing else). It follows the normalised
  gradient, by :math:`\rho` in the first step and linearly less in each later
  one. What it finds is a lower bound of the maximum, and closer with more
  steps: where the gradient is nearly across the steepest curvature, the default
  number can stop a tenth below.

  The paper takes a box around each weight, and 100 times this value; this takes
  one ball for all weights. A net with rectifiers can be rescaled without a
  change of its output, but its sharpness changes. So compare sharpness between
  runs of one model, at a radius in proportion to the norm of the parameters.

  Args:
    loss_fn: `loss_fn(params, batch)` returns the mean loss, a floating scalar.
      A model with statistics goes in as a closure, in evaluation mode.
    params: the point :math:`\theta`, any pytree of floating arrays.
    batch: a pytree of arrays with a leading batch axis.
    radius: :math:`\rho`, in the units of the parameters, over all leaves
      together. It may be traced.
    key: draws the random direction of the start.
    steps: number of steps; each takes the gradient of the whole batch.
    micro_batches: number of parts that the batch is gone through in; it must
      divide the batch. Memory is that of one part.
    denominator: what the loss is a mean of, as for `hessian.operator`:
      `lambda batch: batch['mask'].sum()`.

  Returns:
    `Sharpness`. Where the loss is flat, or the radius 0, the value is 0. The
    ascent is in float32, and the loss runs in the dtype of the parameters: pass
    them in float32, or bfloat16 rounds a small radius away.

  Raises:
    TypeError: for parameters that are not floating (split complex ones into
      their parts), a radius that is no scalar, a loss that is not a floating
      scalar, or a denominator that is not a real one.
    ValueError: for a negative radius, fewer than one step, or a batch that
      `micro_batches` does not divide.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def loss_fn(w, batch):
    ...   return 0.5 * jnp.mean(batch) * jnp.sum(jnp.array([1., 4.]) * w ** 2)
    >>> found = conadv.sharpness(
    ...     loss_fn, jnp.zeros(2), jnp.ones(8), 0.5, key=jax.random.key(0))
    >>> # Half the largest eigenvalue times the radius squared.
    >>> chex.assert_trees_all_close(found.value, 0.5 * 4 * 0.5 ** 2, rtol=1e-3)

  References:
    Keskar et al., `On Large-Batch Training for Deep Learning: Generalization
    Gap and Sharp Minima <https://arxiv.org/abs/1609.04836>`_, 2017
  """
  check_scalar('radius', radius)
  check_count('steps', steps)
  radius = jnp.asarray(radius, jnp.float32)
  center = float32_point(params)

  def loss_and_gradient(shift: Any) -> tuple[jax.Array, Any]:
    point = optax.tree.add(center, shift)
    return mean_over(
      lambda part: value_and_grad(loss_fn, params, part, point),
      batch,
      micro_batches,
      denominator,
    )

  def step(shift: Any, size: jax.Array) -> tuple[Any, jax.Array]:
    value, gradient = loss_and_gradient(shift)
    ascent = optax.tree.scale(size, unit(gradient))
    return _project(optax.tree.add(shift, ascent), radius), value

  loss, gradient = loss_and_gradient(optax.tree.zeros_like(center))
  noise = unit(random_like(key, center))
  direction = unit(optax.tree.add_scale(unit(gradient), 0.1, noise))
  shift = optax.tree.scale(radius, direction)
  sizes = radius * (1 - jnp.arange(steps, dtype=jnp.float32) / steps)
  shift, values = jax.lax.scan(step, shift, sizes)
  last, _ = loss_and_gradient(shift)
  largest = jnp.maximum(jnp.maximum(loss, last), jnp.max(values))
  return Sharpness(loss, largest, (largest - loss) / (1 + jnp.abs(loss)))


def _project(shift: Any, radius: jax.Array) -> Any:
  length = jnp.maximum(optax.tree.norm(shift), jnp.finfo(jnp.float32).tiny)
  return optax.tree.scale(jnp.minimum(1.0, radius / length), shift)
