"""AutoAugment with the policy that was found for ImageNet; uint8 in and out.

An operation gives Pillow's result, with which the policy was found, up to the
rounding of the last level, in a fraction of the time and without the
interpreter lock. Geometry takes the nearest pixel and fills with grey, 128.

References:
  Cubuk et al., `AutoAugment: Learning Augmentation Strategies from Data
  <https://arxiv.org/abs/1805.09501>`_, 2019
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np

# As in `augment`: the threads of the pipeline are the parallelism.
cv2.setNumThreads(0)

_FILL = (128, 128, 128)
_HIGHEST_LEVEL = 9
_MAX_DEGREES = 30.0
_MAX_SHEAR = 0.3
_MAX_ENHANCEMENT = 0.9
_MAX_BITS_DROPPED = 4
# Rec. 601, the weights of Pillow's and OpenCV's grey.
_GREY = np.array([0.299, 0.587, 0.114])
# Pillow's `ImageFilter.SMOOTH`, to and from which sharpness goes.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13
_VALUES = np.arange(256)


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
  """Maps values by a table, (256,), or by one of each channel, (256, C)."""
  table = np.clip(table, 0, 255).astype(np.uint8, order='C')
  return cv2.LUT(image, table.reshape(256, 1, -1))


def _stretched(channel: np.ndarray) -> np.ndarray:
  low, high, _, _ = cv2.minMaxLoc(channel)
  if low == high:
    return _VALUES
  scale = 255 / (high - low)
  return _VALUES * scale - low * scale


def _equalized(counts: np.ndarray) -> np.ndarray:
  """Tables (C, 256) that flatten histograms (C, 256)."""
  # Not `cv2.equalizeHist`, which has another formula.
  up_to = counts.cumsum(1)
  # All but the pixels of the highest value.
  step = np.where(up_to < up_to[:, -1:], up_to, 0).max(1, keepdims=True) // 255
  middle = up_to - counts + step // 2
  return np.where(step, middle // np.maximum(step, 1), _VALUES)


def _warp(image: np.ndarray, source: np.ndarray) -> np.ndarray:
  """Takes the pixel at (x, y) from the one nearest to `source @ (x, y, 1)`."""
  return cv2.warpAffine(
    image,
    source,
    image.shape[1::-1],
    flags=cv2.INTER_NEAREST | cv2.WARP_INVERSE_MAP,
    borderMode=cv2.BORDER_CONSTANT,
    borderValue=_FILL,
  )


def rotate(image: np.ndarray, strength: float) -> np.ndarray:
  """Turns about the centre, by at most 30 degrees, counterclockwise."""
  height, width = image.shape[:2]
  # A pixel's coordinates are those of its centre.
  center = ((width - 1) / 2, (height - 1) / 2)
  # The inverse of a turn is the turn back.
  return _warp(
    image, cv2.getRotationMatrix2D(center, -_MAX_DEGREES * strength, 1.0)
  )


def shear_x(image: np.ndarray, strength: float) -> np.ndarray:
  """Shifts the rows to the left by at most 0.3 of their distance to the top."""
  shear = _MAX_SHEAR * strength
  return _warp(image, np.array([[1.0, shear, shear / 2], [0.0, 1.0, 0.0]]))


def posterize(image: np.ndarray, strength: float) -> np.ndarray:
  """Zeroes at most the four lowest bits."""
  dropped = round(_MAX_BITS_DROPPED * strength)
  return image & np.uint8(256 - 2**dropped)


def solarize(image: np.ndarray, strength: float) -> np.ndarray:
  """Inverts values from a threshold on, which sinks from 255 to 0."""
  # Not `255 * (1 - strength)`, which level 3 would round up past 170.
  below = math.ceil(255 - 255 * strength) - 1
  _, inverted = cv2.threshold(image, below, 255, cv2.THRESH_BINARY)
  # A third of the time of a table: 255 - x has the other bits.
  return cv2.bitwise_xor(image, inverted, dst=inverted)


def invert(image: np.ndarray, strength: float) -> np.ndarray:
  """Inverts every value, whatever the strength."""
  del strength
  return cv2.bitwise_not(image)


def auto_contrast(image: np.ndarray, strength: float) -> np.ndarray:
  """Stretches each channel to 0-255, whatever the strength."""
  del strength
  channels = cv2.split(image)
  return cv2.merge([_look_up(x, _stretched(x)) for x in channels])


def equalize(image: np.ndarray, strength: float) -> np.ndarray:
  """Flattens each channel's histogram, whatever the strength."""
  del strength
  counts = [
    cv2.calcHist([image], [channel], None, [256], [0, 256])
    for channel in range(image.shape[2])
  ]
  tables = _equalized(np.reshape(counts, (-1, 256)).astype(np.int32))
  return _look_up(image, tables.T)


