r"""Several augmented copies of every example in one batch.

References:
  Hoffer et al., `Augment your batch: better training with larger batches
  <https://arxiv.org/abs/1901.09335>`_, 2019
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from conadv_optax.core.micro_batches import merged
from conadv_optax.core.numeric import check_count, describe
from conadv_optax.core.paths import path_names
from conadv_optax.core.types import Batch


class BatchAugmentation(Protocol):
  """From a batch to one of augmented copies."""

  def __call__(self, key: jax.Array, batch: Batch) -> Batch:
    """The augmented batch."""


def batch_augment(
  augment_fn: Callable[[jax.Array, Any], Any], copies: int
) -> BatchAugmentation:
  r"""Batch augmentation: a batch of several augmented copies of each example.

  .. math::

    g = \frac{1}{M B} \sum_{i=1}^{M} \sum_{n=1}^{B}
      \nabla_\theta L(\theta; T_i(x_n), y_n)

  is the gradient on the returned batch, which has :math:`M` = `copies` copies
  of :math:`B` examples. Each copy of each example is augmented with a key of
  its own. Rate and steps per epoch stay those of the batch of :math:`B`.

  The copies of an example lie side by side: copy :math:`i` of example :math:`n`
  has the index :math:`n M + i`. So a batch that is spread over devices stays
  where it is, and each device makes the copies of its own examples.

  - `conadv.accumulate(grad_fn, copies)` runs one copy after another, with the
    memory of one: micro-batch :math:`i`, a BatchNorm group, is copy :math:`i`.
  - `conadv.data_parallel(grad_fn, mesh)` makes a group of each device, which
    holds every copy of its own examples.
  - `conadv.data_parallel(conadv.accumulate(grad_fn, copies), mesh)` does both:
    a group is one copy of a device's examples, and has none of them twice.

  Args:
    augment_fn: `augment_fn(key, example)` returns the augmented example: a
      pytree of leaves without the batch axis, labels among them.
    copies: :math:`M`, static.

  Returns:
    A function `(key, batch) -> batch`, whose leaves have a leading axis of
    `copies` times the batch.

  Raises:
    TypeError: for an `augment_fn` that is no function, or `copies` that are no
      int.
    ValueError: for `copies` below 1, or a call on leaves that do not share a
      leading axis.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def shift(key, example):
    ...   return example + jax.random.uniform(key, minval=-0.1, maxval=0.1)
    >>> augment = conadv.batch_augment(shift, 3)
    >>> batch = augment(jax.random.key(0), jnp.array([1., 2.]))
    >>> chex.assert_trees_all_equal(
    ...     jnp.round(batch), jnp.array([1., 1., 1., 2., 2., 2.]))
    >>> assert len(set(batch.tolist())) == 6

  References:
    Hoffer et al., `Augment your batch: better training with larger batches
    <https://arxiv.org/abs/1901.09335>`_, 2019
  """
  if not callable(augment_fn):
    raise TypeError(
      '`augment_fn` is a function `augment_fn(key, example)`. Given '
      f'{describe(augment_fn)}.'
    )
  check_count('copies', copies)

  # Compiled, so that the numbers lie where the batch does.
  @jax.jit
  def augment(key: jax.Array, batch: Batch) -> Batch:
    def copies_of(number: jax.Array, example: Any) -> Any:
      example_key = jax.random.fold_in(key, number)
      keys = jax.random.split(example_key, copies)
      return jax.vmap(augment_fn, in_axes=(0, None))(keys, example)

    augmented = jax.vmap(copies_of)(_numbers(batch), batch)
    return jax.tree.map(lambda x: merged(x, 0), augmented)

  return augment


def _numbers(batch: Batch) -> jax.Array:
  """Of the examples, spread like the leading axis, which all leaves share."""
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  sizes = {x.shape[0] if x.shape else 0 for _, x in leaves}
  if len(sizes) != 1 or 0 in sizes:
    given = {
      '/'.join(map(str, path_names(path))): describe(x) for path, x in leaves
    }
    raise ValueError(
      'Every leaf of a batch needs the same leading axis, the examples, at '
      f'least one. Given {given}. What belongs to no example goes into '
      '`augment_fn`: `functools.partial(augment, mean=mean)`.'
    )
  sharding = jax.typeof(leaves[0][1]).sharding
  along = sharding.update(spec=P(sharding.spec[0]))
  return jnp.arange(sizes.pop(), dtype=jnp.uint32, out_sharding=along)
