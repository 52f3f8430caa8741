"""A batch in parts, one after the other, so that memory stays that of one."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_optax.core.numeric import check_count, describe
from conadv_optax.core.paths import path_names
from conadv_optax.core.types import Batch


def split(batch: Batch, count: int) -> Batch:
  """`count` micro-batches, stacked along a new leading axis.

  Micro-batch `i` holds the examples `i, i + count, ...`, so that a batch that
  is spread over devices stays where it is: each device splits its own part.
  """
  _check(batch, count)

  def leaf(x: Any) -> jax.Array:
    x = jnp.asarray(x)
    parts = x.reshape(x.shape[0] // count, count, *x.shape[1:])
    return jnp.swapaxes(parts, 0, 1)

  return jax.tree.map(leaf, batch)


def join(stacked: Batch) -> Batch:
  """The batch that `split` took apart, in its order."""

  def leaf(x: jax.Array) -> jax.Array:
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])

  return jax.tree.map(leaf, stacked)


def mean_over(
  function: Callable[[Batch], Any], batch: Batch, count: int
) -> Any:
  """The mean of a function's float32 results over the micro-batches."""
  # Not a loop of one: XLA chooses slow convolutions for it on a CPU.
  if count == 1:
    return function(batch)
  parts = split(batch, count)
  first = jax.eval_shape(function, jax.tree.map(lambda x: x[0], parts))

  def add(total: Any, part: Batch) -> tuple[Any, None]:
    return optax.tree.add(total, function(part)), None

  total, _ = jax.lax.scan(add, optax.tree.zeros_like(first), parts)
  return optax.tree.scale(1 / count, total)


def _check(batch: Batch, count: int) -> None:
  check_count('micro_batches', count)
  for path, value in jax.tree_util.tree_flatten_with_path(batch)[0]:
    shape = jnp.shape(value)
    if not shape or shape[0] % count or not shape[0]:
      raise ValueError(
        'Every leaf of a batch is split along its leading axis, so the batch '
        f'must be a multiple of micro_batches={count}. Leaf '
        f'{list(path_names(path))} is {describe(value)}.'
      )
