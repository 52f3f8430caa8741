"""A loss at the point that it is differentiated at."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_optax.core.numeric import describe
from conadv_optax.core.paths import named
from conadv_optax.core.types import Batch, LossFn
from conadv_optax.training.loss import Loss


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
    return scale * Loss(loss_fn)('main', params, None, batch, None)[0]

  return optax.tree.scale(1 / scale, jax.value_and_grad(loss)(point))


def float32_point(tree: Any) -> Any:
  """The tree in float32; an error where a leaf is not floating."""
  for path, x in named(tree).items():
    if not jnp.issubdtype(jnp.result_type(x), jnp.floating):
      raise TypeError(
        'Curvature is taken in floating leaves alone. Leaf '
        f'{list(path)} is {describe(x)}. If it is raw pixels, make them '
        "floats: `batch['image'].astype(jnp.float32) / 255`. If it is a "
        'counter, leave it out of the parameters and close over it in '
        '`loss_fn`; if it is complex, where the Hessian is no matrix, pass its '
        'parts: `(x.real, x.imag)`.'
      )
  return jax.tree.map(lambda x: jnp.asarray(x).astype(jnp.float32), tree)
