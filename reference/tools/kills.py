"""Kills small runs at random moments: `python -m reference.tools.kills`.

A run on scikit-learn's digits is started, ended by a signal at a random moment,
and started again, until it is complete; then another. After every kill the
newest checkpoint is compared, bit for bit, with that of the same step of a run
that nothing disturbed; and so are, at the end, both records.
"""

import collections
import csv
import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging

from reference import command
from reference.tools import tables

_KILLS = flags.DEFINE_integer('kills', 100, 'How many.', lower_bound=1)
_SEED = flags.DEFINE_integer('seed', 0, 'Of the moments.')
_OUT = flags.DEFINE_string('out', 'runs/kills', 'A folder for the runs.')

_ROOT = Path(__file__).parents[2]
_STEPS = 48
_FLAGS = (
  '--config.batch_size=16',
  f'--config.epochs={(_STEPS - 0.5) * 16 / 1437}',
  '--config.lars.warmup_epochs=0.1',
  # Its weights stay finite, and each step counts.
  '--config.lars.peak=1.0',
  '--config.model.stage_sizes=(1,)',
  '--config.model.filters=4',
  '--config.run.log_every=1',
  '--config.run.evaluate_every=12',
)
_SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


class Mode(NamedTuple):
  """How a run is made.

  Attributes:
    name: for the table.
    processes: how many.
    flags: beside those of every run.
  """

  name: str
  processes: int
  flags: tuple[str, ...]


_MODES = (
  Mode('one process', 1, ()),
  Mode('with two workers', 1, ('--config.run.workers=2',)),
  Mode('two processes', 2, ()),
)


