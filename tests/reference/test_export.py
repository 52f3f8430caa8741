"""A model taken out of a run, and the files that it becomes."""

import json
import re
import shutil
import sys
from pathlib import Path

import forked_commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch_resnet
from run_folders import read_csv, saved
from safetensors.numpy import load_file
from tiny_runs import tiny

from reference.command import Mistake
from reference.run import (
  exports,
  models,
  parts,
  torchvision_layout,
  train,
  trained,
)

ROOT = Path(__file__).parents[2]
README = (ROOT / 'reference' / 'README.md').read_text()
[EXAMPLE] = re.findall(r'```python\n(import json\n.*?)```', README, re.S)


CONFIG = tiny('advprop', steps=3, **{'model.block': 'plain'})


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """A complete run on eight devices, with the checkpoints of 2 and 3."""
  workdir = tmp_path_factory.mktemp('run') / 'work'
  train.train(CONFIG, workdir)
  return workdir


@pytest.fixture(scope='module')
def folder(workdir, tmp_path_factory):
  """An export of step 2, made by the command on one device."""
  out = tmp_path_factory.mktemp('out') / 'my_model'
  result = forked_commands.run(
    '-m',
    'reference.export',
    f'--workdir={workdir}',
    f'--out={out}',
    '--step=2',
  )
  assert result.returncode == 0, result.stderr
  assert f'Step 2 of {workdir}: ' in result.stdout
  assert '10 classes' in result.stdout
  return out


def flat(params, batch_stats):
  """By names with slashes, the collections first."""
  named = {'params': params, 'batch_stats': batch_stats}
  leaves, _ = jax.tree_util.tree_flatten_with_path(named)
  return {'/'.join(key.key for key in path): leaf for path, leaf in leaves}


def assert_same(left, right):
  assert left.keys() == right.keys()
  for name, array in left.items():
    assert array.dtype == right[name].dtype
    np.testing.assert_array_equal(array, right[name])


@pytest.mark.slow
def test_it_holds_the_main_branch_under_plain_names(workdir, folder):
  state, _ = saved(workdir, 2)
  weights = load_file(folder / 'model.safetensors')
  expected = flat(state['params']['main'], state['model_state']['main'])
  assert_same(weights, expected)
  assert weights['params/PlainBlock_0/Conv_0/kernel'].shape == (3, 3, 4, 4)
  assert 'batch_stats/stem_norm/var' in weights


@pytest.mark.slow
def test_the_description_says_what_a_user_needs(workdir, folder):
  about = json.loads((folder / 'model.json').read_text())
  assert about['layout'] == 'flax'
  assert about['step'] == 2
  assert about['classes'] == [str(digit) for digit in range(10)]
  assert about['class_names'] == about['classes']
  assert about['model'] == {
    'num_classes': 10,
    'stage_sizes': [1],
    'filters': 4,
    'block': 'plain',
    'stem': 'small',
    'dtype': 'float32',
  }
  assert about['input']['mean'] == list(CONFIG.data.mean)
  assert about['input']['std'] == list(CONFIG.data.std)
  assert (about['input']['size'], about['input']['channels']) == (8, 1)
  assert about['input']['crop'] == 'resize'
  assert about['config']['attack']['epsilon'] == CONFIG.attack.epsilon
  assert about['dataset']['images'] == 1437
  assert about['versions']['jax'] == jax.__version__
  [row] = [row for row in read_csv(workdir) if row['step'] == '2']
  row = {name: float(value) for name, value in row.items() if value}
  assert about['metrics'] == row
  assert row['loss_main'] > 0


