"""A run whose method sets in late."""

import chex
import jax
import numpy as np
import pytest
from digit_steps import CONSTANT, SGD, arrays, make_batch, make_mesh, start
from digit_steps import tiny as tiny_steps
from run_folders import assert_equal, read_csv, saved
from small_study import make_config, use_one_device
from tiny_runs import BATCH, break_at, tiny

import conadv_optax as conadv
from reference.command import Mistake
from reference.run import checks, parts, train
from reference.study import cell as study_cell


@pytest.mark.parametrize('method', ['conadv', 'fast_advprop'])
def test_at_first_it_is_the_plain_run_and_all_branches_are_alike(method):
  config = tiny_steps(method)
  state, _, place = start(config, devices=2)
  before = arrays(state)
  take = parts.make_plain_step(
    config,
    SGD,
    CONSTANT,
    parts.make_model(config, num_classes=10),
    state,
    make_mesh(2),
  )
  plain, plain_take, _ = start(tiny_steps('vanilla'), devices=2)
  for number in range(3):
    batch = place(make_batch(number))
    state, values = take(state, batch)
    plain, plain_values = plain_take(plain, batch)
    # That of the parameters is over all branches.
    norms = [x.pop('parameter_norm') for x in (values, plain_values)]
    assert norms[0] > norms[1]
    chex.assert_trees_all_close(values, plain_values, rtol=1e-5)
  main = conadv.dual_bn.main((state.params, state.model_state))
  for tree, expected in (
    (state.params, plain.params),
    (state.model_state, plain.model_state),
  ):
    chex.assert_trees_all_close(
      conadv.dual_bn.main(tree), expected, rtol=1e-5, atol=1e-6
    )
    chex.assert_trees_all_equal(
      conadv.dual_bn.select(tree, 'adversarial'), conadv.dual_bn.main(tree)
    )
  assert not np.allclose(
    jax.tree.leaves(main)[0], jax.tree.leaves(before.params)[0]
  )
  chex.assert_trees_all_equal(arrays(state).conadv_state, before.conadv_state)
  assert int(state.step) == 3


@pytest.mark.slow
def test_a_run_resumes_before_and_after_its_method_sets_in(
  tmp_path, monkeypatch
):
  # The fourth step is the first with an attack.
  config = tiny(
    steps=5, plain_epochs=3 * BATCH / 1437, **{'run.checkpoint_every': 1}
  )
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  train.train(config, whole)
  for step in (3, 5):
    break_at(monkeypatch, config, broken, step)
  train.train(config, broken)
  for workdir in (whole, broken):
    rows = read_csv(workdir)
    for name in ('loss_adversarial', 'accuracy_adversarial'):
      assert [bool(row[name]) for row in rows] == [False] * 3 + [True] * 2
    assert all(row['loss_main'] and row['accuracy_main'] for row in rows)
  assert_equal(*(saved(workdir, 5)[0] for workdir in (whole, broken)))


@pytest.mark.slow
def test_a_cell_of_a_study_has_them_too(monkeypatch):
  device = use_one_device(monkeypatch)
  # An epoch is four steps.
  config = make_config(
    method='conadv', batch_size=40, plain_epochs=0.75, **{'lars.peak': 2.0}
  )
  data = study_cell.load(config)
  program = study_cell.make_program(config, data, device)
  assert (program.plain_steps, program.steps) == (3, 8)
  attacked = []

  def noted(values, *, done, workdir, fetch=study_cell.loop.fetch):
    attacked.append('loss_adversarial' in values)
    return fetch(values, done=done, workdir=workdir)

  monkeypatch.setattr(study_cell.loop, 'fetch', noted)
  study_cell.run(
    config,
    program,
    study_cell.make_measures(config, 10),
    data,
    final=False,
  )
  assert attacked == [False] * 3 + [True] * 5


@pytest.mark.parametrize('plain_epochs', [0.01, 0.7])
def test_epochs_that_round_to_no_step_or_to_all(plain_epochs):
  config = tiny(batch_size=128, epochs=1.0, plain_epochs=plain_epochs)
  config.lars.warmup_epochs = 0.0
  with pytest.raises(
    Mistake, match=r'of 1\.0 epochs, which are [01] of 1 step'
  ):
    parts.make_optimizer(config, images=100)


@pytest.mark.parametrize(
  ('fields', 'words'),
  [
    ({'method': 'vanilla'}, 'method=vanilla'),
    ({'method': 'conadv_vrgd'}, 'method=conadv_vrgd'),
    ({'method': 'diffusion'}, 'method=fast_advprop'),
    ({'epochs': 2.0}, r'plain_epochs=1\.4'),
    ({'plain_epochs': -1.0}, r'plain_epochs=0\.0'),
  ],
)
def test_mistakes(fields, words):
  config = tiny(**{'epochs': 10.0, 'plain_epochs': 2.0, **fields})
  with pytest.raises(Mistake, match=words):
    checks.check_choices(config)
    checks.check_numbers(config)
