"""Tables and figures of a study against numbers made by hand."""

import re

import numpy as np
import pytest

from reference.study import record, report, results

SIZES = (60, 750)
SEEDS = 4


@pytest.fixture
def rows(tmp_path):
  """Rows of made-up accuracies, as they come back from a CSV."""
  rng = np.random.default_rng(0)
  made = []
  for size in SIZES:
    for variant, method, staleness, epsilon in (
      ('vanilla', 'vanilla', 0, 8.0),
      ('advprop', 'advprop', 0, 8.0),
      ('conadv', 'conadv', 1, 8.0),
      ('conadv_tau_16', 'conadv', 16, 8.0),
      ('conadv_epsilon_16', 'conadv', 1, 16.0),
      ('conadv_reuse', 'conadv_reuse', 1, 8.0),
    ):
      if size == SIZES[0] and variant.startswith('conadv_'):
        continue
      base = {
        'study': 'made_up',
        'variant': variant,
        'method': method,
        'batch_size': size,
        'staleness': staleness,
        'epsilon': epsilon,
        'targets': 'random',
        'adversarial_fraction': 1.0,
        'every': 1.0,
        'adversarial_downscale': 1.0,
        'attack_downscale': 1.0,
        'dtype': 'float32',
        'copies': 1.0,
        'micro_batches': 1.0,
        'augmentation': 'resize',
        'epochs': 20.0,
        'plain_epochs': 0.0,
        'steps': 100,
      }
      made.append(
        {**base, 'cell': 't', 'kind': 'trial', 'peak': 2.0, 'seed': 0}
        | {'accuracy': 0.125}
      )
      for seed in range(SEEDS):
        accuracy = rng.uniform(0.8, 0.9)
        made.append(
          {
            **base,
            'cell': f'{variant}{size}{seed}',
            'kind': 'final',
            'peak': 4.0,
            'seed': seed,
            'accuracy': accuracy,
            'train_accuracy': 0.99,
            'gap': 0.99 - accuracy,
            'seconds_a_step': 0.2 if variant == 'vanilla' else 0.5,
            'accuracy_by_epoch': f'10:0.5 20:{accuracy:.4f}',
          }
        )
  # As seeds come when several cells run at once.
  made[1], made[3] = made[3], made[1]
  record.write_rows(tmp_path / 'study.csv', made)
  return results.read(tmp_path / 'study.csv')


def accuracies(rows, variant, size):
  chosen = [
    (row['seed'], row['accuracy'])
    for row in rows
    if (row['kind'], row['variant'], row['batch_size'])
    == ('final', variant, size)
  ]
  return 100 * np.array([accuracy for _, accuracy in sorted(chosen)])


def line_of(text, *cells):
  [line] = [
    line
    for line in text.splitlines()
    if all(cell in line.split(' | ') for cell in cells)
  ]
  return line


def cell_of(text, line, column):
  header, cells = (
    [cell.strip() for cell in x.strip('|').split('|')]
    for x in (text.splitlines()[0], line)
  )
  return dict(zip(header, cells, strict=True))[column]


def numbers(text):
  return [float(x) for x in re.findall(r'[-+]?\d+\.\d+', text)]


def test_means_and_spreads(rows):
  groups = results.finals(rows)
  for size in SIZES:
    text = report.accuracy_table(groups, size)
    expected = accuracies(rows, 'vanilla', size)
    assert len(expected) == SEEDS
    line = next(x for x in text.splitlines() if x.startswith('| `vanilla`'))
    cells = [cell.strip() for cell in line.strip('|').split('|')]
    assert cells[:3] == ['`vanilla`', '4', '4']
    np.testing.assert_allclose(
      numbers(cells[3]), [expected.mean(), expected.std(ddof=1)], atol=0.006
    )
    line = next(x for x in text.splitlines() if x.startswith('| `advprop`'))
    assert cell_of(text, line, 's / plain') == '2.50'
    # The rows have no losses.
    assert cell_of(text, line, 'adversarial loss') == ''


def test_differences_are_between_the_same_seeds(rows):
  text = report.comparison_table(results.finals(rows))
  expected = accuracies(rows, 'conadv', 750) - accuracies(rows, 'vanilla', 750)
  line = line_of(text, '| ConAdv against vanilla', '750')
  mean, error, low, high = numbers(line)
  np.testing.assert_allclose(mean, expected.mean(), atol=0.006)
  np.testing.assert_allclose(
    error, expected.std(ddof=1) / np.sqrt(SEEDS), atol=0.006
  )
  np.testing.assert_allclose(
    (low, high), (expected.min(), expected.max()), atol=0.006
  )
  # A seed that one of them lacks does not count.
  fewer = [
    row
    for row in rows
    if not (row['variant'] == 'vanilla' and row['seed'] == 2)
  ]
  text = report.comparison_table(results.finals(fewer))
  line = line_of(text, '| ConAdv against vanilla', '750', '3')
  np.testing.assert_allclose(
    numbers(line)[0], np.delete(expected, 2).mean(), atol=0.006
  )
  assert 'fifth' not in text


