r"""Targets: the wrong class that an attack descends towards.

References:
  Xie et al., `Adversarial Examples Improve Image Recognition
  <https://arxiv.org/abs/1911.09665>`_, 2020
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from conadv_optax.core.numeric import check_count, describe
from conadv_optax.core.paths import LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import Batch

Targets = Callable[[jax.Array | None, Batch], Batch]


def random_targets(num_classes: int, *, label: LeafSpec = 'label') -> Targets:
  """A wrong class for each example, drawn uniformly.

  Pass it as `targets` to an attack; training keeps the true labels. A label
  that is no class stays as it is, such as the -1 or 255 of a pixel that the
  loss ignores.

  Args:
    num_classes: number of classes, at least 2.
    label: the leaf of the batch that holds the labels, integers of any shape:
      a key, a tuple of keys or a `(get, set)` pair.

  Returns:
    A function `(key, batch) -> batch` with targets in place of the labels.

  Raises:
    ValueError: for fewer than 2 classes.
    TypeError: for a number of classes that is not an int, or when it is called
      on labels that are not integers.
    KeyError: when the batch has no such leaf.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> targets = conadv.random_targets(2)
    >>> batch = targets(jax.random.key(0), {'label': jnp.array([0, 1, 1])})
    >>> chex.assert_trees_all_equal(batch, {'label': jnp.array([1, 0, 0])})

  References:
    Xie et al., `Adversarial Examples Improve Image Recognition
    <https://arxiv.org/abs/1911.09665>`_, 2020
  """
  # A wrong class exists only among two or more.
  check_count('num_classes', num_classes, least=2)
  label_leaf = _leaf(label, argument='label')

  def targets(key: jax.Array | None, batch: Batch) -> Batch:
    assert key is not None  # `wrap` and its siblings have seen to it.
    labels = label_leaf.get(batch)
    dtype = getattr(labels, 'dtype', None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
      raise TypeError(
        '`random_targets` draws class indices, so the labels must be integers. '
        f'Given {describe(labels)}. If they are one-hot, let the loss encode '
        "them: keep `batch['label']` as indices and call `jax.nn.one_hot` in "
        'loss_fn.'
      )
    # In int32, so that the sum does not overflow a shorter dtype.
    true = labels.astype(jnp.int32)
    shift = jax.random.randint(key, labels.shape, 1, num_classes)
    wrong = ((true + shift) % num_classes).astype(labels.dtype)
    is_class = (true >= 0) & (true < num_classes)
    return label_leaf.set(batch, jnp.where(is_class, wrong, labels))

  return targets
