"""The study: its grid, its splits, its resuming, and the steps of main."""

import copy
import csv
import importlib

import chex
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest

import conadv_optax as conadv
from reference import methods, sources, study, study_cell, train
from reference.configs import study_fashion_mnist

COMMAND = 'python -m reference.study'


def make_config(**fields):
  """Grid A on the digits, small enough to run in a second or two."""
  config = study_fashion_mnist.get_config()
  config.update_from_flattened_dict(
    {
      'data.source': 'digits',
      'data.size': 8,
      'model.filters': 4,
      'model.stage_sizes': (0, 1),
      'epochs': 2.0,
      'lars.warmup_epochs': 0.5,
      'study.train_images': 160,
      'study.validation_images': 80,
      'study.batch_sizes': (40,),
      'study.peaks': ((2.0, 8.0),),
      'study.seeds': 2,
      'study.evaluate_every': 1,
      'study.robust_images': 20,
      'study.sharpness_seeds': 0,
      'study.variants': ('vanilla',),
      **fields,
    }
  )
  config.study.ablations = {}
  return config


@pytest.fixture
def one_device(monkeypatch):
  [device, *_] = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  return device


def without_times(row):
  return {
    name: str(value)
    for name, value in row.items()
    if name not in ('seconds', 'seconds_a_step') and value != ''
  }


def by_cell(rows):
  assert len({row['cell'] for row in rows}) == len(rows)
  return {row['cell']: without_times(row) for row in rows}


def read(workdir):
  with (workdir / 'study.csv').open() as file:
    return list(csv.DictReader(file))


def test_a_study_from_its_trials_to_its_rows(tmp_path, monkeypatch, one_device):
  config = make_config(
    **{
      'data.crop': 'pad',
      'data.flip': True,
      'study.variants': ('conadv',),
      'study.at_once': 1,
    }
  )
  config.study.ablations = {'conadv_epsilon_16': 'conadv'}
  compiled, during = [], []

  def listen(event, seconds, **_):
    if event == '/jax/core/compile/backend_compile_duration':
      compiled.append(event)

  def run(*args, run=study_cell.run, **keywords):
    before = len(compiled)
    row = run(*args, **keywords)
    during.append(len(compiled) - before)
    return row

  programs = []

  def make_program(*args, make=study_cell.make_program):
    programs.append(make(*args))
    return programs[-1]

  monkeypatch.setattr(study_cell, 'run', run)
  monkeypatch.setattr(study_cell, 'make_program', make_program)
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    rows = study.run(config, tmp_path, command=COMMAND)
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)

  # Seeds, peaks and radii share a program; the first trial and the first
  # final run compile what they are measured with.
  assert len(programs) == 1
  assert len(during) == 6
  assert during[0] > 0
  assert during[2] > 0
  assert [during[i] for i in (1, 3, 4, 5)] == [0, 0, 0, 0]
  # And they are no constants of it.
  assert len({row['loss_adversarial'] for row in rows}) == 6 - 1

  assert [row['kind'] for row in rows] == ['trial'] * 2 + ['final'] * 4
  best = max(rows[:2], key=lambda row: row['accuracy'])['peak']
  assert {row['peak'] for row in rows[2:]} == {best}
  names = [(row['variant'], row['seed'], row['epsilon']) for row in rows[2:]]
  assert names == [
    ('conadv', 0, 8.0),
    ('conadv_epsilon_16', 0, 16.0),
    ('conadv', 1, 8.0),
    ('conadv_epsilon_16', 1, 16.0),
  ]
  for row in rows:
    assert row['steps'] == 8
    assert row['staleness'] == 1
    assert len(row['accuracy_by_epoch'].split()) == 2
    assert row['train_accuracy'] - row['accuracy'] == row['gap']
    assert row['augmentation'] == 'pad'
    assert row['command'] == COMMAND
    assert f'jax {jax.__version__}' in row['versions']
    assert ('robust_accuracy' in row) == (row['kind'] == 'final')
  # The trial of the best peak is the run of seed 0, measured elsewhere.
  [trial] = [row for row in rows[:2] if row['peak'] == best]
  assert trial['loss_main'] == rows[2]['loss_main']
  assert trial['train_accuracy'] == rows[2]['train_accuracy']


def pretend_run(config, *_, final):
  """A result that depends on the config alone."""
  accuracy = 1 / (1 + config.lars.peak + config.seed) + final / 100
  return {'accuracy': accuracy, 'train_accuracy': 1.0, 'seconds': 0.0}


