"""The record of a study: a CSV with a row for each cell."""

import csv
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from reference.command import Mistake

FIELDS = (
  'cell',
  'study',
  'kind',
  'variant',
  'method',
  'batch_size',
  'peak',
  'setting',
  'seed',
  'staleness',
  'epsilon',
  'targets',
  'adversarial_fraction',
  'every',
  'adversarial_downscale',
  'attack_downscale',
  'dtype',
  'copies',
  'micro_batches',
  'augmentation',
  'epochs',
  'plain_epochs',
  'train_images',
  'steps',
  'accuracy',
  'train_accuracy',
  'gap',
  'robust_accuracy',
  'robust_images',
  'top_eigenvalue',
  'hessian_trace',
  'sharpness',
  'loss_main',
  'loss_adversarial',
  'noise_scale',
  'seconds_a_step',
  'seconds',
  'diverged',
  'accuracy_by_epoch',
  'command',
  'commit',
  'versions',
  'hardware',
)
Row = dict[str, Any]


def read_rows(path: Path) -> list[Row]:
  """The rows of a study, by column; a last line that was cut off is dropped.

  Raises:
    Mistake: when the file is of other columns.
  """
  if not path.exists():
    return []
  whole = path.read_text().rpartition('\n')[0]
  rows = list(csv.DictReader(whole.splitlines()))
  # One that lacks columns was written before there were these.
  others = set(whole.partition('\n')[0].split(',')) - {*FIELDS, ''}
  if others:
    raise Mistake(
      f'A study goes on where its CSV ends, with the same columns. {path} has '
      f'{", ".join(sorted(others))} too. Likely another version wrote it: take '
      'another --workdir.'
    )
  return rows


def write_rows(path: Path, rows: Iterable[Row]) -> None:
  """Writes a study's CSV as a whole, so that a kill leaves old or new."""
  unfinished = path.with_suffix('.unfinished')
  with unfinished.open('w', newline='') as file:
    writer = csv.DictWriter(file, FIELDS, lineterminator='\n')
    writer.writeheader()
    writer.writerows(rows)
  os.replace(unfinished, path)


def describe_machine(devices: Sequence[jax.Device]) -> Row:
  """Versions, commit and hardware, as a reader needs them to repeat a run."""
  try:
    commit = subprocess.run(
      ['git', 'describe', '--always', '--dirty'],
      cwd=Path(__file__).parent,
      capture_output=True,
      text=True,
      check=True,
    ).stdout.strip()
  except (OSError, subprocess.CalledProcessError):
    commit = ''
  packages = ('jax', 'jaxlib', 'optax', 'flax')
  versions = [f'{name} {importlib.metadata.version(name)}' for name in packages]
  cpu_info = Path('/proc/cpuinfo')
  lines = cpu_info.read_text().splitlines() if cpu_info.exists() else []
  models = [x.split(': ')[1] for x in lines if x.startswith('model name')]
  cpu = models[0] if models else platform.machine()
  return {
    'commit': commit,
    'versions': ' '.join([f'python {platform.python_version()}', *versions]),
    'hardware': (
      f'{len(devices)} x {devices[0].device_kind}, {os.cpu_count()} cores of '
      f'{cpu}'
    ),
  }


def describe(row: Row) -> str:
  """A row as a line for the console."""
  setting = f'{row["setting"]}, ' if row['setting'] else ''
  words = [
    f'{row["variant"]}, batch {row["batch_size"]}, peak {row["peak"]:g}, '
    f'{setting}{row["kind"]}, seed {row["seed"]}'
  ]
  if 'accuracy' in row:
    words.append(
      f'{row["accuracy"]:.2%} (training {row["train_accuracy"]:.2%})'
    )
  else:
    words.append(f'diverged by step {row["diverged"]}')
  words.append(f'{row["seconds"]:.0f} s')
  return ': '.join((words[0], ', '.join(words[1:])))