# The example is short, and leaves a file open.
@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:unclosed file:ResourceWarning')
def test_it_serves_where_this_project_is_not(
  workdir, folder, tmp_path, monkeypatch
):
  shutil.copytree(folder, tmp_path / 'my_model')
  monkeypatch.chdir(tmp_path)
  for name in ('reference', 'conadv_optax'):
    monkeypatch.setitem(sys.modules, name, None)
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1), np.uint8)
  names = {'pixels': images, 'np': np}
  exec(EXAMPLE, names)
  logits = names['logits']
  state, _ = saved(workdir, 2)
  expected = parts.make_model(CONFIG, num_classes=10).apply(
    {
      'params': state['params']['main'],
      'batch_stats': state['model_state']['main'],
    },
    (images.astype(np.float32) / 255 - np.float32(CONFIG.data.mean))
    / np.float32(CONFIG.data.std),
    train=False,
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
  assert np.ptp(logits) > 0.1


def test_what_is_read_again_is_what_was_written(workdir, folder):
  written, read = trained.load(workdir, step=2), trained.load(folder)
  assert written.config.to_json() == read.config.to_json()
  assert written._replace(config=0, params=0, batch_stats=0) == read._replace(
    config=0, params=0, batch_stats=0
  )
  assert_same(
    flat(written.params, written.batch_stats),
    flat(read.params, read.batch_stats),
  )


def test_another_branch_has_its_own_norm_layers_alone(workdir):
  state, _ = saved(workdir, 3)
  model = trained.load(workdir, branch='adversarial')
  assert model.step == 3
  main, own = (
    flat(state['params']['main'], {}),
    flat(state['params']['branches']['adversarial'], {}),
  )
  norms = {name for name in main if name.split('/')[-1] != 'kernel'}
  norms -= {'params/head/bias'}
  assert len(norms) == 4
  expected = {name: (own if name in norms else main)[name] for name in main}
  assert_same(flat(model.params, {}), expected)
  stats = state['model_state']['branches']['adversarial']
  assert_same(flat({}, model.batch_stats), flat({}, stats))


def test_a_checkpoint_of_before_has_numbers_for_classes(workdir, tmp_path):
  copy = tmp_path / 'old'
  shutil.copytree(workdir, copy)
  for name in ('dataset', 'changes', 'init_from', 'names'):
    shutil.rmtree(copy / 'checkpoints' / '3' / name)
  model = trained.load(copy)
  assert model.classes == model.names == tuple('0123456789')
  assert model.record['dataset'] is None


@pytest.mark.parametrize(
  ('keywords', 'message'),
  [
    ({'step': 1}, r'keeps those of steps: 2, 3\. Given step 1'),
    ({'branch': 'augmented'}, "main, adversarial. Given 'augmented'"),
  ],
)
def test_what_a_run_does_not_have_is_named(keywords, message, workdir):
  with pytest.raises(Mistake, match=message):
    trained.load(workdir, **keywords)


@pytest.mark.parametrize('keywords', [{'step': 3}, {'branch': 'adversarial'}])
def test_an_export_has_one_step_and_branch(keywords, folder):
  with pytest.raises(Mistake, match='which is of step 2'):
    trained.load(folder, **keywords)


def test_no_model_is_told(tmp_path, workdir):
  with pytest.raises(Mistake, match='which is no folder'):
    trained.load(tmp_path / 'misspelt')
  with pytest.raises(Mistake, match='which holds neither'):
    trained.load(workdir.parent)
  (tmp_path / 'checkpoints').mkdir()
  with pytest.raises(Mistake, match='those of steps: none'):
    trained.load(tmp_path)


# Orbax leaves reads behind that nobody waits for, once one of them has failed.
@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
def test_damage_is_told_and_what_is_whole(workdir, folder, tmp_path):
  shutil.copytree(workdir, tmp_path / 'run')
  (tmp_path / 'run/checkpoints/3/state/manifest.ocdbt').unlink()
  with pytest.raises(Mistake, match=r'step 3 .* cannot be read(?s:.*)step=2'):
    trained.load(tmp_path / 'run')
  assert trained.load(tmp_path / 'run', step=2).step == 2
  shutil.copytree(folder, tmp_path / 'copy')
  weights = tmp_path / 'copy' / 'model.safetensors'
  weights.write_bytes(weights.read_bytes()[:-1])
  with pytest.raises(Mistake, match='copy it again'):
    trained.load(tmp_path / 'copy')


def test_nothing_is_overwritten(workdir, tmp_path):
  model = trained.load(workdir)
  (tmp_path / 'mine').write_text('mine')
  for out in (tmp_path, tmp_path / 'mine'):
    with pytest.raises(Mistake, match=f'--out={out}_2'):
      exports.write(model, out)
  assert [path.name for path in tmp_path.iterdir()] == ['mine']
  assert (tmp_path / 'mine').read_text() == 'mine'


def test_a_folder_that_cannot_be_written_is_told(workdir, tmp_path):
  (tmp_path / 'mine').write_text('mine')
  with pytest.raises(Mistake, match='could not be written'):
    exports.write(trained.load(workdir), tmp_path / 'mine' / 'out')


def torch_like(block, stage_sizes, **fields):
  """A ResNet that torchvision has, with drawn statistics and scales."""
  model = models.ResNet(
    5, stage_sizes, 64, block, 'imagenet', jnp.float32, **fields
  )
  shapes = jax.eval_shape(
    lambda: model.init(
      jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False
    )
  )
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    if path[-1].key == 'kernel':
      size = np.prod(leaf.shape[:-1])
      drawn = rng.normal(size=leaf.shape) * np.sqrt(2 / size)
    else:
      drawn = rng.uniform(0.2, 0.9, leaf.shape)
    return drawn.astype(np.float32)

  return model, jax.tree_util.tree_map_with_path(draw, shapes)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('block', 'stage_sizes'),
  [('basic', (1, 2, 1, 1)), ('bottleneck', (2, 1, 1, 1))],
)
def test_torchvision_has_the_same_logits(block, stage_sizes):
  model, variables = torch_like(block, stage_sizes, padding='symmetric')
  images = np.random.default_rng(1).normal(size=(2, 64, 64, 3))
  images = images.astype(np.float32)
  state = torch_resnet.StateDict(
    torchvision_layout.convert(
      stage_sizes, variables['params'], variables['batch_stats'], step=7
    )
  )
  logits = torch_resnet.logits(
    state, images.transpose(0, 3, 1, 2), kind=block, sizes=stage_sizes
  )
  expected = jax.jit(lambda v, x: model.apply(v, x, train=False))(
    variables, images
  )
  np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)
  # The rest are counters.
  assert {name.split('.')[-1] for name in state.unread} == {
    'num_batches_tracked'
  }
  for name in [*state.unread]:
    np.testing.assert_array_equal(state[name], np.int64(7), strict=True)
  assert len(state) == len(jax.tree.leaves(variables)) + len(
    [name for name in state if name.endswith('running_mean')]
  )
  if block == 'bottleneck':
    return  # The other net shows it.
  same, _ = torch_like(block, stage_sizes, padding='same')
  other = jax.jit(lambda v, x: same.apply(v, x, train=False))(variables, images)
  assert abs(other - logits).max() > 0.01


