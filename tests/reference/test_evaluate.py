"""`reference.evaluate` on a run, against measures by hand."""

import csv

import forked_commands
import numpy as np
import pytest
from flax import nnx
from own_models import batch_normed
from PIL import Image
from run_folders import saved
from sklearn import metrics
from tiny_runs import tiny

from reference.data import sources
from reference.run import train

STEPS = 60
SOME = [0, 1, 3, 6, 8]


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Of a run with an NNX model of one's own, in two branches."""
  folder = tmp_path_factory.mktemp('run')
  config = tiny(
    'advprop',
    # As many as it takes to tell some digits from others.
    steps=STEPS,
    **{
      'lars.peak': 0.1,
      'data.crop': 'resize',
      'run.log_every': STEPS,
      'run.checkpoint_every': STEPS,
      'data.source': 'own_sources:coloured_digits',
      'data.mean': (0.3,) * 3,
      'data.std': (0.4,) * 3,
    },
  )
  config.model = {'build': 'own_models:batch_normed', 'channels': 3}
  train.train(config, folder)
  return folder


def evaluate(*arguments):
  return forked_commands.run('-m', 'reference.evaluate', *arguments, PATH='')


def probabilities(workdir, branch, images):
  """By the module itself."""
  state, _ = saved(workdir, STEPS)
  model = batch_normed(num_classes=10, rngs=nnx.Rngs(0), channels=3)
  for trees in (state['params'], state['model_state']):
    own = trees['branches'].get(branch, {'norm': {}})['norm']
    of_branch = {**trees['main'], 'norm': {**trees['main']['norm'], **own}}
    for name in ('norm', 'head'):
      for leaf, value in of_branch.get(name, {}).items():
        getattr(getattr(model, name), leaf)[...] = value
    for number, conv in of_branch.get('convs', {}).items():
      for leaf, value in conv.items():
        getattr(model.convs[int(number)], leaf)[...] = value
  model.eval()
  normalized = ((images / 255 - 0.3) / 0.4).astype(np.float32)
  normalized = np.repeat(normalized, 3, axis=3)
  p = np.exp(np.array(model(normalized), np.float64))
  return p / p.sum(axis=1, keepdims=True)


def read_csv(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_run_is_evaluated_on_its_own_images_and_on_others(workdir, tmp_path):
  held_out = sources.digits().held_out
  images, labels = (np.array(x) for x in zip(*held_out, strict=True))
  # Half of the classes, as PNGs, which lose nothing.
  some = np.flatnonzero(np.isin(labels, SOME))
  for at in some:
    path = tmp_path / 'part' / str(labels[at]) / f'{at:03}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(images[at, ..., 0]).save(path)
  # Not part of the evaluation.
  (tmp_path / 'part' / '.ipynb_checkpoints').mkdir()
  out = tmp_path / 'out'
  run = evaluate(
    f'--workdir={workdir}',
    f'--data={tmp_path / "part"}',
    '--branch=adversarial',
    '--epsilon=0.1',
    '--steps=3',
    '--batch_size=50',
    f'--out={out}',
  )
  assert run.returncode == 0, run.stderr
  rows = read_csv(out / 'evaluation.csv')
  forms = [(row['epsilon'], row['classes'], row['steps']) for row in rows]
  assert forms == [
    ('0.0', '10', '0'),
    ('0.0', '5', '0'),
    ('0.1', '10', '3'),
    ('0.1', '5', '3'),
  ]
  p = probabilities(workdir, 'adversarial', images[some])
  part = p[:, SOME] / p[:, SOME].sum(axis=1, keepdims=True)
  for row, of_classes, names in (
    (rows[0], p, np.arange(10)),
    (rows[1], part, np.array(SOME)),
  ):
    said = names[of_classes.argmax(axis=1)]
    assert int(row['images']) == len(some)
    assert len(set(said)) > 1
    assert float(row['top_1']) == pytest.approx((said == labels[some]).mean())
    assert float(row['loss']) == pytest.approx(
      metrics.log_loss(labels[some], of_classes, labels=names), rel=1e-4
    )
  assert float(rows[0]['top_5']) == pytest.approx(
    metrics.top_k_accuracy_score(labels[some], p, k=5, labels=np.arange(10))
  )
  for clean, attacked in ((rows[0], rows[2]), (rows[1], rows[3])):
    assert float(attacked['loss']) > float(clean['loss'])

  of_classes = {row['class']: row for row in read_csv(out / 'classes.csv')}
  said = p.argmax(axis=1)
  for label in SOME:
    mine = said[labels[some] == label]
    row = of_classes[str(label)]
    assert int(row['images']) == len(mine)
    assert float(row['right']) == pytest.approx((mine == label).mean())
  with Image.open(out / 'examples_1.png') as figure:
    assert min(figure.size) > 500
  assert f'| {len(some)} | PGD-3, 0.1 | 5 |' in run.stdout
  assert f'{float(rows[0]["top_1"]):.2%}' in run.stdout


def test_one_model_is_evaluated():
  run = evaluate()
  assert run.returncode == 2
  assert 'Given --workdir=None and --model=None' in run.stderr
  assert 'Traceback' not in run.stderr
