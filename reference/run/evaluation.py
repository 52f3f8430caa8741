"""Exact evaluation: every held-out image once, on the main statistics."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import conadv_optax as conadv
from reference.command import Mistake
from reference.run import methods, models, objective, step

Batch = dict[str, Any]


def make_evaluation(
  model: models.Model,
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
    the labels as they are), the accuracy, and the number of images counted,
    over the batches of all hosts. Batches have a bool 'mask' (b,), False where
    an image does not count. It raises a ValueError when none counts.
  """

  @jax.jit
  def sums(
    params: Any, batch_stats: Any, batch: dict[str, jax.Array]
  ) -> tuple[jax.Array, jax.Array, jax.Array]:
    logits: Any = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      objective.normalize(batch['image'], config.data),
      train=False,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    mask = batch['mask']
    right = mask & (logits.argmax(-1) == batch['label'])
    # Not a product: a padded image must not count even where it overflows.
    loss = jnp.where(mask, losses, 0.0).sum()
    return loss, right.sum(dtype=jnp.int32), mask.sum(dtype=jnp.int32)

  def evaluate(
    state: step.TrainState, batches: Iterable[Batch]
  ) -> dict[str, float]:
    params, batch_stats = methods.as_one(
      config,
      tuple(map(conadv.dual_bn.main, (state.params, state.model_state))),
    )
    totals = np.zeros(3)
    unread: Any = (0, 0, 0)
    for batch in batches:
      values = sums(params, batch_stats, place(batch))
      # A batch late, so that the next is read while the device works.
      totals += jax.device_get(unread)
      unread = values
    totals += jax.device_get(unread)
    loss, correct, count = totals
    if count == 0:
      raise Mistake(
        'Evaluation needs at least one readable held-out image. Given none. '
        'Likely the copy of the images broke off: the log names each that was '
        'skipped.'
      )
    return {
      'held_out_loss': loss / count,
      'held_out_accuracy': correct / count,
      'held_out_images': int(count),
    }

  return evaluate
