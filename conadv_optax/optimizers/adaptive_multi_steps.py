"""One optimizer step for several gradients, whose number is an argument."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  at_least_float32,
  cast_like,
  check_no_schedule,
  concrete,
  describe,
  is_inexact,
  weighted,
  zeros_like,
)


class AdaptiveMultiStepsState(NamedTuple):
  """State of `adaptive_multi_steps`.

  Attributes:
    index: int32 scalar, the micro-batch of its step that comes next, from 0.
    micro_batches: int32 scalar, the micro-batches of the step under way.
    learning_rate_scale: float32 scalar, the scale of the step under way.
    gradients: the sum so far, at least float32, like the parameters in shape.
    inner: the optimizer's own state.
  """

  index: Any
  micro_batches: jax.Array
  learning_rate_scale: jax.Array
  gradients: optax.Updates
  inner: optax.OptState


def adaptive_multi_steps(
  optimizer: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  r"""Steps once for :math:`m` gradients, where :math:`m` may change on the way.

  .. math::

    u = c \cdot \mathrm{update}\left(\frac1m \sum_{i=1}^{m} g_i\right)

  after every :math:`m` calls, and zero updates in between. It is
  `optax.MultiSteps` with the number of calls as an argument, an array, so
  nothing is compiled anew when a controller changes the number. :math:`m` and
  :math:`c` are read at the first micro-batch of a step and hold until its last.
  A change in between, at the end of an epoch say, waits for the next step, and
  no gradient is lost or counted in two batches.

  Args:
    optimizer: any Optax optimizer.

  Returns:
    A gradient transformation whose `update` also takes `micro_batches`,
    :math:`m`, an integer scalar of at least 1, and `learning_rate_scale`,
    :math:`c`, a float scalar. Both are 1 if left out, which is the optimizer
    itself. The scale stands outside any momentum of the optimizer. The
    optimizer gets all other arguments when it steps.

  Raises:
    TypeError: in `update`, for `micro_batches` that is no integer, a schedule
      say, or a `learning_rate_scale` that is a function.
    ValueError: in `update`, for `micro_batches` that is no scalar, or below 1.
      (Where it is traced, less than 1 is taken for 1.)

  Examples:
    >>> import chex, jax.numpy as jnp, optax
    >>> import conadv_optax as conadv
    >>> tx = conadv.adaptive_multi_steps(optax.sgd(0.1))
    >>> params = jnp.array(1.)
    >>> state = tx.init(params)
    >>> first, state = tx.update(
    ...     jnp.array(1.), state, params, micro_batches=2)
    >>> # 4 comes too late for the step under way.
    >>> second, state = tx.update(
    ...     jnp.array(3.), state, params, micro_batches=4)
    >>> chex.assert_trees_all_close((first, second), (0., -0.1 * 2.))

  References:
    Yao et al., `Large batch size training of neural networks with adversarial
    training and second-order information <https://arxiv.org/abs/1810.01021>`_,
    2018
  """
  inner = optax.with_extra_args_support(optimizer)

  def init_fn(params: optax.Params) -> AdaptiveMultiStepsState:
    return AdaptiveMultiStepsState(
      index=jnp.zeros([], jnp.int32),
      micro_batches=jnp.ones([], jnp.int32),
      learning_rate_scale=jnp.ones([], jnp.float32),
      gradients=jax.tree.map(
        lambda p: at_least_float32(jnp.zeros_like(p)), params
      ),
      inner=inner.init(params),
    )

  def update_fn(
    updates: optax.Updates,
    state: AdaptiveMultiStepsState,
    params: optax.Params | None = None,
    *,
    micro_batches: ArrayLike = 1,
    learning_rate_scale: ArrayLike = 1.0,
    **extra_args: Any,
  ) -> tuple[optax.Updates, AdaptiveMultiStepsState]:
    check_no_schedule('learning_rate_scale', learning_rate_scale)
    _check_micro_batches(micro_batches)
    given = (
      jnp.maximum(jnp.asarray(micro_batches, jnp.int32), 1),
      jnp.asarray(learning_rate_scale, jnp.float32),
    )
    under_way = state.micro_batches, state.learning_rate_scale
    count, scale = optax.tree.where(state.index == 0, given, under_way)
    total = jax.tree.map(
      lambda s, g: s + g.astype(s.dtype), state.gradients, updates
    )

    def step() -> tuple[optax.Updates, Any, Any, jax.Array]:
      mean = jax.tree.map(lambda s: s / count.astype(s.dtype), total)
      mean = cast_like(mean, updates)
      steps, inner_state = inner.update(mean, state.inner, params, **extra_args)
      scaled = jax.tree.map(
        lambda u: weighted(scale, at_least_float32(u)).astype(u.dtype), steps
      )
      # In the dtypes that `init` chose, which saw the parameters alone. Keys
      # have none to cast.
      inner_state = jax.tree.map(
        lambda new, old: cast_like(new, old) if is_inexact(new) else new,
        inner_state,
        state.inner,
      )
      zeros = zeros_like(total)
      return scaled, inner_state, zeros, jnp.zeros_like(state.index)

    def wait() -> tuple[optax.Updates, Any, Any, jax.Array]:
      # In the optimizer's dtypes: bfloat16 may go in and float32 come out.
      shapes, *_ = jax.eval_shape(step)
      zeros = cast_like(zeros_like(updates), shapes)
      return zeros, state.inner, total, state.index + 1

    new_updates, inner_state, gradients, index = jax.lax.cond(
      state.index + 1 >= count, step, wait
    )
    return new_updates, AdaptiveMultiStepsState(
      index, count, scale, gradients, inner_state
    )

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _check_micro_batches(micro_batches: ArrayLike) -> None:
  check_no_schedule('micro_batches', micro_batches)
  number = concrete(micro_batches)
  array: Any = micro_batches if number is None else number
  is_integer = jnp.issubdtype(array.dtype, jnp.integer)
  if array.ndim or not is_integer or (number is not None and number < 1):
    given = '' if number is None else f'micro_batches={number.tolist()} of '
    raise (ValueError if is_integer else TypeError)(
      '`micro_batches` is how many gradients make a step, an integer scalar of '
      f"at least 1. Given {given}{describe(array)}. Pass the controller's: "
      '`micro_batches=state.micro_batches`. Where it comes from a division, '
      'write `micro_batches=batch // micro_batch`.'
    )
