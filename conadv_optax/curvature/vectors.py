"""Random vectors in the space of the parameters."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax


# Outside of `jit` too, a vector is to lie where the parameters do.
@functools.partial(jax.jit, static_argnames='sampler', keep_unused=True)
def random_like(
  key: jax.Array, like: Any, sampler: Callable[..., Any] = jax.random.normal
) -> Any:
  """A tree of the shapes, dtypes and places of `like`."""
  return optax.tree.random_like(key, like, sampler)
