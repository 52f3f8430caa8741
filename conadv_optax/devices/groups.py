"""How groups, devices or micro-batches, are keyed, run and averaged."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from conadv_optax.core.calls import Call, hoist
from conadv_optax.core.numeric import (
  abs_sq,
  at_least_float32,
  cast_like,
  inverse,
  is_inexact,
  scale,
)
from conadv_optax.core.types import (
  ConAdvAux,
  ConAdvState,
  Denominators,
  Divisor,
  GradientFunction,
  PerGroup,
)


class Parts(NamedTuple):
  """What a group returns, by how that of all groups is put together.

  Attributes:
    means: what is averaged, at least float32: the loss, the losses, the
      gradients, and the inexact among the leaves of the model state and the
      scalars of the user's aux.
    counts: the other scalars of the user's aux, which are summed.
    kept: the other leaves of the model state, the same in all groups.
    arrays: the arrays of the user's aux, an entry for each example.
  """

  means: Any
  counts: Any
  kept: Any
  arrays: Any


def run_group(grad_fn: GradientFunction, call: Call) -> tuple[Parts, Any, Any]:
  """One group's `(parts, second_moment, state)`."""
  output, grads, state = call.value_and_grad(grad_fn)
  return take_apart(output, grads), output[1].second_moment, state


def take_apart(output: tuple[jax.Array, ConAdvAux], grads: Any) -> Parts:
  """`(loss, aux), grads` in parts, each with None for what is in another."""
  loss, aux = output

  def pick(tree: Any, wanted: Callable[[Any], bool]) -> Any:
    return jax.tree.map(lambda x: jnp.asarray(x) if wanted(x) else None, tree)

  means = (
    loss,
    aux.losses,
    grads,
    pick(aux.model_state, is_inexact),
    pick(aux.aux, lambda x: is_inexact(x) and not jnp.ndim(x)),
  )
  counts = pick(aux.aux, lambda x: not is_inexact(x) and not jnp.ndim(x))
  return Parts(
    jax.tree.map(at_least_float32, means),
    jax.tree.map(
      lambda x: x.astype(jnp.int32) if x.dtype == bool else x, counts
    ),
    pick(aux.model_state, lambda x: not is_inexact(x)),
    pick(aux.aux, lambda x: jnp.ndim(x) > 0),
  )


def on_devices(
  grad_fn: GradientFunction,
  local: Callable[..., Any],
  mesh: Mesh,
  axes: tuple[str, ...],
  in_specs: Any,
  out_specs: Any,
) -> Callable[..., Any]:
  """`local(grad_fn, *arguments)`, on each device's share of them."""
  arrays, rebuild = hoist(grad_fn)
  # The gradients are averaged by hand, so replication is not tracked: any model
  # may run inside, whatever its loops carry.
  mapped = jax.shard_map(
    lambda arrays, *arguments: local(rebuild(arrays), *arguments),
    mesh=mesh,
    in_specs=(P(), *in_specs),
    out_specs=out_specs,
    axis_names=set(axes),
    check_vma=False,
  )
  return functools.partial(mapped, arrays)


def put_together(
  parts: Parts, second_moment: Any, call: Call
) -> tuple[tuple[jax.Array, ConAdvAux], Any]:
  """`(loss, aux), grads` of the parts of all groups.

  The whole has the dtypes of the parameters and of the model state; what is a
  part of another mean stays at least float32.
  """

  def join(*trees: Any) -> Any:
    return jax.tree.map(
      lambda *leaves: next((x for x in leaves if x is not None), None),
      *trees,
      is_leaf=lambda x: x is None,
    )

  loss, losses, grads, floats, scalars = parts.means
  state = join(floats, parts.kept)
  if call.denominators is None:
    grads = cast_like(grads, call.params)
    state = cast_like(state, call.model_state)
  user = join(scalars, parts.counts, parts.arrays)
  return (loss, ConAdvAux(losses, state, user, second_moment)), grads


def over_groups(
  own: Denominators,
  mean: Callable[[jax.Array], jax.Array],
  most: Callable[[jax.Array], jax.Array],
) -> Denominators:
  """The divisors of all groups, by how a number of each is put together."""
  return {
    branch: Divisor(
      mean(divisor.mean),
      most(divisor.most),
      mean(jnp.asarray(divisor.weight, float)),
    )
    for branch, divisor in own.items()
  }


def check_one_kind(second_moment: Any, wanted: bool) -> None:
  """Gradients are squared in one kind of group, the inner ones."""
  if wanted and second_moment is not None:
    raise ValueError(
      'Squared gradients are averaged over one kind of group, devices or '
      'micro-batches. Given `second_moment=True` for both. Leave it out of '
      '`data_parallel`: its devices average what `accumulate` returns.'
    )


def deviation(
  grads: Any, second_moment: Any, share: jax.Array, before: Any, after: Any
) -> Any:
  """A group's part of the second moment about the mean gradient.

  The second moment is the square of the mean, and the mean of these. Squares
  themselves would be rounded, in their sum, by more than equal groups differ.

  Args:
    grads: the group's part of the mean gradient.
    second_moment: that of groups within the group, or None.
    share: the group's share of the mean.
    before: the mean, or that of the groups before this one.
    after: the mean, or that of the groups up to this one.
  """
  factor = inverse(share)

  def about(g: jax.Array, before: jax.Array, after: jax.Array) -> jax.Array:
    own = scale(factor, g)
    return scale(share, jnp.real(jnp.conj(own - before) * (own - after)))

  parts = jax.tree.map(about, grads, before, after)
  if second_moment is None:
    return parts
  return jax.tree.map(
    lambda part, s, g: part + s - scale(factor, abs_sq(g)),
    parts,
    second_moment,
    grads,
  )


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


def check_groups(state: Any, number: int) -> None:
  """What each group has of its own, as many have."""

  def own(part: PerGroup) -> None:
    held = {jnp.shape(x)[:1] for x in jax.tree.leaves(part)} - {(number,)}
    if held:
      [*given] = held.pop()
      raise ValueError(
        f'Each of the {number} groups has its own part of the state. Given a '
        f'state of {given[0] if given else "no"} groups. Likely it is of a run '
        'on other devices or with other micro-batches: restore all but the '
        'state, and write `state = grad_fn.init(params, first_batches)`.'
      )

  map_state(state, queue=lambda part: None, own=own, shared=lambda leaf: None)


def own_key(key: jax.Array | None, group: ArrayLike) -> Any:
  """The key of a group, so that no two draw the same."""
  return None if key is None else jax.random.fold_in(key, group)
