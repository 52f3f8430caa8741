"""Order, augmentation, batches and unreadable images."""

import itertools

import ml_collections
import numpy as np
import pytest

from reference import augment, autoaugment, input_pipeline, jpeg, sources


def make_config(**data):
  return ml_collections.ConfigDict(
    {
      'seed': 3,
      'batch_size': 4,
      'data': {
        'size': 8,
        'crop': 'pad',
        'flip': True,
        'eval_crop': 'resize',
        'on_bad_image': 'skip',
        'level_factor': 0.8,
        **data,
      },
      'run': {'threads': 2},
    }
  )


def make_source(count=10, size=8, bad=()):
  """Images that differ everywhere; the label is the image's number."""
  rng = np.random.default_rng(0)
  images = rng.integers(1, 256, size=(count, size, size, 3), dtype=np.uint8)

  def read(label):
    if label in bad:
      raise jpeg.BadImageError(f'{label}.jpg', 'Premature end')
    return images[label], label

  return sources.Source(range(count), range(count), read, count), images


def take(source, config, count, *, state=None, skipped=None, **options):
  skipped = {} if skipped is None else skipped
  batches = input_pipeline.train_batches(
    source, config, skipped=skipped, **options
  )
  if state is not None:
    batches.set_state(state)
  taken = list(itertools.islice(batches, count))
  state = batches.get_state()
  batches.close()
  return taken, state


