r"""Local extragradient: the gradient is taken ahead, the step from here.

References:
  Lin et al., `Extrapolation for Large-batch Training in Deep Learning
  <https://arxiv.org/abs/2006.05720>`_, 2020
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax

from conadv_optax.core.calls import (
  Around,
  Call,
  around,
  pytree,
)
from conadv_optax.core.numeric import (
  ascent,
  cast_like,
  check_choice,
  check_scalar,
  inverse,
  is_finite,
  scale,
  tree_at_least_float32,
  zeros_like,
)
from conadv_optax.core.types import (
  GradientFunction,
  LossFn,
  PerGroup,
)
from conadv_optax.training.loss import check_key
from conadv_optax.training.plain import as_gradient_function


class ExtrapolateState(NamedTuple):
  """State of `extrapolate`.

  Attributes:
    inner: the state of the gradient function inside.
    past: a `PerGroup` of the gradient of the step before, like the parameters;
      `()` unless that is the direction.
    extrapolation: a `PerGroup` of the state of the Optax transformation.
  """

  inner: Any
  past: Any
  extrapolation: PerGroup


def extrapolate(
  grad_fn: GradientFunction | LossFn,
  extrapolation: optax.ScalarOrSchedule | optax.GradientTransformation,
  *,
  direction: Literal['past', 'current', 'noise'] = 'past',
) -> GradientFunction:
  r"""Extrapolated SGD: each group takes its gradient some way ahead.

  With a rate :math:`\hat\gamma`,

  .. math::

    g_t = \nabla L(w_t - \hat\gamma d_t), \qquad w_{t+1} = w_t - \gamma g_t

  where the second half is the optimizer's, which knows only the gradient of the
  first. Each group, a device of `data_parallel` or a micro-batch of
  `accumulate`, goes ahead in a direction :math:`d_t` of its own:

  - 'past': its gradient :math:`g_{t-1}`, 0 at first. One gradient a step.
  - 'current': its gradient at :math:`w_t` on the same batch with the same key.
    Two gradients a step: extragradient.
  - 'noise': standard normal, so :math:`\hat\gamma` is the noise's deviation.

  With an Optax transformation :math:`U` in place of the rate, the group goes
  where its next step would lead if the gradient were :math:`d_t`:

  .. math::

    g_t = \nabla L(w_t + U(d_t; s_t)), \qquad s_{t+1} = U'(g_t; s_t)

  where the state :math:`s_t` has seen only the group's own gradients. The
  momentum form is `optax.sgd(rate, momentum)`, the Adam form
  `optax.adam(rate)`; a rate alone is `optax.sgd(rate)`. The formulas with a
  state are this library's.

  To use the optimizer's own momentum too, the same for all groups, pass
  :math:`w_t - \gamma \mu v_t` to `value_and_grad` and :math:`w_t` to the
  optimizer. Here :math:`v_t` is the trace of `optax.sgd(gamma, mu)`. In
  `conadv.lars` with 'scaled' the rate is inside :math:`v_t`: pass
  :math:`w_t - \mu v_t`. The gradient is then taken :math:`\hat\gamma d_t` below
  that point.

  Without groups, 'past' with a rate needs no gradient function:
  `optax.optimistic_gradient_descent(rate, alpha=1., beta=ahead / rate)`, with
  :math:`\gamma` for `rate` and :math:`\hat\gamma` for `ahead`, makes the same
  steps, except the first. Its parameters are the points ahead.

  Loss, aux, batch statistics and the state inside are those of the pass ahead.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    extrapolation: the rate :math:`\hat\gamma`, a float, a scalar array or a
      schedule; or an Optax transformation :math:`U`, which gets directions and
      parameters in float32.
    direction: 'past', 'current' or 'noise'.

  Returns:
    A `GradientFunction` with the staleness of `grad_fn`.

  Raises:
    TypeError: for a `grad_fn` that is no function, a rate that is no scalar, or
      a state of another gradient function.
    ValueError: for an unknown direction, a negative rate, or noise without a
      key.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.extrapolate(
    ...     lambda w, batch: jnp.mean(batch * w ** 2), 0.1)
    >>> w, batch = jnp.array(1.), jnp.ones(4)
    >>> state = grad_fn.init(w, [])
    >>> _, first, state = grad_fn.value_and_grad(w, state, batch)
    >>> _, second, state = grad_fn.value_and_grad(w, state, batch)
    >>> chex.assert_trees_all_close(
    ...     (first, second), (2., 2. * (1. - 0.1 * 2.)))

  References:
    Lin et al., `Extrapolation for Large-batch Training in Deep Learning
    <https://arxiv.org/abs/2006.05720>`_, 2020
  """
  grad_fn = as_gradient_function(grad_fn)
  check_choice('direction', direction, ('past', 'current', 'noise'))
  rate: Any = ()
  if not isinstance(extrapolation, optax.GradientTransformation):
    if not callable(extrapolation):
      check_scalar('extrapolation', extrapolation)
    rate, extrapolation = extrapolation, None
  made = _Extrapolate(grad_fn, rate, extrapolation, direction)
  return around(made)


@pytree('grad_fn', 'rate')
class _Extrapolate(Around):
  rate: Any
  transformation: optax.GradientTransformation | None
  direction: str
  state_kind = ExtrapolateState

  @property
  def tx(self) -> optax.GradientTransformation:
    return self.transformation or optax.sgd(self.rate)

  def init(self, call: Call) -> ExtrapolateState:
    params = jax.tree.map(jnp.asarray, call.params)
    return ExtrapolateState(
      call.init(self.grad_fn),
      PerGroup(zeros_like(params)) if self.direction == 'past' else (),
      PerGroup(self.tx.init(tree_at_least_float32(params))),
    )

  def value_and_grad(self, call: Call) -> tuple[Any, Any, ExtrapolateState]:
    state, call = call.state, call._replace(state=call.state.inner)
    here = tree_at_least_float32(call.params)
    if self.direction == 'past':
      towards = ascent(state.past.value)
    elif self.direction == 'current':
      alone = call._replace(denominators=None)
      towards = ascent(alone.value_and_grad(self.grad_fn)[1])
    else:
      key = check_key(True, call.key)
      noise_key, key = jax.random.split(key)
      towards = optax.tree.random_like(noise_key, here)
      call = call._replace(key=key)
    old = state.extrapolation.value
    updates, _ = self.tx.update(towards, old, here)
    ahead = cast_like(optax.tree.add(here, updates), call.params)
    output, grads, inner = call._replace(params=ahead).value_and_grad(
      self.grad_fn
    )
    # The group's own gradient, of which a mean takes its share.
    factor = inverse(self.share(state, call))
    its_own = scale(factor, tree_at_least_float32(grads))
    # What is not finite would be gone towards for ever.
    is_good = is_finite(its_own)
    _, new = self.tx.update(ascent(its_own), old, here)
    own = PerGroup(optax.tree.where(is_good, new, old))
    past: Any = ()
    if self.direction == 'past':
      newest = cast_like(its_own, call.params)
      past = PerGroup(optax.tree.where(is_good, newest, state.past.value))
    return output, grads, ExtrapolateState(inner, past, own)
