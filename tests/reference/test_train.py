"""The main job from end to end, its restarts, and its errors."""

import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image
from run_folders import (
  assert_equal,
  read_csv,
  rows_without_speed,
  saved,
  steps_saved,
)
from tiny_runs import BATCH, tiny

from reference.configs import jpeg_folder
from reference.data import input_pipeline
from reference.run import checkpoint, loop, metrics, parts, train

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize('method', ['vanilla', 'conadv_reuse'])
def test_the_main_job(method, tmp_path, capsys):
  final = train.train(tiny(method), tmp_path)
  assert final['step'] == 3
  assert final['held_out_images'] == 360
  assert 0 <= final['held_out_accuracy'] <= 1
  rows = read_csv(tmp_path)
  assert [float(row['step']) for row in rows] == [1, 2, 3]
  names = ['loss', 'loss_main', 'images_per_second', 'learning_rate']
  if method == 'vanilla':
    assert 'loss_adversarial' not in rows[0]
  else:
    names.append('loss_adversarial')
  for row in rows:
    assert all(np.isfinite(float(row[name])) for name in names)
  assert rows[0]['held_out_accuracy'] == ''
  assert float(rows[2]['held_out_accuracy']) == pytest.approx(
    final['held_out_accuracy']
  )
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')
  [events] = (tmp_path / 'tensorboard').glob('events.out.tfevents.*')
  assert events.stat().st_size > 0
  assert steps_saved(tmp_path) == [2, 3]
  out, err = capsys.readouterr()
  assert f'{final["held_out_accuracy"]:.2%} of 360' in out
  assert str(tmp_path / 'metrics.csv') in out
  # No bar where the output is no terminal.
  assert 'img/s' not in err
  lines = [line for line in out.splitlines() if 'images/s' in line]
  assert [re.findall(r'step (\d+),.* (\d+) steps left', x) for x in lines] == [
    [('1', '2')], [('2', '1')], [('3', '0')]
  ]  # fmt: skip
  datetime.datetime.fromisoformat(lines[0][:25])
  assert 'held-out accuracy' in lines[2]


class Looked(Exception):
  """Ends a run that was looked at."""