def assert_same(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_batches_are_uint8_and_int32():
  source, _ = make_source()
  [batch], _ = take(source, make_config(), 1)
  assert batch['image'].shape == (4, 8, 8, 3)
  assert batch['image'].dtype == np.uint8
  assert batch['label'].shape == (4,)
  assert batch['label'].dtype == np.int32


def test_every_epoch_has_every_image_once_in_its_own_order():
  source, _ = make_source()
  batches, _ = take(source, make_config(), 10)
  labels = np.concatenate([batch['label'] for batch in batches])
  epochs = labels.reshape(4, 10)
  assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_order_and_augmentation_depend_on_seed_and_epoch_alone():
  source, _ = make_source()
  config = make_config()
  batches, _ = take(source, config, 10)
  config.run.threads = 4
  assert_same(take(source, config, 10)[0], batches)
  config.seed = 4
  others, _ = take(source, config, 10)
  assert any(
    not np.array_equal(a['label'], b['label'])
    for a, b in zip(batches, others, strict=True)
  )


def test_a_restored_position_continues_the_sequence():
  source, _ = make_source(bad=(7,))
  config = make_config()
  batches, _ = take(source, config, 8)
  first, state = take(source, config, 3)
  rest, _ = take(source, config, 5, state=state)
  assert_same(first + rest, batches)


def test_an_image_is_augmented_anew_each_epoch():
  source, _ = make_source(count=4, size=32)
  config = make_config(size=32)
  batches, _ = take(source, config, 6)
  images = [batch['image'][list(batch['label']).index(2)] for batch in batches]
  assert len({image.tobytes() for image in images}) > 3


def test_skipped_images_are_named_and_counted():
  source, _ = make_source(bad=(2, 7))
  skipped = {}
  batches, _ = take(source, make_config(), 8, skipped=skipped)
  labels = np.concatenate([batch['label'] for batch in batches])
  assert set(labels) == set(range(10)) - {2, 7}
  assert skipped == {'2.jpg': 'Premature end', '7.jpg': 'Premature end'}
  skipped = {}
  held_out = list(
    input_pipeline.held_out_batches(source, make_config(), skipped=skipped)
  )
  assert sum(batch['mask'].sum() for batch in held_out) == 8
  assert len(skipped) == 2


def test_stops_at_an_unreadable_image_if_told_to():
  source, _ = make_source(bad=(2,))
  config = make_config(on_bad_image='stop')
  with pytest.raises(jpeg.BadImageError, match=r'2\.jpg is not: Premature end'):
    take(source, config, 8)
  with pytest.raises(jpeg.BadImageError, match='on_bad_image=skip'):
    list(input_pipeline.held_out_batches(source, config, skipped={}))


def test_no_readable_image_is_an_error_and_not_an_endless_search():
  source, _ = make_source(bad=range(10))
  with pytest.raises(ValueError, match='none is'):
    take(source, make_config(), 1)


@pytest.mark.parametrize('count', [8, 10, 3])
def test_held_out_images_come_once_and_in_batches_of_one_shape(count):
  source, images = make_source(count=count)
  batches = list(
    input_pipeline.held_out_batches(source, make_config(), skipped={})
  )
  assert len(batches) == -(-count // 4)
  assert all(batch['image'].shape == (4, 8, 8, 3) for batch in batches)
  labels = np.concatenate([b['label'][b['mask']] for b in batches])
  seen = np.concatenate([b['image'][b['mask']] for b in batches])
  np.testing.assert_array_equal(labels, np.arange(count))
  np.testing.assert_array_equal(seen, images)


BOTH = ('image', 'image_augmented')


def make_crops(**data):
  return make_config(size=16, crop='random_resized', **data)


def test_the_second_view_leaves_the_first_as_it_is():
  source, _ = make_source(size=40)
  alone, _ = take(source, make_crops(), 6)
  both, _ = take(source, make_crops(), 6, images=BOTH)
  for batch in both:
    second = batch.pop('image_augmented')
    assert second.shape == (4, 16, 16, 3)
    assert second.dtype == np.uint8
    assert (second != batch['image']).any(axis=(1, 2, 3)).all()
  assert_same(both, alone)


def test_the_second_view_is_another_crop_and_alone_augmented(monkeypatch):
  given = []

  def mark(image, rng, *, level_factor):
    del rng
    given.append((image, level_factor))
    return np.full_like(image, 7)

  monkeypatch.setattr(autoaugment, 'auto_augment', mark)
  source, images = make_source(size=40)
  # Red tells the column and green the row: a crop shows where it lies.
  images[..., 0] = np.arange(40)
  images[..., 1] = np.arange(40)[:, None]
  batches, _ = take(source, make_crops(), 5, images=BOTH)
  firsts = np.concatenate([batch['image'] for batch in batches])
  assert not (firsts == 7).all(axis=(1, 2, 3)).any()
  assert all((batch['image_augmented'] == 7).all() for batch in batches)
  assert {factor for _, factor in given} == {0.8}

  def corners(crops):
    return {
      tuple(crop[[0, 0, -1, -1], [0, -1, 0, -1], :2].flat) for crop in crops
    }

  seconds = corners(image for image, _ in given)
  assert len(seconds) >= 20
  assert not seconds & corners(firsts)


def test_both_views_are_of_one_decode(monkeypatch):
  """Every read gives another colour, and both views have the same."""
  monkeypatch.setattr(
    autoaugment, 'auto_augment', lambda image, rng, level_factor: image
  )
  numbers = itertools.count(1)
  source, _ = make_source()
  source = source._replace(
    read=lambda label: (np.full((40, 40, 3), next(numbers), np.uint8), label)
  )
  batches, _ = take(source, make_crops(), 3, images=BOTH)
  for batch in batches:
    np.testing.assert_array_equal(batch['image'], batch['image_augmented'])
  colors = {int(image[0, 0, 0]) for b in batches for image in b['image']}
  assert len(colors) == 12


def test_the_second_view_can_stand_alone():
  source, _ = make_source(size=40)
  batches, _ = take(source, make_crops(), 6, images=('image_augmented',))
  assert all(set(batch) == {'image_augmented', 'label'} for batch in batches)


def test_the_second_view_depends_on_seed_and_epoch_alone():
  source, _ = make_source(size=40)
  config = make_crops()
  batches, _ = take(source, config, 8, images=BOTH)
  config.run.threads = 4
  first, state = take(source, config, 3, images=BOTH)
  rest, _ = take(source, config, 5, state=state, images=BOTH)
  assert_same(first + rest, batches)
  views = [
    batch['image_augmented'][list(batch['label']).index(2)].tobytes()
    for batch in batches
    if 2 in batch['label']
  ]
  assert len(set(views)) == len(views) >= 3


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
    augment, 'resize', lambda image, size: crops.append(image.shape) or image
  )
  image = np.zeros((120, 90, 3), np.uint8)
  for seed in range(500):
    augment.random_resized_crop(image, 32, np.random.default_rng(seed))
  height, width = np.array(crops)[:, :2].T
  area = height * width / (120 * 90)
  aspect = width / height
  # Sides are whole pixels, so both limits are met up to rounding.
  assert 0.07 < area.min() < 0.15
  assert 0.85 < area.max() <= 1
  assert 0.72 < aspect.min() < 0.8
  assert 1.25 < aspect.max() < 1.39


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
