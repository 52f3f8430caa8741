"""An attack on part of a batch, in place."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core.batches import check_arrays, first_part, replace_first
from conadv_optax.core.paths import LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import Attack, Batch
from conadv_optax.training.craft import (
  check_attack,
  check_fraction,
  check_inputs,
  craft,
)
from conadv_optax.training.loss import Loss, check_key


def perturb(
  loss_fn: Callable[[Any, Batch], jax.Array],
  params: Any,
  batch: Batch,
  *,
  attack: Attack,
  inputs: LeafSpec = 'image',
  adversarial_fraction: float = 1.0,
  key: jax.Array | None = None,
) -> Batch:
  r"""The batch with its first examples replaced by adversarial ones.

  .. math::

    x_i \leftarrow \hat x_i(\theta) \quad \text{for } i < \lfloor pB \rfloor

  `wrap` trains on adversarial copies beside the clean examples. `perturb` is
  for methods that train on a mixture in one pass, and for measuring robustness.
  Call it outside the function that is differentiated for training.

  Args:
    loss_fn: `loss_fn(params, batch)` returns the mean loss, a floating scalar,
      or the losses of the examples, (batch,), which `pgd(restarts=2)` needs. If
      the model has statistics, let `loss_fn` close over them; ABSA attacks in
      evaluation mode.
    params: parameters, any pytree.
    batch: a pytree of arrays with a leading batch axis.
    attack: how the inputs are perturbed.
    inputs: the leaf of the batch to perturb, as in `wrap`.
    adversarial_fraction: the share :math:`p` of the batch: its first
      :math:`\lfloor p B \rfloor` examples, at least one.
    key: a key, if the attack draws random numbers.

  Returns:
    A batch of the same structure, shapes and dtypes. With a `(get, set)` pair
    the leaf is what `set` makes of the floats: if `get` converts uint8 pixels,
    all examples come back as floats.

  Raises:
    TypeError: for an attack that is no `Attack`, inputs that are not floating
      before or after `set`, or a loss that is neither a floating scalar nor one
      number per example.
    ValueError: for a fraction outside (0, 1], or a missing key.
    KeyError: when the batch lacks the leaf `inputs`.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def loss_fn(w, batch):
    ...   return jnp.mean(w * batch['x'] ** 2)
    >>> mixed = conadv.perturb(
    ...     loss_fn, 2., {'x': jnp.array([1., -1., 1., -1.])}, inputs='x',
    ...     attack=conadv.fgsm(0.1), adversarial_fraction=0.5)
    >>> chex.assert_trees_all_close(
    ...     mixed, {'x': jnp.array([1.1, -1.1, 1., -1.])})

  References:
    Yao et al., `Large batch size training of neural networks with adversarial
    training and second-order information <https://arxiv.org/abs/1810.01021>`_,
    2018
  """
  check_fraction(adversarial_fraction)
  check_attack(attack)
  check_key(attack.draws, key)
  leaf = _leaf(inputs, argument='inputs')
  check_arrays(batch)
  batch = jax.tree.map(jnp.asarray, batch)
  clean = leaf.get(batch)
  check_inputs(clean)

  def loss(batch: Batch, key: Any) -> jax.Array:
    at = 'main', params, None, batch, key
    return Loss(loss_fn)(*at, by_example=True)[0]

  part = first_part(batch, adversarial_fraction, leaf.examples(batch))
  crafted = craft(attack, leaf, loss, part, key)
  return leaf.set(batch, jax.tree.map(replace_first, clean, crafted))
