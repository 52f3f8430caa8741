"""The attack pass, and what it asks of attack and inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.core.numeric import describe
from conadv_optax.core.paths import Leaf
from conadv_optax.core.types import Attack, Batch
from conadv_optax.training.loss import split_key


def craft(
  attack: Attack,
  leaf: Leaf,
  loss: Callable[[Batch, Any], jax.Array],
  batch: Batch,
  key: jax.Array | None,
  *,
  divisor: ArrayLike | None = None,
) -> jax.Array:
  """The attack pass: adversarial inputs of a batch.

  Args:
    attack: how they are found.
    leaf: where they are in the batch.
    loss: `loss(batch, key)`, a mean, at least float32.
    batch: the clean examples.
    key: of the attack.
    divisor: what the loss is divided by; None is the number of examples.
  """
  prepare_key, craft_key, loss_key = split_key(key, 3)
  clean = leaf.get(batch)
  if attack.prepare is not None:
    batch = attack.prepare(prepare_key, batch)
  # The gradient of a mean is that of an example over their number, which
  # float16 does not hold. On its way back it is that of an example, as far as
  # float16 holds the scale; a power of two changes no digit.
  size = jnp.asarray(clean.shape[0] if divisor is None else divisor)
  exponent = jnp.floor(jnp.log2(size.astype(jnp.float32)))
  scale = jnp.exp2(jnp.clip(exponent, 0.0, 15.0))

  def gradient_fn(perturbed: jax.Array) -> jax.Array:
    def scaled(perturbed: jax.Array) -> jax.Array:
      value = loss(leaf.set(batch, perturbed.astype(clean.dtype)), loss_key)
      return scale.astype(value.dtype) * value

    return jax.grad(scaled)(perturbed) / scale.astype(perturbed.dtype)

  return check_crafted(attack.craft(craft_key, gradient_fn, clean), clean)


def check_inputs(inputs: Any) -> None:
  """The perturbed leaf is a floating-point batch."""
  if not hasattr(inputs, 'dtype') or not hasattr(inputs, 'shape'):
    raise TypeError(
      'The perturbed leaf must be an array with a leading batch axis. Given '
      f'{describe(inputs)}.'
    )
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise TypeError(
      'The perturbed leaf must be floating, because an attack moves it by '
      f'fractions. Given {describe(inputs)}. Likely raw pixels: normalise them '
      "before the call, `batch['image'].astype(jnp.float32) / 255`."
    )
  if inputs.ndim < 1 or inputs.shape[0] == 0:
    raise ValueError(
      'The perturbed leaf must have a leading batch axis of at least one '
      f'example. Given {describe(inputs)}.'
    )


def check_attack(attack: Any) -> None:
  """The attack is an `Attack`."""
  if not isinstance(attack, Attack):
    raise TypeError(
      '`attack` must be a `conadv.Attack`. Given a '
      f'{type(attack).__name__}. Likely the call is missing: '
      '`attack=conadv.pgd(8 / 255)`.'
    )


def check_crafted(crafted: Any, clean: jax.Array) -> jax.Array:
  """What an attack returned has the shape and dtype of the inputs."""
  given = getattr(crafted, 'shape', None), getattr(crafted, 'dtype', None)
  if given != (clean.shape, clean.dtype):
    raise TypeError(
      'An attack must return adversarial inputs of the shape and dtype of the '
      f'inputs, {describe(clean)}. It returned {describe(crafted):.80}. Likely '
      'it computes in float32, as it should, and does not convert at the end: '
      '`return perturbed.astype(inputs.dtype)`.'
    )
  return crafted


def check_fraction(fraction: Any) -> None:
  """A share of the batch, more than none of it."""
  if not 0 < fraction <= 1:
    raise ValueError(
      '`adversarial_fraction` is the share of each batch that is attacked, in '
      f'(0, 1]. Given adversarial_fraction={fraction!r}. To train on clean '
      'examples alone, leave `wrap` out.'
    )
