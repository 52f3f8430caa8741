"""Inputs that a batch does not have: zeros to perturb, as at an embedding.

References:
  Miyato et al., `Adversarial Training Methods for Semi-Supervised Text
  Classification <https://arxiv.org/abs/1605.07725>`_, 2017
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core.numeric import describe, varying_like
from conadv_optax.core.paths import Leaf
from conadv_optax.core.types import Batch


def added_leaf(name: str, like: Callable[[Batch], Any]) -> Leaf:
  r"""Perturbs zeros that the loss adds where it likes.

  .. math::

    \delta_0 = 0, \qquad L(\theta; x, \delta)

  Tokens are integers, so no attack can move them, but it can move their
  embedding. The perturbation is a leaf of the embedding's shape, and the model
  adds it to the embedding. Clean batches wait without this leaf, so `loss_fn`
  adds it only if it is there: `batch.get(name, 0.)`.

  Args:
    name: the key under which the perturbation is put into the batch, a dict.
    like: `like(batch)` returns an array, or a `jax.ShapeDtypeStruct`, of the
      shape and dtype of the perturbation, with a leading batch axis.

  Returns:
    A `(get, set)` pair for the `inputs` of `wrap` and its siblings.

  Raises:
    TypeError: when it is used on a batch that is no dict.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def loss_fn(w, batch):
    ...   embedded = w[batch['tokens']] + batch.get('noise', 0.)
    ...   return jnp.mean(embedded ** 2)
    >>> noise = conadv.added_leaf(
    ...     'noise', lambda batch: jax.ShapeDtypeStruct(
    ...         (*batch['tokens'].shape, 2), jnp.float32))
    >>> grad_fn = conadv.wrap(
    ...     loss_fn, 0, attack=conadv.fgsm(0.5), inputs=noise)
    >>> w, batch = jnp.ones((10, 2)), {'tokens': jnp.array([[3, 1], [4, 1]])}
    >>> (_, aux), _, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
    >>> chex.assert_trees_all_close(
    ...     aux.losses, {'main': 1. ** 2, 'adversarial': 1.5 ** 2})

  References:
    Miyato et al., `Adversarial Training Methods for Semi-Supervised Text
    Classification <https://arxiv.org/abs/1605.07725>`_, 2017
  """

  def get(batch: Batch) -> jax.Array:
    _check_dict(batch)
    if name in batch:
      return batch[name]
    shape = like(batch)
    # Of each device's own examples, inside of a `shard_map` too.
    return varying_like(jnp.zeros(shape.shape, shape.dtype), batch)

  def set_(batch: Batch, value: jax.Array) -> Batch:
    _check_dict(batch)
    return {**batch, name: value}

  return Leaf(get, set_)


def _check_dict(batch: Batch) -> None:
  if not isinstance(batch, dict):
    raise TypeError(
      '`added_leaf` adds a key to the batch, which must be a dict. Given '
      f'{describe(batch):.80}. Write a pair of your own: `inputs=(get, set)`.'
    )
