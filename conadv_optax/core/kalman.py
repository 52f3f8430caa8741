r"""Statistics of norm layers, from one layer to the next.

References:
  Wang et al., `Batch Kalman Normalization: Towards Training Deep Neural
  Networks with Micro-Batches <https://arxiv.org/abs/1802.03133>`_, 2018
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm as gaussian
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  at_least_float32,
  check_share,
  describe,
)

# Above this mean ratio of variances the two layers have nothing in common.
_MAX_RATIO = 100.0


class Statistics(NamedTuple):
  """Mean and variance of each channel that a norm layer divides by.

  Attributes:
    mean: float32 [channels], or wider for wider inputs.
    var: the (biased) variance, of the same shape and dtype.
  """

  mean: jax.Array
  var: jax.Array


def fuse(batch: Statistics, previous: Statistics, p: ArrayLike) -> Statistics:
  r"""Joins a batch's statistics with those of the layer before.

  Those of a mixture that draws from the layer before with probability
  :math:`p`, and from the batch otherwise:

  .. math::

    \mu &= p \mu_{-} + (1 - p) \mu_B \\
    v &= p v_{-} + (1 - p) v_B + p (1 - p) (\mu_B - \mu_{-})^2

  Only where the mean of :math:`v_{-} / v_B` over the channels is below 100;
  elsewhere they are the batch's. One channel without any variance in the batch
  makes that mean infinite.

  Args:
    batch: statistics of this layer's batch, float [channels].
    previous: those of the layer before, of the same shape.
    p: how much the layer before counts, from 0 to 1; may be traced. 0 is the
      batch's statistics.

  Returns:
    The fused `Statistics`, of the shape and dtype of `batch`.

  Raises:
    TypeError: when `previous` is no `Statistics`, or `p` is a function.
    ValueError: when the channels differ, or `p` is not from 0 to 1.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax.flax as conadv_flax
    >>> batch, previous = (
    ...     conadv_flax.Statistics(jnp.array([mean]), jnp.array([var]))
    ...     for mean, var in ((3., 1.), (1., 5.)))
    >>> chex.assert_trees_all_close(
    ...     conadv_flax.fuse(batch, previous, 0.25),
    ...     conadv_flax.Statistics(
    ...         jnp.array([0.25 * 1 + 0.75 * 3]),
    ...         jnp.array([0.25 * 5 + 0.75 * 1 + 0.25 * 0.75 * (3 - 1) ** 2])))

  References:
    Wang et al., `Batch Kalman Normalization: Towards Training Deep Neural
    Networks with Micro-Batches <https://arxiv.org/abs/1802.03133>`_, 2018
  """
  check_share('p', p, 'how much the layer before counts')
  check_statistics(previous, batch.mean.shape[-1])
  dtype = batch.mean.dtype
  p = jnp.asarray(p, dtype)
  mean, var = (x.astype(dtype) for x in previous)
  fused = Statistics(
    p * mean + (1 - p) * batch.mean,
    p * var + (1 - p) * batch.var + p * (1 - p) * jnp.square(batch.mean - mean),
  )
  # A NaN, of 0 / 0, is not below it either.
  is_near = jnp.mean(var / batch.var) < _MAX_RATIO
  return jax.tree.map(lambda x, y: jnp.where(is_near, x, y), fused, batch)


def predict(previous: Statistics, kernel: jax.Array) -> Statistics:
  r"""Carries statistics through a ReLU and a convolution or dense layer.

  With channel :math:`i` of the layer before as an independent normal
  :math:`z_i` of its mean and variance, and :math:`W` the kernel, channel
  :math:`o` of this one has

  .. math::

    \mu_o = \sum_{k, i} W_{kio}\, E[\mathrm{relu}(z_i)], \qquad
    v_o = \sum_{k, i} W_{kio}^2\, \mathrm{Var}[\mathrm{relu}(z_i)]

  So the number of channels may change. The released code draws one image of
  such normals and convolves it; this is the limit of many draws, without the
  padding at the border, and needs no key. A sum of two branches has the sum of
  their statistics: `jax.tree.map(jnp.add, first, second)`.

  Args:
    previous: float [channels in].
    kernel: of the layer between, float [..., channels in, channels out].
      Without a ReLU between, or with a grouped convolution, bring a prediction
      of your own.

  Returns:
    `Statistics` of [channels out]. Gradients flow to both arguments.

  Raises:
    TypeError: when `previous` is no `Statistics`.
    ValueError: when the channels differ.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax.flax as conadv_flax
    >>> # Far above zero a ReLU changes nothing: 2 * 9 - 8, and 4 * 1 + 1 * 1.
    >>> previous = conadv_flax.Statistics(
    ...     jnp.array([9., 8.]), jnp.array([1., 1.]))
    >>> chex.assert_trees_all_close(
    ...     conadv_flax.predict(previous, jnp.array([[2.], [-1.]])),
    ...     conadv_flax.Statistics(jnp.array([10.]), jnp.array([5.])))

  References:
    Wang et al., `Batch Kalman Normalization: Towards Training Deep Neural
    Networks with Micro-Batches <https://arxiv.org/abs/1802.03133>`_, 2018
  """
  check_statistics(previous, kernel.shape[-2])
  kernel = at_least_float32(kernel)
  mean, var = (x.astype(kernel.dtype) for x in previous)
  # Not 0, where the root has no slope.
  std = jnp.sqrt(jnp.maximum(var, jnp.finfo(var.dtype).tiny))
  z = mean / std
  above, density = gaussian.cdf(z), gaussian.pdf(z)
  first = mean * above + std * density
  # Not the second moment less `first ** 2`, which is lost in rounding where the
  # mean is many deviations from zero. Beyond 30 of them nothing changes.
  z = jnp.clip(z, -30.0, 30.0)
  spread = above + z * (
    z * above * gaussian.cdf(-z) + density * (1 - 2 * above)
  )
  spread = var * jnp.maximum(spread - jnp.square(density), 0.0)
  return Statistics(
    jnp.einsum('i,...io->o', first, kernel),
    jnp.einsum('i,...io->o', spread, jnp.square(kernel)),
  )


def check_statistics(previous: Any, channels: int) -> None:
  """Raises unless these are statistics of so many channels."""
  if not isinstance(previous, Statistics):
    raise TypeError(
      '`previous` is the `Statistics` that the layer before handed on, or None '
      f'for the first layer. Given a {type(previous).__name__}. A layer '
      'returns two things, take both: `x, statistics = norm(x, statistics)`. '
      'To add statistics, `jax.tree.map(jnp.add, first, second)`.'
    )
  for name, value in previous._asdict().items():
    if value.shape != (channels,):
      raise ValueError(
        '`previous` must have a mean and a variance for each channel here, '
        f'{channels}. Given a `{name}` of {describe(value)}. Where the number '
        'changes between two norm layers, carry the statistics through the '
        'layer between, `predict(previous, kernel)`, or begin anew with '
        '`None`.'
      )
