"""Who waits: the ring of batches, whose newest takes the slot of the oldest."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conadv_optax.core.calls import NEXT, Call, pytree
from conadv_optax.core.numeric import describe
from conadv_optax.core.paths import named
from conadv_optax.core.types import Batch, ConAdvState, Denominators, Queue

# `fold_in(key, 0)` is also the first key that `split` makes of `key`, so the
# keys of `init` are apart from those of any step that counts from 0.
_INIT = 0xADD5EED5


class Turn(NamedTuple):
  """Whose turn it is in a call, boolean scalars; None is always.

  Attributes:
    trains: whether the oldest batch has an adversarial copy, to train on.
    attacks: whether the newest batch gets one.
  """

  trains: jax.Array | None = None
  attacks: jax.Array | None = None


@pytree('step')
class Ring:
  """A step whose batches wait for `staleness` calls.

  Attributes:
    step: `ConAdvStep` or `ReusedStep`. `check(call, batches)` raises;
      `enter(call, batch, key, attacks)` is the entry of one of the first
      batches, and `like(batch)` its batch; `run(call, oldest, turn)` is a step
      and the entry of the newest, `((loss, aux), grads), entry`.
    staleness: the calls that a batch waits for.
    every: of so many batches, one is attacked.
  """

  step: Any
  staleness: int
  every: int = 1
  state_kind = ConAdvState

  def init(self, call: Call) -> ConAdvState:
    """The state whose ring holds the first batches, attacked."""
    if self.staleness == 0:
      return ConAdvState((), ()) if self.every == 1 else fill(())
    call = call.in_jax()
    for batch in call.batch[1:]:
      check_like(batch, call.batch[0], 'Every one of `first_batches`')
    self.step.check(call, call.batch)
    # Compiled, so that every part of the state lies on the devices of the rest.
    return jax.jit(self._fill)(call)

  def _fill(self, call: Call) -> ConAdvState:
    key = call.key
    if key is not None:
      key = jax.random.fold_in(key, _INIT)
      key = jax.random.split(key, self.staleness)
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *call.batch)
    numbers = jnp.arange(self.staleness, dtype=jnp.int32)
    entries = jax.lax.map(
      lambda args: self.step.enter(call, *args),
      (batches, key, self._has_turn(numbers)),
    )
    return fill(entries)

  def value_and_grad(self, call: Call) -> tuple[Any, Any, ConAdvState]:
    """A step: the oldest batch leaves the ring, and the newest enters it."""
    call = call.in_jax()
    self.step.check(call, [call.batch])
    check_state(call.state, self.staleness)
    waited = oldest(call.state)
    if self.staleness > 0:
      check_like(self.step.like(call.batch), waited.batch, 'A later batch')
    (output, grads), entry = self.step.run(call, waited, self._turn(call.state))
    return output, grads, push(call.state, entry, self.every)

  def _turn(self, state: ConAdvState) -> Turn:
    """Whose turn it is in the next call."""
    if self.every == 1:
      return Turn()
    numbers = state.slot, state.slot + self.staleness
    return Turn(*map(self._has_turn, numbers))

  def _has_turn(self, number: jax.Array) -> jax.Array | None:
    """Whether the batch of this number is attacked; None is always."""
    return None if self.every == 1 else number % self.every == 0

  def denominators(self, state: ConAdvState, batch: Batch) -> Denominators:
    """What the losses of a call will be divided by."""
    return self.step.denominators(oldest(state), batch, self._turn(state))


def fill(waiting: Any) -> ConAdvState:
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
      ring, state.slot % ring.shape[0], axis=0, keepdims=False
    )
    return _to(jax.memory.Space.Device, entry)

  return jax.tree.map(read, state.queue)


def push(state: ConAdvState, newest: Queue, every: int = 1) -> ConAdvState:
  """The newest entry takes the slot of the oldest, where any wait."""
  if isinstance(state.slot, tuple):
    return state
  rings = jax.tree.leaves(state.queue)
  staleness = rings[0].shape[0] if rings else 1

  def write(ring: jax.Array, x: jax.Array) -> jax.Array:
    x = _to(jax.typeof(ring).memory_space, x)
    slot = state.slot % staleness
    return jax.lax.dynamic_update_index_in_dim(ring, x, slot, axis=0)

  queue = jax.tree.map(write, state.queue, newest) if rings else ()
  return ConAdvState((state.slot + 1) % (staleness * every), queue)


def _to(space: Any, x: jax.Array) -> jax.Array:
  """Moves an entry, as a ring may lie in the memory of the host."""
  is_there = jax.typeof(x).memory_space == space
  return x if is_there else jax.device_put(x, space)


def check_state(state: Any, staleness: int) -> None:
  """The ring of as many batches as the staleness."""
  rings = jax.tree.leaves(state.queue)
  held = rings[0].shape[0] if rings else 0
  if held != staleness:
    raise ValueError(
      'The state holds as many batches as the staleness, here '
      f'staleness={staleness}. Given a state that holds {held}. Likely it is '
      'of a run with another staleness: restore all but the state, and write '
      f'`state = grad_fn.init(params, {NEXT})`.'
    )


def check_like(batch: Batch, like: Batch, what: str) -> None:
  """The structure, shapes and dtypes of `batch` are those of `like`."""
  given: Any = jax.tree.structure(batch)
  wanted: Any = jax.tree.structure(like)
  if given != wanted:
    raise ValueError(
      f'{what} must have the structure of the first, because it takes its '
      f'place in the queue. Given {given}, after {wanted}.'
    )
  leaves = zip(named(batch).items(), jax.tree.leaves(like), strict=True)
  for (path, new), old in leaves:
    if new.shape != old.shape or new.dtype != old.dtype:
      raise ValueError(
        f'{what} must have the shapes and dtypes of the first, because it '
        f'takes its place in the queue. Leaf {list(path)} is '
        f'{describe(new)}, after {describe(old)}. Likely the last batch of an '
        'epoch is smaller: drop it, or pad it and say what the loss is a mean '
        "of: `denominator=lambda batch: batch['mask'].sum()`."
      )
