"""Crops and flips: where they were taken, and how often."""

import numpy as np
import pytest

from reference.data import augment


@pytest.mark.parametrize('channels', [1, 3])
def test_pad_crop_is_a_shift(channels):
  rng = np.random.default_rng(0)
  image = rng.integers(1, 256, size=(16, 16, channels), dtype=np.uint8)
  seen = set()
  for seed in range(100):
    crop = augment.pad_crop(image, 16, np.random.default_rng(seed))
    padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
    shifts = [
      (top, left)
      for top in range(5)
      for left in range(5)
      if np.array_equal(crop, padded[top : top + 16, left : left + 16])
    ]
    assert len(shifts) == 1
    seen.add(shifts[0])
  assert {top for top, _ in seen} == {left for _, left in seen} == set(range(5))


def test_random_resized_crop_keeps_area_and_aspect(monkeypatch):
  """Coordinates as pixels show where the crop was taken."""
  crops = []
  monkeypatch.setattr(
    augment, 'resize', lambda image, size: crops.append(image) or image
  )
  image = np.stack(np.meshgrid(range(120), range(90), indexing='ij'), axis=-1)
  for seed in range(500):
    augment.random_resized_crop(image, 32, np.random.default_rng(seed))
  height, width = np.array([crop.shape for crop in crops])[:, :2].T
  area = height * width / (120 * 90)
  aspect = width / height
  # Sides are whole pixels, so both limits are met up to rounding.
  assert 0.07 < area.min() < 0.15
  assert 0.85 < area.max() <= 1
  assert 0.72 < aspect.min() < 0.8
  assert 1.25 < aspect.max() < 1.39
  # And it lies anywhere, the borders included.
  top, left = np.array([crop[0, 0] for crop in crops]).T
  for first, space in ((top, 120 - height), (left, 90 - width)):
    places = first[space > 0] / space[space > 0]
    assert (places.min(), places.max()) == (0, 1)
    assert 0.45 < places.mean() < 0.55


def test_random_resized_crop_of_a_very_long_image():
  image = np.zeros((2, 900, 3), np.uint8)
  crop = augment.random_resized_crop(image, 8, np.random.default_rng(0))
  assert crop.shape == (8, 8, 3)


def test_center_crop_is_the_centre():
  image = np.zeros((256, 400, 3), np.uint8)
  image[16:240, 88:312] = 200
  crop = augment.center_crop(image, 224)
  assert crop.shape == (224, 224, 3)
  assert (crop == 200).all()


def test_resize_is_bicubic_and_keeps_channels():
  # A ramp stays a ramp under interpolation away from the border.
  ramp = np.tile(np.arange(0, 160, 10, dtype=np.uint8), (16, 1))[..., None]
  resized = augment.resize(ramp, 32)
  assert resized.shape == (32, 32, 1)
  expected = (np.arange(32) + 0.5) * 5 - 5
  np.testing.assert_allclose(resized[8, 6:-6, 0], expected[6:-6], atol=1)


def test_flip_mirrors_half_of_the_images():
  image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
  flipped = 0
  for seed in range(200):
    result = augment.flip(image, np.random.default_rng(seed))
    if not np.array_equal(result, image):
      np.testing.assert_array_equal(result, np.fliplr(image))
      flipped += 1
  assert 70 < flipped < 130
