"""The first part of a batch, on meshes of explicit axes too."""

import math

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_optax.core.numeric import describe, share_of
from conadv_optax.core.paths import named
from conadv_optax.core.types import Batch


def check_arrays(batch: Batch) -> None:
  """Every leaf is an array, or can be one."""
  for path, x in named(batch).items():
    try:
      jax.typeof(x)
    except TypeError as error:
      raise TypeError(
        'Every leaf of a batch is an array of numbers. Leaf '
        f'{list(path)} is a {type(x).__name__}, {x!r:.80}. Likely a name or a '
        'text: keep it out of the batch, `{k: batch[k] for k in '
        "('image', 'label')}`."
      ) from error


def first_part(batch: Batch, fraction: float, size: int) -> Batch:
  """The first `floor(fraction * size)` of `size` examples, at least one."""
  if fraction == 1:
    return batch
  for path, value in named(batch).items():
    if not value.shape or value.shape[0] != size:
      raise ValueError(
        '`adversarial_fraction` below 1 takes the first part of every leaf, so '
        f'each needs the leading batch axis of {size}. Leaf '
        f'{list(path)} is {describe(value)}.'
      )
  count = share_of(fraction, size)
  return jax.tree.map(lambda x: _part(x, 0, count), batch)


def rest_of(batch: Batch, fraction: float, size: int) -> Batch:
  """What `first_part` leaves."""
  count = share_of(fraction, size)
  return jax.tree.map(lambda x: _part(x, count, size), batch)


def replace_first(x: jax.Array, part: jax.Array) -> jax.Array:
  """`x` with `part` for its first examples."""
  whole = jax.typeof(x).sharding
  if whole.spec[0] != jax.typeof(part).sharding.spec[0]:
    x = _gather(x)
  x = jax.lax.dynamic_update_slice_in_dim(x, part, 0, axis=0)
  return jax.sharding.reshard(x, whole) if whole.mesh.explicit_axes else x


def _part(x: jax.Array, start: int, stop: int) -> jax.Array:
  sharding = jax.typeof(x).sharding
  axes = sharding.spec[0] or ()
  axes = (axes,) if isinstance(axes, str) else axes
  # Where its devices cannot share the part evenly, each of them has all of it.
  if (stop - start) % math.prod(sharding.mesh.shape[axis] for axis in axes):
    x = _gather(x)
  return jax.lax.slice_in_dim(x, start, stop)


def _gather(x: jax.Array) -> jax.Array:
  """`x` whole along its leading axis on all devices."""
  sharding = jax.typeof(x).sharding
  spec = P(None, *sharding.spec[1:])
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, spec))
