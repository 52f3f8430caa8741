"""The balls that attacks stay in: projection, steepest step, uniform draw.

All take a batch in float32, whose first axis is that of the examples, and a
radius of the same shape.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Norm = Literal['linf', 'l2']


class Ball(NamedTuple):
  """The geometry of a norm.

  Attributes:
    project: `project(perturbed, inputs, radius)`, the nearest point of the ball
      around `inputs` (along the ray from there, for unequal radii in L2).
    step: `step(gradient, size)`, the steepest step of that size; zero for a
      gradient of zero.
    draw: `draw(key, like)`, uniform in the unit ball, of the shape of `like`.
  """

  project: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  step: Callable[[jax.Array, jax.Array], jax.Array]
  draw: Callable[[jax.Array, jax.Array], jax.Array]


def _project_linf(
  perturbed: jax.Array, inputs: jax.Array, radius: jax.Array
) -> jax.Array:
  return jnp.clip(perturbed, inputs - radius, inputs + radius)


def _project_l2(
  perturbed: jax.Array, inputs: jax.Array, radius: jax.Array
) -> jax.Array:
  delta = perturbed - inputs
  # Where the radius is 0 nothing moves; elsewhere measure in radii.
  length = _norm(
    jnp.where(radius > 0, delta / jnp.where(radius > 0, radius, 1.0), 0.0)
  )
  inside = jnp.where(radius > 0, delta, 0.0) / jnp.maximum(length, 1.0)
  return inputs + inside


def _example_axes(x: jax.Array) -> tuple[int, ...]:
  return tuple(range(1, x.ndim))


def _norm(x: jax.Array) -> jax.Array:
  """L2 norm of each example, its axes kept; safe from under- and overflow."""
  largest = jnp.max(jnp.abs(x), axis=_example_axes(x), keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.0)
  squares = jnp.sum((x / scale) ** 2, axis=_example_axes(x), keepdims=True)
  return scale * jnp.sqrt(squares)


def _unit(x: jax.Array) -> jax.Array:
  """Each example over its norm; zero where the norm is."""
  length = _norm(x)
  return jnp.where(length > 0, x / jnp.where(length > 0, length, 1.0), 0.0)


def _step_linf(gradient: jax.Array, size: jax.Array) -> jax.Array:
  return size * jnp.sign(gradient)


def _step_l2(gradient: jax.Array, size: jax.Array) -> jax.Array:
  # In an ellipsoid the steepest direction is that of the scaled gradient.
  return size * _unit(size * gradient)


def _draw_linf(key: jax.Array, like: jax.Array) -> jax.Array:
  return jax.random.uniform(key, like.shape, like.dtype, -1.0, 1.0)


def _draw_l2(key: jax.Array, like: jax.Array) -> jax.Array:
  """Uniform in the unit ball: a uniform direction, and u^(1/n) for length."""
  direction_key, length_key = jax.random.split(key)
  direction = _unit(jax.random.normal(direction_key, like.shape, like.dtype))
  shape = like.shape[:1] + (1,) * (like.ndim - 1)
  size = max(1, math.prod(like.shape[1:]))
  u = jax.random.uniform(length_key, shape, like.dtype)
  return direction * u ** (1.0 / size)


BALLS = {
  'linf': Ball(_project_linf, _step_linf, _draw_linf),
  'l2': Ball(_project_l2, _step_l2, _draw_l2),
}


def round_towards(x: jax.Array, clean: jax.Array, dtype: Any) -> jax.Array:
  """`x` in `dtype`, never further from `clean` than `x` is."""
  rounded = x.astype(dtype)
  if dtype == x.dtype:
    return rounded
  too_far = jnp.abs(rounded.astype(x.dtype) - clean) > jnp.abs(x - clean)
  nearer = jnp.nextafter(rounded, clean.astype(dtype))
  return jnp.where(too_far, nearer, rounded)
