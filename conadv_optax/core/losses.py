"""A loss and the point it is differentiated at, for the tools beside `wrap`."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_optax.core.numeric import at_least_float32, describe
from conadv_optax.core.paths import path_names
from conadv_optax.core.types import Batch, LossFn


def mean_loss(loss_fn: LossFn, params: Any, batch: Batch) -> jax.Array:
  """`loss_fn(params, batch)`, checked, at least float32."""
  loss = loss_fn(params, batch)
  is_array = hasattr(loss, 'dtype') and hasattr(loss, 'shape')
  if not is_array or loss.shape or not jnp.issubdtype(loss.dtype, jnp.floating):
    raise TypeError(
      '`loss_fn(params, batch)` must return a floating scalar alone, the mean '
      f'over the batch. It returned {describe(loss)}. If it returns more, '
      'close over the rest: `lambda params, batch: loss_fn(params, '
      'model_state, batch)[0]`; if the mean is missing, `return '
      'jnp.mean(losses)`.'
    )
  return at_least_float32(loss)


def value_and_grad(
  loss_fn: LossFn, like: Any, batch: Batch, point: Any
) -> tuple[jax.Array, Any]:
  """The mean loss and its gradient at a float32 point, cast to be `like`."""
  # In float16 what one of many examples adds to a mean is lost. Powers of two,
  # between one and their number, round nothing.
  sizes = [len(x) for x in jax.tree.leaves(batch) if jnp.ndim(x)]
  scale = 2.0 ** (max(sizes, default=1).bit_length() // 2)

  def loss(point: Any) -> jax.Array:
    params = optax.tree.cast_like(point, like)
    return scale * mean_loss(loss_fn, params, batch)

  return optax.tree.scale(1 / scale, jax.value_and_grad(loss)(point))


def float32_point(tree: Any) -> Any:
  """The tree in float32; an error where a leaf is not floating."""
  for path, x in jax.tree_util.tree_flatten_with_path(tree)[0]:
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise TypeError(
        'Curvature is taken in floating leaves alone. Leaf '
        f'{list(path_names(path))} is {describe(x)}. If it is a counter, leave '
        'it out of the parameters and close over it in `loss_fn`; if it is '
        'complex, where the Hessian is no matrix, pass its parts: `(x.real, '
        'x.imag)`.'
      )
  return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), tree)
