"""The attack pass, and what it asks of attack and inputs."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.core.numeric import cast_like, describe, is_inexact
from conadv_optax.core.paths import Leaf, named
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
) -> Any:
  """The attack pass: adversarial inputs of a batch.

  Args:
    attack: how they are found.
    leaf: where they are in the batch.
    loss: `loss(batch, key)`, a mean or the losses of the examples, at least
      float32.
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
  if divisor is None:
    divisor = leaf.examples(batch)
  size = jnp.asarray(divisor)
  exponent = jnp.floor(jnp.log2(size.astype(jnp.float32)))
  scale = jnp.exp2(jnp.clip(exponent, 0.0, 15.0))

  def losses_fn(perturbed: Any) -> jax.Array:
    losses = loss(leaf.set(batch, perturbed), loss_key)
    return _check_losses(losses, leaf.examples(batch))

  def gradient_fn(perturbed: Any) -> Any:
    def scaled(perturbed: Any) -> jax.Array:
      value = loss(leaf.set(batch, cast_like(perturbed, clean)), loss_key)
      if value.ndim:
        losses = _check_losses(value, leaf.examples(batch))
        value = losses.sum() / size.astype(losses.dtype)
      return scale.astype(value.dtype) * value

    return jax.tree.map(
      lambda g: g / scale.astype(g.dtype), jax.grad(scaled)(perturbed)
    )

  _check_set(batch, leaf.set(batch, clean))
  extra = [losses_fn] if attack.needs_losses else []
  crafted = attack.craft(craft_key, gradient_fn, clean, *extra)
  return check_crafted(crafted, clean)


def _check_losses(losses: jax.Array, examples: int) -> jax.Array:
  """One for each example."""
  if losses.shape != (examples,):
    raise TypeError(
      'An attack that compares the losses of examples, and a `loss_fn` that '
      f'returns them, need one for each of the {examples} where it is called '
      f'for the attack. It returned {describe(losses)}. In `wrap` say '
      "`has_branch=True` and `return losses if branch == 'attack' else "
      'losses.mean()`; in `perturb`, `return losses`.'
    )
  return losses


def check_inputs(inputs: Any) -> None:
  """The perturbed leaf, or each of several, is a floating-point batch."""
  if not jax.tree.leaves(inputs):
    _check_input(inputs)
  leaves = named(inputs, is_leaf=lambda x: x is None)
  sizes = {path: _check_input(x) for path, x in leaves.items()}
  if len(set(sizes.values())) > 1:
    given = {'/'.join(map(str, path)): size for path, size in sizes.items()}
    raise ValueError(
      'The perturbed leaves must have one leading batch axis, that of the '
      f'examples. Given {given} examples. Likely a leaf is not of this batch.'
    )


def _check_input(inputs: Any) -> int:
  """The number of examples."""
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
  return inputs.shape[0]


def _check_set(batch: Batch, after: Batch) -> None:
  """What `set` puts in, the loss can be differentiated in."""
  before = jax.tree.leaves(batch)
  changed = [
    x for x in jax.tree.leaves(after) if not any(x is old for old in before)
  ]
  if changed and not any(map(is_inexact, changed)):
    raise TypeError(
      'The loss is differentiated in what `set(batch, value)` puts into the '
      f'batch, which must be floating. It put in {describe(changed[0])}. '
      'Likely it converts back to pixels, along which nothing has a gradient: '
      'leave the floats, and convert where they are shown.'
    )


def check_attack(attack: Any) -> None:
  """The attack is an `Attack`."""
  if not isinstance(attack, Attack):
    raise TypeError(
      '`attack` must be a `conadv.Attack`. Given a '
      f'{type(attack).__name__}. Likely the call is missing: '
      '`attack=conadv.pgd(8 / 255)`.'
    )


def check_crafted(crafted: Any, clean: Any) -> Any:
  """What an attack returned has the structure, shapes and dtypes of `clean`."""
  given, wanted = (
    {path: _form(x) for path, x in named(tree).items()}
    for tree in (crafted, clean)
  )
  forms: list[Any] = [jax.tree.structure(tree) for tree in (crafted, clean)]
  if given != wanted or forms[0] != forms[1]:
    returned, inputs = (
      str(jax.tree.map(describe, tree)) for tree in (crafted, clean)
    )
    raise TypeError(
      'An attack must return adversarial inputs of the shape and dtype of the '
      f'inputs, {inputs}. It returned {returned:.80}. Likely '
      'it computes in float32, as it should, and does not convert at the end: '
      '`return perturbed.astype(inputs.dtype)`.'
    )
  return crafted


def _form(x: Any) -> Any:
  return getattr(x, 'shape', None), getattr(x, 'dtype', None)


def check_fraction(fraction: Any) -> None:
  """A share of the batch, more than none of it."""
  if not 0 < fraction <= 1:
    raise ValueError(
      '`adversarial_fraction` is the share of each batch that is attacked, in '
      f'(0, 1]. Given adversarial_fraction={fraction!r}. Likely it is in per '
      'cent: `adversarial_fraction=0.2`. For clean examples alone leave the '
      'attack out, `conadv.plain(loss_fn)`.'
    )