def test_effects_vary_one_field(rows):
  found = results.effects(results.finals(rows))
  names = {
    field: [group[0]['variant'] for group in groups]
    for field, groups in found.items()
  }
  assert names['staleness'] == ['advprop', 'conadv', 'conadv_tau_16']
  assert names['epsilon'] == ['conadv', 'conadv_epsilon_16']
  assert names['reuse'] == ['conadv_reuse']

  # With another peak the difference would be the peak's too.
  moved = [
    row | {'peak': 8.0} if row['variant'] == 'advprop' else row for row in rows
  ]
  found = results.effects(results.finals(moved))
  assert 'advprop' not in [group[0]['variant'] for group in found['staleness']]


def test_a_price_is_the_passes_of_a_step(rows):
  plain = rows[-1] | {'method': 'vanilla'}
  conadv = plain | {'method': 'conadv'}
  for row, thirds in (
    (plain, 3),
    # Forward and backward twice, and an attack without weight gradients.
    (conadv, 3 + 3 + 2),
    (conadv | {'method': 'advprop'}, 3 + 3 + 2),
    (conadv | {'adversarial_fraction': 0.2}, 3 + 0.2 * (3 + 2)),
    (conadv | {'every': 5}, 3 + (3 + 2) / 5),
    (conadv | {'every': 5, 'adversarial_fraction': 0.5}, 3 + (3 + 2) / 10),
    (conadv | {'method': 'conadv_reuse'}, 3 + 3),
    # A quarter of the pixels.
    (conadv | {'attack_downscale': 2}, 3 + 3 + 2 / 4),
    (
      conadv | {'adversarial_downscale': 2, 'adversarial_fraction': 0.35},
      3 + 0.35 * (3 + 2) / 4,
    ),
    (plain | {'method': 'batch_augment', 'copies': 4}, 4 * 3),
    (plain | {'method': 'sam'}, 3 + 3),
    (plain | {'method': 'looksam'}, 3 + 3 / 5),
    # One attack, and both branches at two points.
    (conadv | {'method': 'conadv_sam'}, 2 * (3 + 3) + 2),
    # Four fifths clean; a fifth adversarial, and trained on before, too.
    (
      plain | {'method': 'fast_advprop', 'adversarial_fraction': 0.2},
      4 / 5 * 3 + 1 / 5 * (3 + 3),
    ),
    # Of 20 epochs.
    (conadv | {'plain_epochs': 15.0}, (3 * 3 + (3 + 3 + 2)) / 4),
    (
      conadv | {'method': 'conadv_sam', 'plain_epochs': 10.0},
      (3 + 2 * (3 + 3) + 2) / 2,
    ),
  ):
    np.testing.assert_allclose(results.price(row), thirds / 3)


def test_a_study_with_a_variant_of_unknown_price_is_of_something_else(rows):
  groups = results.finals(rows)
  assert results.has_prices(groups)
  for changed in ({'augmentation': 'pad'}, {'method': 'absa'}):
    other = {'other': [rows[-1] | changed]}
    assert not results.has_prices(groups | other)
    assert '### Price' not in report.report(
      [*rows, rows[-1] | {'variant': 'other'} | changed]
    )


def test_the_cheapest_stands_first_and_gains_are_shares_of_conadv(rows):
  text = report.price_table(results.finals(rows), 750)
  names = [line.split('`')[1] for line in text.splitlines()[2:]]
  assert names[:2] == ['vanilla', 'conadv_reuse']
  gains = {
    name: accuracies(rows, name, 750) - accuracies(rows, 'vanilla', 750)
    for name in ('conadv', 'advprop')
  }
  line = next(x for x in text.splitlines() if x.startswith('| `advprop`'))
  gain = gains['advprop']
  for column, wanted, margin in (
    ('arithmetic / plain', 8 / 3, 0.006),
    ('s / plain', 2.5, 0.006),
    ('points over vanilla', gain.mean(), 0.006),
    ('standard error', gain.std(ddof=1) / np.sqrt(SEEDS), 0.006),
    (
      "% of ConAdv's gain",
      100 * gain.mean() / gains['conadv'].mean(),
      0.51,
    ),
  ):
    got = float(cell_of(text, line, column))
    np.testing.assert_allclose(got, wanted, rtol=0, atol=margin)


