"""What is done to one image before it joins a batch; uint8 in, uint8 out.

Resizing is bicubic without antialiasing, with which the published ImageNet
accuracies were reached. `rng` is the generator that the data pipeline seeds
for this image and epoch.
"""

import math

import cv2
import numpy as np

# Grain's threads are the parallelism; OpenCV's own would fight them.
cv2.setNumThreads(0)

# The centre of the image that evaluation looks at: 224 of 256 pixels.
_CENTER = 224 / 256
_AREA = (0.08, 1.0)
_LOG_ASPECT = (math.log(3 / 4), math.log(4 / 3))
_ATTEMPTS = 10


def resize(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes (H, W, C) to (size, size, C), both sides on their own."""
  channels = image.shape[2]
  if image.shape[:2] == (size, size):
    return image
  image = cv2.resize(image, (size, size), interpolation=cv2.INTER_CUBIC)
  # OpenCV drops the axis of a single channel.
  return image.reshape(size, size, channels)


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
  """The centre square, 7/8 of the shorter side, as (size, size, C)."""
  height, width = image.shape[:2]
  side = max(1, round(_CENTER * min(height, width)))
  top, left = (height - side) // 2, (width - side) // 2
  return resize(image[top : top + side, left : left + side], size)


def pad_crop(
  image: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
  """Resizes to `size`, pads an eighth with zeros, crops `size` anywhere."""
  pad = max(1, size // 8)
  # A thirtieth of the time of `np.pad`, which would dominate a small image.
  padded = cv2.copyMakeBorder(
    resize(image, size), pad, pad, pad, pad, cv2.BORDER_CONSTANT
  ).reshape(size + 2 * pad, size + 2 * pad, image.shape[2])
  top, left = rng.integers(2 * pad + 1, size=2)
  return padded[top : top + size, left : left + size]


def random_resized_crop(
  image: np.ndarray, size: int, rng: np.random.Generator
) -> np.ndarray:
  """A random 8-100 % of the area, aspect 3/4-4/3, as (size, size, C).

  Ten draws, then the centre square: a very long image may admit no such crop.
  """
  height, width = image.shape[:2]
  # `rng.uniform` and `rng.integers` take ten times as long for one number.
  (low_area, high_area), (low_aspect, high_aspect) = _AREA, _LOG_ASPECT
  for _ in range(_ATTEMPTS):
    area = low_area + (high_area - low_area) * rng.random()
    area *= height * width
    aspect = math.exp(low_aspect + (high_aspect - low_aspect) * rng.random())
    crop_width = round(math.sqrt(area * aspect))
    crop_height = round(math.sqrt(area / aspect))
    if 0 < crop_width <= width and 0 < crop_height <= height:
      top = int((height - crop_height + 1) * rng.random())
      left = int((width - crop_width + 1) * rng.random())
      crop = image[top : top + crop_height, left : left + crop_width]
      return resize(crop, size)
  return center_crop(image, size)


def flip(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
  """Mirrors left and right with probability 1/2."""
  if rng.random() >= 0.5:
    return image
  # Not a view with a negative stride, which every later copy pays for; OpenCV
  # drops the axis of a single channel.
  return cv2.flip(image, 1).reshape(image.shape)
