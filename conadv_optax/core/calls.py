"""How gradient functions are made and called."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, dataclass_transform

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from conadv_optax.core.batches import check_arrays
from conadv_optax.core.numeric import ratio
from conadv_optax.core.types import (
  Batch,
  Denominators,
  GradientFunction,
  Passes,
)

NEXT = '[next(batches) for _ in range(grad_fn.staleness)]'


class Call(NamedTuple):
  """The arguments of a gradient function's `init` or `value_and_grad`.

  Attributes:
    params: the parameters.
    state: the state; None of an `init`.
    batch: the newest batch; the first batches of an `init`.
    model_state: the model state.
    key: the key.
    denominators: those of the mean, where the call is of one group.
  """

  params: Any
  state: Any
  batch: Any
  model_state: Any = None
  key: Any = None
  denominators: Any = None

  def in_jax(self) -> 'Call':
    """With the arrays of the batch on a device, as JAX's."""
    return self._replace(batch=jax.tree.map(jnp.asarray, self.batch))

  def init(self, grad_fn: GradientFunction) -> Any:
    """Calls `init` of another gradient function."""
    return grad_fn.init(
      self.params, self.batch, model_state=self.model_state, key=self.key
    )

  def value_and_grad(self, grad_fn: GradientFunction) -> tuple[Any, Any, Any]:
    """Calls `value_and_grad` of another gradient function."""
    # One of the user's own need not know of denominators.
    group = {}
    if self.denominators is not None:
      group = {'denominators': self.denominators}
    return grad_fn.value_and_grad(
      self.params,
      self.state,
      self.batch,
      model_state=self.model_state,
      key=self.key,
      **group,
    )


def share_of_mean(own: Denominators | None, mean: Denominators | None) -> Any:
  """How much of the mean over groups is a group's, 1 on average."""
  if own is None or mean is None:
    return jnp.ones([], float)
  share, weight = jnp.zeros([], float), jnp.zeros([], float)
  for branch, of_mean in mean.items():
    share += of_mean.weight * ratio(own[branch].mean, of_mean.mean)
    weight += of_mean.weight
  return ratio(share, weight)


@dataclass_transform(frozen_default=True, eq_default=False)
def pytree(*data: str) -> Callable[[type], Any]:
  """A frozen dataclass that is a pytree of the fields `data`.

  What it computes with, a radius or a weight, is data and may be traced; all
  other fields are static.
  """

  def decorate(kind: type) -> Any:
    made: Any = dataclasses.dataclass(frozen=True, eq=False)(kind)
    static = {field.name for field in dataclasses.fields(made)} - set(data)
    return jax.tree_util.register_dataclass(made, list(data), sorted(static))

  return decorate


def gradient_function(
  made: Any, staleness: int, *, has_denominators: bool, passes: Any = None
) -> GradientFunction:
  """Of a `pytree` with the methods `init`, `value_and_grad`, `denominators`.

  The first two take a `Call`. The functions are pytrees as well: arrays that
  are closed over cannot enter a `shard_map` on a mesh of explicit axes, and
  `hoist` makes arguments of them.
  """
  return GradientFunction(
    Partial(_init, made, staleness),
    Partial(_value_and_grad, made),
    staleness,
    passes,
    Partial(type(made).denominators, made) if has_denominators else None,
  )


def around(made: Any) -> GradientFunction:
  """Of a `pytree` that is as stale as the `grad_fn` in it."""
  inner = made.grad_fn
  return gradient_function(
    made, inner.staleness, has_denominators=inner.denominators is not None
  )


@pytree('grad_fn')
class Around:
  """What holds the state of a gradient function as the `inner` of its own."""

  grad_fn: GradientFunction

  def denominators(self, state: Any, batch: Batch) -> Denominators:
    """What the losses of a step are divided by."""
    assert self.grad_fn.denominators is not None
    return self.grad_fn.denominators(state.inner, batch)

  def share(self, state: Any, call: Call) -> Any:
    """How much of the mean that a call is a part of is its own."""
    own = None
    if self.grad_fn.denominators is not None:
      own = self.denominators(state, call.batch)
    return share_of_mean(own, call.denominators)


def _init(
  made: Any,
  staleness: int,
  params: Any,
  first_batches: Any,
  *,
  model_state: Any = None,
  key: jax.Array | None = None,
) -> Any:
  _check_first_batches(first_batches, staleness)
  check_arrays(first_batches)
  return made.init(Call(params, None, list(first_batches), model_state, key))


def _value_and_grad(
  made: Any,
  params: Any,
  state: Any,
  batch: Batch,
  *,
  model_state: Any = None,
  key: jax.Array | None = None,
  denominators: Any = None,
) -> tuple[Any, Any, Any]:
  check_arrays(batch)
  _check_kind(state, made)
  return made.value_and_grad(
    Call(params, state, batch, model_state, key, denominators)
  )


def hoist(grad_fn: GradientFunction) -> tuple[dict[int, jax.Array], Any]:
  """The arrays of a gradient function, and a function that puts them back."""
  leaves, treedef = jax.tree.flatten(grad_fn)
  arrays = {i: x for i, x in enumerate(leaves) if isinstance(x, jax.Array)}

  def rebuild(arrays: dict[int, jax.Array]) -> GradientFunction:
    return jax.tree.unflatten(
      treedef, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
    )

  return arrays, rebuild


def _check_first_batches(first_batches: Any, staleness: int) -> None:
  """As many batches as the staleness."""
  if not isinstance(first_batches, list | tuple):
    right = {0: '[]', 1: '[batch]'}.get(staleness, NEXT)
    raise TypeError(
      '`first_batches` must be a list of batches, as many as the staleness, '
      f'here {staleness}. Given a {type(first_batches).__name__}. Write '
      f'`grad_fn.init(params, {right})`.'
    )
  if len(first_batches) != staleness:
    raise ValueError(
      f'`init` wants the first {staleness} batches, as many as the staleness. '
      f'Given {len(first_batches)}. Write `first_batches = {NEXT}`.'
    )


def _check_kind(state: Any, made: Any) -> None:
  """The state is of the gradient function that takes it."""
  # The innermost that has a state of its own; one of the user's own may have
  # any.
  while not hasattr(made, 'state_kind'):
    init = getattr(getattr(made, 'grad_fn', None), 'init', None)
    if not isinstance(init, Partial) or not init.args:
      return
    made = init.args[0]
  kind = made.state_kind
  if not isinstance(state, kind):
    raise TypeError(
      'A state goes back to the gradient function that made it, here one with '
      f'a `{kind.__name__}`. Given a {type(state).__name__}. Write `state = '
      'grad_fn.init(params, first_batches)` with the same `grad_fn`.'
    )


def check_passes(grad_fn: GradientFunction, caller: str) -> Passes:
  """The passes of a gradient function, where it can be taken apart."""
  if not isinstance(grad_fn, GradientFunction):
    raise TypeError(
      f'`{caller}` takes a `conadv.GradientFunction`. Given a '
      f'{type(grad_fn).__name__}. Write `conadv.{caller}(conadv.wrap(loss_fn, '
      '...), ...)`.'
    )
  if grad_fn.passes is None:
    raise ValueError(
      f'`{caller}` needs the attack pass and the training passes apart, and '
      'this gradient function does not have them: with `reuse_gradient=True` '
      'there is no attack pass, with `every` most steps have none, and '
      '`data_parallel` has joined them. Pass what `conadv.wrap(loss_fn, ...)` '
      'returned, with `reuse_gradient=False` and `every=1`.'
    )
  return grad_fn.passes
