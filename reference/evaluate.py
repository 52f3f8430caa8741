"""Exact evaluation: every held-out image once, on the main statistics."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import conadv_optax as conadv
from reference import models, step

Batch = dict[str, Any]


def make_evaluation(
  model: models.ResNet,
  config: ml_collections.ConfigDict,
  place: Callable[[Batch], dict[str, jax.Array]],
) -> Callable[[step.TrainState, Iterable[Batch]], dict[str, float]]:
  """A function that evaluates a state on held-out batches.

  Args:
    model: of the parameters.
    config: of the run.
    place: puts a batch on the devices.

  Returns:
    A function of `(state, batches)` that returns the mean cross entropy (of
    the labels as they are), the accuracy, and the number of images counted.
    Batches have a bool 'mask' (B,), False where an image does not count.
  """

  @jax.jit
  def sums(
    params: Any, batch_stats: Any, batch: dict[str, jax.Array]
  ) -> tuple[jax.Array, jax.Array]:
    batch = step.normalize(batch, config.data)
    logits: Any = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      batch['image'],
      train=False,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    right = batch['mask'] & (logits.argmax(-1) == batch['label'])
    # Not a product: a padded image must not count even where it overflows.
    loss = jnp.where(batch['mask'], losses, 0.0).sum()
    return loss, right.sum(dtype=jnp.int32)

  def evaluate(
    state: step.TrainState, batches: Iterable[Batch]
  ) -> dict[str, float]:
    params = conadv.dual_bn.main(state.params)
    batch_stats = conadv.dual_bn.main(state.model_state)
    loss, correct, count = 0.0, 0, 0
    for batch in batches:
      batch_loss, batch_correct = sums(params, batch_stats, place(batch))
      loss += float(batch_loss)
      correct += int(batch_correct)
      count += int(np.sum(batch['mask']))
    return {
      'held_out_loss': loss / count,
      'held_out_accuracy': correct / count,
      'held_out_images': count,
    }

  return evaluate