def color(image: np.ndarray, strength: float) -> np.ndarray:
  """Goes from the grey image to this one, by a factor of 1 +- 0.9."""
  factor = 1 + _MAX_ENHANCEMENT * strength
  return cv2.transform(image, factor * np.eye(3) + (1 - factor) * _GREY)


def contrast(image: np.ndarray, strength: float) -> np.ndarray:
  """Goes from the mean grey to this image, by a factor of 1 +- 0.9."""
  factor = 1 + _MAX_ENHANCEMENT * strength
  mean = round(cv2.mean(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[0])
  return _look_up(image, mean + factor * (_VALUES - mean))


def sharpness(image: np.ndarray, strength: float) -> np.ndarray:
  """Goes from the smooth image to this one, by a factor of 1 +- 0.9."""
  factor = 1 + _MAX_ENHANCEMENT * strength
  kernel = (1 - factor) * _SMOOTH
  kernel[1, 1] += factor
  result = cv2.filter2D(image, -1, kernel)
  # Pillow smooths no pixel that lacks a neighbour.
  for edge in (np.s_[0], np.s_[-1], np.s_[:, 0], np.s_[:, -1]):
    result[edge] = image[edge]
  return result


class Operation(NamedTuple):
  """What may be done to an image.

  Attributes:
    apply: takes an image, uint8 (H, W, 3), and a strength, 0 to 1, and returns
      an image of the same shape.
    signed: whether the strength gets a random sign.
  """

  apply: Callable[[np.ndarray, float], np.ndarray]
  signed: bool


OPERATIONS = {
  'rotate': Operation(rotate, signed=True),
  'shear_x': Operation(shear_x, signed=True),
  'posterize': Operation(posterize, signed=False),
  'solarize': Operation(solarize, signed=False),
  'invert': Operation(invert, signed=False),
  'auto_contrast': Operation(auto_contrast, signed=False),
  'equalize': Operation(equalize, signed=False),
  'color': Operation(color, signed=True),
  'contrast': Operation(contrast, signed=True),
  'sharpness': Operation(sharpness, signed=True),
}

# Sub-policies: operations one after the other, each with its probability and
# level, 0 to 9. Some stand twice, as in the paper.
POLICY = (
  (('posterize', 0.4, 8), ('rotate', 0.6, 9)),
  (('solarize', 0.6, 5), ('auto_contrast', 0.6, 5)),
  (('equalize', 0.8, 8), ('equalize', 0.6, 3)),
  (('posterize', 0.6, 7), ('posterize', 0.6, 6)),
  (('equalize', 0.4, 7), ('solarize', 0.2, 4)),
  (('equalize', 0.4, 4), ('rotate', 0.8, 8)),
  (('solarize', 0.6, 3), ('equalize', 0.6, 7)),
  (('posterize', 0.8, 5), ('equalize', 1.0, 2)),
  (('rotate', 0.2, 3), ('solarize', 0.6, 8)),
  (('equalize', 0.6, 8), ('posterize', 0.4, 6)),
  (('rotate', 0.8, 8), ('color', 0.4, 0)),
  (('rotate', 0.4, 9), ('equalize', 0.6, 2)),
  (('equalize', 0.0, 7), ('equalize', 0.8, 8)),
  (('invert', 0.6, 4), ('equalize', 1.0, 8)),
  (('color', 0.6, 4), ('contrast', 1.0, 8)),
  (('rotate', 0.8, 8), ('color', 1.0, 2)),
  (('color', 0.8, 8), ('solarize', 0.8, 7)),
  (('sharpness', 0.4, 7), ('invert', 0.6, 8)),
  (('shear_x', 0.6, 5), ('equalize', 1.0, 9)),
  (('color', 0.4, 0), ('equalize', 0.6, 3)),
  (('equalize', 0.4, 7), ('solarize', 0.2, 4)),
  (('solarize', 0.6, 5), ('auto_contrast', 0.6, 5)),
  (('invert', 0.6, 4), ('equalize', 1.0, 8)),
  (('color', 0.6, 4), ('contrast', 1.0, 8)),
  (('equalize', 0.8, 8), ('equalize', 0.6, 3)),
)


def auto_augment(
  image: np.ndarray, rng: np.random.Generator, *, level_factor: float = 1.0
) -> np.ndarray:
  """Applies a sub-policy drawn uniformly.

  Args:
    image: uint8 (H, W, 3).
    rng: draws the sub-policy, which of its operations are left out, and signs.
    level_factor: 0 to 1, multiplies every level.

  Returns:
    An image of the same shape; the given one where nothing was applied.
  """
  for name, probability, level in POLICY[rng.integers(len(POLICY))]:
    if rng.random() < probability:
      operation = OPERATIONS[name]
      strength = level_factor * level / _HIGHEST_LEVEL
      if operation.signed and rng.random() < 0.5:
        strength = -strength
      image = operation.apply(image, strength)
  return image