def test_a_torchvision_export_is_not_read_as_flax(workdir, tmp_path):
  _, variables = torch_like('basic', (1, 1, 1, 1))
  model = trained.load(workdir)._replace(**variables)
  model.config.model = {
    'build': '',
    'stage_sizes': [1, 1, 1, 1],
    'block': 'basic',
    'stem': 'imagenet',
    'filters': 64,
    'padding': 'symmetric',
  }
  exported = exports.write(model, tmp_path / 'torch', layout='torchvision')
  assert {path.name for path in exported.files} == {
    'model.json',
    'model.safetensors',
  }
  weights = load_file(tmp_path / 'torch' / 'model.safetensors')
  assert weights['layer4.0.downsample.0.weight'].shape == (512, 256, 1, 1)
  assert weights['fc.weight'].shape == (5, 512)
  with pytest.raises(Mistake, match="layout 'torchvision'"):
    trained.load(tmp_path / 'torch')


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    ('padding', 'same', "model.padding is 'same' and not 'symmetric'"),
    ('padding', None, "model.padding is 'same'"),
    ('stem', 'small', "model.stem is 'small'"),
    ('filters', 16, 'model.filters is 16 and not 64'),
    ('block', 'plain', "model.block is 'plain'"),
    ('stage_sizes', [1, 1], '2 stages and not 4'),
    ('build', 'mine:vit', "model.build is 'mine:vit'"),
    ('channels', 1, r'images have 1 channel\(s\)'),
  ],
)
def test_what_torchvision_does_not_have_is_refused(field, value, message):
  model = {
    'stage_sizes': [1, 1, 1, 1],
    'filters': 64,
    'block': 'basic',
    'stem': 'imagenet',
    'padding': 'symmetric',
    'channels': 3,
  }
  torchvision_layout.check(model, {'stem': {'kernel': np.zeros((7, 7, 3, 64))}})
  model[field] = value
  if value is None:
    del model[field]
  channels = model.pop('channels')
  params = {'stem': {'kernel': np.zeros((7, 7, channels, 64))}}
  with pytest.raises(Mistake, match=message):
    torchvision_layout.check(model, params)
