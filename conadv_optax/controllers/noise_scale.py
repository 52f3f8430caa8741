r"""The gradient noise scale: how large a batch is still worth its cost.

References:
  McCandlish et al., `An Empirical Model of Large-Batch Training
  <https://arxiv.org/abs/1812.06162>`_, 2018
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.controllers.order import check_order
from conadv_optax.core.numeric import (
  abs_sq,
  check_count,
  check_no_schedule,
  concrete,
)
from conadv_optax.core.second_moment import check_second_moment


class NoiseScaleState(NamedTuple):
  """The running averages of `noise_scale`, float32 scalars.

  Attributes:
    weight: what the averages have seen, from 0 towards 1.
    noise: average of :math:`S`, the trace of the covariance of the gradient of
      one example; 0 before the first step.
    signal: average of :math:`|G|^2`, the squared norm of the true gradient; may
      be negative, because it is a difference of two noisy norms.
  """

  weight: jax.Array
  noise: jax.Array
  signal: jax.Array


class NoiseScale(NamedTuple):
  """Two pure functions, as in `optax`.

  Attributes:
    init: `init()` returns the `NoiseScaleState` of no steps.
    update: `update(grads, state, *, second_moment)` returns `(scale, state)`:
      the noise scale in examples, a float32 scalar, and the state.
  """

  init: Callable[[], NoiseScaleState]
  update: Callable[..., tuple[jax.Array, NoiseScaleState]]


def noise_scale(
  batch_size: int, groups: int, *, decay: ArrayLike = 0.99
) -> NoiseScale:
  r"""Estimates the simple noise scale from gradients that a step has anyway.

  A step averages the gradients :math:`g_k` of :math:`K` groups of
  :math:`B / K` examples into :math:`g`. The norms of the small and of the large
  batch give unbiased estimates

  .. math::

    S = \frac{\frac1K \sum_k |g_k|^2 - |g|^2}{K / B - 1 / B}, \qquad
    |G|^2 = \frac{B |g|^2 - \frac{B}{K} \frac1K \sum_k |g_k|^2}{B - B / K}

  which are averaged over steps, each by itself, with the bias of an exponential
  average corrected; then

  .. math::

    B_{\text{simple}} = \overline{S} \,/\, \overline{|G|^2}

  A batch far below :math:`B_{\text{simple}}` can grow by some factor and need
  as many times fewer steps; far above it, more examples a step gain little.
  :math:`B_{\text{simple}}` grows as the loss falls. Groups are devices of
  `data_parallel` or micro-batches of `accumulate`, with `second_moment=True`.

  Args:
    batch_size: :math:`B`, the examples of one whole step, over all groups.
    groups: :math:`K`, how many gradients the second moment is the mean of, at
      least 2: devices or micro-batches, or the product of both where
      `data_parallel` averages the second moment of an `accumulate` within it.
    decay: of the exponential averages, in [0, 1). 0 keeps only the last step,
      which is very noisy.

  Returns:
    A `NoiseScale`. The noise scale is `inf` where the average of :math:`|G|^2`
    is not positive, that is, where the gradient is lost in the noise: take a
    larger `decay`. It is `nan` where both averages are 0, as before the first
    step. A step whose gradients, or their squares, are not finite is left out:
    the averages stay what they were.

  Raises:
    TypeError: for a number of things that is not an int, a function for the
      decay, or an `update` with the state before the gradients.
    ValueError: for fewer than two groups, a batch that they do not divide
      evenly, a decay outside [0, 1), or an `update` without the second moment
      of these gradients.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> # The gradient of each example is the example itself.
    >>> grad_fn = conadv.accumulate(
    ...     conadv.plain(lambda w, x: jnp.mean(w * x)), 4, second_moment=True)
    >>> w, x = jnp.array(0.), jnp.array([1., 2., 4., 5.])
    >>> (_, aux), grads, _ = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), x)
    >>> tracker = conadv.noise_scale(batch_size=4, groups=4)
    >>> scale, state = tracker.update(
    ...     grads, tracker.init(), second_moment=aux.second_moment)
    >>> variance = jnp.var(x, ddof=1)
    >>> chex.assert_trees_all_close(state.noise, variance)
    >>> chex.assert_trees_all_close(state.signal, 3. ** 2 - variance / 4)
    >>> chex.assert_trees_all_close(scale, state.noise / state.signal)

  References:
    McCandlish et al., `An Empirical Model of Large-Batch Training
    <https://arxiv.org/abs/1812.06162>`_, 2018
  """
  check_count('groups', groups, least=2)
  check_count('batch_size', batch_size)
  if batch_size % groups:
    raise ValueError(
      '`batch_size` is the number of examples of one step over all groups, a '
      f'multiple of their number. Given batch_size={batch_size} with '
      f'groups={groups}. Likely it is the batch of one group: write '
      '`batch_size=groups * examples_per_group`.'
    )
  check_no_schedule('decay', decay)
  number = concrete(decay)
  if number is not None and not 0 <= number < 1:
    raise ValueError(
      '`decay` is the share of an exponential average that stays at each '
      f'step, in [0, 1). Given decay={decay!r}. Write `decay=0.99`.'
    )

  def init_fn() -> NoiseScaleState:
    return NoiseScaleState(*(jnp.zeros([], jnp.float32) for _ in range(3)))

  def update_fn(
    grads: Any, state: NoiseScaleState, *, second_moment: Any = None
  ) -> tuple[jax.Array, NoiseScaleState]:
    call = 'tracker.update(grads, state, second_moment=aux.second_moment)'
    check_order(call, state, NoiseScaleState)
    check_second_moment(second_moment, grads, call)
    large, small = (
      optax.tree.sum(optax.tree.cast(squares, jnp.float32))
      for squares in (jax.tree.map(abs_sq, grads), second_moment)
    )
    # The mean of squares is no smaller than the square of the mean, but for
    # rounding.
    noise = batch_size * jnp.maximum(small - large, 0.0) / (groups - 1)
    signal = (groups * large - small) / (groups - 1)

    kept = jnp.asarray(decay, jnp.float32)
    weight = kept * state.weight + (1 - kept)
    step = (1 - kept) / weight
    is_finite = jnp.isfinite(noise) & jnp.isfinite(signal)
    moved = NoiseScaleState(
      weight,
      state.noise + step * (noise - state.noise),
      state.signal + step * (signal - state.signal),
    )
    state = optax.tree.where(is_finite, moved, state)
    return state.noise / jnp.maximum(state.signal, 0.0), state

  return NoiseScale(init_fn, update_fn)
