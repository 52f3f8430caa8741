"""Two processes over loopback are one run: its start, its steps, its stop."""

import concurrent.futures
import errno
import importlib.metadata
import json
import os
import re
import shutil
import socket
import threading
import tomllib
from unittest import mock

import forked_commands
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from forked_commands import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src import distributed, xla_bridge
from jax.sharding import Mesh
from run_folders import read_csv, steps_saved
from tiny_runs import flags, make_targets, tiny

from reference.command import Mistake
from reference.run import hosts, parts, storage, train

STEPS = 24
CONFIG = tiny(
  steps=STEPS,
  **{
    'lars.peak': 1.0,
    'run.checkpoint_every': 10,
    'run.evaluate_every': STEPS,
  },
)
# By a signal to the second process. The first has it a second or two later.
STOPPED = forked_commands.STOPPED.format(
  kill='jax.process_index() and os.kill(os.getpid(), signal.SIGUSR1)'
)


def run_pair(workdir, *own_flags, program=('-m', 'reference.main')):
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  processes = [
    forked_commands.Command(
      *program,
      *flags(CONFIG),
      f'--workdir={workdir}',
      f'--coordinator=127.0.0.1:{port}',
      '--num_processes=2',
      f'--process_id={index}',
      *(own_flags if index else ()),
    )
    for index in range(2)
  ]
  ends = [process.finish() for process in processes]
  return [(end.returncode, end.stdout, end.stderr) for end in ends]


def read_state(workdir, target):
  with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
    return manager.restore(
      STEPS, args=ocp.args.Composite(state=ocp.args.StandardRestore(target))
    ).state


@pytest.mark.slow
def test_two_processes_that_are_stopped_and_resumed_are_one(
  tmp_path, monkeypatch
):
  alone, pair = tmp_path / 'alone', tmp_path / 'pair'
  stopped = run_pair(pair, program=('-c', STOPPED))
  assert [code for code, _, _ in stopped] == [138, 138], stopped
  # Both at the same step, or the arrays of the checkpoint would be missing.
  newest = steps_saved(pair)[-1]
  assert newest < STEPS
  assert f'Stopped by SIGUSR1 after step {newest} of' in stopped[0][1]

  resumed = run_pair(pair)
  assert [code for code, _, _ in resumed] == [0, 0], resumed
  assert '2 cpu device(s)' in resumed[0][1]
  assert f'; {newest} of {STEPS} steps done' in resumed[0][1]
  # The first process alone speaks and writes.
  for _, out, err in (stopped[1], resumed[1]):
    assert 'device(s)' not in out
    assert 'held-out' not in out
    assert 'img/s' not in err
  assert len(list((pair / 'tensorboard').iterdir())) == 2

  # The same on two devices of this process.
  def make_mesh(batch_size, *, accumulate=1):
    return Mesh(np.asarray(jax.devices()[:2]), ('data',))

  monkeypatch.setattr(parts, 'make_mesh', make_mesh)
  train.train(CONFIG, alone)
  left, right = read_csv(pair), read_csv(alone)
  assert len(left) == len(right) == STEPS
  for one, other in zip(left, right, strict=True):
    assert one.keys() == other.keys()
    for name in one.keys() - {'images_per_second'}:
      if one[name] or other[name]:
        np.testing.assert_allclose(
          float(one[name]), float(other[name]), rtol=1e-5, err_msg=name
        )
  assert left[-1]['held_out_images'] == '360'

  state, batches = make_targets(CONFIG)
  batches.close()
  one, other = (read_state(workdir, state) for workdir in (pair, alone))
  for a, b in zip(
    jax.tree.leaves((one.params, one.model_state, one.conadv_state)),
    jax.tree.leaves((other.params, other.model_state, other.conadv_state)),
    strict=True,
  ):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_processes_that_differ_do_not_start(tmp_path):
  ends = run_pair(tmp_path, '--config.lars.peak=3.0')
  for code, _, err in ends:
    assert code not in (0, 143)
    assert 'All processes must have the same config' in err
    assert '  lars.peak: process 1 has 3.0; the others have 1.0' in err
  assert list(tmp_path.iterdir()) == []


def expected_differences(held):
  """By brute force: whoever does not hold what most do."""
  found = set()
  for name in {name for fields in held for name in fields}:
    values = [fields.get(name, 'nothing') for fields in held]
    most = max(values.count(value) for value in values)
    usual = next(value for value in values if values.count(value) == most)
    for index, value in enumerate(values):
      if value != usual:
        found.add((name, index, value, usual))
  return found