@pytest.mark.slow
def test_one_device_for_many_holds_no_more_than_it_must(tmp_path, monkeypatch):
  shapes = set()

  def held_out_batches(
    *arguments, make=input_pipeline.held_out_batches, **more
  ):
    for batch in make(*arguments, **more):
      shapes.add(batch['image'].shape)
      yield batch

  def run_steps(config, state, *, evaluation, **_):
    batch = (config.batch_size, 8, 8, 1)
    assert [x for x in jax.live_arrays() if x.shape == batch] == []
    assert evaluation(state)['held_out_images'] == 360
    raise Looked

  monkeypatch.setattr(parts, 'make_step', lambda *_: None)
  monkeypatch.setattr(loop, 'run_steps', run_steps)
  monkeypatch.setattr(input_pipeline, 'held_out_batches', held_out_batches)
  with pytest.raises(Looked):
    train.train(tiny(steps=2, accumulate=2), tmp_path)
  assert shapes == {(8, 8, 8, 1)}


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A run of six steps that nothing disturbed."""
  workdir = tmp_path_factory.mktemp('whole')
  train.train(tiny(steps=6), workdir)
  return workdir


@pytest.mark.slow
def test_a_run_that_was_stopped_and_broken_is_the_uninterrupted_one(
  whole, tmp_path, monkeypatch, capsys
):
  def add(record, row, add=metrics.add):
    add(record, row)
    if row['step'] == 2:
      os.kill(os.getpid(), signal.SIGTERM)
    if row['step'] == 5:
      raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(metrics, 'add', add)
    with pytest.raises(SystemExit) as stop:
      train.train(tiny(steps=6), tmp_path)
    # As a shell reports a process that the signal ended.
    assert stop.value.code == 128 + 15
    # The step under way is saved.
    assert steps_saved(tmp_path) == [2, 3]
    out = capsys.readouterr().out
    assert 'Stopped by SIGTERM after step 3 of 6' in out
    assert f'{tmp_path}/checkpoints; the same command resumes' in out
    with pytest.raises(KeyboardInterrupt):
      train.train(tiny(steps=6), tmp_path)
  assert '3 of 6 steps done' in capsys.readouterr().out
  assert steps_saved(tmp_path) == [3, 4]
  # How a run is watched may change; what it learns does not.
  train.train(tiny(steps=6, **{'run.keep': 3}), tmp_path)

  state, position = saved(tmp_path, 6)
  whole_state, whole_position = saved(whole, 6)
  assert_equal(state, whole_state)
  assert position == whole_position
  left, right = rows_without_speed(tmp_path), rows_without_speed(whole)
  assert left == right
  assert [float(row['step']) for row in left] == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_complete_run_is_only_evaluated(whole, tmp_path, capsys, monkeypatch):
  """And gets the last row of its record again, if that is lost."""
  workdir = tmp_path / 'complete'
  shutil.copytree(whole, workdir)
  rows = read_csv(workdir)
  monkeypatch.setattr(parts, 'make_step', None)
  again = train.train(tiny(steps=6), workdir)
  assert {key: f'{value:.9g}' for key, value in again.items()} == rows[-1]
  assert read_csv(workdir) == rows
  assert 'The run is complete' in capsys.readouterr().out

  path = workdir / 'metrics.csv'
  path.write_bytes(path.read_bytes()[:-9] + b'\0' * 9)
  again = train.train(tiny(steps=6), workdir)
  assert again['step'] == 6
  assert again['held_out_accuracy'] == pytest.approx(
    float(rows[-1]['held_out_accuracy'])
  )
  assert [float(row['step']) for row in read_csv(workdir)] == [1, 2, 3, 4, 5, 6]


def test_another_config_is_refused_field_by_field(tmp_path):
  with checkpoint.open_manager(tmp_path, keep=1) as manager:
    manager.save(
      7,
      args=ocp.args.Composite(
        config=ocp.args.JsonSave(checkpoint.comparable(tiny()))
      ),
    )
  other = tiny('advprop', **{'lars.peak': 3.0, 'model.filters': 8})
  with pytest.raises(ValueError, match='belongs to one config') as error:
    train.train(other, tmp_path)
  lines = str(error.value).splitlines()
  assert lines[1:-1] == [
    '  lars.peak: given 3.0, stored 8.0',
    "  method: given 'advprop', stored 'conadv'",
    '  model.filters: given 8, stored 4',
  ]
  assert 'step 7' in lines[0]
  assert '--workdir=' in lines[-1]


@pytest.mark.slow
def test_a_diverged_run_stops_and_keeps_its_last_good_checkpoint(tmp_path):
  config = tiny('vanilla', **{'lars.peak': 1e30, 'run.checkpoint_every': 1})
  with pytest.raises(FloatingPointError, match=r'At step 2.*lars\.peak'):
    train.train(config, tmp_path)
  # The first step of a warm-up has rate 0.
  assert steps_saved(tmp_path) == [1]
  state, _ = saved(tmp_path, 1)
  for leaf in jax.tree.leaves(state['params']):
    assert np.isfinite(leaf).all()
  assert [float(row['step']) for row in read_csv(tmp_path)] == [1]


@pytest.mark.parametrize(
  ('field', 'value', 'message'),
  [
    (
      'method',
      'conadv-reuse',
      'must be one of vanilla, autoaugment, advprop, conadv, conadv_reuse, '
      'conadv_autoaugment, .*, conadv_vrgd. Given '
      "'conadv-reuse'.*--config.method=conadv_reuse",
    ),
    ('data.crop', 'random', '--config.data.crop=random_resized'),
    ('model.block', 'bottle', '--config.model.block=bottleneck'),
    ('run.keep', 0, r'number of checkpoints, 1 or more\. Given 0.*run\.keep='),
    ('run.log_every', 0, r'number of steps.*--config\.run\.log_every=1000000'),
    ('label_smoothing', 1.5, r'less than 1\. Given 1\.5.*label_smoothing=0\.1'),
    ('attack.label_smoothing', 1.0, r'Given 1\.0.*\.attack\.label_smoothing=0'),
  ],
)
def test_a_field_that_cannot_be(field, value, message, tmp_path):
  with pytest.raises(ValueError, match=message):
    train.train(tiny(**{field: value}), tmp_path)


def write_jpegs(folder, train_count, held_out_count):
  rng = np.random.default_rng(0)
  for split, count in (('train', train_count), ('test', held_out_count)):
    for name in ('cat', 'dog'):
      (folder / split / name).mkdir(parents=True)
      for index in range(count):
        pixels = rng.integers(256, size=(24, 30, 3), dtype=np.uint8)
        path = folder / split / name / f'{index}.jpg'
        Image.fromarray(pixels).save(path)


def jpegs(folder, **overrides):
  config = jpeg_folder.get_config()
  config.update_from_flattened_dict(
    {
      'data.folder': str(folder),
      'data.size': 16,
      'batch_size': BATCH,
      'epochs': 1.5,
      'lars.warmup_epochs': 0.5,
      'model.stage_sizes': (1,),
      'model.filters': 4,
      **overrides,
    }
  )
  return config


@pytest.mark.slow
def test_three_branches_of_a_folder_with_unreadable_jpegs(tmp_path, capsys):
  write_jpegs(tmp_path, 16, 10)
  for name in ('train/cat/3.jpg', 'test/dog/5.jpg'):
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-200])
  config = jpegs(
    tmp_path,
    method='conadv_autoaugment',
    **{
      'data.crop': 'random_resized',
      'run.log_every': 1,
      'run.checkpoint_every': 2,
    },
  )
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  final = train.train(config, whole)
  assert final['step'] == 3
  assert np.isfinite(final['loss_augmented'])
  assert final['held_out_images'] == 19
  assert final['skipped_since_start'] == 1
  assert final['held_out_skipped'] == 1
  out = capsys.readouterr().out
  assert f'Skipped {tmp_path}/train/cat/3.jpg: ' in out
  assert f'Skipped {tmp_path}/test/dog/5.jpg: ' in out

  # As one that was killed before its last checkpoint.
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / 'checkpoints' / '3')
  train.train(config, broken)
  assert '2 of 3 steps done' in capsys.readouterr().out
  assert_equal(saved(broken, 3)[0], saved(whole, 3)[0])


def test_autoaugment_of_grey_images_is_refused(tmp_path):
  with pytest.raises(ValueError, match=r'RGB images.*and 1.*--config\.method='):
    train.train(tiny('conadv_autoaugment'), tmp_path)


def test_a_folder_of_jpegs_stops_at_an_unreadable_one(tmp_path):
  write_jpegs(tmp_path, 16, 10)
  path = tmp_path / 'train' / 'cat' / '3.jpg'
  path.write_bytes(path.read_bytes()[:-200])
  config = jpegs(tmp_path, **{'data.on_bad_image': 'stop'})
  with pytest.raises(ValueError, match=r'cat/3\.jpg is not'):
    train.train(config, tmp_path / 'work')


@pytest.mark.slow
def test_flags_override_the_config_and_name_the_work_folder(tmp_path):
  result = subprocess.run(
    [
      *(sys.executable, '-m', 'reference.main'),
      '--config.method=vanilla',
      '--config.epochs=0.08',
      '--config.lars.warmup_epochs=0.0',
      '--config.batch_size=96',
      '--config.model.stage_sizes=(1,)',
      '--config.model.filters=4',
    ],
    cwd=tmp_path,
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 0, result.stderr
  assert 'digits, vanilla: 1437 training' in result.stdout
  assert 'batches of 96 on 1 cpu' in result.stdout
  assert steps_saved(tmp_path / 'runs' / 'digits_vanilla') == [2]
