"""The study: its grid, its rows and its resuming."""

import csv
import importlib
import operator

import jax
import jax.monitoring
import numpy as np
import pytest
from small_study import make_config, use_one_device

from reference.command import Mistake
from reference.study import cell as study_cell
from reference.study import grid, record

COMMAND = 'python -m reference.study'


@pytest.fixture
def one_device(monkeypatch):
  return use_one_device(monkeypatch)


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


@pytest.mark.slow
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
    rows = grid.run(config, tmp_path, command=COMMAND)
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


@pytest.mark.slow
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
  grid.run(config, tmp_path / 'whole', command=COMMAND)
  cells = 2 * 2 + 2 * 2
  assert len(ran) == len(set(ran)) == cells

  for kill_at in range(1, cells):
    ran.clear()
    folder = tmp_path / str(kill_at)
    with pytest.raises(KeyboardInterrupt):
      grid.run(config, folder, command=COMMAND)
    # In the middle of writing the last row.
    text = (folder / 'study.csv').read_text()
    (folder / 'study.csv').write_text(text[:-30])
    torn = ran.pop()
    kill_at = None
    grid.run(config, folder, command=COMMAND)
    assert ran.count(torn) == 1
    assert len(ran) == len(set(ran)) == cells
    assert by_cell(read(folder)) == by_cell(read(tmp_path / 'whole'))

  ran.clear()
  folder = tmp_path / 'whole'
  grid.run(config, folder, command=COMMAND)
  assert not ran
  # More seeds are more cells; other epochs are other cells.
  config.study.seeds = 3
  grid.run(config, folder, command=COMMAND)
  assert [cell[2] for cell in ran] == [2, 2]
  config.epochs = 1.0
  grid.run(config, folder, command=COMMAND)
  assert len(ran) == 2 + 4 + 6


def test_an_ablation_that_is_its_parent_has_rows_too(
  tmp_path, monkeypatch, one_device
):
  monkeypatch.setattr(study_cell, 'make_program', lambda *_: None)
  monkeypatch.setattr(study_cell, 'make_measures', lambda *_: None)
  monkeypatch.setattr(study_cell, 'run', pretend_run)
  config = make_config()
  grid.run(config, tmp_path, command=COMMAND)
  config.study.overrides.same = {}
  config.study.ablations = {'same': 'vanilla'}
  rows = grid.run(config, tmp_path, command=COMMAND)
  finals = [
    (x['variant'], int(x['seed'])) for x in rows if x['kind'] == 'final'
  ]
  assert finals == [(name, i) for name in ('vanilla', 'same') for i in (0, 1)]


def test_a_cell_is_measured_by_its_own_model(tmp_path, monkeypatch, one_device):
  monkeypatch.setattr(study_cell, 'make_program', lambda *_: None)
  made = []

  def make_measures(config, num_classes):
    made.append(dict(config.model))
    return made[-1]

  def run(config, program, measures, *args, **keywords):
    assert measures == dict(config.model)
    return pretend_run(config, **keywords)

  monkeypatch.setattr(study_cell, 'make_measures', make_measures)
  monkeypatch.setattr(study_cell, 'run', run)
  config = make_config(**{'study.variants': ('vanilla', 'conadv', 'wide')})
  config.model.width = 8
  config.study.overrides.wide = {'model': {'width': 16}}
  grid.run(config, tmp_path, command=COMMAND)
  assert [x['width'] for x in made] == [8, 16]


def test_cells_run_at_once_each_once(tmp_path, monkeypatch):
  made = []
  monkeypatch.setattr(
    study_cell, 'make_program', lambda *args: made.append(args[0].method)
  )
  monkeypatch.setattr(study_cell, 'make_measures', lambda *_: None)
  monkeypatch.setattr(study_cell, 'run', pretend_run)
  config = make_config(**{'study.variants': ('vanilla', 'conadv', 'advprop')})
  config.study.at_once = 4
  rows = grid.run(config, tmp_path, command=COMMAND)
  assert len(by_cell(rows)) == 3 * 2 + 3 * 2
  assert by_cell(rows) == by_cell(read(tmp_path))
  # A program for each method and device.
  assert len(made) <= 3 * len(jax.devices())


def test_what_fails_in_a_cell_ends_the_study(tmp_path, monkeypatch, one_device):
  def make_program(*_):
    raise ValueError('no such program')

  monkeypatch.setattr(study_cell, 'make_program', make_program)
  with pytest.raises(ValueError, match='no such program'):
    grid.run(make_config(), tmp_path, command=COMMAND)
  assert read(tmp_path) == []


