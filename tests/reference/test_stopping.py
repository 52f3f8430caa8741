"""Signals: what is under way is saved, and twice Ctrl-C does not wait."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from reference.run import stopping

ROOT = Path(__file__).parents[2]


def wait_until(condition):
  deadline = time.monotonic() + 20
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.001)


@pytest.fixture
def listening():
  """Signals as at a terminal: a job in the background ignores Ctrl-C."""
  before = {x: signal.signal(x, signal.SIG_DFL) for x in stopping.SIGNALS}
  yield
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.mark.parametrize('number', stopping.SIGNALS)
def test_every_signal_stops_at_the_end_of_a_step(number, capsys, listening):
  before = {x: signal.getsignal(x) for x in stopping.SIGNALS}
  threads = set(threading.enumerate())
  with stopping.watch(lambda: None) as stop:
    stop.saves = True
    assert not stop.reached(1)
    os.kill(os.getpid(), number)
    wait_until(lambda: stop.reached(2))
    assert stop.reached(3)
    assert stop.by() is number
  assert {x: signal.getsignal(x) for x in stopping.SIGNALS} == before
  # Threads of earlier tests may end meanwhile.
  assert set(threading.enumerate()) <= threads
  out = capsys.readouterr().out
  assert f'{number.name}: the step under way is finished and saved' in out


@pytest.fixture
def ends(monkeypatch):
  """The statuses with which the process would have ended."""
  statuses = []
  monkeypatch.setattr(stopping.os, '_exit', statuses.append)
  monkeypatch.setattr(
    stopping.pieces, 'end_workers', lambda: statuses.append('workers')
  )
  monkeypatch.setattr(stopping.threading, 'Timer', lambda *_: threading.Event)
  monkeypatch.setattr(threading.Event, 'start', lambda: None, raising=False)
  return statuses


def test_other_signals_wait_and_ctrl_c_does_not(ends, capsys):
  released = []
  stop = stopping.Stop(lambda: released.append(True))
  stop.saves = True
  for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM, signal.SIGHUP):
    stop.receive(number)
  assert stop.reached(1)
  assert ends == released == []
  stop.receive(signal.SIGINT)
  assert ends == ['workers', 130]
  assert released == [True]
  assert stop.by() is signal.SIGUSR1
  assert 'Ended by SIGINT at once' in capsys.readouterr().out


def test_before_the_first_step_a_signal_does_not_wait(ends, capsys):
  stopping.Stop(lambda: None).receive(signal.SIGTERM)
  assert ends == ['workers', 143]
  assert 'there is nothing to save' in capsys.readouterr().out


def test_what_is_ignored_stays_so():
  """As under nohup."""
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with stopping.watch(lambda: None) as stop:
      stop.saves = True
      os.kill(os.getpid(), signal.SIGHUP)
      os.kill(os.getpid(), signal.SIGTERM)
      wait_until(lambda: stop.reached(1))
      assert stop.by() is signal.SIGTERM
  finally:
    signal.signal(signal.SIGHUP, before)


def start(*command, **options):
  return subprocess.Popen(
    [sys.executable, *command],
    env={**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **options,
  )


def test_ctrl_c_while_modules_load_has_no_traceback():
  # What runs in the background of a shell ignores it.
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    process = start('-X', 'importtime', '-m', 'reference.main')
  finally:
    signal.signal(signal.SIGINT, before)
  lines = []
  for line in process.stderr:
    lines.append(line)
    if line.endswith(' jax._src.config\n'):
      process.send_signal(signal.SIGINT)
  process.communicate(timeout=60)
  assert process.returncode == -signal.SIGINT
  assert all(line.startswith('import time:') for line in lines)


# What it says after its reader left, and that it goes on.
TALKS = """
import sys
from reference import command
def main():
  print('first')
  sys.stdin.readline()
  for _ in range(10000):
    print('lost')
    print('lost', file=sys.stderr)
  sys.exit(7)
command.run(main)
"""


def test_a_reader_that_leaves_does_not_end_a_run():
  process = start('-c', TALKS, stdin=subprocess.PIPE)
  # Before the end: nothing waits in a buffer.
  assert process.stdout.readline() == 'first\n'
  process.stdout.close()
  process.stderr.close()
  process.stdin.write('\n')
  process.stdin.close()
  assert process.wait(60) == 7


# Python's own handlers would wait for the end of this, as of a compilation.
BUSY = """
import hashlib, signal, sys
from reference.run import stopping
# What runs in the background of a shell ignores it.
signal.signal(signal.SIGINT, signal.SIG_DFL)
with stopping.watch(lambda: print('released')) as stop:
  stop.saves = sys.argv[1] == 'saves'
  print('busy', flush=True)
  hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)
"""


@pytest.mark.slow
@pytest.mark.parametrize('times', [1, 2])
def test_a_busy_main_thread_does_not_keep_the_process(times):
  process = start('-c', BUSY, 'saves' if times == 2 else 'not yet')
  assert process.stdout.readline() == 'busy\n'
  process.send_signal(signal.SIGINT)
  if times == 2:
    assert process.stdout.readline().startswith('SIGINT: the step under way')
    process.send_signal(signal.SIGINT)
  out, err = process.communicate(timeout=60)
  assert (process.returncode, err) == (130, '')
  assert out.startswith('released\n')