def test_a_killed_study_goes_on_where_it_was(tmp_path, monkeypatch, one_device):
  monkeypatch.setattr(study_cell, 'make_program', lambda *_: None)
  monkeypatch.setattr(study_cell, 'make_measures', lambda *_: None)
  config = make_config(**{'study.variants': ('vanilla', 'conadv')})
  config.study.at_once = 1
  ran = []

  def run(config, *args, **keywords):
    if len(ran) == kill_at:
      raise KeyboardInterrupt
    ran.append(
      (config.method, config.lars.peak, config.seed, *keywords.items())
    )
    return pretend_run(config, *args, **keywords)

  monkeypatch.setattr(study_cell, 'run', run)
  kill_at = None
  study.run(config, tmp_path / 'whole', command=COMMAND)
  cells = 2 * 2 + 2 * 2
  assert len(ran) == len(set(ran)) == cells

  for kill_at in range(1, cells):
    ran.clear()
    folder = tmp_path / str(kill_at)
    with pytest.raises(KeyboardInterrupt):
      study.run(config, folder, command=COMMAND)
    # In the middle of writing the last row.
    text = (folder / 'study.csv').read_text()
    (folder / 'study.csv').write_text(text[:-30])
    torn = ran.pop()
    kill_at = None
    study.run(config, folder, command=COMMAND)
    assert ran.count(torn) == 1
    assert len(ran) == len(set(ran)) == cells
    assert by_cell(read(folder)) == by_cell(read(tmp_path / 'whole'))

  ran.clear()
  folder = tmp_path / 'whole'
  study.run(config, folder, command=COMMAND)
  assert not ran
  # More seeds are more cells; other epochs are other cells.
  config.study.seeds = 3
  study.run(config, folder, command=COMMAND)
  assert [cell[2] for cell in ran] == [2, 2]
  config.epochs = 1.0
  study.run(config, folder, command=COMMAND)
  assert len(ran) == 2 + 4 + 6


def test_cells_run_at_once_each_once(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(
    study_cell, 'make_program', lambda *args: made.append(args[0].method)
  )
  monkeypatch.setattr(study_cell, 'make_measures', lambda *_: None)
  monkeypatch.setattr(study_cell, 'run', pretend_run)
  config = make_config(**{'study.variants': ('vanilla', 'conadv', 'advprop')})
  config.study.at_once = 4
  rows = study.run(config, tmp_path, command=COMMAND)
  assert len(by_cell(rows)) == 3 * 2 + 3 * 2
  assert by_cell(rows) == by_cell(read(tmp_path))
  # A program for each method and device.
  assert len(made) <= 3 * len(jax.devices())


def test_what_fails_in_a_cell_ends_the_study(tmp_path, monkeypatch, one_device):
  def make_program(*_):
    raise ValueError('no such program')

  monkeypatch.setattr(study_cell, 'make_program', make_program)
  with pytest.raises(ValueError, match='no such program'):
    study.run(make_config(), tmp_path, command=COMMAND)
  assert read(tmp_path) == []


def test_another_studys_columns_are_refused(tmp_path):
  (tmp_path / 'study.csv').write_text('cell,accuracy\na,0.5\n')
  with pytest.raises(ValueError) as error:
    study.run(make_config(), tmp_path, command=COMMAND)
  assert 'columns' in str(error.value)
  assert '--workdir' in str(error.value)


def test_only_the_last_line_may_be_cut_off(tmp_path):
  path = tmp_path / 'study.csv'
  rows = [{'cell': 'a', 'accuracy': 0.5}, {'cell': 'b', 'variant': 'x, "y"'}]
  study.write_rows(path, rows)
  whole = path.read_text()
  assert [row['cell'] for row in study.read_rows(path)] == ['a', 'b']
  assert study.read_rows(path)[1]['variant'] == 'x, "y"'
  second = len(whole.splitlines(keepends=True)[-1])
  for missing in range(1, second + 1):
    path.write_text(whole[:-missing])
    assert [row['cell'] for row in study.read_rows(path)] == ['a']


def test_the_steps_are_those_of_the_main_job(one_device):
  config = make_config(method='conadv', batch_size=40, seed=3)
  data = study_cell.load(config)
  images, labels = data.train
  order = study_cell.order_of(config.seed, len(labels), config.batch_size)
  rows = [next(order) for _ in range(6)]

  mesh = jax.sharding.Mesh(np.asarray([one_device]), ('data',))
  place = train.make_placement(mesh)
  batches = iter(
    [place({'image': images[row], 'label': labels[row]}) for row in rows]
  )
  model = train.make_model(config, num_classes=10)
  tx, schedule, _ = train.make_optimizer(config, images=len(labels))
  grad_fn = methods.make_gradient(model, config, mesh)
  first = [next(batches) for _ in range(grad_fn.staleness)]
  state = train.make_state(config, model, tx, grad_fn, mesh, first)
  train_step = train.make_step(config, tx, schedule, grad_fn, state, mesh)
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

  return sources.Source(list(range(300)), list(range(300, 400)), read, 10)


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

  def attack(params, batch_stats, batch):
    look_at([batch])
    return batch

  place = jax.sharding.SingleDeviceSharding(one_device)
  program = study_cell.Program(
    init, step, jax.device_put(data.train, place), staleness=2, steps=10
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


def test_too_many_images_are_refused():
  with pytest.raises(ValueError) as error:
    study_cell.load(make_config(**{'study.train_images': 1400}))
  assert '1437' in str(error.value)
  assert '--config.study.train_images=1357' in str(error.value)


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
  model = train.make_model(config, num_classes=10)
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
    parts = study_cell.batches_of(split)
  finally:
    study_cell._EVALUATION_BATCH = 1000
  assert [len(batch['label']) for batch in parts] == [10, 10, 10]
  for given in (batches, parts):
    found = measures.evaluate(state, given)
    assert found['held_out_images'] == 23
    np.testing.assert_allclose(found['held_out_accuracy'], right.mean())


def test_the_best_peak_by_validation_is_taken_and_by_ablations_too():
  config = make_config(
    **{
      'study.batch_sizes': (10, 40),
      'study.peaks': ((1.0, 2.0), (2.0, 8.0)),
      'study.variants': ('vanilla', 'conadv'),
    }
  )
  config.study.ablations = {'conadv_tau_16': 'conadv', 'unused': 'advprop'}
  tried = study.trials(config)
  # As many for each variant at each batch size.
  count = {}
  for cell in tried:
    key = cell.variant, cell.batch_size
    count[key] = count.get(key, 0) + 1
    assert not cell.final
  assert set(count.values()) == {2}
  assert len(count) == 4
  best = {
    ('vanilla', 10): 1.0,
    ('conadv', 10): 2.0,
    ('vanilla', 40): 8.0,
    ('conadv', 40): 2.0,
  }
  accuracies = {
    cell: 0.9 if best[cell.variant, cell.batch_size] == cell.peak else 0.8
    for cell in tried
  }
  cells = study.finals(config, accuracies)
  chosen = [(*key, peak) for key, peak in best.items()]
  chosen.append(('conadv_tau_16', 40, 2.0))
  for seed in range(2):
    part = cells[5 * seed : 5 * seed + 5]
    assert {cell.seed for cell in part} == {seed}
    assert all(cell.final for cell in part)
    assert sorted(cell[:3] for cell in part) == sorted(chosen)


def test_a_single_peak_needs_no_trial():
  config = make_config(**{'study.peaks': ((8.0,),)})
  assert study.trials(config) == []
  assert [cell.peak for cell in study.finals(config, {})] == [8.0, 8.0]


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
    ({'method': 'vrgd'}, '--config.accumulate'),
    (
      {'method': 'batch_augment', 'data.crop': 'pad'},
      '--config.data.crop=resize',
    ),
    ({'method': 'conadv', 'methods.conadv.targets': 'all'}, 'random'),
  ],
)
def test_what_cannot_run_is_refused(one_device, fields, expected):
  config = make_config()
  data = study_cell.load(config)
  config.update_from_flattened_dict(fields)
  with pytest.raises(ValueError) as error:
    study_cell.make_program(config, data, one_device)
  assert expected in str(error.value)