@pytest.mark.parametrize(
  ('fields', 'expected'),
  [
    ({'study.batch_sizes': (20, 40)}, r'`--config.study.peaks="\(\(2.0, 8.0'),
    ({'study.at_once': 0}, '`study.at_once` is a number of things'),
    ({'study.evaluate_every': 0}, '--config.study.evaluate_every=1'),
  ],
)
def test_a_grid_that_cannot_be_gone_through(tmp_path, fields, expected):
  with pytest.raises(ValueError, match=expected):
    grid.run(make_config(**fields), tmp_path, command=COMMAND)


def test_an_ablation_keeps_the_number_that_was_chosen():
  config = make_config(**{'study.variants': ('conadv',)})
  config.study.ablations = {'tau_16': 'conadv', 'wide': 'conadv'}
  config.study.overrides = {
    'conadv': {'method': 'conadv'},
    'tau_16': {'method': 'conadv', 'staleness': 16},
    'wide': {'method': 'conadv', 'attack': {'epsilon': 16.0}},
  }
  tried = grid.trials(config)
  best = tried[0]._replace(setting='attack.epsilon=8.0')
  cells = grid.finals(config, {**dict.fromkeys(tried, 0.5), best: 0.9})
  assert {x.variant: x.setting for x in cells} == {
    'conadv': 'attack.epsilon=8.0',
    'tau_16': 'attack.epsilon=8.0',
    'wide': '',
  }


def test_another_studys_columns_are_refused(tmp_path):
  (tmp_path / 'study.csv').write_text('cell,colour\na,red\n')
  with pytest.raises(ValueError) as error:
    grid.run(make_config(), tmp_path, command=COMMAND)
  assert 'columns' in str(error.value)
  assert '--workdir' in str(error.value)


def test_only_the_last_line_may_be_cut_off(tmp_path):
  path = tmp_path / 'study.csv'
  rows = [{'cell': 'a', 'accuracy': 0.5}, {'cell': 'b', 'variant': 'x, "y"'}]
  record.write_rows(path, rows)
  whole = path.read_text()
  assert [row['cell'] for row in record.read_rows(path)] == ['a', 'b']
  assert record.read_rows(path)[1]['variant'] == 'x, "y"'
  second = len(whole.splitlines(keepends=True)[-1])
  for missing in range(1, second + 1):
    path.write_text(whole[:-missing])
    assert [row['cell'] for row in record.read_rows(path)] == ['a']


def test_the_best_peak_by_validation_is_taken_and_by_ablations_too():
  config = make_config(
    **{
      'study.batch_sizes': (10, 40),
      'study.peaks': ((1.0, 2.0), (2.0, 8.0)),
      'study.variants': ('vanilla', 'conadv'),
    }
  )
  config.study.ablations = {'conadv_tau_16': 'conadv', 'unused': 'advprop'}
  tried = grid.trials(config)
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
  cells = grid.finals(config, accuracies)
  chosen = [(*key, peak) for key, peak in best.items()]
  chosen.append(('conadv_tau_16', 40, 2.0))
  for seed in range(2):
    part = cells[5 * seed : 5 * seed + 5]
    assert {cell.seed for cell in part} == {seed}
    assert all(cell.final for cell in part)
    assert sorted(cell[:3] for cell in part) == sorted(chosen)


def test_a_number_of_its_own_is_tried_at_the_best_peak(
  tmp_path, monkeypatch, one_device
):
  monkeypatch.setattr(study_cell, 'make_program', lambda *_: None)
  monkeypatch.setattr(study_cell, 'make_measures', lambda *_: None)
  config = make_config(
    **{'study.variants': ('vanilla', 'sam'), 'study.peaks': ((1.0, 2.0, 4.0),)}
  )
  config.study.overrides = {'vanilla': {}, 'sam': {'method': 'sam'}}
  config.study.settings = {'sam': ('methods.sam.radius', 0.25, 0.5)}
  ran = []

  def run(config, *_, final):
    peak, radius = config.lars.peak, config.methods.sam.radius
    ran.append((config.method, peak, radius, final))
    accuracy = 0.5 - abs(peak - 2.0) / 10
    if config.method == 'sam' and radius == better:
      accuracy += 0.1
    return {'accuracy': accuracy, 'train_accuracy': 1.0, 'seconds': 0.0}

  monkeypatch.setattr(study_cell, 'run', run)
  for better, setting in ((0.5, 'methods.sam.radius=0.5'), (0.05, '')):
    ran.clear()
    folder = tmp_path / str(better)
    rows = grid.run(config, folder, command=COMMAND)
    # Three peaks each, two radii more, and both seeds.
    assert len(ran) == len(by_cell(rows)) == 3 * 2 + 2 + 2 * 2
    assert [x[:3] for x in ran[6:8]] == [('sam', 2.0, 0.25), ('sam', 2.0, 0.5)]
    last = {(x['variant'], x['peak'], x['setting']) for x in rows[8:]}
    assert last == {('vanilla', 2.0, ''), ('sam', 2.0, setting)}
    assert {x[:3] for x in ran[8:]} == {
      ('vanilla', 2.0, 0.05),
      ('sam', 2.0, better),
    }
    ran.clear()
    grid.run(config, folder, command=COMMAND)
    assert not ran


