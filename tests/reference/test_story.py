"""The whole way of a user, by the commands: from images to a served model."""

import csv
import json
import os
import re
import shutil
import subprocess
import sys

import forked_commands
import numpy as np
import pytest
from forked_commands import ROOT
from PIL import Image
from run_folders import read_csv, steps_saved
from safetensors.numpy import load_file

README = (ROOT / 'reference' / 'README.md').read_text()
[EXAMPLE] = re.findall(r'```python\n(import json\n.*?)```', README, re.S)
CLASSES = ('n1', 'n2', 'n3', 'n4')
NAMES = ['bird', 'car, auto', 'cat', 'n4']
STEPS = 12  # two epochs of 48 images, eight a step
TINY = (
  f'--config={ROOT}/reference/configs/jpeg_folder.py',
  '--config.batch_size=8',
  '--config.model.stage_sizes=(1,)',
  '--config.model.filters=4',
  '--config.lars.peak=1.0',
  '--config.lars.warmup_epochs=0.5',
  '--config.run.log_every=1',
  f'--config.run.evaluate_every={STEPS}',
  f'--config.run.checkpoint_every={STEPS}',
)
STOPPED = forked_commands.STOPPED.format(
  kill='os.kill(os.getpid(), signal.SIGINT)'
)
# What the README's lines need beside the model, where the project is not.
SERVING = f"""
import sys
sys.modules |= {{'reference': None, 'conadv_optax': None}}
import numpy as np
pixels = np.load('images.npy')
{EXAMPLE}
np.save('logits.npy', logits)
"""


def run(*command):
  result = forked_commands.run(*command)
  assert result.returncode == 0, result.stderr
  return result.stdout


def train(data, workdir, *flags, epochs=2):
  return run('-m', 'reference.main', *make_flags(data, workdir, epochs), *flags)


def make_flags(data, workdir, epochs=2, source='array_record'):
  return (
    *TINY,
    f'--config.epochs={epochs}',
    f'--config.data.source={source}',
    f'--config.data.folder={data}',
    f'--workdir={workdir}',
  )


def write_images(folder):
  """A colour for each class, under noise, as JPEGs."""
  rng = np.random.default_rng(0)
  colours = rng.integers(256, size=(len(CLASSES), 3))
  for split, count in (('train', 12), ('test', 3)):
    for name, colour in zip(CLASSES, colours, strict=True):
      (folder / split / name).mkdir(parents=True)
      for number in range(count):
        pixels = colour + rng.normal(0, 40, size=(32, 32, 3))
        pixels = pixels.clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / split / name / f'{number}.jpg')
  (folder / 'words.txt').write_text('n1\tbird\nn2\tcar, auto\nn3\tcat\n')


def train_until_ctrl_c(data, workdir):
  """What the run said."""
  result = forked_commands.run('-c', STOPPED, *make_flags(data, workdir))
  assert result.returncode == 130, result.stderr
  assert 'Traceback' not in result.stderr
  return result.stdout


def export(workdir, out):
  run('-m', 'reference.export', f'--workdir={workdir}', f'--out={out}')
  return load_file(out / 'model.safetensors')


@pytest.fixture(scope='module')
def story(tmp_path_factory):
  """A run that was stopped, has gone on to its end, and was exported."""
  folder = tmp_path_factory.mktemp('story')
  write_images(folder / 'images')
  said = run(
    '-m',
    'reference.prepare_data',
    f'--source={folder}/images',
    f'--target={folder}/shards',
  )
  assert '4 classes' in said
  said = train_until_ctrl_c(folder / 'shards', folder / 'run')
  assert 'SIGINT: the step under way is finished and saved' in said
  [stopped] = steps_saved(folder / 'run')
  assert 2 <= stopped < STEPS
  said = train(folder / 'shards', folder / 'run')
  assert f'{stopped} of {STEPS} steps done' in said
  export(folder / 'run', folder / 'my_model')
  return folder


@pytest.mark.slow
def test_the_stopped_run_is_the_uninterrupted_one(story):
  train(story / 'shards', story / 'whole')
  weights = load_file(story / 'my_model' / 'model.safetensors')
  whole = export(story / 'whole', story / 'of_whole')
  assert weights.keys() == whole.keys()
  for name, array in whole.items():
    np.testing.assert_array_equal(weights[name], array, strict=True)


@pytest.mark.slow
def test_the_export_is_evaluated_and_serves_elsewhere(story, tmp_path):
  out = tmp_path / 'out'
  model = story / 'my_model'
  data = story / 'images' / 'test'
  said = run(
    '-m',
    'reference.evaluate',
    f'--model={model}',
    f'--data={data}',
    f'--out={out}',
  )
  with (out / 'evaluation.csv').open(newline='') as file:
    [row] = csv.DictReader(file)
  with (out / 'classes.csv').open(newline='') as file:
    named = {row['class']: row['name'] for row in csv.DictReader(file)}
  assert named == dict(zip(CLASSES, NAMES, strict=True))
  assert '| name |' in said
  assert 'top-5' not in said
  paths = sorted(data.glob('*/*.jpg'))
  labels = np.array([CLASSES.index(path.parent.name) for path in paths])
  assert int(row['images']) == len(paths)

  np.save(tmp_path / 'images.npy', [np.array(Image.open(x)) for x in paths])
  shutil.copytree(model, tmp_path / 'my_model')
  subprocess.run(
    [sys.executable, '-I', '-c', SERVING],
    env={**os.environ, 'JAX_PLATFORMS': 'cpu'},
    cwd=tmp_path,
    check=True,
  )
  logits = np.load(tmp_path / 'logits.npy').astype(np.float64)
  p = np.exp(logits)
  p /= p.sum(axis=1, keepdims=True)
  assert np.ptp(logits) > 0.1
  accuracy = (logits.argmax(axis=1) == labels).mean()
  assert float(row['top_1']) == pytest.approx(accuracy)
  loss = -np.log(p[np.arange(len(labels)), labels]).mean()
  assert float(row['loss']) == pytest.approx(loss, rel=1e-4)
  about = json.loads((model / 'model.json').read_text())
  assert about['classes'] == list(CLASSES)
  assert about['class_names'] == NAMES
  assert float(row['top_1']) == pytest.approx(
    about['metrics']['held_out_accuracy']
  )


@pytest.mark.slow
def test_a_complete_run_is_extended(story):
  workdir = story / 'extended'
  shutil.copytree(story / 'run', workdir)
  said = train(story / 'shards', workdir, '--extend', epochs=3)
  assert 'epochs' in said
  assert max(steps_saved(workdir)) == 18
  rows = read_csv(workdir)
  assert [row['changes'] for row in rows[-6:]] == ['1'] * 6
  assert {row['changes'] for row in rows[:-6]} <= {'', '0'}


@pytest.mark.slow
def test_three_classes_are_learnt_from_it(story):
  few = story / 'few'
  for split in ('train', 'test'):
    for name in CLASSES[1:]:
      shutil.copytree(story / 'images' / split / name, few / split / name)
  said = run(
    '-m',
    'reference.main',
    *make_flags(few, story / 'tuned', epochs=1, source='jpeg_folder'),
    f'--init_from={story}/my_model',
  )
  assert 'Its 4 classes are not the 3 here, so the head is new' in said
  assert float(read_csv(story / 'tuned')[-1]['held_out_accuracy']) > 0
