"""A batch in parts, one after the other, so that memory stays that of one."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  add_weighted,
  check_count,
  describe,
  full,
)
from conadv_optax.core.paths import named
from conadv_optax.core.types import Batch

Denominator = Callable[[Batch], ArrayLike]
"""What the loss of a batch was divided by."""


def check_divides(batch: Batch, groups: int, what: str, fix: str) -> None:
  """The leading axis of every leaf divides evenly over the groups."""
  for path, value in named(batch).items():
    shape = jnp.shape(value)
    if not shape or shape[0] % groups or not shape[0]:
      raise ValueError(
        'Every leaf of a batch is split along its leading axis, so the batch '
        f'must be a multiple of the {groups} {what}. Leaf '
        f'{list(path)} is {describe(value)}. Change the batch, drop or pad the '
        f'last one of an epoch (to pad, say `denominator=`), or {fix}.'
      )


def cut(batch: Batch, micro_batches: int) -> Batch:
  """Every leaf (B, ...) as (B / K, K, ...), micro-batch k at the index k.

  So a batch that is spread over devices stays where it is: each device has its
  own part of every micro-batch.
  """
  check_count('micro_batches', micro_batches)
  batch = jax.tree.map(jnp.asarray, batch)
  devices = max(map(_devices, jax.tree.leaves(batch)), default=1)
  what = 'micro-batches'
  if devices > 1:
    what = f'parts, {micro_batches} micro-batches on each of {devices} devices'
  fix = 'take another number of them'
  check_divides(batch, micro_batches * devices, what, fix)
  return jax.tree.map(
    # Not -1, which has no value where an array has no elements.
    lambda x: x.reshape(
      x.shape[0] // micro_batches, micro_batches, *x.shape[1:]
    ),
    batch,
  )


def _devices(x: jax.Array) -> int:
  """Over how many its leading axis is spread, where its type says so."""
  sharding = jax.typeof(x).sharding
  axes = jax.tree.leaves(tuple(sharding.spec[:1]))
  return math.prod(sharding.mesh.shape[axis] for axis in axes)


def part_of(batches: Batch, number: jax.Array) -> Batch:
  """One micro-batch of what `cut` returned."""
  return jax.tree.map(
    lambda x: jax.lax.dynamic_index_in_dim(x, number, axis=1, keepdims=False),
    batches,
  )


def merged(x: jax.Array, axis: int) -> jax.Array:
  """With this axis and the next one in one."""
  size = x.shape[axis] * x.shape[axis + 1]
  return x.reshape(*x.shape[:axis], size, *x.shape[axis + 2 :])


def join(stacked: Batch) -> Batch:
  """The batch of micro-batches that are stacked along a leading axis."""
  return jax.tree.map(lambda x: merged(x.swapaxes(0, 1), 0), stacked)


def weight_of(batch: Batch, denominator: Denominator | None) -> jax.Array:
  """The weight of a part in a mean, floating; 1 without a denominator."""
  weight = 1 if denominator is None else denominator(batch)
  if weight is None or jnp.ndim(weight) or jnp.iscomplexobj(weight):
    raise TypeError(
      '`denominator(batch)` is the real scalar that the loss of the batch was '
      f'divided by. It returned {describe(weight)}. Likely a sum is missing: '
      "`denominator=lambda batch: batch['mask'].sum()`."
    )
  return jnp.asarray(weight).astype(float)


def mean_over(
  function: Callable[[Batch], Any],
  batch: Batch,
  micro_batches: int,
  denominator: Denominator | None = None,
) -> Any:
  """The mean of a function's results over the micro-batches, by weight."""

  def add(total: Any, part: Batch) -> Any:
    result = (jnp.ones([], float), function(part))
    return add_weighted(total, weight_of(part, denominator), result)

  # Outside of `jit` too, zeros are to lie where the batch does.
  @jax.jit
  def sums(parts: Batch) -> Any:
    numbers = jnp.arange(micro_batches)
    one = jax.eval_shape(lambda: add(None, part_of(parts, numbers[0])))
    zeros = jax.tree.map(lambda x: full(x, 0), one)
    return jax.lax.scan(
      lambda total, i: (add(total, part_of(parts, i)), None), zeros, numbers
    )[0]

  # Not a loop of one: XLA chooses slow convolutions for it on a CPU.
  whole, total = (
    add(None, batch) if micro_batches == 1 else sums(cut(batch, micro_batches))
  )
  return jax.tree.map(lambda x: x / whole.astype(x.dtype), total)