@pytest.mark.parametrize('name', ['study_fashion_mnist', 'study_cifar10'])
def test_every_variant_of_the_grids_can_be_made(name):
  config = importlib.import_module(f'reference.configs.{name}').get_config()
  assert config.name == name
  variants = {*config.study.variants, *config.study.ablations}
  assert variants == set(config.study.overrides)
  assert set(config.study.ablations.values()) <= set(config.study.variants)
  assert len(config.study.peaks) == len(config.study.batch_sizes)
  assert len({len(peaks) for peaks in config.study.peaks}) == 1
  [device, *_] = jax.devices()
  mesh = jax.sharding.Mesh(np.asarray([device]), ('data',))
  ids = set()
  for variant in variants:
    cell = study.Cell(variant, max(config.study.batch_sizes), 1.0, 0, True)
    study_cell._check(study.cell_config(config, cell), mesh)
    ids.add(study.identify(config, cell))
  # No two are the same by a slip.
  assert len(ids) == len(variants)


@pytest.mark.parametrize('fraction', [0.2, 1.0])
@pytest.mark.parametrize('targets', ['random', 'none'])
def test_fraction_and_targets_reach_the_attack(monkeypatch, fraction, targets):
  attacks, wrapped = [], []

  def pgd(*args, pgd=conadv.pgd, **keywords):
    attacks.append(keywords)
    return pgd(*args, **keywords)

  def wrap(*args, **keywords):
    wrapped.append(keywords)

  monkeypatch.setattr(conadv, 'pgd', pgd)
  monkeypatch.setattr(conadv, 'wrap', wrap)
  config = make_config(method='conadv')
  config.methods.conadv.adversarial_fraction = fraction
  config.methods.conadv.targets = targets
  model = train.make_model(config, num_classes=10)
  methods.make_group_gradient(model, config)
  [attack], [arguments] = attacks, wrapped
  assert arguments['adversarial_fraction'] == fraction
  assert (attack['targets'] is None) == (targets == 'none')
