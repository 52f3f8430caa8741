"""What predictions come to: accuracy, calibration, confusions."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

BINS = 15


class Predictions(NamedTuple):
  """What a model says of N images.

  Attributes:
    labels: int (N,).
    top: int (N, K), the K likeliest classes, the likeliest first.
    confidence: float (N,), the probability of the likeliest.
    losses: float (N,), the cross entropy.
  """

  labels: np.ndarray
  top: np.ndarray
  confidence: np.ndarray
  losses: np.ndarray

  @property
  def right(self) -> np.ndarray:
    """bool (N,), whether the likeliest class is the label."""
    return self.top[:, 0] == self.labels


class ClassScore(NamedTuple):
  """How the images of a class fare.

  Attributes:
    label: of the class.
    images: how many there are.
    right: how many are taken for it.
    taken_for: the other classes that they are taken for, and how often, most
      often first.
  """

  label: int
  images: int
  right: int
  taken_for: list[tuple[int, int]]


def calibration_error(
  confidence: np.ndarray, right: np.ndarray, *, bins: int = BINS
) -> float:
  r"""The expected calibration error.

  .. math::

    \sum_b \frac{n_b}{N} \left| \mathrm{right}_b - \mathrm{confidence}_b \right|

  over `bins` bins of the same width from 0 to 1, each with its upper end and
  without its lower one; `right` and `confidence` are means over a bin.

  Args:
    confidence: (N,), the probability of the predicted class.
    right: (N,), whether the prediction is right.
    bins: how many.

  References:
    Guo et al., `On Calibration of Modern Neural Networks
    <https://arxiv.org/abs/1706.04599>`_, 2017
  """
  number = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.zeros(bins)
  # n_b cancels: the sum of a bin in place of n_b times its mean.
  np.add.at(gaps, number, right - confidence)
  return float(np.abs(gaps).sum() / len(confidence))


def summary(predictions: Predictions) -> dict[str, float]:
  """The measures of all images by name; shares are from 0 to 1."""
  labels = predictions.labels[:, None]
  return {
    'images': len(predictions.labels),
    'top_1': float(predictions.right.mean()),
    'top_5': float((predictions.top == labels).any(axis=1).mean()),
    'loss': float(predictions.losses.mean()),
    'calibration_error': calibration_error(
      predictions.confidence, predictions.right
    ),
  }


def of_classes(predictions: Predictions) -> list[ClassScore]:
  """Each class that has images, that with the smallest share right first."""
  scores = []
  for label in np.unique(predictions.labels):
    said = predictions.top[predictions.labels == label, 0]
    classes, counts = np.unique(said, return_counts=True)
    taken_for = [
      (int(other), int(count))
      for other, count in zip(classes, counts, strict=True)
      if other != label
    ]
    taken_for.sort(key=lambda x: -x[1])
    right = int((said == label).sum())
    scores.append(ClassScore(int(label), len(said), right, taken_for))
  return sorted(scores, key=lambda x: x.right / x.images)


def in_words(
  taken_for: Sequence[tuple[int, int]], classes: Sequence[str], *, shown: int
) -> str:
  """The first few, such as 'cat (12), dog (3)'."""
  return ', '.join(f'{classes[x]} ({count})' for x, count in taken_for[:shown])
