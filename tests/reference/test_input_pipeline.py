"""Order, augmentation, batches and unreadable images."""

import itertools

import ml_collections
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reference.data import autoaugment, input_pipeline, jpeg, sources


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
        'mean': (0.5, 0.5, 0.5),
        **data,
      },
      'run': {'threads': 2, 'workers': 0},
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

  classes = tuple(map(str, range(count)))
  return sources.Source(range(count), range(count), classes, read), images


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


def test_augmentation_depends_on_the_seed():
  """With a single image the order cannot."""
  source, _ = make_source(count=1, size=40)
  config = make_config(size=16, crop='random_resized')
  batches, _ = take(source, config, 3)
  config.seed = 4
  others, _ = take(source, config, 3)
  for left, right in zip(batches, others, strict=True):
    assert (left['image'] != right['image']).any(axis=(1, 2, 3)).all()


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


@pytest.mark.parametrize('flip', [False, True])
def test_images_are_mirrored_where_the_config_says(flip):
  source, images = make_source()
  batches, _ = take(source, make_config(crop='resize', flip=flip), 10)
  is_mirrored = set()
  for batch in batches:
    for image, label in zip(batch['image'], batch['label'], strict=True):
      is_mirrored.add(not np.array_equal(image, images[label]))
      if not np.array_equal(image, images[label]):
        np.testing.assert_array_equal(image, images[label][:, ::-1])
  assert is_mirrored == ({False, True} if flip else {False})


def test_held_out_images_are_cropped_as_the_config_says():
  # Of 8 pixels a side the centre has 7.
  source, images = make_source()
  for crop, expected in (
    ('center', images[:, :7, :7]),
    ('resize', images),
  ):
    size = expected.shape[1]
    [batch, *_] = input_pipeline.held_out_batches(
      source, make_config(size=size, eval_crop=crop), batch_size=4, skipped={}
    )
    np.testing.assert_array_equal(batch['image'], expected[:4])


def test_skipped_images_are_named_and_counted():
  source, _ = make_source(bad=(2, 7))
  skipped = {}
  batches, _ = take(source, make_config(), 8, skipped=skipped)
  labels = np.concatenate([batch['label'] for batch in batches])
  assert set(labels) == set(range(10)) - {2, 7}
  assert skipped == {'2.jpg': 'Premature end', '7.jpg': 'Premature end'}
  skipped = {}
  held_out = list(
    input_pipeline.held_out_batches(
      source, make_config(), batch_size=4, skipped=skipped
    )
  )
  assert sum(batch['mask'].sum() for batch in held_out) == 8
  assert len(skipped) == 2


def test_stops_at_an_unreadable_image_if_told_to():
  source, _ = make_source(bad=(2,))
  config = make_config(on_bad_image='stop')
  with pytest.raises(jpeg.BadImageError, match=r'2\.jpg is not: Premature end'):
    take(source, config, 8)
  with pytest.raises(jpeg.BadImageError, match='on_bad_image=skip'):
    list(
      input_pipeline.held_out_batches(
        source, config, batch_size=config.batch_size, skipped={}
      )
    )


def test_no_readable_image_is_an_error_and_not_an_endless_search():
  source, _ = make_source(bad=range(10))
  with pytest.raises(ValueError, match='none is'):
    take(source, make_config(), 1)


