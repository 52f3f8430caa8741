"""The plain step, in the form of all the others."""

from collections.abc import Sequence
from typing import Any

import jax

from conadv_optax import dual_bn
from conadv_optax.core import checks
from conadv_optax.core.numeric import at_least_float32, describe
from conadv_optax.core.types import (
  Batch,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
  LossFn,
)


def plain(
  loss_fn: LossFn,
  *,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
) -> GradientFunction:
  r"""The gradient of a loss, for what takes a `GradientFunction`.

  .. math::

    g_t = \nabla_\theta L(\theta_t; B_t)

  It has one branch, 'main', and no memory. Where parameters and model state are
  `dual_bn.Branched`, the other branches get gradients of zero.

  Args:
    loss_fn: as for `wrap`, with the same `has_state`, `has_aux`, `has_key`.
    has_state: whether `loss_fn` takes and returns a model state.
    has_aux: whether `loss_fn` returns `(loss, aux)`, or
      `(loss, (model_state, aux))`.
    has_key: whether `loss_fn` also takes `key=`.

  Returns:
    A `GradientFunction` of staleness 0. Its loss is at least float32.

  Raises:
    TypeError: for a `loss_fn` that returns something else than it should.
    ValueError: for a missing key or model state.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.plain(lambda w, batch: jnp.mean(batch * w ** 2))
    >>> w, batch = jnp.array(3.), jnp.ones(4)
    >>> (loss, aux), grads, state = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), batch)
    >>> chex.assert_trees_all_close((loss, grads), (9., 6.))

  References:
    You et al., `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, 2017: the step at its largest batches
  """

  def init(
    params: Any,
    first_batches: Sequence[Batch],
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> ConAdvState:
    del params, model_state, key
    checks.check_first_batches(first_batches, 0)
    return ConAdvState((), ())

  def value_and_grad(
    params: Any,
    state: ConAdvState,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, ConAdvState]:
    checks.check_model_state(params, model_state, has_state)
    checks.check_key(has_key, key)

    def loss(params: Any) -> tuple[jax.Array, tuple[Any, Any]]:
      state = dual_bn.select(model_state, 'main')
      output = loss_fn(
        dual_bn.select(params, 'main'),
        *([state] if has_state else []),
        batch,
        **({'key': key} if has_key else {}),
      )
      value, new_state, aux = checks.unpack_loss(
        output, state, has_state, has_aux
      )
      if isinstance(model_state, dual_bn.Branched):
        new_state = dual_bn.replace(model_state, 'main', new_state)
      return at_least_float32(value), (new_state, aux)

    (value, (new_state, aux)), grads = jax.value_and_grad(loss, has_aux=True)(
      params
    )
    user_aux = {'main': aux} if has_aux else None
    return (
      (value, ConAdvAux({'main': value}, new_state, user_aux)),
      grads,
      state,
    )

  return GradientFunction(init, value_and_grad, staleness=0)


def as_gradient_function(
  fn: GradientFunction | LossFn,
  *,
  has_state: bool,
  has_aux: bool,
  has_key: bool,
) -> GradientFunction:
  """A gradient function as it is, and a loss function made `plain`."""
  flags = {'has_state': has_state, 'has_aux': has_aux, 'has_key': has_key}
  if not isinstance(fn, GradientFunction):
    if not callable(fn):
      raise TypeError(
        'Here belongs a gradient function, what `conadv.wrap` or '
        '`conadv.plain` returned say, or a loss function. Given '
        f'{describe(fn)}.'
      )
    return plain(fn, **flags)
  if any(flags.values()):
    given = ', '.join(f'{name}=True' for name in flags if flags[name])
    raise ValueError(
      'A gradient function knows already what its loss takes and returns; '
      '`has_state`, `has_aux` and `has_key` are for a loss function. Given a '
      f'gradient function and {given}. Write `conadv.plain(loss_fn, {given})`, '
      'or the same with `conadv.wrap`.'
    )
  return fn
