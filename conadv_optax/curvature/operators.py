"""The Hessian of a loss as a function of a vector."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core.micro_batches import (
  Denominator,
  cut,
  join,
  mean_over,
  part_of,
  weight_of,
)
from conadv_optax.core.numeric import add_weighted, describe
from conadv_optax.core.paths import LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import Batch, LossFn
from conadv_optax.curvature.points import float32_point, value_and_grad

Operator = Callable[[Any], Any]
"""Multiplies a float32 pytree by a symmetric matrix."""


def operator(
  loss_fn: LossFn,
  params: Any,
  batch: Batch,
  *,
  micro_batches: int = 1,
  denominator: Denominator | None = None,
) -> Operator:
  r"""The Hessian of the loss in the parameters, as a function of a vector.

  .. math::

    v \mapsto H v = \nabla_\theta \left( \nabla_\theta L(\theta) \cdot v
    \right), \qquad L = \frac{\sum_{i=1}^{m} d_i L_i}{\sum_{i=1}^{m} d_i}

  over :math:`m` micro-batches of weight :math:`d_i`, 1 without a `denominator`,
  by forward- over reverse-mode differentiation. A product costs about two
  gradients.

  Args:
    loss_fn: `loss_fn(params, batch)` returns the mean loss, a floating scalar.
    params: the point :math:`\theta`, any pytree of floating arrays.
    batch: a pytree of arrays with a leading batch axis.
    micro_batches: number of parts that the batch is gone through in; it must
      divide the batch. Part i holds the examples i, i + m, ... A loss with
      batch statistics in training mode sees those of a part.
    denominator: what the loss is a mean of, where that is not every example
      alike: `denominator(batch)` is the scalar that the batch's loss was
      divided by, `lambda batch: batch['mask'].sum()`. A part with 0 adds
      nothing.

  Returns:
    A function of a float32 pytree like `params` that returns another. The loss
    runs in the dtype of the parameters; sums are float32. In bfloat16 a product
    has two to three digits: pass the parameters in float32 for more. For
    float16 the loss is scaled by about the root of the batch, and the result
    is scaled back.

  Raises:
    TypeError: for parameters that are not floating (split complex ones into
      their parts), a loss that is not a floating scalar, or a denominator that
      is not a real one.
    ValueError: for a batch that `micro_batches` does not divide, or a vector
      that is not like the parameters.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def loss_fn(w, batch):
    ...   return 0.5 * jnp.mean((batch @ w) ** 2)
    >>> x = jnp.array([[2., 0.], [0., 4.]])
    >>> hessian = conadv.hessian.operator(
    ...     loss_fn, jnp.zeros(2), x, micro_batches=2)
    >>> chex.assert_trees_all_close(hessian(jnp.ones(2)), jnp.array([2., 8.]))

  References:
    Pearlmutter, `Fast Exact Multiplication by the Hessian
    <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994
  """
  point = float32_point(params)

  # Compiled once, where it is called outside of `jit`.
  @jax.jit
  def product(vector: Any) -> Any:
    _check_like(vector, point)
    return mean_over(
      lambda part: _product(loss_fn, params, part, vector),
      batch,
      micro_batches,
      denominator,
    )

  return product


def input_operator(
  loss_fn: LossFn,
  params: Any,
  batch: Batch,
  *,
  inputs: LeafSpec = 'image',
  micro_batches: int = 1,
  denominator: Denominator | None = None,
) -> Operator:
  r"""The Hessian of the loss in the inputs, as a function of a vector.

  .. math::

    v \mapsto \nabla_x \left( \nabla_x L(x) \cdot v \right)

  for all inputs of the batch together. Where examples do not meet in the loss,
  the Hessian is block-diagonal. As `L` is a mean, the block of an example is
  the example's own Hessian divided by the size of the batch.

  Args:
    loss_fn: as for `operator`.
    params: parameters, any pytree.
    batch: a pytree of arrays with a leading batch axis.
    inputs: the floating leaf of the batch to differentiate in: a key, a tuple
      of keys, or a `(get, set)` pair, or several in a list or dict, as in
      `wrap`.
    micro_batches: as for `operator`.
    denominator: as for `operator`; the block of a part is scaled by its share.

  Returns:
    A function of float32 arrays of the shapes of the inputs that returns as
    many.

  Raises:
    TypeError: for inputs that are not floating, a loss that is not a floating
      scalar, or a denominator that is not a real one.
    ValueError: for a batch that `micro_batches` does not divide, or a vector
      that is not like the inputs.
    KeyError: when the batch has no leaf `inputs`.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def loss_fn(w, batch):
    ...   return 0.5 * jnp.mean((batch['x'] @ w) ** 2)
    >>> batch = {'x': jnp.ones((4, 2))}
    >>> hessian = conadv.hessian.input_operator(
    ...     loss_fn, jnp.array([1., 3.]), batch, inputs='x')
    >>> # Each example's block is w w^T / 4.
    >>> chex.assert_trees_all_close(
    ...     hessian(jnp.ones((4, 2))), jnp.tile(jnp.array([[1., 3.]]), (4, 1)))

  References:
    Yao et al., `Hessian-based Analysis of Large Batch Training and Robustness
    to Adversaries <https://arxiv.org/abs/1802.08241>`_, 2018
  """
  leaf = _leaf(inputs, argument='inputs')
  point = float32_point(leaf.get(batch))

  def weighed(part: Batch, vector: jax.Array) -> Any:
    result = _product(
      lambda x, part: loss_fn(params, leaf.set(part, x)),
      leaf.get(part),
      part,
      vector,
    )
    weight = weight_of(part, denominator)
    return add_weighted(None, weight, (result, jnp.float32(1)))

  @jax.jit
  def product(vector: jax.Array) -> jax.Array:
    _check_like(vector, point)
    if micro_batches == 1:
      result, weights = weighed(batch, vector)
    else:
      parts = cut((batch, vector), micro_batches)
      result, weights = jax.lax.map(
        lambda i: weighed(*part_of(parts, i)), jnp.arange(micro_batches)
      )
      result = join(result)
    total = jnp.sum(weights)
    return jax.tree.map(lambda x: x / total, result)

  return product


def _product(loss_fn: LossFn, like: Any, batch: Batch, vector: Any) -> Any:
  """The Hessian of the mean loss at `like`, times the vector."""
  return jax.jvp(
    lambda point: value_and_grad(loss_fn, like, batch, point)[1],
    (float32_point(like),),
    (vector,),
  )[1]


def _check_like(vector: Any, point: Any) -> None:
  given, wanted = (
    (jax.tree.structure(tree), jax.tree.map(jnp.shape, jax.tree.leaves(tree)))
    for tree in (vector, point)
  )
  if given != wanted:
    raise ValueError(
      'The Hessian multiplies vectors of the shapes that it was taken at. '
      f'Given {jax.tree.map(describe, vector)}, for '
      f'{jax.tree.map(describe, point)}. Pass the same tree as `like`.'
    )
