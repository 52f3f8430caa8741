"""A trained model's predictions, on images as they are and under attack."""

from collections.abc import Callable, Collection, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

import conadv_optax as conadv
from reference.command import Mistake
from reference.run import methods, models, objective
from reference.tools import scores

TOP = 5
Batch = dict[str, Any]


class Adversary(NamedTuple):
  """PGD against the label, from a random start.

  Attributes:
    epsilon: the radius, for pixels in [0, 1].
    steps: how many.
  """

  epsilon: float
  steps: int


def make_adversary(epsilon: float, steps: int) -> Adversary | None:
  """The attack of that strength, None for a radius of 0.

  Raises:
    Mistake: for a radius outside [0, 1], or no step.
  """
  if not 0 <= epsilon <= 1:
    raise Mistake(
      f'`--epsilon` is a radius for pixels from 0 to 1. Given {epsilon:g}. '
      'Likely meant in levels of 255: '
      f'`--epsilon={abs(epsilon) / 255:.4g}`.'
    )
  if steps < 1:
    raise Mistake(
      f'`--steps` is a number of steps, 1 or more. Given {steps}. Likely no '
      'attack is meant: leave out `--epsilon` too.'
    )
  return Adversary(epsilon, steps) if epsilon else None


class Seen(NamedTuple):
  """What came of a pass over the images.

  Attributes:
    all: predictions among all classes of the model.
    among: those among the classes that the images are of, None where these are
      all.
    shown: pixels (H, W, C) from 0 to 1 of the images that were asked for, as
      the model saw them, by number.
    numbers: int (N,), the numbers of the images that could be read.
  """

  all: scores.Predictions
  among: scores.Predictions | None
  shown: dict[int, np.ndarray]
  numbers: np.ndarray


def attack(
  config: ml_collections.ConfigDict,
  model: models.Model,
  adversary: Adversary,
) -> Callable[..., objective.Batch]:
  """A function of `(params, batch_stats, batch, key)`: the perturbed batch.

  The model is in evaluation mode, so that no image changes what another is
  perturbed by.
  """
  loss_fn = objective.make_evaluation_loss(model, config)
  epsilon, bounds = methods.make_ball(config, adversary.epsilon)
  pgd = conadv.pgd(epsilon, steps=adversary.steps, bounds=bounds)

  def perturb(
    params: Any, batch_stats: Any, batch: objective.Batch, key: jax.Array
  ) -> objective.Batch:
    return conadv.perturb(
      lambda params, batch: loss_fn(params, batch_stats, batch),
      params,
      batch,
      attack=pgd,
      inputs=methods.make_inputs(config),
      key=key,
    )

  return perturb


def _measure(logits: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
  log_p = jax.nn.log_softmax(logits)
  values, top = jax.lax.top_k(log_p, min(TOP, logits.shape[1]))
  return {
    'top': top,
    'confidence': jnp.exp(values[:, 0]),
    'losses': optax.softmax_cross_entropy_with_integer_labels(logits, labels),
  }


def make_predict(
  model: models.Model,
  config: ml_collections.ConfigDict,
  params: Any,
  batch_stats: Any,
  place: Callable[[Batch], dict[str, jax.Array]],
  *,
  among: Collection[int],
  adversary: Adversary | None = None,
) -> Callable[[Iterable[Batch], Collection[int]], Seen]:
  """A function that predicts every image once.

  Args:
    model: of the parameters.
    config: of the run.
    params: of one branch.
    batch_stats: of the same.
    place: puts a batch on the devices.
    among: the labels that the images have.
    adversary: what perturbs them first, or None.

  Returns:
    A function of `(batches, show)`, held-out batches in order and the numbers
    of the images to show, that returns what was seen.
  """
  perturb = attack(config, model, adversary) if adversary else None
  is_part = len(among) < model.num_classes
  others = np.ones(model.num_classes, bool)
  others[list(among)] = False

  @jax.jit
  def predict(
    params: Any, batch_stats: Any, batch: objective.Batch, key: jax.Array
  ) -> tuple[dict[str, Any], jax.Array]:
    batch = {**batch, 'image': objective.normalize(batch['image'], config.data)}
    if perturb:
      batch = perturb(params, batch_stats, batch, key)
    logits: Any = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      batch['image'],
      train=False,
    )
    measured = {'all': _measure(logits, batch['label'])}
    if is_part:
      logits = jnp.where(others, -jnp.inf, logits)
      measured['among'] = _measure(logits, batch['label'])
    return measured, batch['image']

  def see(batches: Iterable[Batch], show: Collection[int]) -> Seen:
    found: list[dict[str, Any]] = []
    shown: dict[int, np.ndarray] = {}
    unread: Any = None

    def read(number: int, batch: Batch, measured: Any, image: Any) -> None:
      mask = np.asarray(batch['mask'])
      numbers = number * len(mask) + np.arange(len(mask))
      for row in np.flatnonzero(mask & np.isin(numbers, list(show))):
        pixels = np.asarray(image[row]) * config.data.std + config.data.mean
        shown[int(numbers[row])] = np.clip(pixels, 0.0, 1.0)
      of_batch = {
        'numbers': numbers,
        'labels': np.asarray(batch['label']),
        **jax.device_get(measured),
      }
      found.append(jax.tree.map(lambda x: x[mask], of_batch))

    for number, batch in enumerate(batches):
      key = jax.random.fold_in(jax.random.key(0), number)
      results = predict(params, batch_stats, place(batch), key)
      # A batch late, so that the next is read while the device works.
      if unread:
        read(*unread)
      unread = number, batch, *results
    read(*unread)
    whole = jax.tree.map(lambda *x: np.concatenate(x), *found)
    labels = whole['labels']
    return Seen(
      scores.Predictions(labels, **whole['all']),
      scores.Predictions(labels, **whole['among']) if is_part else None,
      shown,
      whole['numbers'],
    )

  return see
