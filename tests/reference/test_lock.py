"""A work folder takes one run, and a dead one does not keep it."""

import json
import os
import subprocess
import threading
import time

import pytest
from tiny_runs import tiny

from reference import command
from reference.run import lock, train


@pytest.fixture
def living():
  """Another process, until it is killed."""
  process = subprocess.Popen(['sleep', '600'])
  yield process
  process.kill()
  process.wait()


def write(workdir, process, **changes):
  """The lock of another run."""
  owner = {
    'host': 'worker-3',
    'process': process,
    'since': '2026-01-02T03:04:05+00:00',
    'started': lock._started(process),
    'place': lock._place(),
    **changes,
  }
  path = workdir / 'lock_other.json'
  path.write_text(json.dumps(owner))
  return path


def locks(workdir):
  return list(workdir.glob('lock_*'))


def test_a_folder_is_held_until_the_run_ends(tmp_path):
  with lock.hold(tmp_path):
    [path] = locks(tmp_path)
    owner = json.loads(path.read_text())
    assert owner['process'] == os.getpid()
    with (
      pytest.raises(command.Mistake, match=f'process {os.getpid()} on'),
      lock.hold(tmp_path),
    ):
      pass
    assert locks(tmp_path) == [path]
  assert locks(tmp_path) == []


def test_a_second_run_is_told_who_the_first_is(tmp_path, living):
  path = write(tmp_path, living.pid)
  with pytest.raises(command.Mistake) as error:
    train.train(tiny(), tmp_path)
  assert (
    f'process {living.pid} on worker-3 has been running since '
    '2026-01-02T03:04:05+00:00'
  ) in str(error.value)
  assert f'--workdir={tmp_path}_2' in str(error.value)
  assert list(tmp_path.iterdir()) == [path]


def test_a_killed_run_of_this_host_gives_way_at_once(tmp_path, living):
  path = write(tmp_path, living.pid)
  living.kill()
  # Its parent has not asked for it yet.
  while lock._started(living.pid) not in ('ended', ''):
    time.sleep(0.01)
  with lock.hold(tmp_path):
    assert path not in locks(tmp_path)


def test_another_process_with_the_number_of_a_dead_one(tmp_path, living):
  write(tmp_path, living.pid, started='1')
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('content', ['elsewhere', 'cut off'])
def test_a_dead_run_of_another_host_gives_way(
  content, tmp_path, monkeypatch, capsys, living
):
  monkeypatch.setattr(lock, '_SILENT', 0.3)
  # A number that is another process here.
  path = write(tmp_path, living.pid, place='elsewhere')
  if content == 'cut off':
    path.write_text(path.read_text()[:40])
  with lock.hold(tmp_path):
    assert path not in locks(tmp_path)
  assert 'for a sign of life' in capsys.readouterr().out


def test_one_that_is_long_dead_is_not_waited_for(tmp_path, living):
  path = write(tmp_path, living.pid, place='elsewhere')
  os.utime(path, (0, time.time() - 3600))
  started = time.monotonic()
  with lock.hold(tmp_path):
    pass
  assert time.monotonic() - started < 30


@pytest.fixture
def impatient(monkeypatch):
  """Looks more often whether another run lives, for as long as before."""
  monkeypatch.setattr(
    lock.time, 'sleep', lambda seconds, sleep=time.sleep: sleep(0.01)
  )


def test_a_living_run_of_another_host_keeps_the_folder(
  tmp_path, monkeypatch, impatient
):
  """Its heart beats here, for a process that is not here."""
  monkeypatch.setattr(lock, '_SILENT', 20.0)
  monkeypatch.setattr(lock, '_BEAT', 0.05)
  other = lock.Lock(tmp_path)
  with monkeypatch.context() as there:
    there.setattr(lock, '_place', lambda: 'elsewhere')
    there.setattr(lock.socket, 'gethostname', lambda: 'worker-3')
    assert other.take() == ''
  with pytest.raises(command.Mistake, match='on worker-3'), lock.hold(tmp_path):
    pass
  other.release()
  assert locks(tmp_path) == []


def test_of_many_at_once_no_two_hold_it(tmp_path, impatient):
  barrier = threading.Barrier(8)
  taken = []

  def contend():
    held = lock.Lock(tmp_path)
    barrier.wait()
    if not held.take():
      taken.append(held)

  for _ in range(20):
    contenders = [threading.Thread(target=contend) for _ in range(8)]
    for thread in contenders:
      thread.start()
    for thread in contenders:
      thread.join()
    assert len(taken) <= 1
    for held in taken:
      held.release()
    taken.clear()
    assert locks(tmp_path) == []


def test_a_run_that_lost_its_folder_writes_no_more(tmp_path, living):
  held = lock.Lock(tmp_path)
  assert held.take() == ''
  held.check()
  [path] = locks(tmp_path)
  path.unlink()
  # One took it over, and has ended.
  with pytest.raises(command.Mistake, match='start the same command again'):
    held.check()
  assert locks(tmp_path) == []

  other = write(tmp_path, living.pid)
  with pytest.raises(command.Mistake, match='one run at a time'):
    held.check()
  assert locks(tmp_path) == [other]
