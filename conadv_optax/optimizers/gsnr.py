r"""Variance-reduced gradient descent: smaller steps where groups disagree.

References:
  Jiang et al., `Accelerating Large Batch Training via Gradient Signal to Noise
  Ratio (GSNR) <https://arxiv.org/abs/2309.13681>`_, 2023
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  abs_sq,
  at_least_float32,
  check_not_negative,
  concrete,
)
from conadv_optax.core.second_moment import check_second_moment


def scale_by_gsnr(
  *, min_ratio: ArrayLike = 0.1, max_ratio: ArrayLike = 1.0
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each gradient by its signal-to-noise ratio over groups.

  With :math:`g_k` the gradient of group :math:`k` of :math:`K`, and :math:`g`
  their mean, element by element,

  .. math::

    r = \frac{|g|^2}{\frac1K \sum_k |g_k|^2 - |g|^2}, \qquad
    g \leftarrow g \cdot \mathrm{clip}\left(
      \frac{r}{\overline{r}},\ r_{\min},\ r_{\max} \right)

  where :math:`\overline{r}` is the mean of :math:`r` over the layer, that is,
  over one array of parameters. Because of this division a variance with
  :math:`K` in the denominator and one with :math:`K - 1` are the same method.

  Where the groups agree, so that the variance is zero up to the rounding of the
  gradient's dtype, the ratio is `max_ratio` and does not count in the mean. So
  with one group, or with equal groups, the gradient is only multiplied by
  `max_ratio`.

  The transformation stands first in a chain, before what changes the gradient:
  `optax.chain(conadv.scale_by_gsnr(), conadv.lars(...))` is VR-LARS, and with
  `optax.lamb` in the second place it is VR-LAMB. The paper takes 8 groups or
  more: devices of `data_parallel` or micro-batches of `accumulate`.

  Args:
    min_ratio: :math:`r_{\min}`.
    max_ratio: :math:`r_{\max}`. With both 1 the gradient is unchanged.

  Returns:
    A gradient transformation without state. `update` needs `second_moment=`,
    the mean over groups of their squared gradients, real, float32 and of the
    structure of the gradients. `optax.chain` passes it on; `optax.masked` does
    so with `mask_compatible_extra_args=True`. `optax.MultiSteps` passes only
    the last second moment: use `accumulate`. The result has the dtype of the
    gradients.

  Raises:
    TypeError: for a function, a schedule say, in place of a ratio.
    ValueError: for a negative ratio, `min_ratio` above `max_ratio`, or an
      `update` without the second moment of these gradients.

  Examples:
    >>> import chex, jax, jax.numpy as jnp, optax
    >>> import conadv_optax as conadv
    >>> # Eight groups, which agree on the gradient of the last weight alone.
    >>> loss_fn = lambda w, x: jnp.mean(x @ w)
    >>> x = jnp.array([[2., 3., 5.], [0., 1., 5.]] * 4)
    >>> grad_fn = conadv.accumulate(
    ...     conadv.plain(loss_fn), 8, second_moment=True)
    >>> w = jnp.zeros(3)
    >>> (_, aux), grads, _ = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), x)
    >>> tx = optax.chain(conadv.scale_by_gsnr(), optax.sgd(1.))
    >>> updates, _ = tx.update(
    ...     grads, tx.init(w), w, second_moment=aux.second_moment)
    >>> # Means 1, 2 and 5, variances 1, 1 and 0: ratios 1 and 4, over their
    >>> # mean 0.4 and 1.6, of which the second is cut to 1.
    >>> chex.assert_trees_all_close(grads, jnp.array([1., 2., 5.]))
    >>> chex.assert_trees_all_close(updates, jnp.array([-0.4, -2., -5.]))

  References:
    Jiang et al., `Accelerating Large Batch Training via Gradient Signal to
    Noise Ratio (GSNR) <https://arxiv.org/abs/2309.13681>`_, 2023
  """
  check_not_negative('min_ratio', min_ratio)
  check_not_negative('max_ratio', max_ratio)
  low, high = concrete(min_ratio), concrete(max_ratio)
  if low is not None and high is not None and low > high:
    raise ValueError(
      '`min_ratio` must not be above `max_ratio`. Given '
      f'min_ratio={min_ratio!r}, max_ratio={max_ratio!r}. Likely they are '
      'swapped: `min_ratio=0.1, max_ratio=1.0`.'
    )

  def update_fn(
    updates: optax.Updates,
    state: optax.EmptyState,
    params: optax.Params | None = None,
    *,
    second_moment: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, optax.EmptyState]:
    del params, extra_args
    check_second_moment(
      second_moment,
      updates,
      'tx.update(grads, opt_state, params, second_moment=aux.second_moment)',
    )

    def leaf(gradient: jax.Array, moment: jax.Array) -> jax.Array:
      g = at_least_float32(gradient)
      signal = abs_sq(g)
      moment = moment.astype(signal.dtype)
      noise = moment - signal
      # Both terms are rounded, the second in the dtype of the gradient, whose
      # numbers are no denser below its smallest normal one.
      info = jnp.finfo(gradient.dtype)
      size = jnp.maximum(moment, float(info.tiny) ** 2)
      agree = noise <= 4 * float(info.eps) * size
      r = jnp.where(agree, 0.0, signal / jnp.where(agree, 1.0, noise))
      mean = jnp.sum(r) / jnp.maximum(jnp.sum(~agree, dtype=r.dtype), 1.0)
      # Beside complex parameters `optax.inject_hyperparams` makes them complex.
      least, most = (
        jnp.real(x).astype(r.dtype) for x in (min_ratio, max_ratio)
      )
      r = jnp.clip(r / jnp.where(mean > 0, mean, 1.0), least, most)
      r = jnp.where(agree, most, r)
      return (r.astype(g.dtype) * g).astype(gradient.dtype)

    return jax.tree.map(leaf, updates, second_moment), state

  return optax.GradientTransformationExtraArgs(
    optax.init_empty_state, update_fn
  )
