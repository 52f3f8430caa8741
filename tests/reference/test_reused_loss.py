"""The two causes of a low adversarial loss, told apart."""

import statistics

import jax
import numpy as np
import pytest
from small_study import make_config, use_one_device

from reference.study import cell as study_cell
from reference.study import reused_loss

WHEN = ('before', 'after a step on them', 'after a step on others')


@pytest.fixture
def one_device(monkeypatch):
  return use_one_device(monkeypatch)


def find(config, device, epochs):
  data = study_cell.load(config)
  rows = reused_loss.run(config, data, device, epochs)
  return {(row['epoch'], row['attack']): row for row in rows}


def test_epochs_after_the_end_are_refused_before_the_run():
  with pytest.raises(ValueError, match=r'\[1, 3\] of 2\..*`--epochs=2`'):
    list(reused_loss.run(make_config(), None, None, [1, 3]))


@pytest.mark.slow
def test_after_the_step_it_is_what_the_next_step_reports(one_device):
  config = make_config(method='conadv_reuse', batch_size=40)
  found = find(config, one_device, [1])

  data = study_cell.load(config)
  program = study_cell.make_program(config, data, one_device)
  numbers, key = study_cell.numbers_of(config), jax.random.key(config.seed)
  order = study_cell.order_of(config.seed, len(data.train.labels), 40)
  first = np.asarray([next(order)], np.int32)
  state = program.init(numbers, key, program.train, first)
  losses = []
  for done in range(5):
    state, values = program.step(
      numbers, state, key, program.train, np.int32(done + 1), next(order)
    )
    losses.append(float(values['loss_adversarial']))
  # The first step trains on what the first batch's attack pass made.
  row = found[1, reused_loss.REUSED]
  assert row['after a step on them'] == pytest.approx(
    statistics.fmean(losses[1:]), rel=1e-5
  )
  assert row['after a step on others'] != row['after a step on them']


@pytest.mark.slow
def test_without_a_learning_rate_no_step_changes_a_loss(one_device):
  config = make_config(method='conadv_reuse', batch_size=40)
  # The smallest that a run may have: no parameter moves by it.
  config.lars.peak, config.lars.end = 1e-30, 0.0
  found = find(config, one_device, [2])
  assert set(found) == {(2, reused_loss.REUSED), (2, reused_loss.PASS)}
  for row in found.values():
    assert [row[when] for when in WHEN] == [row['before']] * 3
  # The attack away from the label gains more than one towards a wrong class.
  reused, attacked = (
    found[2, name]['before'] for name in (reused_loss.REUSED, reused_loss.PASS)
  )
  assert reused > attacked


def test_the_table_has_means_and_spread_over_seeds(capsys):
  reused_loss.print_table(
    [
      {
        'epoch': 3,
        'seed': seed,
        'attack': reused_loss.PASS,
        **dict.fromkeys(WHEN, 0.5 + seed),
      }
      for seed in range(3)
    ]
  )
  line = capsys.readouterr().out.splitlines()[-1]
  assert line == (
    '| 3 | attack pass | 3 | 1.500 ± 1.000 | 1.500 ± 1.000 | 1.500 ± 1.000 |'
  )
