"""A cell of a study: its splits, its order, and the steps of main."""

import copy

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from digit_steps import first_state
from small_study import make_config, use_one_device

from reference.data import jpeg, sources
from reference.run import methods, parts
from reference.study import cell as study_cell


@pytest.fixture
def one_device(monkeypatch):
  return use_one_device(monkeypatch)


@pytest.mark.slow
def test_the_steps_are_those_of_the_main_job(one_device):
  config = make_config(method='conadv', batch_size=40, seed=3)
  data = study_cell.load(config)
  images, labels = data.train
  order = study_cell.order_of(config.seed, len(labels), config.batch_size)
  rows = [next(order) for _ in range(6)]

  mesh = jax.sharding.Mesh(np.asarray([one_device]), ('data',))
  place = parts.make_placement(mesh)
  batches = iter(
    [place({'image': images[row], 'label': labels[row]}) for row in rows]
  )
  model = parts.make_model(config, num_classes=10)
  tx, schedule, _ = parts.make_optimizer(config, images=len(labels))
  grad_fn = methods.make_gradient(model, config, mesh)
  first = [next(batches) for _ in range(grad_fn.staleness)]
  state = first_state(config, model, tx, grad_fn, mesh, first)
  train_step = parts.make_step(config, tx, schedule, grad_fn, state, mesh)
  expected = []
  for batch in batches:
    state, values = train_step(state, batch)
    expected.append(values)

  other = copy.deepcopy(config)
  other.lars.peak, other.attack.epsilon = 1.0, 1.0
  program = study_cell.make_program(other, data, one_device)
  numbers, key = study_cell.numbers_of(config), jax.random.key(config.seed)
  count = program.staleness
  assert count == grad_fn.staleness
  mine = program.init(
    numbers,
    key,
    program.train,
    np.asarray(rows[:count], np.int32).reshape(-1, 40),
  )
  found = []
  for position, row in enumerate(rows[count:], count):
    mine, values = program.step(
      numbers, mine, key, program.train, np.int32(position), row
    )
    found.append(values)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)
  chex.assert_trees_all_close(
    (mine.params, mine.model_state),
    (state.params, state.model_state),
    rtol=1e-5,
    atol=1e-6,
  )


class State:
  """Of no model."""

  params = model_state = ()


def numbered_source():
  """Images that hold their number: 0 to 299 for training, the rest held out."""

  def read(number):
    image = np.zeros((8, 8, 1), np.uint8)
    image[:2, 0, 0] = divmod(number, 256)
    return image, number % 10

  classes = tuple('0123456789')
  return sources.Source(list(range(300)), list(range(300, 400)), classes, read)


def numbers_in(images):
  images = np.asarray(images).reshape(-1, 8, 8).astype(int)
  return set((256 * images[:, 0, 0] + images[:, 1, 0]).tolist())


def test_no_split_sees_the_images_of_another(monkeypatch, one_device):
  monkeypatch.setattr(sources, 'open_source', lambda _: numbered_source())
  config = make_config()
  data = study_cell.load(config)
  assert data.train.images.shape == (160, 8, 8, 1)
  assert data.validation.labels.shape == (80,)
  trained, validated, tested = (numbers_in(split.images) for split in data[:3])
  assert (len(trained), len(validated)) == (160, 80)
  assert trained | validated < set(range(300))
  assert not trained & validated
  assert tested == set(range(300, 400))
  for split in data[:3]:
    assert (
      split.labels == [min(numbers_in(x)) % 10 for x in split.images]
    ).all()

  seen, orders = set(), []

  def look_at(batches):
    for batch in batches:
      mask = np.asarray(batch.get('mask', True))
      seen.update(numbers_in(np.asarray(batch['image'])[mask]))

  def init(numbers, key, split, indices):
    assert indices.dtype == np.int32
    assert numbers == {'lars.peak': 3.0, 'attack.epsilon': 8.0}
    orders.append(list(enumerate(map(tuple, indices))))
    return State()

  def step(numbers, state, key, split, position, indices):
    seen.update(numbers_in(split.images[indices]))
    orders[-1].append((int(position), tuple(indices)))
    done = len(orders[-1]) - 2  # two of them were first batches
    return state, {'loss_main': np.float32(done), 'loss': np.float32(0)}

  def evaluate(state, batches):
    look_at(batches)
    return {
      'held_out_accuracy': len(orders[-1]) / 100,
      'held_out_images': 20,
    }

  def attack(params, batch_stats, batch, key):
    look_at([batch])
    return batch

  place = jax.sharding.SingleDeviceSharding(one_device)
  program = study_cell.Program(
    init,
    step,
    None,
    jax.device_put(data.train, place),
    staleness=2,
    steps=10,
    plain_steps=0,
  )
  measures = study_cell.Measures(evaluate, attack, None)
  config.update({'batch_size': 40, 'epochs': 2.5, 'seed': 7})
  config.lars.peak = 3.0
  rows = {}
  for final in (False, True):
    seen.clear()
    rows[final] = study_cell.run(config, program, measures, data, final=final)
    assert seen == trained | (tested if final else validated)

  order = study_cell.order_of(7, 160, 40)
  expected = [(i, tuple(next(order))) for i in range(2 + 10)]
  assert orders == [expected, expected]
  # Two batches wait, so that the steps of an epoch end at 4, 8 and 10.
  row = rows[False]
  assert row['accuracy_by_epoch'] == '1:0.0600 2:0.1000 2.5:0.1200'
  assert row['accuracy'] == 0.12
  assert row['loss_main'] == np.mean([7, 8, 9, 10])
  assert 'robust_accuracy' not in row
  assert rows[True]['robust_accuracy'] == 0.12


