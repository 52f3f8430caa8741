"""Worker processes make the batches that threads make, and end with the run."""

import contextlib
import itertools
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time
from multiprocessing import resource_tracker
from pathlib import Path

import forked_commands
import numpy as np
import pytest
from forked_commands import ROOT
from prepared_images import break_two, prepare, write_images
from run_folders import assert_equal, saved, steps_saved
from tiny_runs import flags, tiny

from reference.configs import jpeg_folder
from reference.data import input_pipeline, jpeg, pieces, sources

BOTH = ('image', 'image_augmented')


def make_config(**run):
  config = jpeg_folder.get_config()
  config.batch_size = 6
  config.data.size = 8
  config.data.crop = 'random_resized'
  config.run.update(run)
  return config


def take(source, config, count, *, state=None, skipped=None, **options):
  batches = input_pipeline.train_batches(
    source, config, skipped={} if skipped is None else skipped, **options
  )
  try:
    if state is not None:
      batches.set_state(state)
    return list(itertools.islice(batches, count)), batches.get_state()
  finally:
    batches.close()
    assert not multiprocessing.active_children()


def assert_same(left, right):
  for a, b in zip(left, right, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      assert type(a[name]) is np.ndarray
      assert a[name].dtype == b[name].dtype
      np.testing.assert_array_equal(a[name], b[name])


def telling_source(count=20, bad=()):
  """The reason of a bad image tells of the process that met it."""

  def read(label):
    if label in bad:
      from jax._src import xla_bridge

      reason = f'process {os.getpid()}, devices {dict(xla_bridge._backends)}'
      raise jpeg.BadImageError(f'{label}.jpg', reason)
    image = np.random.default_rng(label).integers(256, size=(12, 12, 3))
    return image.astype(np.uint8), label

  classes = tuple(map(str, range(count)))
  return sources.Source(range(count), range(count), classes, read)


@pytest.mark.slow
def test_workers_make_the_same_batches_and_states(caplog):
  """On one of three hosts, where images are unreadable, and resumed."""
  bad = (1, 3, 7, 9, 15)
  source = telling_source(bad=bad)
  options = {'images': BOTH, 'host': 1, 'hosts': 3}
  alone, end = take(source, make_config(threads=3, workers=0), 60, **options)
  first, state = take(source, make_config(workers=0), 2, **options)
  assert_same(first, alone[:2])
  skipped = {}
  caplog.clear()
  middle, state = take(
    source,
    make_config(threads=2, workers=2),
    53,
    state=state,
    skipped=skipped,
    **options,
  )
  assert_same(middle, alone[2:55])
  # One process counts and names them, and neither of them is this one.
  assert set(skipped) == {f'{number}.jpg' for number in bad}
  assert [x.split(':')[0] for x in caplog.messages] == [
    f'Skipped {path}' for path in skipped
  ]
  for reason in skipped.values():
    [(process, devices)] = re.findall(r'process (\d+), devices (.*)', reason)
    assert int(process) != os.getpid()
    # JAX did not touch a device there.
    assert devices == '{}'
  rest, last = take(source, make_config(workers=0), 5, state=state, **options)
  assert_same(rest, alone[55:])
  assert last == end


@pytest.mark.slow
def test_a_worker_leaves_signals_to_the_run_and_is_missed(
  tmp_path, monkeypatch
):
  """It makes batches of shards, and is then killed."""
  # Not that of tests before: its start unblocks signals.
  tracker = resource_tracker.ResourceTracker()
  for name in ('ensure_running', 'getfd'):
    monkeypatch.setattr(resource_tracker, name, getattr(tracker, name))
  prepare(write_images(tmp_path / 'images'), tmp_path / 'shards')
  source = sources.array_record(str(tmp_path / 'shards'))
  alone, _ = take(source, make_config(), 5)
  batches = input_pipeline.train_batches(
    source, make_config(workers=1), skipped={}
  )
  try:
    assert_same(list(itertools.islice(batches, 5)), alone)
    [worker] = multiprocessing.active_children()
    # From its first instruction on, while it still loads modules.
    status = Path(f'/proc/{worker.pid}/status').read_text()
    blocked = int(re.search(r'SigBlk:\s*(\w+)', status)[1], 16)
    for number in (1, 2, 10, 15):
      assert blocked >> (number - 1) & 1, number
    worker.kill()
    # An error, and no wait.
    with pytest.raises(RuntimeError, match='exit code -9'):
      list(batches)
  finally:
    batches.close()


@pytest.mark.slow
def test_errors_arrive_as_from_threads(tmp_path):
  break_two(write_images(tmp_path))
  source = sources.jpeg_folder(str(tmp_path))

  def take_until_error(**run):
    config = make_config(**run)
    config.data.on_bad_image = 'stop'
    batches = input_pipeline.train_batches(source, config, skipped={})
    made = []
    with (
      contextlib.closing(batches),
      pytest.raises(jpeg.BadImageError, match=r'1\.JPEG is not: ') as error,
    ):
      made.extend(itertools.islice(batches, 8))
    return made, str(error.value)

  batches, error = take_until_error(workers=1)
  alone, expected = take_until_error()
  assert error == expected
  assert_same(batches, alone)


def test_fewer_than_no_workers():
  with pytest.raises(ValueError, match=r'Given -1.*--config\.run\.workers=0'):
    take(telling_source(), make_config(workers=-1), 1)


def is_alive(process):
  """Whether it runs; one that nobody waited for yet does not."""
  try:
    status = Path(f'/proc/{process}/stat').read_text()
  except (FileNotFoundError, ProcessLookupError):
    return False
  return status.rpartition(')')[2].split()[0] != 'Z'


def wait_until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


# Names its worker, and neither closes the batches nor guards its start.
SCRIPT = """
import multiprocessing, os, signal, sys
from reference.data import input_pipeline, sources
from reference.configs import digits

if __name__ == '__main__':
  config = digits.get_config()
  config.run.workers = 1
  batches = input_pipeline.train_batches(sources.digits(), config, skipped={})
  next(batches)
  [worker] = multiprocessing.active_children()
  print(worker.pid, flush=True)
  os.kill(os.getpid(), int(sys.argv[1]))
  raise ValueError
"""


@pytest.mark.slow
def test_no_worker_outlives_a_process_that_is_killed():
  result = forked_commands.run('-c', SCRIPT, signal.SIGKILL)
  assert result.returncode == -signal.SIGKILL
  wait_until(lambda: not is_alive(int(result.stdout)))


@pytest.mark.slow
def test_no_worker_outlives_a_process_that_fails(tmp_path):
  path = tmp_path / 'script.py'
  path.write_text(SCRIPT)
  result = subprocess.run(
    [sys.executable, str(path), '0'],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    capture_output=True,
    text=True,
  )
  assert result.returncode == 1
  assert 'ValueError' in result.stderr
  wait_until(lambda: not is_alive(int(result.stdout)))


def test_workers_that_only_start_are_ended(monkeypatch):
  """The last of two comes a little later; a third is no worker."""
  monkeypatch.setattr(pieces, '_opened', 2)
  processes = []

  def add(name):
    code = f'import time; time.sleep(60)  # {name}'
    processes.append(subprocess.Popen([sys.executable, '-c', code]))

  add('multiprocessing.spawn')
  add('multiprocessing.resource_tracker')
  late = threading.Timer(0.2, add, ['multiprocessing.spawn'])
  late.start()
  pieces.end_workers()
  late.join()
  first, other, last = processes
  assert first.wait(10) == last.wait(10) == -signal.SIGKILL
  assert other.poll() is None
  other.kill()
  other.wait()


# To its group, as a scheduler sends it.
STOPPED = forked_commands.STOPPED.format(kill='os.killpg(0, signal.SIGTERM)')


@pytest.mark.slow
def test_the_main_job_stops_by_a_signal_to_all_its_processes(tmp_path):
  """And goes on without workers."""
  config = tiny('vanilla', steps=12, **{'run.checkpoint_every': 100})

  def run(workdir, workers, *program):
    command = forked_commands.Command(
      *(program or ('-m', 'reference.main')),
      *flags(config),
      f'--workdir={workdir}',
      f'--config.run.workers={workers}',
    )
    return command.pid, command.finish()

  alone, stopped = tmp_path / 'alone', tmp_path / 'stopped'
  group, result = run(stopped, 1, '-c', STOPPED)
  assert result.returncode == 143, result.stderr
  [newest] = steps_saved(stopped)
  assert f'after step {newest} of 12' in result.stdout

  def nobody_is_left():
    with contextlib.suppress(ProcessLookupError):
      os.killpg(group, 0)
      return False
    return True

  wait_until(nobody_is_left)
  for workdir in (stopped, alone):
    _, result = run(workdir, 0)
    assert result.returncode == 0, result.stderr
  (state, position), (whole, end) = saved(stopped, 12), saved(alone, 12)
  assert_equal(state, whole)
  assert position == end
