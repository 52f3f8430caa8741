"""A step without an attack pass: the training pass's own input gradient."""

from typing import Any

from conadv_optax.core.batches import first_part
from conadv_optax.core.calls import Call, pytree
from conadv_optax.core.numeric import tree_at_least_float32
from conadv_optax.core.types import Attack, Batch, Denominators, Queue
from conadv_optax.training.craft import check_crafted
from conadv_optax.training.queue import Turn
from conadv_optax.training.steps import Step


@pytree('attack', 'weights')
class ReusedStep(Step):
  """Trains on the newest clean batch and on the copy that has waited.

  The gradient of the clean pass in its inputs makes the next copy.
  """

  def enter(self, call: Call, batch: Batch, key: Any, attacks: None) -> Queue:
    """The entry of one of the first batches."""
    del attacks  # There is no pass to save.
    crafted = self.craft(call, batch, key)
    return Queue(self.leaf.set(self.part(batch), crafted), None)

  def like(self, newest: Batch) -> Batch:
    """The batch of the entry of `newest`, in its shapes and dtypes."""
    # `inputs` may convert: the entry is as `get` returns it.
    part = self.part(newest)
    return self.leaf.set(part, self.leaf.get(part))

  def run(
    self, call: Call, oldest: Any, turn: Turn
  ) -> tuple[tuple[Any, Any], Queue]:
    """`((loss, aux), grads), entry`: a step, and the entry of the newest."""
    del turn
    inputs = tree_at_least_float32(self.leaf.get(call.batch))
    output, gradient = self.train(call, call.batch, oldest.batch, inputs=inputs)
    assert self.attack.reuse is not None  # `check_reuse` has seen to it.
    part = self.part(call.batch)
    clean = self.leaf.get(part)
    size = self.leaf.examples(call.batch)
    gradient = first_part(gradient, self.fraction, size)
    crafted = self.attack.reuse(gradient, clean)
    crafted = check_crafted(crafted, clean)
    return output, Queue(self.leaf.set(part, crafted), None)

  def denominators(
    self, oldest: Any, newest: Batch, turn: Turn
  ) -> Denominators:
    """What the losses of a step are divided by."""
    del turn
    return self.divisors(newest, oldest.batch)


def check_reuse(attack: Attack, staleness: int, every: int) -> None:
  """One gradient is enough for the attack, and it is a step old."""
  if every > 1:
    raise ValueError(
      '`reuse_gradient=True` has no attack pass that `every` could leave out. '
      f'Given every={every}. Write `adversarial_fraction={round(1 / every, 3)}`'
      ' in its place, which saves as much of the adversarial training pass.'
    )
  if staleness == 0:
    raise ValueError(
      '`reuse_gradient=True` makes the adversarial copy from the gradient of '
      'a training pass, so it can be trained on one step later at the '
      'earliest. Given staleness=0. Write `staleness=1`.'
    )
  if attack.reuse is None:
    raise ValueError(
      '`reuse_gradient=True` has one gradient, at the clean inputs: it needs '
      'an attack of one step, without random start, restarts or targets. '
      'Write `attack=conadv.fgsm(epsilon)`, or `reuse_gradient=False`.'
    )