def test_the_first_test_images_are_of_all_classes(monkeypatch):
  source = numbered_source()
  by_class = sorted(source.held_out, key=lambda number: number % 10)
  data = {}
  for name, held_out in (('mixed', source.held_out), ('sorted', by_class)):
    monkeypatch.setattr(
      sources,
      'open_source',
      lambda _, held_out=held_out: source._replace(held_out=held_out),
    )
    data[name] = study_cell.load(make_config()).test
    assert numbers_in(data[name].images) == set(range(300, 400))
    assert (
      data[name].labels == [min(numbers_in(x)) % 10 for x in data[name].images]
    ).all()
    assert len(set(data[name].labels[:40])) == 10
  # What is mixed already stays as it is.
  assert (data['mixed'].labels == [x % 10 for x in source.held_out]).all()


def test_too_many_images_are_refused():
  with pytest.raises(ValueError) as error:
    study_cell.load(make_config(**{'study.train_images': 1400}))
  assert '1437' in str(error.value)
  assert '--config.study.train_images=1357' in str(error.value)


def test_images_of_other_channels_or_crops_are_refused():
  for fields, expected in (
    ({'data.mean': (0.5,) * 3, 'data.std': (0.25,) * 3}, '`data.mean`'),
    ({'data.eval_crop': 'center'}, '--config.data.eval_crop=resize'),
  ):
    with pytest.raises(ValueError, match=expected):
      study_cell.load(make_config(**fields))


def test_an_image_that_cannot_be_read_is_named(monkeypatch):
  def read(number):
    raise jpeg.BadImageError(f'{number}.jpg', 'it is empty')

  source = numbered_source()._replace(read=read)
  monkeypatch.setattr(sources, 'open_source', lambda _: source)
  with pytest.raises(ValueError, match='jpg cannot be read: it is empty') as e:
    study_cell.load(make_config())
  # Which a study does not do.
  assert 'skip' not in str(e.value)


def test_every_epoch_is_a_shuffle_of_all_images():
  order = study_cell.order_of(0, 30, 7)
  images = np.concatenate([next(order) for _ in range(30)]).reshape(7, 30)
  for epoch in images:
    assert sorted(epoch) == list(range(30))
  assert len({tuple(epoch) for epoch in images}) == 7
  again = study_cell.order_of(0, 30, 7)
  np.testing.assert_array_equal(next(again), images[0, :7])
  other = study_cell.order_of(1, 30, 7)
  assert any(next(other) != images[0, :7])


def test_an_uneven_last_batch_counts_every_image_once(one_device):
  config = make_config()
  data = study_cell.load(config)
  model = parts.make_model(config, num_classes=10)
  variables = jax.jit(
    lambda: model.init(jax.random.key(1), jnp.zeros((1, 8, 8, 1)), train=False)
  )()
  split = study_cell.Split(data.test.images[:23], data.test.labels[:23])
  batches = study_cell.batches_of(split)
  assert sum(batch['mask'].sum() for batch in batches) == 23
  pixels = (
    split.images / np.float32(255) - config.data.mean[0]
  ) / config.data.std[0]
  logits = model.apply(variables, jnp.asarray(pixels, jnp.float32), train=False)
  right = np.asarray(logits).argmax(-1) == split.labels
  measures = study_cell.make_measures(config, 10)

  state = State()
  state.params, state.model_state = (
    variables['params'],
    variables['batch_stats'],
  )
  study_cell._EVALUATION_BATCH = 10
  try:
    uneven = study_cell.batches_of(split)
  finally:
    study_cell._EVALUATION_BATCH = 1000
  assert [len(batch['label']) for batch in uneven] == [10, 10, 10]
  for given in (batches, uneven):
    found = measures.evaluate(state, given)
    assert found['held_out_images'] == 23
    np.testing.assert_allclose(found['held_out_accuracy'], right.mean())


def test_a_run_that_diverges_has_a_row(one_device):
  config = make_config(**{'lars.peak': 1e30, 'lars.warmup_epochs': 0.0})
  data = study_cell.load(config)
  program = study_cell.make_program(config, data, one_device)
  measures = study_cell.make_measures(config, data.num_classes)
  row = study_cell.run(config, program, measures, data, final=False)
  assert 0 < row['diverged'] <= row['steps']
  assert 'accuracy' not in row


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'data.crop': 'random_resized'}, '--config.data.crop=pad'),
    ({'data.flip': True}, '--config.data.crop=pad'),
    ({'method': 'conadv_autoaugment'}, '--config.data.crop=pad'),
    ({'method': 'absa'}, 'reference.main --config.method=absa'),
    ({'method': 'diffusion'}, 'reference.main --config.method=diffusion'),
    ({'method': 'vrgd'}, '--config.accumulate'),
    (
      {'method': 'batch_augment', 'data.crop': 'pad'},
      '--config.data.crop=resize',
    ),
    ({'method': 'conadv', 'methods.conadv.targets': 'all'}, 'random'),
    ({'attack.start_from_clean': 20.0}, '--config.attack.start_from_clean=0.2'),
    ({'lars.peak': -8.0}, '`lars.peak`'),
  ],
)
def test_what_cannot_run_is_refused(one_device, fields, expected):
  config = make_config()
  data = study_cell.load(config)
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError) as error:
    study_cell.make_program(config, data, one_device)
  assert expected in str(error.value)
