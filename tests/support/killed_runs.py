"""Runs the main job and kills it, ten times, and then lets it end.

`python killed_runs.py WORKDIR [FLAG ...]`. Every run is a process of its own;
it is forked before a device is touched, so that modules are imported once.
"""

import os
import random
import signal
import sys
import threading
import time

from absl import app
from grain import checkpoint as grain_checkpoint

from reference.run import metrics

# In the middle of: a step or a checkpoint, whichever the moment hits; writing
# a checkpoint; replacing the CSV.
MOMENTS = ['any'] * 6 + ['checkpoint'] * 2 + ['csv'] * 2


def kill():
  os.kill(os.getpid(), signal.SIGKILL)


def plant(moment, rows, delay):
  """Makes this process kill itself a few rows after it has started."""
  written = 0

  def add(record, row, add=metrics.add):
    nonlocal written
    add(record, row)
    written += 1
    if moment == 'any' and written == rows:
      threading.Timer(delay, kill).start()
    if moment == 'any' and written == rows + 3:
      # However fast the machine is, the run must not get to its end.
      time.sleep(60)

  def replace(*paths, replace=os.replace):
    if moment == 'csv' and written == rows:
      kill()
    replace(*paths)

  def save(self, directory, *arguments, **keywords):
    save_data(self, directory, *arguments, **keywords)
    if moment == 'checkpoint' and written >= rows:
      kill()

  save_data = grain_checkpoint.CheckpointHandler.save
  metrics.add = add
  metrics.os.replace = replace
  grain_checkpoint.CheckpointHandler.save = save


def run(program, flags, *kill_at):
  """The number of the signal that ended the run, or 0."""
  child = os.fork()
  if not child:
    if kill_at:
      plant(*kill_at)
    app.run(program, argv=['main', *flags])
  return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == '__main__':
  # Not above: pytest imports this file too, and `main` defines flags.
  from reference.main import main

  workdir, *flags = sys.argv[1:]
  assert run(main, [f'--workdir={workdir}/whole', *flags]) == 0
  rng = random.Random(0)
  rng.shuffle(MOMENTS)
  flags.append(f'--workdir={workdir}/killed')
  for moment in MOMENTS:
    kill_at = moment, rng.randint(3, 5), rng.uniform(0, 0.1)
    assert run(main, flags, *kill_at) == -signal.SIGKILL, kill_at
  assert run(main, flags) == 0
