"""The plain step, in the form of all the others."""

from collections.abc import Callable
from typing import Any

from jax.typing import ArrayLike

from conadv_optax.core.calls import Call, gradient_function, pytree
from conadv_optax.core.numeric import describe
from conadv_optax.core.types import (
  Batch,
  ConAdvState,
  Denominators,
  GradientFunction,
  LossFn,
)
from conadv_optax.training.loss import Loss
from conadv_optax.training.passes import Pass, collect, train
from conadv_optax.training.queue import check_state


def plain(
  loss_fn: LossFn,
  *,
  denominator: Callable[[Batch], ArrayLike] | None = None,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
  has_branch: bool = False,
) -> GradientFunction:
  r"""The plain gradient of a loss, as a `GradientFunction`.

  .. math::

    g_t = \nabla_\theta L(\theta_t; B_t)

  It has one branch, 'main', and no memory. If parameters and model state are
  `dual_bn.Branched`, the other branches get gradients of zero.

  Args:
    loss_fn: as for `wrap`, with the same `has_state`, `has_aux`, `has_key`.
    denominator: what the loss is a mean of, as for `wrap`.
    has_state: whether `loss_fn` takes and returns a model state.
    has_aux: whether `loss_fn` returns `(loss, aux)`, or
      `(loss, (model_state, aux))`.
    has_key: whether `loss_fn` also takes `key=`.
    has_branch: whether `loss_fn` also takes `branch=`, here 'main'.

  Returns:
    A `GradientFunction` of staleness 0. Its loss is at least float32.

  Raises:
    TypeError: for a `loss_fn` that returns something else than it should, a
      denominator that is no scalar, an NNX module for parameters, a leaf of a
      batch that is no array, or a state of another gradient function.
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
  loss = Loss(loss_fn, has_state, has_aux, has_key, has_branch, denominator)
  return gradient_function(
    _Plain(loss), 0, has_denominators=denominator is not None
  )


@pytree()
class _Plain:
  loss: Loss
  state_kind = ConAdvState

  def init(self, call: Call) -> ConAdvState:
    del call
    return ConAdvState((), ())

  def value_and_grad(self, call: Call) -> tuple[Any, Any, ConAdvState]:
    self.loss.check(call)
    check_state(call.state, 0)
    passes = {'main': Pass('main', call.batch, call.key, 1.0)}
    trained = train(self.loss, call, passes)
    return *collect(trained, call, self.loss.has_aux), call.state

  def denominators(self, state: ConAdvState, batch: Batch) -> Denominators:
    del state
    return {'main': self.loss.divisor(batch)}


def as_gradient_function(fn: GradientFunction | LossFn) -> GradientFunction:
  """A gradient function as it is, and a loss function made `plain`."""
  if isinstance(fn, GradientFunction):
    return fn
  if not callable(fn):
    raise TypeError(
      'Here belongs a gradient function, what `conadv.wrap` or `conadv.plain` '
      f'returned say, or a loss function. Given {describe(fn)}.'
    )
  return plain(fn)