def test_a_csv_of_before_there_were_prices_goes_on(tmp_path):
  path = tmp_path / 'study.csv'
  path.write_text('cell,kind\na,final\n')
  [row] = results.read(path)
  assert row == {
    'cell': 'a',
    'kind': 'final',
    'every': 1.0,
    'adversarial_downscale': 1.0,
    'attack_downscale': 1.0,
    'dtype': 'float32',
    'copies': 1.0,
    'micro_batches': 1.0,
    'plain_epochs': 0.0,
  }


def test_a_row_names_the_number_that_was_tuned(rows):
  row = {'peak': 16.0, 'accuracy': 0.875}
  assert results.chosen(row) == '16'
  setting = {'setting': 'methods.sam.radius=0.2'}
  assert results.chosen(row | setting) == '16, radius=0.2'
  [trial] = [
    x
    for x in rows
    if (x['kind'], x['variant'], x['batch_size']) == ('trial', 'vanilla', 60)
  ]
  text = report.trial_table([trial, trial | row | setting])
  line = line_of(text, '| `vanilla`')
  assert '2: 12.50, 16, radius=0.2: 87.50' in line


def test_sharpness_is_shown_of_the_rows_that_have_it(rows):
  assert '### Sharpness' not in report.report(rows)
  values = {'top_eigenvalue': [100.0, 102.0], 'sharpness': [0.25, 0.75]}
  for row in rows:
    if (
      row['variant'] == 'conadv' and row['seed'] < 2 and row['kind'] == 'final'
    ):
      row['hessian_trace'] = 500.0
      row |= {name: x[int(row['seed'])] for name, x in values.items()}
  text = report.sharpness_table(results.finals(rows))
  assert len(text.splitlines()) == 2 + len(SIZES)
  line = line_of(text, '| `conadv`', '750', '2')
  assert cell_of(text, line, 'trace') == '500\xa0±\xa00'
  assert cell_of(text, line, 'eigenvalue') == '101.0\xa0±\xa01.4'
  assert cell_of(text, line, 'rise') == '0.5'
  assert text in report.report(rows)


def test_two_rows_of_a_seed_are_refused(rows):
  with pytest.raises(ValueError) as error:
    results.finals([*rows, rows[-1]])
  assert 'conadv_reuse' in str(error.value)
  assert 'seed 3' in str(error.value)


def test_trials_are_shown_and_stay_out_of_the_means(rows):
  text = report.report(rows)
  assert text.count('2: 12.50') == 9
  assert '12.50' not in text.split('### Trials')[0]


def test_a_study_of_trials_alone_has_tables(rows):
  text = report.report([x for x in rows if x['kind'] == 'trial'])
  assert '2: 12.50' in text


def test_without_the_plain_run_nothing_is_compared_with_it(rows):
  rows = [x for x in rows if x['variant'] != 'vanilla']
  head, _, *lines = report.accuracy_table(results.finals(rows), 750).split('\n')
  column = head.split(' | ').index('s / plain')
  assert {line.split(' | ')[column] for line in lines} == {''}


def test_a_row_without_accuracy_is_no_number(rows):
  rows = [dict(row) for row in rows]
  for row in rows:
    if row['variant'] == 'advprop' and row['seed'] == 1:
      del row['accuracy']
  text = report.accuracy_table(results.finals(rows), 750)
  line = next(x for x in text.splitlines() if x.startswith('| `advprop`'))
  assert line.split(' | ')[2] == '3'


@pytest.mark.slow
def test_every_figure_is_drawn_for_light_and_dark(rows, tmp_path):
  report.draw(rows, tmp_path / 'figures')
  found = {path.name for path in (tmp_path / 'figures').iterdir()}
  common = {'time', 'staleness', 'epsilon'}
  assert found == {
    f'made_up_{what}-{theme}.svg'
    for what in common | {'price_60', 'price_750'}
    for theme in ('light', 'dark')
  }
  # Of what has no price.
  other = [{**x, 'augmentation': 'pad'} for x in rows]
  report.draw(other, tmp_path / 'others')
  found = {path.name for path in (tmp_path / 'others').iterdir()}
  assert found == {
    f'made_up_{what}-{theme}.svg'
    for what in common | {'accuracy'}
    for theme in ('light', 'dark')
  }
