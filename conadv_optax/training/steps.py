"""What the steps with an adversarial branch share: craft, and train."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.core.batches import first_part
from conadv_optax.core.calls import Call, pytree
from conadv_optax.core.paths import Leaf
from conadv_optax.core.types import (
  Attack,
  Batch,
  ConAdvAux,
  Denominators,
  Passes,
)
from conadv_optax.training.craft import check_inputs, craft
from conadv_optax.training.loss import Loss, split_key
from conadv_optax.training.passes import Pass, collect, train

_PAIR = 'main', 'adversarial'


@pytree('attack', 'weights')
class Step:
  """What the steps with an adversarial branch share.

  Attributes:
    attack: how the inputs are perturbed.
    weights: the weight of each branch's loss, by name.
    loss: the loss of a branch.
    leaf: the inputs, in a batch.
    views: the inputs of each extra branch, by name.
    fraction: the share of a batch that is attacked.
  """

  attack: Attack
  weights: Mapping[str, ArrayLike]
  loss: Loss
  leaf: Leaf
  views: Mapping[str, Leaf]
  fraction: float

  def check(self, call: Call, batches: Sequence[Batch]) -> None:
    """Raises where a call passes what the step cannot take."""
    self.loss.check(call, draws=self.attack.draws)
    for batch in batches:
      check_inputs(self.leaf.get(batch))

  def passes(self) -> Passes | None:
    """Craft and train apart, where they can be."""
    return None

  def part(self, batch: Batch) -> Batch:
    """The examples that are attacked."""
    return first_part(batch, self.fraction, self.leaf.examples(batch))

  def keys(self, key: jax.Array | None) -> tuple[Any, dict[str, Any]]:
    """The attack's own key and those of the branches, from that of a call."""
    branches = (*_PAIR, *self.views)
    attack_key, *branch_keys = split_key(key, 1 + len(branches))
    return attack_key, dict(zip(branches, branch_keys, strict=True))

  def craft(self, call: Call, batch: Batch, key: Any) -> Any:
    """The attack pass: adversarial inputs of the first part of a batch."""
    batch = self.part(batch)

    def loss(batch: Batch, key: Any) -> jax.Array:
      at = 'adversarial', call.params, call.model_state, batch, key
      return self.loss(*at, name='attack', by_example=True)[0]

    divisor = None
    if self.loss.denominator is not None:
      divisor = self.loss.divisor(batch).mean
    return craft(self.attack, self.leaf, loss, batch, key, divisor=divisor)

  def divisors(
    self, clean: Batch, attacked: Batch, trains: jax.Array | None = None
  ) -> Denominators:
    """What the losses of these examples are divided by."""
    weights = self._weights(trains)
    examples = self._examples(clean, attacked)
    return {
      name: self.loss.divisor(batch, weights[name])
      for name, batch in examples.items()
    }

  def train(
    self,
    call: Call,
    clean: Batch,
    attacked: Batch,
    *,
    inputs: Any = None,
    after: Any = None,
    trains: jax.Array | None = None,
  ) -> tuple[tuple[tuple[jax.Array, ConAdvAux], Any], Any]:
    """`((loss, aux), grads), input_gradient`: one pass for each branch.

    Args:
      call: the call of the step.
      clean: the clean examples.
      attacked: the adversarial ones.
      inputs: the clean inputs, where the gradient in them is wanted too.
      after: what is to be computed first.
      trains: whether the adversarial pass is run; None is always.
    """
    _, keys = self.keys(call.key)
    weights = self._weights(trains)
    of_pass = {'main': inputs}
    runs = {'adversarial': trains}
    passes = {
      name: Pass(
        *(name, batch, keys[name], weights[name]),
        inputs=of_pass.get(name),
        runs=runs.get(name),
      )
      for name, batch in self._examples(clean, attacked).items()
    }
    trained = train(self.loss, call, passes, leaf=self.leaf, after=after)
    return collect(trained, call, self.loss.has_aux), trained.of_inputs

  def _weights(self, trains: jax.Array | None) -> dict[str, ArrayLike]:
    """Those of the passes; the main one has all where they train alone."""
    weights = dict(self.weights)
    if trains is not None:
      main, adversarial = (jnp.asarray(weights[x], float) for x in _PAIR)
      weights['main'] = jnp.where(trains, main, main + adversarial)
      weights['adversarial'] = jnp.where(trains, adversarial, 0.0)
    return weights

  def _examples(self, clean: Batch, attacked: Batch) -> dict[str, Batch]:
    views = {
      name: self.leaf.set(clean, view.get(clean))
      for name, view in self.views.items()
    }
    return {'adversarial': attacked, 'main': clean, **views}