@pytest.mark.parametrize('count', [8, 10, 3])
def test_held_out_images_come_once_and_in_batches_of_one_shape(count):
  source, images = make_source(count=count)
  batches = list(
    input_pipeline.held_out_batches(
      source, make_config(), batch_size=4, skipped={}
    )
  )
  assert len(batches) == -(-count // 4)
  assert all(batch['image'].shape == (4, 8, 8, 3) for batch in batches)
  labels = np.concatenate([b['label'][b['mask']] for b in batches])
  seen = np.concatenate([b['image'][b['mask']] for b in batches])
  np.testing.assert_array_equal(labels, np.arange(count))
  np.testing.assert_array_equal(seen, images)


BOTH = ('image', 'image_augmented')


def put_together(parts):
  """The hosts' parts of a batch as one."""
  assert all(part.keys() == parts[0].keys() for part in parts)
  return {
    name: np.concatenate([part[name] for part in parts]) for name in parts[0]
  }


def recording(source, read):
  """The source, which notes what is read."""

  def noted(record):
    read.append(record)
    return source.read(record)

  return source._replace(read=noted)


@pytest.mark.parametrize('hosts', [1, 2, 4])
def test_the_parts_of_the_hosts_are_the_batch_of_one(hosts):
  source, _ = make_source(count=11, size=24)
  config = make_config(size=16, crop='random_resized')
  config.batch_size = 8
  alone, _ = take(source, config, 6, images=BOTH)
  parts = [
    take(source, config, 6, images=BOTH, host=host, hosts=hosts)[0]
    for host in range(hosts)
  ]
  assert all(len(x['label']) == 8 // hosts for x in parts[-1])
  assert_same(map(put_together, zip(*parts, strict=True)), alone)


@pytest.mark.parametrize('split', ['train', 'held_out'])
def test_a_host_reads_its_own_records_alone(split):
  plain, _ = make_source(count=400)
  config = make_config()
  config.batch_size = 32
  reads = []
  for host in range(4):
    share = {'host': host, 'hosts': 4}
    reads.append([])
    source = recording(plain, reads[-1])
    if split == 'train':
      take(source, config, 2, **share)
    else:
      list(
        input_pipeline.held_out_batches(
          source, config, batch_size=config.batch_size, skipped={}, **share
        )
      )
  together = list(itertools.chain(*reads))
  # All that is read ahead is of the first epoch too.
  assert len(together) == len(set(together))
  if split == 'train':
    assert all(16 <= len(read) <= 80 for read in reads)
  else:
    assert sorted(together) == list(range(400))


@pytest.mark.parametrize('host', [0, 1, 2])
def test_every_host_continues_from_its_own_position(host):
  source, _ = make_source(count=13, bad=(5,))
  config = make_config()
  config.batch_size = 12
  share = {'host': host, 'hosts': 3}
  whole, _ = take(source, config, 8, **share)
  first, state = take(source, config, 3, **share)
  rest, _ = take(source, config, 5, state=state, **share)
  assert_same(first + rest, whole)


def test_an_unreadable_image_shifts_its_host_alone():
  """No image is lost or doubled, and the other host's rows stay."""
  config = make_config()
  plain, _ = make_source(count=40)
  whole = [take(plain, config, 10, host=host, hosts=2)[0] for host in (0, 1)]
  missed = int(whole[0][3]['label'][1])
  source, _ = make_source(count=40, bad=(missed,))
  first, second = (
    take(source, config, 10, host=host, hosts=2)[0] for host in (0, 1)
  )
  assert_same(second, whole[1])
  labels = [np.concatenate([x['label'] for x in y]) for y in (first, whole[0])]
  expected = [label for label in labels[1] if label != missed]
  np.testing.assert_array_equal(labels[0][:19], expected)


@settings(deadline=None, max_examples=25)
@given(data=st.data())
def test_held_out_images_count_once_over_all_hosts(data):
  hosts = data.draw(st.integers(1, 4))
  per_host = data.draw(st.integers(1, 5))
  count = data.draw(st.integers(1, 30))
  bad = data.draw(st.sets(st.integers(0, count - 1), max_size=count - 1))
  source, images = make_source(count=count, bad=bad)
  config = make_config()
  config.batch_size = hosts * per_host
  parts, skipped = [], {}
  for host in range(hosts):
    batches = input_pipeline.held_out_batches(
      source,
      config,
      batch_size=config.batch_size,
      skipped=skipped,
      host=host,
      hosts=hosts,
    )
    parts.append(list(batches))
    for part in parts[-1]:
      assert part['image'].shape == (per_host, 8, 8, 3)
      assert part['image'].dtype == np.uint8
      assert part['label'].shape == part['mask'].shape == (per_host,)
      assert (part['label'].dtype, part['mask'].dtype) == (np.int32, np.bool_)
      assert not part['image'][~part['mask']].any()
  # Every host takes part in every batch, or the others would wait for it.
  assert {len(part) for part in parts} == {-(-count // config.batch_size)}
  together = list(map(put_together, zip(*parts, strict=True)))
  labels = np.concatenate([batch['label'][batch['mask']] for batch in together])
  seen = np.concatenate([batch['image'][batch['mask']] for batch in together])
  readable = sorted(set(range(count)) - bad)
  assert labels.tolist() == readable
  np.testing.assert_array_equal(seen, images[readable])
  assert len(skipped) == len(bad)


@pytest.mark.parametrize(
  ('host', 'hosts', 'message'),
  [
    (2, 2, 'host 2 of 2.*jax.process_index'),
    (-1, 2, 'host -1 of 2'),
    (0, 3, r'4 on 3 hosts.*--config\.batch_size=3'),
    (0, 8, r'4 on 8 hosts.*--config\.batch_size=8'),
  ],
)
def test_hosts_that_do_not_divide_the_batch(host, hosts, message):
  source, _ = make_source()
  with pytest.raises(ValueError, match=message):
    take(source, make_config(), 1, host=host, hosts=hosts)
  with pytest.raises(ValueError, match=message):
    next(
      input_pipeline.held_out_batches(
        source, make_config(), batch_size=4, skipped={}, host=host, hosts=hosts
      )
    )


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


@pytest.mark.parametrize('factor', [-0.1, 1.01, 8, float('nan')])
def test_a_level_factor_out_of_range_is_told_at_the_start(factor):
  source, _ = make_source()
  config = make_crops(level_factor=factor)
  with pytest.raises(ValueError, match=r'from 0 to 1.*level_factor=0\.8'):
    input_pipeline.train_batches(source, config, skipped={}, images=BOTH)
