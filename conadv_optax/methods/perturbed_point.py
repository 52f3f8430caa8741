"""What SAM and its kin share: the first pass, and where the second is."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.core.calls import Call
from conadv_optax.core.numeric import (
  ascent,
  cast_like,
  describe,
  norm,
  scale,
  tree_at_least_float32,
  unit,
)
from conadv_optax.core.paths import tree_of
from conadv_optax.core.types import GradientFunction, PerGroup

Adaptive = Literal['layer', 'element'] | None
Mask = Any | Callable[[Any], Any]
Axis = str | tuple[str, ...] | None


def perturbed(
  params: Any,
  gradient: Any,
  radius: ArrayLike,
  *,
  adaptive: Adaptive = None,
  mask: Mask | None = None,
) -> Any:
  """The parameters moved up the loss, in their own dtypes.

  Args:
    params: the parameters.
    gradient: of the loss there, at least float32.
    radius: how far.
    adaptive: what the move is in proportion to, as for `sam`.
    mask: True where a parameter moves, as for `sam`. None is everywhere.
  """
  wide = tree_at_least_float32(params)
  point = jax.tree.map(
    lambda w, d: w + jnp.asarray(radius, d.dtype) * d,
    wide,
    _STEPS[adaptive](wide, ascent(gradient)),
  )
  if mask is not None:
    chosen = resolve_mask(mask, params)
    point = jax.tree.map(jnp.where, chosen, point, wide)
  return cast_like(point, params)


def _of_length_one(params: Any, up: Any) -> Any:
  del params
  return unit(up)


def _by_layer(params: Any, up: Any) -> Any:
  return unit(jax.tree.map(lambda w, g: scale(norm(w), unit(g)), params, up))


def _by_element(params: Any, up: Any) -> Any:
  size = jax.tree.map(lambda w: jnp.abs(w).astype(w.dtype), params)
  scaled = jax.tree.map(jnp.multiply, size, up)
  return jax.tree.map(jnp.multiply, size, unit(scaled))


_STEPS: dict[Adaptive, Callable[[Any, Any], Any]] = {
  None: _of_length_one,
  'layer': _by_layer,
  'element': _by_element,
}


def first_pass(
  grad_fn: GradientFunction, call: Call, axis: Axis, method: str
) -> tuple[Any, Any, Any, Any]:
  """`(loss, aux), grads, mean, state` where the parameters are.

  `mean` is the gradient over the devices of `axis`, at least float32.
  """
  (loss, aux), grads, state = call.value_and_grad(grad_fn)
  # That of an `accumulate` inside is not of the gradient that is returned.
  output = loss, aux._replace(second_moment=None)
  mean = mean_over(axis, tree_at_least_float32(grads), method)
  return output, grads, mean, state


def hold(axis: Axis, value: Any) -> Any:
  """What a state keeps: one for all devices of `axis`, or each its own."""
  return PerGroup(value) if axis is None else value


def held(axis: Axis, part: Any) -> Any:
  """What `hold` was given."""
  return part.value if axis is None else part


def mean_over(axis: Axis, tree: Any, method: str) -> Any:
  """The mean over the devices of `axis`, of one device where it is None."""
  return _across(jax.lax.pmean, axis, tree, method)


def shared_key(axis: Axis, key: jax.Array, method: str) -> jax.Array:
  """One key for all devices of `axis`, whose own differ."""
  raw_key = _across(jax.lax.pmax, axis, jax.random.key_data(key), method)
  return jax.random.wrap_key_data(raw_key, impl=jax.random.key_impl(key))


def _across(reduce: Callable[..., Any], axis: Axis, x: Any, method: str) -> Any:
  if axis is None:
    return x
  try:
    return reduce(x, axis)
  except NameError as error:
    raise ValueError(
      '`axis` names the axis of a mesh over which devices perturb together. '
      f'Given axis={axis!r} where there is none. Likely `data_parallel` is '
      f'missing, or inside of `{method}`: write `conadv.data_parallel('
      f'conadv.{method}(grad_fn, radius, axis={axis!r}), mesh, '
      f'axis={axis!r})`.'
    ) from error


def resolve_mask(mask: Mask, params: Any) -> Any:
  """The mask as a full tree of bools or of arrays of bools."""
  tree = tree_of(mask, params)
  for leaf in jax.tree.leaves(tree):
    if jnp.result_type(leaf) != jnp.bool_:
      raise TypeError(
        '`mask` is True where a parameter is perturbed: bools, or arrays of '
        f'bools like the parameters. Given a leaf {describe(leaf)}. Likely '
        'zeros and ones: write `mask=jax.tree.map(lambda m: m > 0, mask)`.'
      )

  def spread(chosen: Any, part: Any) -> Any:
    if jnp.ndim(chosen):
      _check_shape(chosen, part)
    return jax.tree.map(lambda _: chosen, part)

  return jax.tree.map(spread, tree, params)


def _check_shape(chosen: Any, part: Any) -> None:
  if jnp.shape(part) != jnp.shape(chosen):
    raise ValueError(
      'An array in `mask` has the shape of its parameter. Given '
      f'{describe(chosen)} for {describe(part)}. For all of a parameter, or of '
      'a part of the tree, write True or False.'
    )
