"""Evaluates a trained model on a set of images: measures and examples."""

import math
from typing import NamedTuple

import ml_collections
import numpy as np
import tqdm

from reference.data import evaluation_sets, input_pipeline, jpeg
from reference.run import parts, trained
from reference.tools import examples, predictions, scores, tables

# Of each kind, in the figure.
_EXAMPLES = 16
_TAKEN_FOR = 3
# That read images.
_THREADS = 4


class Found(NamedTuple):
  """What was found on a set of images.

  Attributes:
    rows: the measures, without and with an attack.
    classes: how each class fares without one, that with the smallest share
      right first.
    sections: images with their predictions, by title, for the figure.
    skipped: the images that could not be read, and why.
  """

  rows: list[tables.Row]
  classes: list[tables.Row]
  sections: dict[str, list[examples.Example]]
  skipped: jpeg.Skipped


def _examples(
  seen: predictions.Seen,
  names: tuple[str, ...],
  pixels: dict[int, np.ndarray],
) -> list[examples.Example]:
  """The images of these numbers, in the order in which they are given."""
  place = {int(number): at for at, number in enumerate(seen.numbers)}
  return [
    examples.Example(
      image,
      names[seen.all.labels[at]],
      names[seen.all.top[at, 0]],
      float(seen.all.confidence[at]),
      bool(seen.all.right[at]),
    )
    for at, image in ((place[number], pixels[number]) for number in pixels)
  ]


def _most_confident_mistakes(seen: predictions.Seen) -> list[int]:
  """Their numbers, the most confident first."""
  wrong = np.flatnonzero(~seen.all.right)
  order = wrong[np.argsort(-seen.all.confidence[wrong], kind='stable')]
  return seen.numbers[order[:_EXAMPLES]].tolist()


def _rows(
  seen: predictions.Seen,
  images: evaluation_sets.EvaluationSet,
  adversary: predictions.Adversary | None = None,
) -> list[tables.Row]:
  """Measures among all classes, and among those of the images if fewer."""
  epsilon, steps = adversary or (0.0, 0)
  rows: list[tables.Row] = []
  for classes, found in (
    (images.source.num_classes, seen.all),
    (len(images.labels), seen.among),
  ):
    if found is not None:
      measures = scores.summary(found)
      if classes <= predictions.TOP:
        # All there are, which says nothing.
        del measures['top_5']
      rows.append(
        {'epsilon': epsilon, 'steps': steps, 'classes': classes, **measures}
      )
  return rows


def examine(
  found: trained.Trained,
  images: evaluation_sets.EvaluationSet,
  *,
  batch_size: int,
  adversary: predictions.Adversary | None = None,
) -> Found:
  """Evaluates on every image once; without an attack, then with one.

  Args:
    found: the model, with its config.
    images: to evaluate on.
    batch_size: a multiple of the number of devices.
    adversary: the attack, or None for none.
  """
  source = images.source
  config = ml_collections.ConfigDict(
    {**found.config.to_dict(), 'run': {'threads': _THREADS}}
  )
  # Whatever its run did: here they are counted.
  config.data.on_bad_image = 'skip'
  model = parts.make_model(config, num_classes=len(found.classes))
  place = parts.make_placement(parts.make_mesh(batch_size))
  skipped: jpeg.Skipped = {}

  def see(
    adversary: predictions.Adversary | None, show: list[int]
  ) -> predictions.Seen:
    predict = predictions.make_predict(
      model,
      config,
      found.params,
      found.batch_stats,
      place,
      among=images.labels,
      adversary=adversary,
    )
    batches = input_pipeline.held_out_batches(
      source, config, batch_size=batch_size, skipped=skipped
    )
    total = math.ceil(len(source.held_out) / batch_size)
    return predict(tqdm.tqdm(batches, total=total, disable=None), show)

  spaced = np.linspace(0, len(source.held_out) - 1, _EXAMPLES).astype(int)
  show = np.unique(spaced).tolist()
  seen, crop = see(None, show), input_pipeline.EVAL_CROPS[config.data.eval_crop]
  mistakes = {
    number: crop(source.read(source.held_out[number])[0], config.data.size)
    / 255
    for number in _most_confident_mistakes(seen)
  }
  sections = {
    'Evenly spaced': _examples(seen, found.names, seen.shown),
    'The most confident mistakes': _examples(seen, found.names, mistakes),
  }
  rows = _rows(seen, images)
  if adversary:
    attacked = see(adversary, show)
    rows += _rows(attacked, images, adversary)
    title = (
      f'Evenly spaced, under PGD-{adversary.steps}, {adversary.epsilon:.4g}'
    )
    sections[title] = _examples(attacked, found.names, attacked.shown)
  classes: list[tables.Row] = [
    {
      'class': found.classes[score.label],
      'name': found.names[score.label],
      'images': score.images,
      'right': score.right / score.images,
      'taken_for': scores.in_words(
        score.taken_for, found.names, shown=_TAKEN_FOR
      ),
    }
    for score in scores.of_classes(seen.all)
  ]
  for row in rows:
    row['skipped'] = len(skipped)
  return Found(rows, classes, sections, skipped)
