"""The balls that attacks stay in: projection, steepest step, uniform draw.

All take a batch in float32, whose first axis is that of the examples, and a
radius that broadcasts to it.
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
    step: `step(gradient, size)`, the steepest step of that size, downwards if
      it is negative; zero for a gradient of zero, and for infinite entries the
      limit of large ones.
    draw: `draw(key, like)`, uniform in the unit ball, of the shape of `like`.
  """

  project: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
  step: Callable[[jax.Array, jax.Array], jax.Array]
  draw: Callable[[jax.Array, jax.Array], jax.Array]


def _of_each(reduce: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
  """`reduce` over each example, its axes kept."""
  return reduce(x, axis=tuple(range(1, x.ndim)), keepdims=True)


def _measure(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Each example over its L2 norm, zero where that is, and the norm."""
  # Over the largest entry first, safe from under- and overflow.
  largest = _of_each(jnp.max, jnp.abs(x))
  largest = jnp.where(largest > 0, largest, 1.0)
  x = x / largest
  square = _of_each(jnp.sum, x**2)
  # No second division: XLA joins the divisors, whose product may overflow.
  unit = x * jax.lax.rsqrt(jnp.maximum(square, 1.0))
  return unit, largest * jnp.sqrt(square)


def _project_l2(
  perturbed: jax.Array, inputs: jax.Array, radius: jax.Array
) -> jax.Array:
  # Where the radius is 0 nothing moves; elsewhere measure in radii.
  moves = radius > 0
  delta = jnp.where(moves, perturbed - inputs, 0.0)
  _, length = _measure(delta / jnp.where(moves, radius, 1.0))
  return inputs + delta / jnp.maximum(length, 1.0)


def _step_l2(gradient: jax.Array, size: jax.Array) -> jax.Array:
  # Infinite, or so large that a reciprocal is not a normal number.
  huge = jnp.abs(gradient) > jnp.finfo(gradient.dtype).max / 8
  limit = jnp.where(huge, jnp.sign(gradient), 0.0)
  direction, _ = _measure(jnp.where(_of_each(jnp.any, huge), limit, gradient))
  # In an ellipsoid the steepest direction is that of the scaled gradient.
  return size * _measure(jnp.abs(size) * direction)[0]


def _draw_l2(key: jax.Array, like: jax.Array) -> jax.Array:
  """Uniform in the unit ball: a uniform direction, and u^(1/n) for length."""
  direction_key, length_key = jax.random.split(key)
  normal = jax.random.normal(direction_key, like.shape, like.dtype)
  shape = like.shape[:1] + (1,) * (like.ndim - 1)
  u = jax.random.uniform(length_key, shape, like.dtype)
  return _measure(normal)[0] * u ** (1.0 / math.prod(like.shape[1:]))


BALLS = {
  'linf': Ball(
    lambda x, inputs, radius: jnp.clip(x, inputs - radius, inputs + radius),
    lambda gradient, size: size * jnp.sign(gradient),
    lambda key, like: jax.random.uniform(
      key, like.shape, like.dtype, -1.0, 1.0
    ),
  ),
  'l2': Ball(_project_l2, _step_l2, _draw_l2),
}


class Region(NamedTuple):
  """Where the examples of a batch may go: a ball around each, within bounds.

  Attributes:
    ball: the geometry.
    clean: the batch.
    radius: of the ball, of the rank of `clean`.
    size: of a step up, likewise; negative for steps down.
    low: the lower bound, likewise.
    high: the upper bound, likewise.
  """

  ball: Ball
  clean: jax.Array
  radius: jax.Array
  size: jax.Array
  low: jax.Array
  high: jax.Array

  def project(self, x: jax.Array) -> jax.Array:
    """To the ball, then to the bounds."""
    x = self.ball.project(x, self.clean, self.radius)
    return jnp.clip(x, self.low, self.high)

  def step(self, x: jax.Array, gradient: jax.Array) -> jax.Array:
    """The steepest step, none where an example's gradient holds a NaN."""
    is_wrong = _of_each(jnp.any, jnp.isnan(gradient))
    gradient = jnp.where(is_wrong, 0.0, gradient)
    return self.project(x + self.ball.step(gradient, self.size))

  def rounded(self, x: jax.Array, dtype: Any) -> jax.Array:
    """A point in `dtype`, which takes it out of neither ball nor bounds."""
    return jnp.clip(
      _round_towards(x, self.clean, dtype),
      # Inwards, because the clean input may be outside.
      _round_towards(self.low, self.high, dtype),
      _round_towards(self.high, self.low, dtype),
    )


def _round_towards(x: jax.Array, to: jax.Array, dtype: Any) -> jax.Array:
  """`x` in `dtype`, never on the far side of `x` as seen from `to`."""
  rounded = x.astype(dtype)
  if dtype == x.dtype:
    return rounded
  back = rounded.astype(x.dtype)
  too_far = ((back < x) & (x < to)) | ((back > x) & (x > to))
  return jnp.where(too_far, jnp.nextafter(rounded, to.astype(dtype)), rounded)
