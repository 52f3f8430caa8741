"""A batch in parts, one after the other, so that memory stays that of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import add_weighted, check_count, describe
from conadv_optax.core.paths import path_names
from conadv_optax.core.types import Batch

Denominator = Callable[[Batch], ArrayLike]
"""What the loss of a batch was divided by."""


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


def split(batch: Batch, micro_batches: int) -> Batch:
  """Micro-batches, stacked along a new leading axis.

  Micro-batch `i` holds the examples `i, i + micro_batches, ...`, so that a
  batch that is spread over devices stays where it is: each device splits its
  own part.
  """
  check_count('micro_batches', micro_batches)
  fix = 'take another `micro_batches`'
  check_divides(batch, micro_batches, 'micro-batches', fix)
  batch = jax.tree.map(jnp.asarray, batch)
  # What one device holds, where the type of an array says so.
  shards = jax.tree.map(
    lambda x: jax.typeof(x).update(
      shape=jax.typeof(x).sharding.shard_shape(x.shape), sharding=None
    ),
    batch,
  )
  check_divides(shards, micro_batches, 'micro-batches on each device', fix)

  def leaf(x: jax.Array) -> jax.Array:
    parts = x.reshape(-1, micro_batches, *x.shape[1:])
    return jnp.swapaxes(parts, 0, 1)

  return jax.tree.map(leaf, batch)


def join(stacked: Batch) -> Batch:
  """The batch that `split` took apart, in its order."""

  def leaf(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 0, 1).reshape(-1, *x.shape[2:])

  return jax.tree.map(leaf, stacked)


def weight_of(batch: Batch, denominator: Denominator | None) -> jax.Array:
  """The weight of a part in a mean, float32; 1 without a denominator."""
  weight = jnp.asarray(1 if denominator is None else denominator(batch))
  if weight.shape or jnp.iscomplexobj(weight):
    raise TypeError(
      '`denominator(batch)` is the real scalar that the loss of the batch was '
      f'divided by. It returned {describe(weight)}. Likely a sum is missing: '
      "`denominator=lambda batch: batch['mask'].sum()`."
    )
  return weight.astype(jnp.float32)


def mean_over(
  function: Callable[[Batch], Any],
  batch: Batch,
  micro_batches: int,
  denominator: Denominator | None = None,
) -> Any:
  """The mean of a function's results over the micro-batches, by weight."""

  def add(total: Any, part: Batch) -> tuple[Any, None]:
    result = (jnp.float32(1), function(part))
    return add_weighted(total, weight_of(part, denominator), result), None

  # Outside of `jit` too, zeros are to lie where the batch does.
  @jax.jit
  def sums(parts: Batch) -> Any:
    part = jax.tree.map(lambda x: x[0], parts)
    zeros = optax.tree.zeros_like(jax.eval_shape(add, None, part)[0])
    return jax.lax.scan(add, zeros, parts)[0]

  # Not a loop of one: XLA chooses slow convolutions for it on a CPU.
  whole, total = (
    add(None, batch)[0]
    if micro_batches == 1
    else sums(split(batch, micro_batches))
  )
  return jax.tree.map(lambda x: x / whole.astype(x.dtype), total)


def cut(batch: Batch, micro_batches: int) -> Batch:
  """Every leaf (B, ...) as (B / K, K, ...), micro-batch k at the index k.

  So a batch that is spread over devices stays where it is: each device has its
  own part of every micro-batch.
  """
  check_divides(
    batch, micro_batches, 'micro-batches', 'take another number of them'
  )
  return jax.tree.map(
    lambda x: x.reshape(-1, micro_batches, *x.shape[1:]), batch
  )


def part_of(batches: Batch, number: jax.Array) -> Batch:
  """One micro-batch of what `cut` returned."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False),
    batches,
  )
