"""Kills, damage and a full disk: what a run comes back from, and how."""

import hashlib
import importlib.metadata
import json
import re
import shutil
import signal

import forked_commands
import jax
import pytest
from run_folders import (
  assert_equal,
  rows_without_speed,
  saved,
  steps_saved,
)
from tiny_runs import flags, make_targets, tiny

import conadv_optax as conadv
from reference.run import agreement, checkpoint, hosts, train

SOFTWARE = hosts.software()
# Orbax leaves reads behind that nobody waits for, once one of them has failed.
pytestmark = pytest.mark.filterwarnings(
  'ignore::pytest.PytestUnraisableExceptionWarning'
)


def hashes(folder):
  return {
    str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest()
    for path in folder.rglob('*')
    if path.is_file()
  }


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """A complete run that kept the checkpoints of steps 2, 4 and 6."""
  workdir = tmp_path_factory.mktemp('whole')
  train.train(tiny(steps=6, **{'run.keep': 3}), workdir)
  return workdir


@pytest.fixture
def workdir(whole, tmp_path):
  copy = tmp_path / 'work'
  shutil.copytree(whole, copy)
  return copy


@pytest.fixture(scope='module')
def targets():
  state, batches = make_targets(tiny(steps=6))
  yield state, batches
  batches.close()


# A run as `whole`, but it keeps one checkpoint, and ends itself somewhere.
KILLED = """
import os, signal, sys
from pathlib import Path
import jax
from grain import checkpoint
from reference.run import train
from tiny_runs import tiny

def kill(*_):
  os.kill(os.getpid(), signal.SIGKILL)

save, rename = checkpoint.CheckpointHandler.save, os.rename
def save_and_kill(*arguments, **keywords):
  save(*arguments, **keywords)
  kill()

{place}
jax.config.update('jax_num_cpu_devices', 8)
train.train(tiny(steps=6, **{{'run.keep': 1}}), Path(sys.argv[1]))
"""
# And the steps that a run has when it comes there.
KILLS = [
  # A checkpoint is being written.
  ('checkpoint.CheckpointHandler.save = save_and_kill', 0),
  # It is written, and about to become one.
  (
    "os.rename = lambda a, b: kill() if str(b)[-2:] == '/2' else rename(a, b)",
    0,
  ),
  # It is one, and what it replaces is still there.
  (
    "os.rename = lambda a, b: rename(a, b) or str(b)[-2:] == '/4' and kill()",
    0,
  ),
  # The record is being written.
  ('os.replace = kill', 4),
]


@pytest.mark.slow
def test_kills_leave_no_trace(whole, tmp_path):
  said = []
  for place, _ in KILLS:
    code = KILLED.format(place=place)
    result = forked_commands.run('-c', code, tmp_path)
    assert result.returncode == -signal.SIGKILL, result.stderr
    said.append(result.stdout)
  assert (tmp_path / 'metrics.unfinished').exists()
  result = forked_commands.run('-c', KILLED.format(place=''), tmp_path)
  assert result.returncode == 0, result.stderr
  resumed = re.findall(
    r'; (\d+) of 6 steps done', ''.join(said) + result.stdout
  )
  assert list(map(int, resumed)) == [*(done for _, done in KILLS), 4]
  state, position = saved(tmp_path, 6)
  expected_state, expected_position = saved(whole, 6)
  assert_equal(state, expected_state)
  assert position == expected_position
  assert rows_without_speed(tmp_path) == rows_without_speed(whole)
  # Nothing that was half written stays, and none was taken to be damaged.
  left = {path.name for path in (tmp_path / 'checkpoints').iterdir()}
  assert left == {'6'}
  assert not (tmp_path / 'damaged_checkpoints').exists()


def halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 1
  path.write_bytes(data)


def largest(folder):
  return max(folder.glob('state/d/*'), key=lambda path: path.stat().st_size)


DAMAGE = {
  'truncated arrays': lambda x: halve(largest(x)),
  'a bit of the arrays': lambda x: flip(largest(x)),
  'empty arrays': lambda x: largest(x).write_bytes(b''),
  'no arrays': lambda x: shutil.rmtree(x / 'state' / 'd'),
  'truncated manifest': lambda x: halve(x / 'state' / 'manifest.ocdbt'),
  'no manifest': lambda x: (x / 'state' / 'manifest.ocdbt').unlink(),
  'truncated metadata': lambda x: halve(x / 'state' / '_METADATA'),
  'no metadata': lambda x: (x / 'state' / '_METADATA').unlink(),
  'no state': lambda x: shutil.rmtree(x / 'state'),
  'truncated position': lambda x: halve(x / 'data' / 'process_0-of-1.json'),
  'no position': lambda x: (x / 'data' / 'process_0-of-1.json').unlink(),
  'no data': lambda x: shutil.rmtree(x / 'data'),
  'nothing at all': lambda x: [
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in x.iterdir()
  ],
}


