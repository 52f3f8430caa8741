"""An attack on part of a batch, in place."""

from collections.abc import Callable
from typing import Any

import jax

from conadv_optax.core import checks
from conadv_optax.core.losses import mean_loss
from conadv_optax.core.paths import LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import Attack, Batch


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

  `wrap` trains on adversarial copies beside the clean examples. This is for the
  methods that train on a mixture in one pass, and for measuring robustness.
  Craft outside of the function that is differentiated for training.

  Args:
    loss_fn: `loss_fn(params, batch)` returns the mean loss, a floating scalar.
      A model with statistics goes in as a closure; ABSA attacks in evaluation
      mode.
    params: parameters, any pytree.
    batch: a pytree of arrays with a leading batch axis.
    attack: how the inputs are perturbed.
    inputs: the leaf of the batch to perturb, as in `wrap`.
    adversarial_fraction: the share :math:`p` of the batch: its first
      `int(p * batch)` examples, at least one.
    key: for an attack that draws.

  Returns:
    A batch of the same structure, shapes and dtypes. The leaf of a `(get, set)`
    pair is what `set` makes of the floats: where `get` converts uint8 pixels,
    all of its examples come back as floats, unless `set` converts back.

  Raises:
    TypeError: for an attack that is none, inputs that are not floating, or a
      loss that is not a floating scalar.
    ValueError: for a fraction outside (0, 1], or a missing key.
    KeyError: when the batch has no leaf `inputs`.

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
  checks.check_fraction(adversarial_fraction)
  checks.check_attack(attack, reuse_gradient=False)
  checks.check_key(attack.draws, key)
  leaf = _leaf(inputs, argument='inputs')
  batch = jax.tree.map(jax.numpy.asarray, batch)
  clean = leaf.get(batch)
  checks.check_inputs(clean)
  checks.check_batch_axis(batch, clean.shape[0])
  count = max(1, int(adversarial_fraction * clean.shape[0]))
  part = jax.tree.map(lambda x: x[:count], batch)
  prepare_key, craft_key = (
    (None, None) if key is None else jax.random.split(key)
  )
  if attack.prepare is not None:
    part = attack.prepare(prepare_key, part)

  def loss(perturbed: jax.Array) -> jax.Array:
    typed = perturbed.astype(clean.dtype)
    return mean_loss(loss_fn, params, leaf.set(part, typed))

  crafted = attack.craft(craft_key, jax.grad(loss), clean[:count])
  return leaf.set(batch, clean.at[:count].set(crafted))
