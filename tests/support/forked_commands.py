"""Commands, in forks of a process that has loaded their modules.

To load them takes three seconds, which so are spent once. That process touched
no device, or it could not be forked. What a command needs of an interpreter's
own start and end is tested with one.
"""

import functools
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
# None of them defines flags, which the commands define anew.
LOADED = (
  'reference.data.evaluation_sets',
  'reference.data.preparation',
  'reference.run.exports',
  'reference.run.train',
  'sklearn.datasets',
)
# The main job, which sends a signal at its second step, and takes its time
# until that has been received.
STOPPED = """
import os, signal, time
import jax
from reference import command, main
from reference.run import loop

def fetch(*arguments, done, fetch=loop.fetch, **keywords):
  if done == 2:
    {kill}
  time.sleep(0.2)
  return fetch(*arguments, done=done, **keywords)

loop.fetch = fetch
command.run(main.main)
"""


@functools.cache
def fork():
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(list(LOADED))
  with mock.patch.dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS='cpu'):
    forkserver.ensure_running()
  return context


def become(command, output, environment):
  """What the interpreter would do, as the leader of a group of its own."""
  os.setsid()
  # What runs in the background of a shell ignores it.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  for number, name in ((1, 'out'), (2, 'err')):
    os.dup2(os.open(output / name, os.O_CREAT | os.O_WRONLY), number)
  os.environ.update(environment)
  form, program, *flags = map(str, command)
  sys.argv = [form, *flags]
  if form == '-m':
    runpy.run_module(program, run_name='__main__', alter_sys=True)
  else:
    exec(program, {'__name__': '__main__'})


class Command:
  """`python -m MODULE FLAG ...` or `python -c CODE FLAG ...`."""

  def __init__(self, *command, **environment):
    self._command = command
    self._output = Path(tempfile.mkdtemp())
    arguments = command, self._output, environment
    self._process = fork().Process(target=become, args=arguments)
    self._process.start()
    self.pid = self._process.pid

  def finish(self):
    """Waits for its end; what `subprocess.run` returns."""
    self._process.join(300)
    code = self._process.exitcode
    out, err = ((self._output / x).read_text() for x in ('out', 'err'))
    shutil.rmtree(self._output)
    assert code is not None, out + err
    return subprocess.CompletedProcess(self._command, code, out, err)


def run(*command, **environment):
  return Command(*command, **environment).finish()
