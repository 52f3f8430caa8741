r"""Norm layers for Flax models, where a group has a few images.

This module imports Flax, so `conadv_optax` does not import it by itself:

    from conadv_optax.flax import LinenKalmanNorm

Batch Kalman normalisation treats the norm layers of a net as one system. What
one layer found is carried to the next (`predict`) and joined with what that
layer sees itself (`fuse`), which may be a few images.

References:
  Wang et al., `Batch Kalman Normalization: Towards Training Deep Neural
  Networks with Micro-Batches <https://arxiv.org/abs/1802.03133>`_, 2018
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import ArrayLike, DTypeLike

from conadv_optax.core.kalman import (
  Statistics,
  check_statistics,
  fuse,
  predict,
)
from conadv_optax.core.numeric import (
  at_least_float32,
  check_share,
  describe,
)

__all__ = [
  'LinenKalmanNorm',
  'NnxKalmanNorm',
  'Statistics',
  'fuse',
  'predict',
]

_Init = Callable[..., jax.Array]


class LinenKalmanNorm(nn.Module, kw_only=True):
  r"""Batch Kalman normalisation for Flax Linen.

  This is `nn.BatchNorm` over the last axis, with the statistics of `fuse`: it
  joins those of the batch with those that the layer before hands on. Gradients
  go through the statistics, and evaluation takes their running averages.

      x, statistics = norm()(conv1(x), None)  # The first of a chain.
      x, statistics = norm()(conv2(nn.relu(x)), statistics)

  Two layers with different channels are an error: hand on
  `predict(statistics, kernel)`, which carries the statistics through the layer
  between as the released code does, or None to begin anew.

  With `p=0`, or None at each layer, it is `nn.BatchNorm`, and its variables
  have the same names: a trained `BatchNorm` loads, and `conadv.dual_bn.split`
  finds the layer.

  Attributes:
    p: how much the layer before counts, from 0 to 1. The released code has 0.05
      for batches of 128 images, and 0.9 for groups of 2.
    use_running_average: whether the running averages are used, as in
      evaluation. Given here or in the call.
    momentum: decay of the running averages.
    epsilon: added to the variance.
    dtype: of the result; that of the input and the parameters if None.
      Statistics are float32 at least, and their running averages float32.
    param_dtype: of scale and bias.
    use_bias: whether a bias is added.
    use_scale: whether the result is scaled.
    bias_init: initializer of the bias.
    scale_init: initializer of the scale.
    axis_name: axis of devices over which the batch's statistics are means.

  Raises:
    TypeError: when the input is not floating, or `previous` is no
      `Statistics`.
    ValueError: when the channels differ, the input has no axis beside them, or
      `p` is not from 0 to 1.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax.flax as conadv_flax
    >>> norm = conadv_flax.LinenKalmanNorm(p=0.9, use_running_average=False)
    >>> x = jnp.array([[1.], [3.]])  # Two images: mean 2, variance 1.
    >>> previous = conadv_flax.Statistics(jnp.array([1.]), jnp.array([4.]))
    >>> variables = norm.init(jax.random.key(0), x, previous)
    >>> (y, statistics), updates = norm.apply(
    ...     variables, x, previous, mutable=['batch_stats'])
    >>> mean, var = 0.9 * 1 + 0.1 * 2, 0.9 * 4 + 0.1 * 1 + 0.09 * (2 - 1) ** 2
    >>> chex.assert_trees_all_close(
    ...     statistics,
    ...     conadv_flax.Statistics(jnp.array([mean]), jnp.array([var])))
    >>> chex.assert_trees_all_close(y, (x - mean) / var ** 0.5, atol=1e-4)
    >>> chex.assert_trees_all_close(
    ...     updates['batch_stats']['mean'], jnp.array([0.01 * mean]), rtol=1e-5)

  References:
    Wang et al., `Batch Kalman Normalization: Towards Training Deep Neural
    Networks with Micro-Batches <https://arxiv.org/abs/1802.03133>`_, 2018
  """

  p: float
  use_running_average: bool | None = None
  momentum: float = 0.99
  epsilon: float = 1e-5
  dtype: DTypeLike | None = None
  param_dtype: DTypeLike = jnp.float32
  use_bias: bool = True
  use_scale: bool = True
  bias_init: _Init = nn.initializers.zeros
  scale_init: _Init = nn.initializers.ones
  axis_name: str | None = None

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    previous: Statistics | None,
    *,
    use_running_average: bool | None = None,
  ) -> tuple[jax.Array, Statistics]:
    """Normalises `x`.

    Args:
      x: floating [..., channels].
      previous: what the layer before handed on, or None for the first. Checked
        but not used with running averages.
      use_running_average: as the attribute, if that is None.

    Returns:
      `(y, statistics)`: the normalised input, and what it was normalised by,
      for the layer after.
    """
    use_running_average = nn.merge_param(
      'use_running_average', self.use_running_average, use_running_average
    )
    channels = x.shape[-1:]
    _check(x, previous, channels[0], self.p)
    mean = self.variable(
      'batch_stats', 'mean', jnp.zeros, channels, jnp.float32
    )
    var = self.variable('batch_stats', 'var', jnp.ones, channels, jnp.float32)
    statistics = Statistics(mean.value, var.value)
    if not use_running_average:
      is_init = self.is_initializing()
      axis_name = None if is_init else self.axis_name
      statistics = _of_batch(x, previous, self.p, axis_name)
      if not is_init:
        mean.value = _move(mean.value, statistics.mean, self.momentum)
        var.value = _move(var.value, statistics.var, self.momentum)
    scale = bias = None
    if self.use_scale:
      scale = self.param('scale', self.scale_init, channels, self.param_dtype)
    if self.use_bias:
      bias = self.param('bias', self.bias_init, channels, self.param_dtype)
    y = _normalize(x, statistics, scale, bias, self.epsilon, self.dtype)
    return y, statistics


class NnxKalmanNorm(nnx.Module):
  r"""Batch Kalman normalisation for Flax NNX.

  This is `nnx.BatchNorm` over the last axis with the statistics of `fuse`. All
  that `LinenKalmanNorm` says holds here too. `model.train()`, `model.eval()`
  and `nnx.view` set `use_running_average`.

  Args:
    num_features: channels of the input.
    p: how much the layer before counts, from 0 to 1. The released code has 0.05
      for batches of 128 images, and 0.9 for groups of 2.
    rngs: keys for the parameters.
    **: as the attributes of `LinenKalmanNorm`.

  Raises:
    TypeError: when the input is not floating, or `previous` is no
      `Statistics`.
    ValueError: when the channels differ, the input has no axis beside them, or
      `p` is not from 0 to 1.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> from flax import nnx
    >>> import conadv_optax.flax as conadv_flax
    >>> norm = conadv_flax.NnxKalmanNorm(1, p=0.9, rngs=nnx.Rngs(0))
    >>> x = jnp.array([[1.], [3.]])  # Two images: mean 2, variance 1.
    >>> previous = conadv_flax.Statistics(jnp.array([1.]), jnp.array([4.]))
    >>> y, statistics = norm(x, previous)
    >>> mean, var = 0.9 * 1 + 0.1 * 2, 0.9 * 4 + 0.1 * 1 + 0.09 * (2 - 1) ** 2
    >>> chex.assert_trees_all_close(y, (x - mean) / var ** 0.5, atol=1e-4)
    >>> chex.assert_trees_all_close(
    ...     norm.mean[...], jnp.array([0.01 * mean]), rtol=1e-5)

  References:
    Wang et al., `Batch Kalman Normalization: Towards Training Deep Neural
    Networks with Micro-Batches <https://arxiv.org/abs/1802.03133>`_, 2018
  """

  def __init__(
    self,
    num_features: int,
    *,
    p: float,
    use_running_average: bool = False,
    momentum: float = 0.99,
    epsilon: float = 1e-5,
    dtype: DTypeLike | None = None,
    param_dtype: DTypeLike = jnp.float32,
    use_bias: bool = True,
    use_scale: bool = True,
    bias_init: _Init = nn.initializers.zeros,
    scale_init: _Init = nn.initializers.ones,
    axis_name: str | None = None,
    rngs: nnx.Rngs,
  ):
    shape = (num_features,)
    self.mean = nnx.BatchStat(jnp.zeros(shape, jnp.float32))
    self.var = nnx.BatchStat(jnp.ones(shape, jnp.float32))

    def make(init: _Init) -> nnx.Param[jax.Array]:
      return nnx.Param(init(rngs.params(), shape, param_dtype))

    self.scale = make(scale_init) if use_scale else None
    self.bias = make(bias_init) if use_bias else None
    self.num_features = num_features
    self.p = p
    self.use_running_average = use_running_average
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = dtype
    self.axis_name = axis_name

  def __call__(
    self,
    x: jax.Array,
    previous: Statistics | None,
    *,
    use_running_average: bool | None = None,
  ) -> tuple[jax.Array, Statistics]:
    """Normalises `x`.

    Args:
      x: floating [..., num_features].
      previous: what the layer before handed on, or None for the first. Checked
        but not used with running averages.
      use_running_average: takes the place of the attribute.

    Returns:
      `(y, statistics)`: the normalised input, and what it was normalised by,
      for the layer after.
    """
    if use_running_average is None:
      use_running_average = self.use_running_average
    _check(x, previous, self.num_features, self.p)
    statistics = Statistics(self.mean[...], self.var[...])
    if not use_running_average:
      running = statistics
      statistics = _of_batch(x, previous, self.p, self.axis_name)
      self.mean[...] = _move(running.mean, statistics.mean, self.momentum)
      self.var[...] = _move(running.var, statistics.var, self.momentum)
    scale, bias = (
      None if x is None else x[...] for x in (self.scale, self.bias)
    )
    y = _normalize(x, statistics, scale, bias, self.epsilon, self.dtype)
    return y, statistics

  def set_view(self, use_running_average: bool | None = None) -> None:
    """What `nnx.view` sets.

    Args:
      use_running_average: the new value of the attribute, unless None.
    """
    if use_running_average is not None:
      self.use_running_average = use_running_average


def _check(x: jax.Array, previous: Any, channels: int, p: ArrayLike) -> None:
  check_share('p', p, 'how much the layer before counts')
  if not jnp.issubdtype(x.dtype, jnp.floating):
    raise TypeError(
      f'A norm layer takes floating inputs. Given {describe(x)}. Cast them '
      'before the first layer: `x.astype(jnp.float32)`.'
    )
  if x.ndim < 2 or x.shape[-1] != channels:
    raise ValueError(
      f'A norm layer of {channels} channels takes [..., {channels}], the '
      f'channels last and at least one axis before them. Given {describe(x)}. '
      'Likely `jax.vmap` took the batch away, or channels come first: '
      '`jnp.moveaxis(x, 1, -1)`.'
    )
  if previous is not None:
    check_statistics(previous, channels)


def _of_batch(
  x: jax.Array,
  previous: Statistics | None,
  p: ArrayLike,
  axis_name: str | None,
) -> Statistics:
  """What training divides by."""
  x = at_least_float32(x)
  axes = tuple(range(x.ndim - 1))
  mean, square = jnp.mean(x, axes), jnp.mean(jnp.square(x), axes)
  if axis_name is not None:
    mean, square = jax.lax.pmean((mean, square), axis_name)
  batch = Statistics(mean, jnp.maximum(0.0, square - jnp.square(mean)))
  return batch if previous is None else fuse(batch, previous, p)


def _move(running: jax.Array, new: jax.Array, momentum: float) -> jax.Array:
  # NNX may hold the average in a buffer that takes no gradient.
  new = jax.lax.stop_gradient(new).astype(running.dtype)
  return momentum * running + (1 - momentum) * new


def _normalize(
  x: jax.Array,
  statistics: Statistics,
  scale: jax.Array | None,
  bias: jax.Array | None,
  epsilon: float,
  dtype: DTypeLike | None,
) -> jax.Array:
  if dtype is None:
    dtype = jnp.result_type(*(a for a in (x, scale, bias) if a is not None))
  x = at_least_float32(x)

  def row(values: jax.Array) -> jax.Array:
    return values.astype(x.dtype).reshape((1,) * (x.ndim - 1) + values.shape)

  factor = jax.lax.rsqrt(row(statistics.var) + epsilon)
  if scale is not None:
    factor *= row(scale)
  y = (x - row(statistics.mean)) * factor
  if bias is not None:
    y += row(bias)
  return y.astype(dtype)