def test_a_variant_that_is_not_there():
  cell = grid.Cell('vanila', 8, 1.0, 0, final=False)
  with pytest.raises(Mistake, match=r"vanilla.*Given 'vanila'\. Likely"):
    grid.cell_config(make_config(), cell)


def test_a_variant_of_other_images_is_refused():
  config = make_config()
  config.study.overrides.large = {'data': {'size': 16}}
  cell = grid.Cell('large', 8, 1.0, 0, final=False)
  with pytest.raises(Mistake, match=r"loads its images once\. Given 'large'"):
    grid.cell_config(config, cell)


def test_a_setting_may_be_any_value():
  config = make_config()
  trial = grid.Cell('vanilla', 8, 1.0, 0, final=False)
  for field, value, text in (
    ('methods.conadv.targets', 'none', '"none"'),
    ('data.flip', True, 'true'),
    ('lars.weight_decay', 5e-4, '0.0005'),
  ):
    config.study.settings = {'vanilla': (field, value)}
    config.study.variants, config.study.batch_sizes = ('vanilla',), (8,)
    config.study.peaks = ((1.0, 2.0),)
    [cell] = grid.more_trials(config, {trial: 0.5})
    assert cell.setting == f'{field}={text}'
    found = operator.attrgetter(field)(grid.cell_config(config, cell))
    assert found == value


def test_a_row_has_the_numbers_of_its_own_attack():
  config = make_config(method='conadv')
  config.methods.fast_advprop.epsilon = 2.0
  config.methods.conadv.adversarial_fraction = 0.5
  found = grid.attack_columns(config)
  assert found == {
    'epsilon': 8.0,
    'targets': 'random',
    'adversarial_fraction': 0.5,
  }
  config.method = 'conadv_reuse'
  assert grid.attack_columns(config) == found | {'targets': 'none'}
  config.method = 'fast_advprop'
  assert grid.attack_columns(config) == {
    'epsilon': 2.0,
    'targets': 'none',
    'adversarial_fraction': 0.2,
  }


def test_a_single_peak_needs_no_trial():
  config = make_config(**{'study.peaks': ((8.0,),)})
  assert grid.trials(config) == []
  assert [cell.peak for cell in grid.finals(config, {})] == [8.0, 8.0]


@pytest.mark.parametrize(
  'name',
  [
    'study_fashion_mnist',
    'study_price',
    'study_methods',
    'study_augmentation',
    'study_cifar10',
    'study_depth',
  ],
)
def test_every_variant_of_the_grids_can_be_made(name):
  config = importlib.import_module(f'reference.configs.{name}').get_config()
  assert config.name == name
  variants = {*config.study.variants, *config.study.ablations}
  if name == 'study_methods':
    # Reached by a command of its own, once its peak is known.
    variants.add('legw')
  assert variants == set(config.study.overrides)
  assert set(config.study.ablations.values()) <= set(config.study.variants)
  assert len(config.study.peaks) == len(config.study.batch_sizes)
  assert len({len(peaks) for peaks in config.study.peaks}) == 1
  [device, *_] = jax.devices()
  mesh = jax.sharding.Mesh(np.asarray([device]), ('data',))
  ids = set()
  for variant in variants:
    cell = grid.Cell(variant, max(config.study.batch_sizes), 1.0, 0, True)
    study_cell._check(grid.cell_config(config, cell), mesh)
    # With the peak of another variant, the same is something else.
    peak_of = config.study.ablations.get(variant)
    ids.add((grid.identify(config, cell), peak_of))
  # No two are the same by a slip.
  assert len(ids) == len(variants)
