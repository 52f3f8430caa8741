r"""LARS: a learning rate for each layer, from the norms of weight and gradient.

References:
  You et al., `Large Batch Training of Convolutional Networks
  <https://arxiv.org/abs/1708.03888>`_, 2017
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  abs_sq,
  at_least_float32,
  check_choice,
  check_no_schedule,
  check_not_negative,
)
from conadv_optax.core.paths import tree_of
from conadv_optax.optimizers.masks import (
  TAKEN_FOR_A_SCHEDULE,
  exclude_norm_and_bias,
)


class LarsState(NamedTuple):
  """State of `lars`.

  Attributes:
    count: int32 scalar, the steps taken.
    momentum: the momentum buffer, like the parameters in shape and dtype.
  """

  count: Any
  momentum: optax.Updates


def lars(
  learning_rate: optax.ScalarOrSchedule,
  *,
  weight_decay: optax.ScalarOrSchedule,
  momentum: ArrayLike = 0.9,
  trust_coefficient: ArrayLike = 1e-3,
  eps: ArrayLike = 0.0,
  nesterov: bool = False,
  mask: Callable[[Any], Any] | Any | None = None,
  trust_ratio: Literal['separate', 'joint'] = 'separate',
  momentum_over: Literal['scaled', 'raw'] = 'scaled',
  max_trust_ratio: ArrayLike | None = None,
  trust_clip: bool = False,
) -> optax.GradientTransformationExtraArgs:
  r"""Layer-wise adaptive rate scaling, in the forms that are in use.

  With :math:`d = g + \lambda w` for weight :math:`w`, gradient :math:`g`, decay
  :math:`\lambda`, trust coefficient :math:`c`, and norms in float32,

  .. math::

    r = \frac{c \|w\|}{\|g\| + \lambda \|w\| + \epsilon}
    \ \text{('separate')}, \qquad
    r = \frac{c \|w\|}{\|d\| + \epsilon}\ \text{('joint')}

  .. math::

    v \leftarrow m v + \eta r d,\ w \leftarrow w - v
    \ \text{('scaled')}, \qquad
    v \leftarrow m v + r d,\ w \leftarrow w - \eta v\ \text{('raw')}

  :math:`r` is 1 where either norm in it is 0. Leaves outside the mask take
  plain momentum: :math:`r = 1` and no decay. 'separate' with 'scaled' is the
  form of MLPerf and of ConAdv; 'joint' with 'scaled', and nothing excluded, is
  `optax.lars`. The two momenta differ while the learning rate changes.

  Parameters may be complex. As in Optax, the gradient is taken as it is given.
  `jax.grad` returns the conjugate of the direction of ascent: conjugate it.

  Args:
    learning_rate: a float, a scalar array or a schedule.
    weight_decay: coefficient :math:`\lambda`, a float, a scalar array or a
      schedule. The coefficients below may be traced, but cannot be schedules:
      for that take `optax.inject_hyperparams`.
    momentum: coefficient :math:`m`.
    trust_coefficient: coefficient :math:`c`.
    eps: added to the denominator of the ratio.
    nesterov: step by :math:`m v + (\ldots)` with the new :math:`v`.
    mask: True where LARS applies: a function of the parameters, a tree of bools
      (a prefix will do), or True for all. None is `exclude_norm_and_bias`.
      Under `optax.inject_hyperparams`, which takes every function for a
      schedule, pass a function with `static_args='mask'`.
    trust_ratio: 'separate' or 'joint'.
    momentum_over: 'scaled' or 'raw'.
    max_trust_ratio: the largest ratio, None for no limit.
    trust_clip: LARC: take :math:`\min(r / \eta, 1)` for the ratio, so that no
      layer's rate :math:`\eta r` is above the learning rate.

  Returns:
    A gradient transformation; `update` needs `params`, and its updates have the
    dtype of the gradients. State and updates keep every shape and dtype.

  Raises:
    TypeError: for a function in place of a coefficient; in `update`, for a mask
      that is not made of bools.
    ValueError: for an unknown form or a negative decay; in `update`, for a mask
      that is False itself, or no `params`.

  Examples:
    >>> import chex, jax.numpy as jnp, optax
    >>> import conadv_optax as conadv
    >>> tx = conadv.lars(2., weight_decay=0.5, trust_coefficient=0.1)
    >>> params = {'kernel': jnp.full((1, 4), 2.), 'bias': jnp.ones(1)}
    >>> grads = {'kernel': jnp.full((1, 4), 1.), 'bias': jnp.ones(1)}
    >>> updates, _ = tx.update(grads, tx.init(params), params)
    >>> # |w| = 4, |g| = 2: ratio 0.1 * 4 / (2 + 0.5 * 4); g + wd * w = 2
    >>> chex.assert_trees_all_close(
    ...     updates,
    ...     {'kernel': jnp.full((1, 4), -0.4), 'bias': jnp.full(1, -2.)})

  References:
    You et al., `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, 2017
  """
  check_choice('trust_ratio', trust_ratio, ('separate', 'joint'))
  check_choice('momentum_over', momentum_over, ('scaled', 'raw'))
  if not callable(weight_decay):
    check_not_negative('weight_decay', weight_decay)
  for name, coefficient in (
    ('momentum', momentum),
    ('trust_coefficient', trust_coefficient),
    ('eps', eps),
    ('max_trust_ratio', max_trust_ratio),
  ):
    check_no_schedule(name, coefficient)
  form = _Lars(
    learning_rate,
    weight_decay,
    momentum,
    trust_coefficient,
    eps,
    nesterov,
    mask,
    trust_ratio == 'separate',
    momentum_over == 'scaled',
    max_trust_ratio,
    trust_clip,
  )
  return optax.GradientTransformationExtraArgs(form.init, form.update)


@dataclasses.dataclass(frozen=True, eq=False)
class _Lars:
  learning_rate: optax.ScalarOrSchedule
  weight_decay: optax.ScalarOrSchedule
  momentum: ArrayLike
  trust_coefficient: ArrayLike
  eps: ArrayLike
  nesterov: bool
  mask: Any
  is_separate: bool
  is_scaled: bool
  max_trust_ratio: ArrayLike | None
  trust_clip: bool

  def init(self, params: optax.Params) -> LarsState:
    return LarsState(
      count=jnp.zeros([], jnp.int32),
      momentum=jax.tree.map(jnp.zeros_like, params),
    )

  def update(
    self,
    updates: optax.Updates,
    state: LarsState,
    params: optax.Params | None = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, LarsState]:
    del extra_args
    if params is None:
      raise ValueError(
        'LARS scales each layer by the norm of its weights, so `update` needs '
        'them. Likely `tx.update(grads, opt_state)`; say '
        '`tx.update(grads, opt_state, params)`.'
      )
    rate, decay = (
      value(state.count) if callable(value) else value
      for value in (self.learning_rate, self.weight_decay)
    )
    both = jax.tree.map(
      functools.partial(self._leaf, rate, decay),
      _resolve(self.mask, params),
      updates,
      state.momentum,
      params,
    )
    # `jax.tree.transpose` knows no tree without leaves, as an empty group of
    # `optax.multi_transform` is.
    new_updates, new_momentum = (
      jax.tree.map(lambda _, pair, i=i: pair[i], updates, both)
      for i in range(2)
    )
    count = optax.safe_increment(state.count)
    return new_updates, LarsState(count, new_momentum)

  def _leaf(
    self,
    rate: ArrayLike,
    decay: ArrayLike,
    is_weight: bool,
    g: jax.Array,
    v: jax.Array,
    w: jax.Array,
  ) -> tuple[jax.Array, jax.Array]:
    """The update and the momentum of a leaf."""
    dtypes = g.dtype, v.dtype
    g, v, w = (at_least_float32(x) for x in (g, v, w))
    lr, wd, m = (_as(w, x) for x in (rate, decay, self.momentum))
    inside, outside = (lr, 1.0) if self.is_scaled else (1.0, lr)
    d = inside * g
    if is_weight:
      d = g + wd * w
      x, beside = (g, decay) if self.is_separate else (d, 0)
      d = inside * self._ratio(w, x, beside, rate) * d
    v = m * v + d
    step = m * v + d if self.nesterov else v
    return (-outside * step).astype(dtypes[0]), v.astype(dtypes[1])

  def _ratio(
    self, w: jax.Array, x: jax.Array, decay: ArrayLike, rate: ArrayLike
  ) -> jax.Array:
    w_norm, x_norm = _norm(w), _norm(x)
    defined = (w_norm > 0) & (x_norm > 0)
    below = x_norm + _as(x_norm, decay) * w_norm + _as(x_norm, self.eps)
    above = _as(w_norm, self.trust_coefficient) * w_norm
    r = jnp.where(defined, above / jnp.where(defined, below, 1.0), 1.0)
    if self.max_trust_ratio is not None:
      r = jnp.minimum(r, _as(r, self.max_trust_ratio))
    if self.trust_clip:
      lr = _as(r, rate)
      r = jnp.minimum(jnp.where(lr > 0, r / jnp.where(lr > 0, lr, 1.0), r), 1.0)
    return r.astype(w.dtype)


def _as(like: jax.Array, number: ArrayLike) -> jax.Array:
  # Beside complex parameters `optax.inject_hyperparams` makes it complex too.
  return jnp.real(number).astype(like.dtype)


def _norm(x: jax.Array) -> jax.Array:
  square = jnp.sum(abs_sq(x))
  # The root's derivative at 0 is infinite, and makes a NaN even if not used.
  is_zero = square == 0
  return jnp.where(is_zero, 0.0, jnp.sqrt(jnp.where(is_zero, 1.0, square)))


def _resolve(mask: Any, params: optax.Params) -> Any:
  """The mask as a full tree of bools."""
  if isinstance(mask, bool | np.bool_) and not mask:
    raise ValueError(
      '`mask` is True where LARS applies: a function of the parameters, a tree '
      'of bools, or True for all. Given mask=False, which leaves plain '
      f'momentum everywhere. {TAKEN_FOR_A_SCHEDULE} If it is meant, write '
      '`mask=jax.tree.map(lambda _: False, params)`.'
    )
  if mask is None:
    mask = exclude_norm_and_bias
  tree = tree_of(mask, params)
  wrong = [
    leaf
    for leaf in jax.tree.leaves(tree)
    if not isinstance(leaf, bool | np.bool_)
  ]
  if wrong:
    raise TypeError(
      '`mask` must be made of bools, True where LARS applies. Given a '
      f'leaf of type {type(wrong[0]).__name__}. If it is a tree of arrays, '
      f'write `mask=jax.tree.map(bool, mask)`. {TAKEN_FOR_A_SCHEDULE}'
    )
  return jax.tree.map(
    lambda chosen, part: jax.tree.map(lambda _: chosen, part), tree, params
  )