@pytest.mark.slow
@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(damage, workdir, targets, capsys):
  state, batches = targets
  DAMAGE[damage](workdir / 'checkpoints' / '6')
  before = hashes(workdir / 'checkpoints' / '6')
  restored, about = checkpoint.restore(workdir, state, batches, SOFTWARE)
  expected_state, expected_position = saved(workdir, 4)
  assert_equal(
    conadv.dual_bn.main(restored.params), expected_state['params']['main']
  )
  assert int(restored.step) == 4
  assert about.dataset['images'] == 1437
  position = json.loads(json.dumps(batches.get_state()))
  assert position == json.loads(expected_position)
  assert steps_saved(workdir) == [2, 4]
  assert hashes(workdir / 'damaged_checkpoints' / '6') == before
  said = capsys.readouterr().out
  assert 'step 6 is damaged' in said
  assert f'{workdir}/damaged_checkpoints/6' in said
  assert 'resumes from step 4' in said


@pytest.mark.slow
def test_a_run_goes_on_exactly_after_damage(whole, workdir, capsys):
  for number in (4, 6):
    DAMAGE['no position'](workdir / 'checkpoints' / str(number))
  # The config is read before the rest is.
  (workdir / 'checkpoints' / '6' / 'config' / 'metadata').write_text('{')
  train.train(tiny(steps=6, **{'run.keep': 3}), workdir)
  assert '2 of 6 steps done' in capsys.readouterr().out
  assert steps_saved(workdir) == [2, 4, 6]
  for number in (4, 6):
    state, position = saved(workdir, number)
    expected_state, expected_position = saved(whole, number)
    assert_equal(state, expected_state)
    assert position == expected_position
  assert rows_without_speed(workdir) == rows_without_speed(whole)


def test_a_second_damaged_checkpoint_of_a_step_is_kept_too(workdir, targets):
  (workdir / 'damaged_checkpoints' / '6').mkdir(parents=True)
  DAMAGE['no manifest'](workdir / 'checkpoints' / '6')
  checkpoint.restore(workdir, *targets, SOFTWARE)
  kept = workdir / 'damaged_checkpoints'
  assert sorted(path.name for path in kept.iterdir()) == ['6', '6_2']
  assert not any((kept / '6').iterdir())


def test_nothing_is_moved_where_all_are_damaged(workdir):
  for number in (2, 4, 6):
    DAMAGE['truncated arrays'](workdir / 'checkpoints' / str(number))
  before = hashes(workdir)
  with pytest.raises(ValueError, match='one checkpoint must be whole') as error:
    train.train(tiny(steps=6), workdir)
  assert hashes(workdir) == before
  lines = str(error.value).splitlines()
  assert [line.split(':')[0].strip() for line in lines[1:4]] == [
    'step 6',
    'step 4',
    'step 2',
  ]
  assert '--workdir=' in lines[-1]


def test_other_software_is_named(workdir, targets, capsys):
  checkpoint.restore(workdir, *targets, SOFTWARE)
  assert 'has changed' not in capsys.readouterr().out
  checkpoint.restore(workdir, *targets, SOFTWARE | {'grain': '0.0'})
  version = importlib.metadata.version('grain')
  assert f'has changed: grain {version} -> 0.0. The' in capsys.readouterr().out


@pytest.mark.slow
def test_a_run_that_resumes_holds_one_state(workdir, monkeypatch):
  def restore(workdir, state, *arguments, restore=checkpoint.restore):
    leaves = jax.tree.leaves(state)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    return restore(workdir, state, *arguments)

  monkeypatch.setattr(checkpoint, 'restore', restore)
  train.train(tiny(steps=6), workdir)


def test_an_empty_folder_holds_nothing_to_restore(tmp_path, targets):
  assert checkpoint.restore(tmp_path, *targets, SOFTWARE) is None
  (tmp_path / 'checkpoints').mkdir()
  assert checkpoint.restore(tmp_path, *targets, SOFTWARE) is None


def test_another_number_of_processes_is_refused(workdir, monkeypatch):
  monkeypatch.setattr(checkpoint.jax, 'process_count', lambda: 2, raising=True)
  monkeypatch.setattr(checkpoint.hosts, 'gather', lambda value: [value] * 2)
  newest, fields = checkpoint.read_about(workdir), checkpoint.comparable
  with pytest.raises(ValueError, match='processes: given 2, stored 1'):
    agreement.check_config(workdir, *newest, fields(tiny(steps=6)), ())


# No file may have more than 4 KiB, which is less than the arrays need.
FULL = """
import resource
import jax
from reference import command, main
jax.config.update('jax_num_cpu_devices', 8)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
command.run(main.main)
"""


@pytest.mark.slow
def test_a_disk_that_is_full_costs_no_checkpoint(workdir):
  for number in (2, 6):
    shutil.rmtree(workdir / 'checkpoints' / str(number))
  before = hashes(workdir / 'checkpoints')
  config = tiny(steps=6, **{'run.keep': 1, 'run.checkpoint_every': 1})
  result = forked_commands.run(
    '-c', FULL, f'--workdir={workdir}', *flags(config)
  )
  assert result.returncode not in (0, -signal.SIGXFSZ)
  assert f'could not write to {workdir}/checkpoints: File' in result.stderr
  assert 'Likely the disk is full' in result.stderr
  assert 'Traceback' not in result.stderr
  assert '4 of 6 steps done' in result.stdout
  assert steps_saved(workdir) == [4]
  after = hashes(workdir / 'checkpoints')
  assert {name: after[name] for name in before} == before