@given(
  st.lists(
    st.dictionaries(st.sampled_from('abc'), st.integers(0, 2)),
    min_size=1,
    max_size=5,
  )
)
@settings(max_examples=50, deadline=None)
def test_differences_are_named(held):
  lines = hosts.differences(held)
  expected = expected_differences(held)
  assert len(lines) == len({name for name, *_ in expected})
  for name, index, value, usual in expected:
    [line] = [line for line in lines if line.startswith(f'  {name}: ')]
    assert f'process {index} has {json.dumps(value)}' in line
    assert line.endswith(f'the others have {json.dumps(usual)}')
    assert line.count('process ') == sum(name == x for x, *_ in expected)


def test_the_software_of_a_host_names_every_source_file():
  software = hosts.software()
  assert software['jax'] == jax.__version__
  for package in ('conadv_optax', 'reference'):
    for path in (ROOT / package).rglob('*.py'):
      assert len(software[str(path.relative_to(ROOT))]) == 12
  hashes = [value for name, value in software.items() if name.endswith('.py')]
  assert len(set(hashes)) >= len(hashes) - 2


def test_the_software_of_a_host_is_all_that_decides_a_result(monkeypatch):
  project = tomllib.loads((ROOT / 'pyproject.toml').read_text())['project']
  needed = {
    re.split(r'[\[>=]', requirement)[0]
    for requirement in (
      *project['dependencies'],
      *project['optional-dependencies']['reference'],
    )
  }
  # These check, parse, draw and report.
  needed -= {'chex', 'absl-py', 'ml_collections', 'tqdm', 'tensorboardX'}
  needed -= {'matplotlib', 'scikit-learn', 'pillow', 'scipy'}
  needed -= {'safetensors'}
  assert needed | {'jaxlib', 'libtpu', 'numpy'} <= hosts.software().keys()

  version = importlib.metadata.version

  def without_a_tpu(name):
    if name == 'libtpu':
      raise importlib.metadata.PackageNotFoundError(name)
    return version(name)

  monkeypatch.setattr(importlib.metadata, 'version', without_a_tpu)
  assert hosts.software()['libtpu'] == 'not installed'


def test_a_changed_source_file_changes_its_hash_alone(tmp_path, monkeypatch):
  before = hosts.software()
  for package in ('conadv_optax', 'reference'):
    shutil.copytree(ROOT / package, tmp_path / package)
  with (tmp_path / 'reference' / 'run' / 'loop.py').open('a') as file:
    file.write('\n')
  monkeypatch.setattr(
    hosts, '__file__', str(tmp_path / 'reference/run/hosts.py')
  )
  after = hosts.software()
  changed = {name for name in before if before[name] != after[name]}
  assert changed == {'reference/run/loop.py'}


def test_a_folder_that_one_process_does_not_see(tmp_path, monkeypatch):
  gather = hosts.gather

  def second_is_blind(value):
    return [value, False] if value is True else gather(value)

  monkeypatch.setattr(hosts, 'gather', second_is_blind)
  with pytest.raises(ValueError, match=r'process\(es\) \[1\].*--workdir='):
    storage.check_shared(tmp_path / 'work')
  assert list((tmp_path / 'work').iterdir()) == []


def in_two_processes(monkeypatch, function):
  """What two processes raise; they are threads here, that gather in turn."""
  here = threading.local()
  barrier = threading.Barrier(2, timeout=2)
  values = [None, None]

  def gather(value):
    values[here.index] = value
    barrier.wait()
    gathered = list(values)
    barrier.wait()
    return gathered

  def run(index):
    here.index = index
    try:
      function()
    except Exception as error:
      return error

  monkeypatch.setattr(hosts, 'gather', gather)
  monkeypatch.setattr(hosts, 'is_first', lambda: here.index == 0)
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    return list(pool.map(run, range(2)))


def test_a_folder_that_cannot_be_made_stops_every_process(
  tmp_path, monkeypatch
):
  (tmp_path / 'file').touch()
  workdir = tmp_path / 'file' / 'work'
  errors = in_two_processes(monkeypatch, lambda: storage.check_shared(workdir))
  for error in errors:
    assert isinstance(error, ValueError)
    assert f'must be writable. Given {workdir}: ' in str(error)
    assert 'Not a directory. Likely the path is mistyped' in str(error)


def test_a_folder_where_folders_are_not_renamed_stops_every_process(
  tmp_path, monkeypatch
):
  rename = os.rename

  def as_gcsfuse_does(source, target):
    if os.path.isdir(source) and os.listdir(source):
      raise OSError(errno.EMFILE, 'Too many open files')
    rename(source, target)

  monkeypatch.setattr(os, 'rename', as_gcsfuse_does)
  errors = in_two_processes(monkeypatch, lambda: storage.check_shared(tmp_path))
  for error in errors:
    assert isinstance(error, ValueError)
    assert f'Given {tmp_path}: [Errno 24] Too many open' in str(error)
    assert '--enable-hierarchical-namespace`' in str(error)
  assert list(tmp_path.iterdir()) == []
  monkeypatch.setattr(os, 'rename', rename)
  assert in_two_processes(
    monkeypatch, lambda: storage.check_shared(tmp_path)
  ) == [None, None]


