"""The balls that attacks stay in: projection, steepest step, uniform draw.

All take a batch in float32, an array or a tree of them whose leading axes are
those of the balls, and radii that broadcast to it. A ball holds what a place
along those axes has in all leaves.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

Norm = Literal['linf', 'l2']


class Ball(NamedTuple):
  """The geometry of a norm.

  Attributes:
    project: `project(perturbed, inputs, radius, axes)`, the nearest point of
      the ball around `inputs` (along the ray from there, for unequal radii in
      L2).
    step: `step(gradient, size, axes)`, the steepest step of that size,
      downwards if it is negative; zero for a gradient of zero, and for infinite
      entries the limit of large ones.
    draw: `draw(key, like, axes)`, uniform in the unit ball, of the shape of
      `like`.
  """

  project: Callable[[Any, Any, Any, int], Any]
  step: Callable[[Any, Any, int], Any]
  draw: Callable[[jax.Array, Any, int], Any]


def _of_each(
  reduce: Callable[..., jax.Array], join: Any, tree: Any, axes: int
) -> Any:
  """`reduce` over each ball, for each leaf with axes of size 1 in its place."""
  parts = [
    reduce(x, axis=tuple(range(axes, x.ndim))) for x in jax.tree.leaves(tree)
  ]
  total = functools.reduce(join, parts)
  return jax.tree.map(
    lambda x: jnp.expand_dims(total, range(axes, x.ndim)), tree
  )


def _measure(tree: Any, axes: int) -> tuple[Any, Any]:
  """Each ball over its L2 norm, zero where that is, and the norm."""
  # Over the largest entry first, safe from under- and overflow.
  sizes = jax.tree.map(jnp.abs, tree)
  most = functools.partial(jnp.max, initial=0.0)
  largest = _of_each(most, jnp.maximum, sizes, axes)
  largest = jax.tree.map(lambda x: jnp.where(x > 0, x, 1.0), largest)
  tree = jax.tree.map(jnp.divide, tree, largest)
  squares = jax.tree.map(jnp.square, tree)
  square = _of_each(jnp.sum, jnp.add, squares, axes)
  # No second division: XLA joins the divisors, whose product may overflow.
  unit = jax.tree.map(
    lambda x, s: x * jax.lax.rsqrt(jnp.maximum(s, 1.0)), tree, square
  )
  return unit, jax.tree.map(lambda x, s: x * jnp.sqrt(s), largest, square)


def _project_linf(perturbed: Any, inputs: Any, radius: Any, axes: int) -> Any:
  del axes
  return jax.tree.map(
    lambda x, clean, r: jnp.clip(x, clean - r, clean + r),
    perturbed,
    inputs,
    radius,
  )


def _step_linf(gradient: Any, size: Any, axes: int) -> Any:
  del axes
  return jax.tree.map(lambda g, s: s * jnp.sign(g), gradient, size)


def _draw_linf(key: jax.Array, like: Any, axes: int) -> Any:
  del axes
  return jax.tree.map(
    lambda key, x: jax.random.uniform(key, x.shape, x.dtype, -1.0, 1.0),
    _keys(key, like),
    like,
  )


def _project_l2(perturbed: Any, inputs: Any, radius: Any, axes: int) -> Any:
  # Where the radius is 0 nothing moves; elsewhere measure in radii.
  delta = jax.tree.map(
    lambda x, clean, r: jnp.where(r > 0, x - clean, 0.0),
    perturbed,
    inputs,
    radius,
  )
  in_radii = jax.tree.map(
    lambda d, r: d / jnp.where(r > 0, r, 1.0), delta, radius
  )
  _, length = _measure(in_radii, axes)
  return jax.tree.map(
    lambda clean, d, n: clean + d / jnp.maximum(n, 1.0), inputs, delta, length
  )


def _step_l2(gradient: Any, size: Any, axes: int) -> Any:
  # Infinite, or so large that a reciprocal is not a normal number.
  huge = jax.tree.map(
    lambda g: jnp.abs(g) > jnp.finfo(g.dtype).max / 8, gradient
  )
  along = jax.tree.map(
    lambda g, is_huge, any_is: jnp.where(
      any_is, jnp.where(is_huge, jnp.sign(g), 0.0), g
    ),
    gradient,
    huge,
    _of_each(jnp.any, jnp.logical_or, huge, axes),
  )
  direction, _ = _measure(along, axes)
  # In an ellipsoid the steepest direction is that of the scaled gradient.
  scaled = jax.tree.map(lambda d, s: jnp.abs(s) * d, direction, size)
  return jax.tree.map(jnp.multiply, size, _measure(scaled, axes)[0])


def _draw_l2(key: jax.Array, like: Any, axes: int) -> Any:
  """Uniform in the unit ball: a uniform direction, and u^(1/n) for length."""
  direction_key, length_key = jax.random.split(key)
  normal = jax.tree.map(
    lambda key, x: jax.random.normal(key, x.shape, x.dtype),
    _keys(direction_key, like),
    like,
  )
  leaves = jax.tree.leaves(like)
  size = sum(math.prod(x.shape[axes:]) for x in leaves)
  u = jax.random.uniform(length_key, leaves[0].shape[:axes], leaves[0].dtype)
  length = u ** (1.0 / max(1, size))
  return jax.tree.map(
    lambda x: x * jnp.expand_dims(length, range(axes, x.ndim)),
    _measure(normal, axes)[0],
  )


def _keys(key: jax.Array, like: Any) -> Any:
  """A key for each leaf; the key itself for an only one."""
  leaves, treedef = jax.tree.flatten(like)
  keys = [key] if len(leaves) == 1 else jax.random.split(key, len(leaves))
  return jax.tree.unflatten(treedef, list(keys))


BALLS = {
  'linf': Ball(_project_linf, _step_linf, _draw_linf),
  'l2': Ball(_project_l2, _step_l2, _draw_l2),
}


class Region(NamedTuple):
  """Where the examples of a batch may go: balls around them, within bounds.

  Attributes:
    ball: the geometry.
    axes: how many leading axes have a ball at each place.
    clean: the inputs, an array or a tree of them.
    radius: of the balls, a tree like `clean` of arrays of its ranks.
    size: of a step up, likewise; negative for steps down.
    low: the lower bound, likewise.
    high: the upper bound, likewise.
  """

  ball: Ball
  axes: int
  clean: Any
  radius: Any
  size: Any
  low: Any
  high: Any

  def draw(self, key: jax.Array) -> Any:
    """How far a uniform point of the balls is from the clean inputs."""
    noise = self.ball.draw(key, self.clean, self.axes)
    return jax.tree.map(jnp.multiply, self.radius, noise)

  def project(self, x: Any) -> Any:
    """To the balls, then to the bounds."""
    x = self.ball.project(x, self.clean, self.radius, self.axes)
    return jax.tree.map(jnp.clip, x, self.low, self.high)

  def step(self, x: Any, gradient: Any) -> Any:
    """The steepest step, none where the gradient in a ball holds a NaN."""
    is_wrong = jax.tree.map(jnp.isnan, gradient)
    gradient = jax.tree.map(
      lambda wrong, g: jnp.where(wrong, 0.0, g),
      _of_each(jnp.any, jnp.logical_or, is_wrong, self.axes),
      gradient,
    )
    step = self.ball.step(gradient, self.size, self.axes)
    return self.project(jax.tree.map(jnp.add, x, step))

  def rounded(self, x: Any, like: Any) -> Any:
    """A point in the dtypes of `like`, still in its balls and its bounds."""

    def of_leaf(x: Any, clean: Any, low: Any, high: Any, like: Any) -> Any:
      return jnp.clip(
        _round_towards(x, clean, like.dtype),
        # Inwards, because the clean input may be outside.
        _round_towards(low, high, like.dtype),
        _round_towards(high, low, like.dtype),
      )

    return jax.tree.map(of_leaf, x, self.clean, self.low, self.high, like)


def _round_towards(x: jax.Array, to: jax.Array, dtype: Any) -> jax.Array:
  """`x` in `dtype`, never on the far side of `x` as seen from `to`."""
  rounded = x.astype(dtype)
  if dtype == x.dtype:
    return rounded
  back = rounded.astype(x.dtype)
  too_far = ((back < x) & (x < to)) | ((back > x) & (x > to))
  return jnp.where(too_far, jnp.nextafter(rounded, to.astype(dtype)), rounded)
