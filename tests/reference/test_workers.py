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
from pathlib import Path

import jax
import numpy as np
import pytest
from prepared_images import break_two, prepare, write_images
from run_folders import assert_equal, read_csv, saved, steps_saved

from reference.configs import jpeg_folder
from reference.data import input_pipeline, jpeg, pieces, sources

ROOT = Path(__file__).parents[2]
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


def telling_source(count=20, bad=(3, 7)):
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
  """Also where images are unreadable, and from one number to another."""
  source = telling_source()
  alone, end = take(source, make_config(threads=3, workers=0), 12, images=BOTH)
  skipped = {}
  two = make_config(threads=2, workers=2)
  caplog.clear()
  first, state = take(source, two, 7, skipped=skipped, images=BOTH)
  # One process counts and names them, and neither of them is this one.
  assert set(skipped) == {'3.jpg', '7.jpg'}
  assert [x.split(':')[0] for x in caplog.messages] == [
    f'Skipped {path}' for path in skipped
  ]
  for reason in skipped.values():
    [(process, devices)] = re.findall(r'process (\d+), devices (.*)', reason)
    assert int(process) != os.getpid()
    # JAX did not touch a device there.
    assert devices == '{}'
  one = make_config(threads=1, workers=1)
  rest, last = take(source, one, 5, state=state, images=BOTH)
  assert_same(first + rest, alone)
  assert last == end
  assert_same(
    take(source, make_config(workers=0), 5, state=state, images=BOTH)[0], rest
  )


@pytest.mark.slow
def test_workers_leave_signals_to_the_run():
  """From their first instruction on, while they still load modules."""
  batches = input_pipeline.train_batches(
    telling_source(), make_config(workers=2), skipped={}
  )
  try:
    next(batches)
    for worker in multiprocessing.active_children():
      status = Path(f'/proc/{worker.pid}/status').read_text()
      blocked = int(re.search(r'SigBlk:\s*(\w+)', status)[1], 16)
      for number in (1, 2, 10, 15):
        assert blocked >> (number - 1) & 1, number
  finally:
    batches.close()