def test_one_process_is_alike_and_sees_its_folder(tmp_path):
  hosts.check_alike({'any': 1})
  storage.check_shared(tmp_path / 'deep' / 'work')
  assert list((tmp_path / 'deep' / 'work').iterdir()) == []
  assert hosts.gather({'a': [1, None]}) == [{'a': [1, None]}]
  assert hosts.is_first()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'coordinator': 'a:1'}, r"coordinator='a:1'.*--process_id=1"),
    ({'num_processes': 2, 'process_id': 0}, 'coordinator=None.*--coordinator='),
    ({'coordinator': 'a:1', 'num_processes': 2}, 'process_id=None'),
    ({'distributed': True, 'process_id': 0}, 'finds the other processes'),
    (
      {'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2},
      'process_id=2',
    ),
    (
      {'coordinator': 'a', 'num_processes': 2, 'process_id': 1},
      "coordinator='a'",
    ),
  ],
)
def test_flags_that_do_not_belong_together(flags, message):
  given = {
    'distributed': False,
    'coordinator': None,
    'num_processes': None,
    'process_id': None,
  }
  with pytest.raises(ValueError, match=message):
    hosts.start(**{**given, **flags})


def test_what_is_accepted_is_compared(monkeypatch, tmp_path):
  found = {}

  def see(fields):
    found.update(fields)
    raise ValueError('seen')

  monkeypatch.setattr(hosts, 'check_alike', see)
  with pytest.raises(ValueError, match='seen'):
    train.train(tiny(), tmp_path, accept=['devices', 'data'])
  assert found['accept'] == ['data', 'devices']


def test_a_process_that_finds_no_others(monkeypatch):
  # As in a process that has just begun.
  monkeypatch.setattr(xla_bridge, 'backends_are_initialized', lambda: False)
  with pytest.raises(Mistake, match=r'nothing answers: .*leave the flag out'):
    hosts.start(
      distributed=True, coordinator=None, num_processes=None, process_id=None
    )


def test_what_one_process_lacks_stops_all(monkeypatch):
  def lacks():
    raise Mistake('There is no folder.')

  assert hosts.on_all(lambda: 3) == 3
  with pytest.raises(Mistake, match=r'^There is no folder\.$'):
    hosts.on_all(lacks)
  monkeypatch.setattr(hosts, 'gather', lambda value: ['', value or 'None.'])
  with pytest.raises(Mistake, match=r'^Process 1: There is no folder\.$'):
    hosts.on_all(lacks)
  with pytest.raises(Mistake, match=r'^Process 1: None\.$'):
    hosts.on_all(lambda: 3)


def test_one_process_needs_no_flags(monkeypatch):
  monkeypatch.setattr(jax.distributed, 'initialize', None)
  hosts.start(
    distributed=False, coordinator=None, num_processes=None, process_id=None
  )


@pytest.mark.parametrize('by_hand', [False, True])
@pytest.mark.parametrize(
  ('environment', 'visible'),
  [
    ({}, 'all'),
    ({'SLURM_STEP_NUM_NODES': '2'}, 'all'),
    # As JAX has it: a GPU for each of four processes on two hosts.
    ({'SLURM_STEP_NUM_NODES': '2', 'SLURM_NTASKS': '4'}, '0'),
    ({'JAX_LOCAL_DEVICE_IDS': '2,3'}, '2,3'),
  ],
)
def test_a_process_alone_on_its_host_sees_every_gpu_under_slurm(
  monkeypatch, environment, visible, by_hand
):
  slurm = {
    'SLURM_JOB_ID': '7',
    'SLURM_STEP_NODELIST': 'node[1-2]',
    'SLURM_NTASKS': '2',
    'SLURM_PROCID': '1',
    'SLURM_LOCALID': '0',
  }
  for name, value in {**slurm, **environment}.items():
    monkeypatch.setenv(name, value)
  # JAX's own detection; only what connects is left out.
  state = distributed.State()
  monkeypatch.setattr(distributed, 'global_state', state)
  monkeypatch.setattr(xla_bridge, 'backends_are_initialized', lambda: False)
  monkeypatch.setattr(
    distributed._jax, 'get_distributed_runtime_client', mock.MagicMock()
  )
  monkeypatch.setattr(state, 'initialize_preemption_sync_manager', lambda: None)
  updates = {'jax_cuda_visible_devices': 'all'}
  monkeypatch.setattr(distributed.config, 'update', updates.__setitem__)
  hosts.start(
    distributed=not by_hand,
    coordinator='node1:1234' if by_hand else None,
    num_processes=int(os.environ['SLURM_NTASKS']) if by_hand else None,
    process_id=1 if by_hand else None,
  )
  assert state.process_id == 1
  assert state.num_processes == int(os.environ['SLURM_NTASKS'])
  assert updates['jax_cuda_visible_devices'] == visible
