"""Measures of predictions, against scikit-learn and plain loops."""

import numpy as np
import pytest
from sklearn import metrics

from reference.tools import scores

CLASSES, IMAGES = 7, 400


def make(seed=0, classes=CLASSES):
  """Predictions, and the probabilities (N, classes) that they are of."""
  rng = np.random.default_rng(seed)
  labels = rng.integers(classes, size=IMAGES)
  logits = rng.normal(size=(IMAGES, classes))
  # Right more often than by chance, and for some classes more than for others.
  logits[np.arange(IMAGES), labels] += labels / 2
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  order = np.argsort(-p, axis=1)
  return scores.Predictions(
    labels,
    order[:, :5],
    p.max(axis=1),
    -np.log(p[np.arange(IMAGES), labels]),
  ), p


def test_accuracy_and_loss_are_those_of_scikit_learn():
  predictions, p = make()
  found = scores.summary(predictions)
  labels, every = predictions.labels, np.arange(CLASSES)
  assert found['images'] == IMAGES
  for name, k in (('top_1', 1), ('top_5', 5)):
    assert found[name] == pytest.approx(
      metrics.top_k_accuracy_score(labels, p, k=k, labels=every)
    )
  assert found['loss'] == pytest.approx(
    metrics.log_loss(labels, p, labels=every)
  )
  assert 0.3 < found['top_1'] < found['top_5'] < 1


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_the_calibration_error_is_that_of_a_loop_over_the_bins(bins):
  predictions, _ = make()
  # Both ends of a bin, and of all.
  confidence = predictions.confidence.copy()
  confidence[:4] = 0.2, 0.4, 1.0, 0.0
  right = predictions.right
  expected = 0.0
  for b in range(bins):
    inside = [
      i
      for i in range(IMAGES)
      if b / bins < confidence[i] <= (b + 1) / bins
      or (b == 0 and confidence[i] == 0)
    ]
    if inside:
      gap = np.mean(right[inside]) - np.mean(confidence[inside])
      expected += len(inside) / IMAGES * abs(gap)
  found = scores.calibration_error(confidence, right, bins=bins)
  assert found == pytest.approx(expected)


def test_calibration_in_closed_form():
  right = np.repeat([True, False], 50)
  # Right half of the time, and half sure; then quite sure.
  assert scores.calibration_error(np.full(100, 0.5), right) == pytest.approx(0)
  assert scores.calibration_error(np.ones(100), right) == pytest.approx(0.5)
  # Too sure and too unsure do not cancel, as they are in two bins.
  halves = np.where(right, 0.7, 0.3)
  assert scores.calibration_error(halves, right) == pytest.approx(0.3)
  assert scores.calibration_error(halves, right, bins=1) == pytest.approx(0)


def test_the_classes_are_the_rows_of_the_confusion_matrix():
  predictions, _ = make()
  said = predictions.top[:, 0]
  matrix = metrics.confusion_matrix(predictions.labels, said)
  recall = metrics.recall_score(predictions.labels, said, average=None)
  found = scores.of_classes(predictions)
  assert [x.label for x in found] == np.argsort(recall, kind='stable').tolist()
  for score in found:
    row = matrix[score.label]
    assert (score.images, score.right) == (row.sum(), row[score.label])
    counts = [count for _, count in score.taken_for]
    assert counts == sorted(counts, reverse=True)
    others = {x: int(n) for x, n in enumerate(row) if n and x != score.label}
    assert dict(score.taken_for) == others
  assert (
    scores.in_words([(2, 5), (0, 1), (1, 1)], 'abc', shown=2) == 'c (5), a (1)'
  )


def test_classes_without_images_are_no_rows():
  predictions, _ = make()
  some = predictions.labels < 3
  part = scores.Predictions(*(array[some] for array in predictions))
  assert sorted(x.label for x in scores.of_classes(part)) == [0, 1, 2]


def test_with_two_classes_top_5_is_all():
  predictions, _ = make(classes=2)
  assert scores.summary(predictions)['top_5'] == 1.0
