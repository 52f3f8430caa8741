"""Norms and sums in float32 whatever the dtype, and checks of numbers."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike


def at_least_float32(x: jax.Array) -> jax.Array:
  """`x` in float32, or in its own dtype where that is wider."""
  x = jnp.asarray(x)  # A parameter may be a Python float.
  is_wide = is_inexact(x) and jnp.finfo(x.dtype).bits >= 32
  return x if is_wide else x.astype(jnp.float32)


def tree_at_least_float32(tree: Any) -> Any:
  """Every leaf in float32, or in its own dtype where that is wider."""
  return jax.tree.map(at_least_float32, tree)


def cast_like(tree: Any, like: Any) -> Any:
  """Every leaf in the dtype of its counterpart."""
  return jax.tree.map(lambda x, y: x.astype(jnp.result_type(y)), tree, like)


def zeros_like(tree: Any) -> Any:
  """Zeros of the shapes and dtypes of a tree, spread as it is."""
  # On explicit axes not every JAX spreads `jnp.zeros_like(x)` as `x`.
  return jax.tree.map(
    lambda x: jnp.where(False, x, jnp.zeros([], x.dtype)), tree
  )


def full(like: Any, value: float) -> jax.Array:
  """`value` in the shape and dtype of what is traced, spread as that is."""
  x = jax.lax.full(like.shape, value, like.dtype, sharding=like.sharding)
  return _vary(x, _varying(like))


def varying_like(tree: Any, like: Any) -> Any:
  """A tree that may differ from device to device where a leaf of `like` does.

  Inside of a `shard_map`; elsewhere the tree as it is.
  """
  kinds = map(jax.typeof, jax.tree.leaves(like))
  axes = frozenset().union(*map(_varying, kinds))
  return jax.tree.map(lambda x: _vary(x, axes - _varying(jax.typeof(x))), tree)


def _varying(kind: Any) -> frozenset[str]:
  """The axes of a `shard_map` along which what has this type differs."""
  return getattr(kind.manual_axis_type, 'varying', frozenset())


def _vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
  return jax.lax.pcast(x, tuple(axes), to='varying') if axes else x


def summed_like(loss: jax.Array, gradients: Any, params: Any) -> Any:
  """Gradients on `varying_like` parameters, the same where loss and they are.

  A device's loss has a gradient of its own. That of a loss that devices have in
  common is the sum of their parts, as `jax.grad` has it.
  """

  def summed(g: jax.Array, param: Any) -> jax.Array:
    kinds = map(jax.typeof, (g, loss, param))
    of_gradient, *own = map(_varying, kinds)
    axes = of_gradient.difference(*own)
    return jax.lax.psum(g, tuple(axes)) if axes else g

  return jax.tree.map(summed, gradients, params)


def is_inexact(x: Any) -> bool:
  """Whether a mean makes sense for `x`: it is floating or complex."""
  return jnp.issubdtype(jnp.result_type(x), jnp.inexact)


def is_finite(tree: Any) -> jax.Array:
  """Whether no entry of any leaf is infinite or a NaN."""
  leaves = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
  return jnp.all(jnp.asarray(leaves))


def abs_sq(x: jax.Array) -> jax.Array:
  """The squared size of each entry, at least float32, real."""
  x = at_least_float32(x)
  return jnp.real(x * jnp.conj(x))


def dot(x: Any, y: Any) -> jax.Array:
  """The inner product of two trees, of complex leaves as pairs of reals."""
  # Not `jnp.vdot`, which flattens: leaves may be sharded along any axis.
  parts = jax.tree.map(lambda a, b: jnp.sum(jnp.real(jnp.conj(a) * b)), x, y)
  return jnp.asarray(sum(jax.tree.leaves(parts)))


def scale(factor: ArrayLike, tree: Any) -> Any:
  """The tree times a real scalar, in the dtypes of its leaves."""
  return jax.tree.map(lambda x: jnp.asarray(factor, x.dtype) * x, tree)


def add_scale(x: Any, factor: ArrayLike, y: Any) -> Any:
  """`x + factor * y` of two trees."""
  return jax.tree.map(jnp.add, x, scale(factor, y))


def norm(tree: Any) -> jax.Array:
  """The L2 norm of a tree of at least float32."""
  return jnp.sqrt(dot(tree, tree))


def ascent(gradient: Any) -> Any:
  """The direction in which the loss rises, at least float32.

  For a complex leaf JAX's gradient is the conjugate of it.
  """
  return jax.tree.map(lambda g: jnp.conj(at_least_float32(g)), gradient)


def unit(tree: Any) -> Any:
  """A tree of float32 over its norm; zero where that is."""
  length = norm(tree)
  return scale(1 / jnp.where(length > 0, length, 1.0), tree)


def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
  """`part / whole`, 0 of nothing; a NaN stays one."""
  is_none = whole == 0
  return jnp.where(is_none, 0.0, part / jnp.where(is_none, 1.0, whole))


def inverse(x: jax.Array) -> jax.Array:
  """`1 / x`, 0 of nothing."""
  return ratio(jnp.ones_like(x), x)


def weighted(weight: ArrayLike, x: jax.Array) -> jax.Array:
  """`weight * x`; nothing, not even a NaN, where the weight is 0."""
  weight = jnp.asarray(weight, x.dtype)
  return jnp.where(weight == 0, jnp.zeros([], x.dtype), weight * x)


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
  """Raises for a function, or what is concrete and negative or NaN.

  Of a list or dict, for each of its numbers.
  """
  for part in jax.tree.leaves(value, is_leaf=lambda x: x is None):
    check_no_schedule(name, part)
    number = concrete(part)
    if number is not None and not np.all(number >= 0):
      raise ValueError(
        f'`{name}` must not be negative. Given {name}={number.tolist()}. It is '
        'a distance or a rate: pass its size, the sign is put in by the method.'
      )


def check_scalar(name: str, value: Any) -> None:
  """`value` is one number for all parameters, not negative and no NaN."""
  check_not_negative(name, value)
  if not jax.tree_util.all_leaves([value]) or jnp.ndim(value):
    given = jax.tree.map(lambda x: describe(jnp.asarray(x)), value)
    raise TypeError(
      f'`{name}` is one number for all parameters, a float or a scalar array. '
      f'Given {given}. Likely an entry is meant: `{name}=values[i]`.'
    )


def check_share(name: str, value: Any, what: str) -> None:
  """Raises where `value` is a function, or concrete and not from 0 to 1."""
  check_no_schedule(name, value)
  number = concrete(value)
  if number is not None and not 0 <= number <= 1:
    raise ValueError(
      f'`{name}` is {what}, in [0, 1]. Given {name}={number.tolist()}.'
    )


def check_no_schedule(name: str, value: Any) -> None:
  """Raises `TypeError` where `value` is a function, a schedule most likely."""
  if callable(value):
    raise TypeError(
      f'`{name}` is a number or an array, which may be traced. Given a '
      'function, likely an Optax schedule. Call it with your own count of '
      'steps, where `jax.jit` compiles the step, and make there what takes '
      f'`{name}`: `{name}=schedule(count)`. It is compiled once.'
    )


def check_count(name: str, value: Any, *, least: int = 1) -> None:
  """`value` is an int, and at least `least`."""
  if isinstance(value, bool) or not isinstance(value, int):
    raise TypeError(
      f'`{name}` is a number of things, a Python int, because shapes or loops '
      f'depend on it. Given {name}={value!r} of type {type(value).__name__}. '
      f'Where it comes from a division, write `{name}=int(...)`; mark it '
      'static under `jax.jit`.'
    )
  if value < least:
    raise ValueError(
      f'`{name}` is a number of things, at least {least}. Given {name}={value}.'
    )


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
  """`value` is one of the choices."""
  if value not in choices:
    raise ValueError(
      f'`{name}` must be {" or ".join(map(repr, choices))}. Given '
      f'{name}={value!r}.'
    )


def share_of(fraction: float, size: int) -> int:
  """`floor(fraction * size)`, at least 1, as decimals are meant.

  In binary `0.29 * 100` is 28.999999999999996, and `(1 - 0.8) * 10` below 2.
  """
  return max(1, int(round(fraction * size, 6)))


def describe(x: Any) -> str:
  """Dtype and shape, as in `float32[8,3]`."""
  if not hasattr(x, 'shape') or not hasattr(x, 'dtype'):
    return f'{type(x).__name__} {x!r}'
  return f'{x.dtype.name}[{",".join(map(str, x.shape))}]'