@pytest.mark.slow
def test_hosts_have_workers_of_their_own():
  source = telling_source(bad=())
  alone, _ = take(source, make_config(), 4)
  parts = [
    take(source, make_config(workers=1), 4, host=host, hosts=2)[0]
    for host in (0, 1)
  ]
  together = [
    {name: np.concatenate([left[name], right[name]]) for name in left}
    for left, right in zip(*parts, strict=True)
  ]
  assert_same(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize('form', ['jpeg_folder', 'array_record'])
def test_every_source_reaches_the_workers(form, tmp_path):
  folder = write_images(tmp_path / 'images')
  if form == 'array_record':
    prepare(folder, tmp_path / 'shards')
    source = sources.array_record(str(tmp_path / 'shards'))
  else:
    break_two(folder)
    source = sources.jpeg_folder(str(folder))
  alone, _ = take(source, make_config(), 5)
  skipped = {}
  batches, _ = take(source, make_config(workers=1), 5, skipped=skipped)
  assert_same(batches, alone)
  assert [Path(x).name for x in skipped] == ['1.JPEG'] * (form == 'jpeg_folder')


@pytest.mark.slow
def test_errors_arrive_as_from_threads():
  config = make_config(workers=1)
  config.data.on_bad_image = 'stop'
  with pytest.raises(jpeg.BadImageError, match=r'7\.jpg is not: process'):
    take(telling_source(bad=(7,)), config, 8)
  config.data.on_bad_image = 'skip'
  with pytest.raises(ValueError, match=r'At least one of 20 images.*none is'):
    take(telling_source(bad=range(20)), config, 1)


@pytest.mark.slow
def test_a_worker_that_is_killed_is_an_error_and_no_wait():
  batches = input_pipeline.train_batches(
    telling_source(), make_config(workers=1), skipped={}
  )
  try:
    next(batches)
    [worker] = multiprocessing.active_children()
    worker.kill()
    with pytest.raises(RuntimeError, match='exit code -9'):
      list(batches)
  finally:
    batches.close()


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


def start(*command, **options):
  return subprocess.Popen(
    [sys.executable, *command],
    env={
      **os.environ,
      'PYTHONPATH': str(ROOT),
      'JAX_PLATFORMS': 'cpu',
      'JAX_COMPILATION_CACHE_DIR': jax.config.jax_compilation_cache_dir,
      'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.2',
    },
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def wait_until(condition, seconds=60):
  deadline = time.monotonic() + seconds
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.05)


# Names its workers, and neither closes the batches nor guards its start.
SCRIPT = """
import multiprocessing, sys, time
from reference.data import input_pipeline, sources
from reference.configs import digits

if __name__ == '__main__':
  config = digits.get_config()
  config.run.workers = 2
  batches = input_pipeline.train_batches(sources.digits(), config, skipped={})
  next(batches)
  print(*[x.pid for x in multiprocessing.active_children()], flush=True)
  if sys.argv[1] == 'sleep':
    time.sleep(600)
  assert sys.argv[1] != 'fail'
"""


@pytest.mark.slow
@pytest.mark.parametrize(
  ('end', 'code'),
  [('kill', -signal.SIGKILL), ('return', 0), ('fail', 1)],
)
def test_no_worker_outlives_its_process(end, code, tmp_path):
  path = tmp_path / 'script.py'
  path.write_text(SCRIPT)
  process = start(str(path), 'sleep' if end == 'kill' else end)
  workers = [int(x) for x in process.stdout.readline().split()]
  assert len(workers) == 2
  if end == 'kill':
    assert all(map(is_alive, workers))
    process.kill()
  process.communicate(timeout=100)
  assert process.returncode == code
  wait_until(lambda: not any(map(is_alive, workers)))


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


# Slow steps: the run must not end before the signal.
SLOW = """
import time
from absl import app
from reference import main
from reference.run import loop

def fetch(*arguments, fetch=loop.fetch, **keywords):
  time.sleep(0.2)
  return fetch(*arguments, **keywords)

if __name__ == '__main__':
  loop.fetch = fetch
  app.run(main.main)
"""


@pytest.mark.slow
def test_the_main_job_stops_by_a_signal_to_all_its_processes(tmp_path):
  """As a scheduler sends it; resumed with another number of workers."""
  path = tmp_path / 'slow.py'
  path.write_text(SLOW)
  flags = [
    '--config.method=vanilla',
    '--config.batch_size=16',
    f'--config.epochs={11.5 * 16 / 1437}',
    f'--config.lars.warmup_epochs={16 / 1437}',
    '--config.model.stage_sizes=(1,)',
    '--config.model.filters=4',
    '--config.run.log_every=1',
    '--config.run.checkpoint_every=100',
  ]

  def run(workdir, workers):
    return start(
      str(path),
      *flags,
      f'--workdir={workdir}',
      f'--config.run.workers={workers}',
      start_new_session=True,
    )

  alone, stopped = tmp_path / 'alone', tmp_path / 'stopped'
  process = run(stopped, 2)
  table = stopped / 'metrics.csv'
  wait_until(
    lambda: process.poll() or (table.exists() and len(read_csv(stopped)) > 1),
    200,
  )
  assert process.poll() is None, process.communicate()[1]
  os.killpg(process.pid, signal.SIGTERM)
  out, err = process.communicate(timeout=100)
  assert process.returncode == 143, err
  [newest] = steps_saved(stopped)
  assert f'after step {newest} of 12' in out

  def nobody_is_left():
    with contextlib.suppress(ProcessLookupError):
      os.killpg(process.pid, 0)
      return False
    return True

  wait_until(nobody_is_left)
  for workdir, workers in ((stopped, 1), (alone, 0)):
    process = run(workdir, workers)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
  (state, position), (whole, end) = saved(stopped, 12), saved(alone, 12)
  assert_equal(state, whole)
  assert position == end
