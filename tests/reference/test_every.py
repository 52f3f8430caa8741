"""A run in which one batch in some has an adversarial copy."""

import math

import pytest
from run_folders import assert_equal, read_csv, saved
from tiny_runs import break_at, tiny

from reference.command import Mistake
from reference.run import checks, loop, train


@pytest.mark.slow
def test_a_resumed_run_goes_on_with_its_turns(tmp_path, monkeypatch):
  config = tiny(steps=5, **{'methods.conadv.every': 2})
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  train.train(config, whole)

  break_at(monkeypatch, config, broken, 3)
  train.train(config, broken)
  for workdir in (whole, broken):
    rows = read_csv(workdir)
    for name in ('loss_adversarial', 'accuracy_adversarial'):
      assert [bool(row[name]) for row in rows] == [True, False] * 2 + [True]
    assert all(row['loss_main'] and row['accuracy_main'] for row in rows)
  assert_equal(*(saved(workdir, 5)[0] for workdir in (whole, broken)))


def test_a_mean_is_over_the_steps_that_have_the_metric(tmp_path):
  steps = [
    loop.fetch(values, done=1, workdir=tmp_path)
    for values in (
      {'loss': 1.0, 'loss_adversarial': 3.0, 'accuracy_adversarial': 0.5},
      {'loss': 2.0, 'loss_adversarial': math.nan, 'accuracy_adversarial': 0.0},
    )
  ]
  assert loop.average(steps) == {
    'loss': 1.5,
    'loss_adversarial': 3.0,
    'accuracy_adversarial': 0.5,
  }


def test_an_adversarial_loss_that_diverged_is_no_missing_turn(tmp_path):
  with pytest.raises(FloatingPointError, match='loss_adversarial'):
    loop.fetch(
      {'loss': math.nan, 'loss_adversarial': math.nan},
      done=1,
      workdir=tmp_path,
    )


def test_a_reused_gradient_takes_no_turns():
  config = tiny('conadv_reuse', **{'methods.conadv.every': 4})
  with pytest.raises(Mistake, match=r'every=4.*adversarial_fraction=0\.25'):
    checks.check_choices(config)
