"""Float32 whatever the model's dtype, and checks of concrete numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` in float32, or in its own dtype where that is wider."""
  return x if jnp.finfo(x.dtype).bits >= 32 else x.astype(jnp.float32)


def unit(tree: Any) -> Any:
  """A tree of float32 over its norm; zero where that is."""
  length = optax.tree.norm(tree)
  return optax.tree.scale(1 / jnp.where(length > 0, length, 1.0), tree)


def tree_at_least_float32(tree: Any) -> Any:
  """Every leaf in float32, or in its own dtype where that is wider."""
  return jax.tree.map(at_least_float32, tree)


def weighted(weight: ArrayLike, x: jax.Array) -> jax.Array:
  """`weight * x`; nothing, not even a NaN, where the weight is 0."""
  weight = jnp.asarray(weight, x.dtype)
  return jnp.where(weight == 0, 0.0, weight * x)


def add_weighted(total: Any, weight: ArrayLike, gradients: Any) -> Any:
  """`total` plus the weighted gradients, at least float32; None is zero."""
  scaled = jax.tree.map(
    lambda g: weighted(weight, at_least_float32(g)), gradients
  )
  return scaled if total is None else jax.tree.map(jnp.add, total, scaled)


def concrete(value: Any) -> np.ndarray | None:
  """`value` as NumPy, or None where it is traced and cannot be looked at."""
  return None if isinstance(value, jax.core.Tracer) else np.asarray(value)


def check_not_negative(name: str, value: Any) -> None:
  """Raises `ValueError` where a concrete `value` is negative or NaN."""
  number = concrete(value)
  if number is not None and not np.all(number >= 0):
    raise ValueError(
      f'`{name}` must not be negative. Given {name}={number.tolist()}. It is a '
      'distance or a rate: pass its size, the sign is put in by the method.'
    )


def check_count(name: str, value: Any, *, least: int = 1) -> None:
  """Raises `ValueError` where `value` is no int of at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int) or value < least:
    raise ValueError(
      f'`{name}` is a number of things, a Python int of at least {least}. '
      f'Given {name}={value!r} of type {type(value).__name__}. Where it comes '
      f'from a division, write `{name}=int(...)`.'
    )


def describe(x: Any) -> str:
  """Dtype and shape, as in `float32[8,3]`."""
  if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
    return f'{type(x).__name__} {x!r}'
  return f'{x.dtype.name}[{",".join(map(str, x.shape))}]'
