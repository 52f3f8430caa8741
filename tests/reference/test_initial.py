"""A run that begins with the model of another."""

import shutil

import jax
import numpy as np
import pytest
from run_folders import assert_equal, saved
from tiny_runs import tiny

from reference.command import Mistake
from reference.run import (
  agreement,
  checkpoint,
  exports,
  initial,
  parts,
  train,
  trained,
)

DIGITS = tuple('0123456789')


@pytest.fixture(scope='module')
def source(tmp_path_factory):
  """A run without branches, and its export."""
  folder = tmp_path_factory.mktemp('source')
  train.train(tiny('vanilla'), folder / 'run')
  exports.write(trained.load(folder / 'run'), folder / 'model')
  return folder


def fit(path, config, classes):
  return initial.fit(
    path,
    config,
    classes,
    make_model=lambda n: parts.make_model(config, num_classes=n),
  )


@pytest.mark.slow
def test_a_run_begins_with_another_and_resumes_without_it(
  source, tmp_path, capsys, monkeypatch
):
  begun = []

  def make_state(*arguments, make_state=parts.make_state):
    state = make_state(*arguments)
    # The first step takes its memory.
    begun.append(jax.device_get(state._replace(key=())))
    return state

  monkeypatch.setattr(parts, 'make_state', make_state)
  origin = tmp_path / 'origin'
  shutil.copytree(source / 'model', origin)
  config = tiny()
  workdir = tmp_path / 'work'
  train.train(config, workdir, init_from=origin)
  line = f'It began with {origin}, step 3.'
  assert line in capsys.readouterr().out

  then, _ = saved(source / 'run', 3)
  [state] = begun
  assert_equal(state.params.main, then['params'])
  norm = state.params.branches['adversarial']['BasicBlock_0']['BatchNorm_1']
  assert_equal(norm, then['params']['BasicBlock_0']['BatchNorm_1'])
  assert_equal(state.model_state.main, then['model_state'])
  adversarial = state.model_state.branches['adversarial']
  assert_equal(adversarial, then['model_state'])
  whole, _ = saved(workdir, 3)

  shutil.rmtree(origin)
  shutil.rmtree(workdir / 'checkpoints' / '3')
  train.train(config, workdir, init_from=origin)
  said = capsys.readouterr().out
  assert '2 of 3 steps done' in said
  assert line in said
  assert_equal(saved(workdir, 3)[0], whole)
  assert len(begun) == 1
  assert trained.load(workdir).record['init_from']['step'] == 3
  newest = checkpoint.read_about(workdir)
  agreement.check_config(workdir, *newest, checkpoint.comparable(config), ())
  with pytest.raises(Mistake, match=f'began with {origin}; given'):
    agreement.check_init_from(workdir, *newest, source / 'run')


@pytest.mark.slow
def test_a_run_that_began_by_itself_takes_no_other(source):
  with pytest.raises(Mistake, match='began with parameters that were drawn'):
    train.train(tiny('vanilla'), source / 'run', init_from=source / 'model')


def test_the_same_classes_keep_the_head(source):
  config = tiny()
  start = fit(source / 'model', config, DIGITS)
  state, _ = saved(source / 'run', 3)
  leaves = jax.tree.leaves(state['params'])
  leaves += jax.tree.leaves(state['model_state'])
  assert len(start.leaves) == len(leaves)
  np.testing.assert_array_equal(
    start.leaves['params', 'head', 'kernel'], state['params']['head']['kernel']
  )
  assert start.record == {
    'path': str(source / 'model'),
    'step': 3,
    'notes': [],
  }
  # A work folder does as well as an export.
  again = fit(source / 'run', config, DIGITS)
  assert again.leaves.keys() == start.leaves.keys()


@pytest.mark.parametrize(
  ('classes', 'count'),
  [(('cat', 'dog', 'emu'), '3'), (DIGITS[::-1], '10')],
)
def test_other_classes_get_a_new_head(classes, count, source):
  kept = fit(source / 'run', tiny(), DIGITS).leaves
  start = fit(source / 'run', tiny(), classes)
  assert kept.keys() - start.leaves.keys() == {
    ('params', 'head', 'bias'),
    ('params', 'head', 'kernel'),
  }
  assert start.record['notes'] == [
    f'Its 10 classes are not the {count} here, so the head is new: '
    'params/head/bias, params/head/kernel.'
  ]
  about = agreement.About({}, None, [], start.record)
  assert agreement.lines(about) == [
    f'It began with {source}/run, step 3.',
    *start.record['notes'],
  ]


def test_a_checkpoint_without_names_keeps_the_head_of_as_many(source, tmp_path):
  shutil.copytree(source / 'run', tmp_path / 'old')
  shutil.rmtree(tmp_path / 'old/checkpoints/3/dataset')
  start = fit(tmp_path / 'old', tiny(), [f'class {i}' for i in range(10)])
  assert ('params', 'head', 'kernel') in start.leaves
  start = fit(tmp_path / 'old', tiny(), DIGITS[:9])
  assert ('params', 'head', 'kernel') not in start.leaves


@pytest.mark.parametrize(
  ('fields', 'parts'),
  [
    (
      {'model.filters': 6},
      [
        'of another shape: batch_stats/BasicBlock_0/BatchNorm_0/mean (4,)',
        'and 11 more',
        'model.filters 4 -> 6',
      ],
    ),
    (
      {'data.mean': (0.5, 0.5, 0.5), 'data.std': (0.2, 0.2, 0.2)},
      ['shape: params/stem/kernel (3, 3, 1, 4) for (3, 3, 3, 4)\n'],
    ),
    (
      {'model.stage_sizes': (1, 1)},
      ['not there: batch_stats/BasicBlock_1/BatchNorm_0/mean'],
    ),
    (
      {'model.stage_sizes': ()},
      ['not in this model: batch_stats/BasicBlock_0/BatchNorm_0/mean'],
    ),
  ],
)
def test_another_model_is_refused_by_name(fields, parts, source):
  with pytest.raises(Mistake, match='must fit the model') as error:
    fit(source / 'run', tiny(**fields), DIGITS)
  for part in parts:
    assert part in str(error.value)


def test_what_no_shape_tells_is_said(source):
  config = tiny(**{'model.stem': 'strided', 'data.mean': (0.5,)})
  assert fit(source / 'run', config, DIGITS).record['notes'] == [
    'Another config: data.mean [0.305] -> [0.5].',
    "Another config: model.stem 'small' -> 'strided'.",
  ]


def test_a_digest_tells_any_two_apart():
  leaves = {('params', 'a'): np.ones(3), ('params', 'b'): np.zeros(3)}
  other = {**leaves, ('params', 'b'): np.array([0, 0, 1e-6])}
  assert initial.digest(leaves) == initial.digest(
    dict(reversed(leaves.items()))
  )
  assert initial.digest(leaves) != initial.digest(other)
