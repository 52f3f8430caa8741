"""What belongs to a group: a device, or a micro-batch of an accumulation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.core.numeric import at_least_float32, describe
from conadv_optax.core.paths import path_names
from conadv_optax.core.types import Batch, ConAdvAux, ConAdvState, PerGroup


def map_state(
  *states: Any,
  queue: Callable[..., Any],
  own: Callable[..., Any],
  shared: Callable[..., Any],
) -> Any:
  """Maps over the parts of states of one structure, by who they belong to.

  Args:
    *states: of gradient functions; the first decides the structure.
    queue: of each `ConAdvState`, whose queue is split like the batch.
    own: of each `PerGroup`, of which every group has one.
    shared: of each other leaf, which is the same in all groups.
  """

  def apply(*parts: Any) -> Any:
    if isinstance(parts[0], ConAdvState):
      return queue(*parts)
    if isinstance(parts[0], PerGroup):
      return own(*parts)
    return shared(*parts)

  return jax.tree.map(
    apply, *states, is_leaf=lambda x: isinstance(x, ConAdvState | PerGroup)
  )


def own_key(key: jax.Array | None, group: ArrayLike) -> Any:
  """The key of a group, so that no two draw the same."""
  return None if key is None else jax.random.fold_in(key, group)


def is_floating(x: Any) -> bool:
  """Whether a mean over groups makes sense for `x`."""
  return jnp.issubdtype(jnp.result_type(x), jnp.floating)


def check_divides(batch: Batch, groups: int, what: str, fix: str) -> None:
  """The leading axis of every leaf divides evenly over the groups."""
  for path, value in jax.tree_util.tree_flatten_with_path(batch)[0]:
    shape = jnp.shape(value)
    if not shape or shape[0] % groups or not shape[0]:
      raise ValueError(
        'Every leaf of a batch is split along its leading axis, so the batch '
        f'must be a multiple of the {groups} {what}. Leaf '
        f'{list(path_names(path))} is {describe(value)}. Change the batch, '
        f'drop or pad the last one of an epoch, or {fix}.'
      )


def split_aux(aux: Any) -> tuple[Any, Any]:
  """The scalars of the user's aux, and its arrays; None elsewhere."""
  scalars = jax.tree.map(lambda x: None if jnp.ndim(x) else x, aux)
  arrays = jax.tree.map(lambda x: x if jnp.ndim(x) else None, aux)
  return scalars, arrays


def join_aux(scalars: Any, arrays: Any) -> Any:
  """The inverse of `split_aux`."""
  return jax.tree.map(
    lambda x, y: y if x is None else x,
    scalars,
    arrays,
    is_leaf=lambda x: x is None,
  )


def second_moment(aux: ConAdvAux, gradients: Any, wanted: bool) -> Any:
  """A group's part of the second moment, which is a mean over groups.

  Groups may lie within groups, of which the innermost have squared theirs.
  """
  if wanted and aux.second_moment is not None:
    raise ValueError(
      'Squared gradients are averaged over one kind of group, devices or '
      'micro-batches. Given `second_moment=True` for both. Leave it out of '
      '`data_parallel`: its devices average what `accumulate` returns.'
    )
  if not wanted:
    return aux.second_moment
  return jax.tree.map(lambda g: jnp.square(at_least_float32(g)), gradients)


def check_second_moment(second_moment: Any, gradients: Any, call: str) -> None:
  """There is a second moment, of the structure and shapes of the gradients."""
  if second_moment is None:
    raise ValueError(
      "This needs the second moment of the groups' gradients. Given none. Let "
      'the gradient function return it, `conadv.data_parallel(grad_fn, mesh, '
      'second_moment=True)` or `conadv.accumulate(grad_fn, count, '
      f'second_moment=True)`, and pass it on: `{call}`.'
    )
  given, wanted = (
    {
      path_names(path): jnp.shape(leaf)
      for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for tree in (second_moment, gradients)
  )
  if given != wanted:
    different = sorted(set(given.items()) ^ set(wanted.items()), key=str)
    raise ValueError(
      '`second_moment` must have the structure and shapes of the gradients. '
      f'They differ in {different[:3]}. It is that of the same step, before '
      'anything else changes the gradients; under `optax.masked` say '
      '`mask_compatible_extra_args=True`.'
    )
