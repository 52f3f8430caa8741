"""The ring of batches that wait: the newest takes the slot of the oldest."""

from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core.types import ConAdvState, Queue


def fill(waiting: Queue) -> ConAdvState:
  """The state whose ring is full, its oldest entry first."""
  # Of no weak types, `jnp.full(shape, 2.)` say, as `push` leaves none: the
  # second step would compile again.
  queue = jax.tree.map(
    lambda x: jax.lax.convert_element_type(x, x.dtype), waiting
  )
  return ConAdvState(jnp.zeros([], jnp.int32), queue)


def oldest(state: ConAdvState) -> Any:
  """The entry that has waited for longest, in the memory of the device."""

  def read(ring: jax.Array) -> jax.Array:
    entry = jax.lax.dynamic_index_in_dim(
      ring, state.slot, axis=0, keepdims=False
    )
    return _to(jax.memory.Space.Device, entry)

  return jax.tree.map(read, state.queue)


def push(state: ConAdvState, newest: Queue) -> ConAdvState:
  """The newest entry takes the slot of the oldest."""
  staleness = jax.tree.leaves(state.queue)[0].shape[0]

  def write(ring: jax.Array, x: jax.Array) -> jax.Array:
    x = _to(jax.typeof(ring).memory_space, x)
    return jax.lax.dynamic_update_index_in_dim(ring, x, state.slot, axis=0)

  queue = jax.tree.map(write, state.queue, newest)
  return ConAdvState((state.slot + 1) % staleness, queue)


def _to(space: Any, x: jax.Array) -> jax.Array:
  """Moves an entry, as a ring may lie in the memory of the host."""
  is_there = jax.typeof(x).memory_space == space
  return x if is_there else jax.device_put(x, space)