class Run:
  """The processes of one run."""

  def __init__(self, mode: Mode, workdir: Path, *own_flags: str):
    with socket.socket() as free:
      free.bind(('127.0.0.1', 0))
      port = free.getsockname()[1]
    together = [
      [
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={mode.processes}',
        f'--process_id={index}',
      ]
      for index in range(mode.processes)
    ]
    self._processes = [
      subprocess.Popen(
        [
          *(sys.executable, '-m', 'reference.main', f'--workdir={workdir}'),
          *(*_FLAGS, *mode.flags, *own_flags),
          *(together[index] if mode.processes > 1 else ()),
        ],
        cwd=_ROOT,
        env={
          **os.environ,
          'JAX_PLATFORMS': 'cpu',
          'JAX_COMPILATION_CACHE_DIR': str(workdir.parent / 'compiled'),
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A group, as of a terminal, which Ctrl-C reaches whole.
        start_new_session=True,
      )
      for index in range(mode.processes)
    ]

  def is_over(self) -> bool:
    """Whether a process ended by itself."""
    return any(process.poll() is not None for process in self._processes)

  def wait_for_a_row(self, workdir: Path) -> None:
    """Waits until it records a step, or ended by itself."""
    path = workdir / 'metrics.csv'
    before = path.stat().st_mtime_ns if path.exists() else 0
    while not self.is_over():
      if path.exists() and path.stat().st_mtime_ns != before:
        return
      time.sleep(0.005)

  def send(self, number: int, which: list[int]) -> None:
    """Sends a signal to some of the processes, and to their workers."""
    for index in which:
      process = self._processes[index]
      if number == signal.SIGKILL:
        process.kill()
      elif process.poll() is None:
        os.killpg(process.pid, number)

  def end(self, *, patience: float = 60) -> tuple[list[int], str, str]:
    """Statuses, and what was printed.

    Args:
      patience: seconds after which those are killed that did not end, as when
        another one is gone. Schedulers do so too.
    """
    deadline = time.monotonic() + patience
    for process in self._processes:
      try:
        process.wait(max(0.1, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        process.kill()
    printed = [process.communicate() for process in self._processes]
    return (
      [process.returncode for process in self._processes],
      ''.join(out for out, _ in printed),
      ''.join(error for _, error in printed),
    )


def _steps(workdir: Path) -> list[int]:
  folder = workdir / 'checkpoints'
  if not folder.exists():
    return []
  return sorted(int(x.name) for x in folder.iterdir() if x.name.isdigit())


def _read(workdir: Path, number: int) -> dict[str, Any]:
  """All that a checkpoint holds, whatever devices wrote it."""
  folder = workdir.absolute() / 'checkpoints' / str(number)
  with ocp.PyTreeCheckpointer() as reader:
    tree = reader.metadata(folder / 'state').item_metadata.tree
    state = reader.restore(
      folder / 'state',
      ocp.args.PyTreeRestore(
        restore_args=jax.tree.map(
          lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree
        )
      ),
    )
  arrays = {
    jax.tree_util.keystr(path): np.asarray(
      jax.random.key_data(x)
      if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
      else x
    )
    for path, x in jax.tree_util.tree_leaves_with_path(state)
  }
  texts = {
    str(path.relative_to(folder)): path.read_text()
    for item in ('data', 'config', 'dataset', 'changes')
    for path in sorted((folder / item).iterdir())
    if path.name != 'commit_success.txt'
  }
  return arrays | texts


def _differences(left: dict[str, Any], right: dict[str, Any]) -> list[str]:
  return [
    name
    for name in sorted(left.keys() | right.keys())
    if name not in left
    or name not in right
    or type(left[name]) is not type(right[name])
    or (
      left[name] != right[name]
      if isinstance(left[name], str)
      else left[name].tobytes() != right[name].tobytes()
    )
  ]


def _rows(workdir: Path) -> list[dict[str, str]]:
  with (workdir / 'metrics.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  for row in rows:
    del row['images_per_second']
  return rows


def _allowed(number: int) -> set[int]:
  """The statuses after a signal: of its own, or as the run was over."""
  if number == signal.SIGKILL:
    # Where one process is killed, JAX aborts the others.
    return {-number, -signal.SIGABRT}
  return {128 + number, -number, 0}


class Campaign:
  """Kills of runs that are made in one way."""

  def __init__(self, mode: Mode, out: Path, rng: random.Random):
    self._mode = mode
    self._out = out / mode.name.replace(' ', '_')
    self._rng = rng
    self._whole = self._out / 'whole'
    self.counts: collections.Counter[tuple[str, str]] = collections.Counter()
    self.faults: list[str] = []
    self.complete = 0
    self._begun = 0
    self._seconds = 0.0

  def measure(self) -> None:
    """The run that nothing disturbs, twice: the first one compiles."""
    shutil.rmtree(self._out, ignore_errors=True)
    for name in ('compiling', 'whole'):
      started = time.monotonic()
      run = Run(
        self._mode,
        self._out / name,
        '--config.run.checkpoint_every=1',
        '--config.run.keep=1000',
      )
      while not run.is_over():
        time.sleep(0.1)
      statuses, _, error = run.end()
      if any(statuses):
        raise RuntimeError(f'{statuses}: {error}')
      self._seconds = time.monotonic() - started

  def _fault(self, workdir: Path, text: str) -> None:
    self.faults.append(f'{self._mode.name}, {workdir}: {text}')
    print(self.faults[-1], flush=True)

  def _compare(self, workdir: Path, number: int) -> None:
    found = _differences(_read(workdir, number), _read(self._whole, number))
    if found:
      self._fault(workdir, f'step {number} differs in {", ".join(found[:5])}')

  def _hit(self, workdir: Path) -> bool:
    """Starts the run and kills it; returns whether it was over before."""
    before = _steps(workdir)
    number = self._rng.choice(_SIGNALS)
    which = list(range(self._mode.processes))
    if self._rng.random() < 0.5:
      which = [self._rng.choice(which)]
    run = Run(self._mode, workdir, '--config.run.checkpoint_every=3')
    seconds = self._seconds
    if self._rng.random() < 0.75:
      # Most of the time it only starts.
      run.wait_for_a_row(workdir)
      seconds /= 4
    deadline = time.monotonic() + self._rng.uniform(0, seconds)
    while time.monotonic() < deadline and not run.is_over():
      time.sleep(0.005)
    if run.is_over():
      statuses, _, error = run.end()
      if any(statuses):
        self._fault(workdir, f'by itself {statuses}: {error[-2000:]}')
      return True
    run.send(number, which)
    statuses, out, error = run.end(
      patience=3 if number == signal.SIGKILL else 60
    )
    told = f'{signal.Signals(number).name} to {which}: {statuses}: '
    if not {statuses[index] for index in which} <= _allowed(number):
      self._fault(workdir, told + error[-2000:])
    if (
      number != signal.SIGKILL
      and len(which) == len(statuses)
      and ('Traceback' in error or 'Fatal' in error)
    ):
      self._fault(workdir, told + error[-2000:])
    self._look(workdir, before, out, told)
    stage = 'before a step' if _steps(workdir) == before else 'in training'
    if ' after step ' in out:
      stage = 'saved'
    self.counts[signal.Signals(number).name, stage] += 1
    return False

  def _look(
    self, workdir: Path, before: list[int], out: str, told: str
  ) -> None:
    """Finds faults in the checkpoints that a kill left."""
    after = _steps(workdir)
    newest = before[-1] if before else 0
    if 'steps done' in out and f'; {newest} of {_STEPS} steps done' not in out:
      self._fault(workdir, f'{told}did not resume from step {newest}: {out}')
    if max(after, default=0) < newest:
      self._fault(workdir, f'{told}a checkpoint is lost: {before} -> {after}')
    if ' after step ' in out:
      step = int(out.partition(' after step ')[2].split()[0])
      if max(after, default=0) != step:
        self._fault(workdir, f'{told}step {step} is not saved: {after}')
    if after:
      self._compare(workdir, after[-1])

  def kill(self, most: int) -> None:
    """Kills one run until it is complete, or was killed so often."""
    if not self._begun:
      self.measure()
    workdir = self._out / f'killed_{self._begun}'
    self._begun += 1
    for _ in range(most):
      # One that has its last step would only be evaluated.
      if self._hit(workdir) or _STEPS in _steps(workdir):
        break
      print(
        f'{self._mode.name}: step {max(_steps(workdir), default=0)}', flush=True
      )
    self._finish(workdir)

  def _finish(self, workdir: Path) -> None:
    """Lets a run come to its end, and compares all of it."""
    run = Run(self._mode, workdir, '--config.run.checkpoint_every=3')
    while not run.is_over():
      time.sleep(0.1)
    statuses, _, error = run.end()
    if any(statuses):
      self._fault(workdir, f'the last run: {statuses}: {error[-2000:]}')
      return
    self._compare(workdir, _STEPS)
    if _rows(workdir) != _rows(self._whole):
      self._fault(workdir, 'the rows of metrics.csv differ')
    left = {path.name for path in workdir.iterdir()}
    if left != {'checkpoints', 'metrics.csv', 'tensorboard', 'curves.png'}:
      self._fault(workdir, f'left over: {sorted(left)}')
    whole = {str(x) for x in _steps(workdir)}
    if {x.name for x in (workdir / 'checkpoints').iterdir()} != whole:
      self._fault(workdir, 'a checkpoint is half written')
    self.complete += 1
    shutil.rmtree(workdir)


def main() -> None:
  """Kills, and prints what came of it."""
  # A shell lets what runs in its background ignore it, and that is inherited.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  # Orbax tells of every file that it reads.
  logging.set_verbosity(logging.ERROR)
  rng = random.Random(_SEED.value)
  out = Path(_OUT.value).absolute()
  campaigns = [Campaign(mode, out, rng) for mode in _MODES]
  done = 0
  for campaign in itertools.cycle(campaigns):
    if done >= _KILLS.value:
      break
    campaign.kill(_KILLS.value - done)
    done = sum(x.counts.total() for x in campaigns)
    print(
      f'{done} kills: {sum(x.complete for x in campaigns)} runs complete, '
      f'{sum(len(x.faults) for x in campaigns)} faults.',
      flush=True,
    )
  tables.print_markdown(
    [
      {
        'run': mode.name,
        'signal': name,
        'when': stage,
        'kills': str(count),
      }
      for mode, campaign in zip(_MODES, campaigns, strict=True)
      for (name, stage), count in sorted(campaign.counts.items())
    ]
  )
  if any(campaign.faults for campaign in campaigns):
    sys.exit(1)


if __name__ == '__main__':
  command.run(main)
