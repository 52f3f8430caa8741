"""Many hosts, a process on each: their start and their checks."""

import collections
import hashlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from reference import command

T = TypeVar('T')

_PACKAGES = (
  'jax',
  'jaxlib',
  'libtpu',
  'numpy',
  'optax',
  'flax',
  'orbax-checkpoint',
  'grain',
  'array-record',
  'simplejpeg',
  'opencv-python-headless',
)


def start(
  *,
  distributed: bool,
  coordinator: str | None,
  num_processes: int | None,
  process_id: int | None,
) -> None:
  """Connects this process with those on the other hosts, if there are any.

  Args:
    distributed: whether JAX finds the others by itself, as it can on TPU pods
      and under Slurm.
    coordinator: else the address and a free port of process 0.
    num_processes: how many there are.
    process_id: which this is, from 0.

  Raises:
    Mistake: when the flags do not belong together.
  """
  by_hand = (coordinator, num_processes, process_id)
  if distributed and by_hand != (None, None, None):
    raise command.Mistake(
      '`--distributed` finds the other processes by itself. Given also '
      '`--coordinator`, `--num_processes` or `--process_id`: leave out either.'
    )
  if distributed:
    try:
      jax.distributed.initialize(local_device_ids=_local_devices())
    except ValueError as error:
      raise command.Mistake(
        'With `--distributed` JAX asks a TPU pod, Slurm or MPI for the other '
        f'processes. Here nothing answers: {error}. Likely this is one host: '
        'leave the flag out; or tell each process by `--coordinator`.'
      ) from error
  elif by_hand != (None, None, None):
    if (
      coordinator is None
      or not coordinator.rpartition(':')[2].isdigit()
      or num_processes is None
      or process_id is None
      or not 0 <= process_id < num_processes
    ):
      raise command.Mistake(
        'Without `--distributed` a process must be told three things: address '
        'and port of process 0, how many there are, and which it is, from 0. '
        f'Given coordinator={coordinator!r}, num_processes={num_processes!r} '
        f'and process_id={process_id!r}. Write on the second of two hosts '
        '`--coordinator=ADDRESS_OF_THE_FIRST:1234 --num_processes=2 '
        '--process_id=1`.'
      )
    jax.distributed.initialize(
      coordinator, num_processes, process_id, _local_devices()
    )


def _local_devices() -> list[int] | None:
  """Devices of this host: [] for all of them, None for those that JAX takes.

  Under Slurm JAX takes one GPU for each process, even where that has the host
  to itself.
  """
  tasks = os.environ.get('SLURM_NTASKS')
  alone = tasks == os.environ.get('SLURM_STEP_NUM_NODES', tasks)
  return [] if alone and 'JAX_LOCAL_DEVICE_IDS' not in os.environ else None


def is_first() -> bool:
  """Whether this process writes the record and speaks for all."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """The value of every process, in their order; of any form that JSON has."""
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(data.size))
  padding = int(np.max(sizes)) - data.size
  padded = np.pad(data, (0, padding), constant_values=ord(' '))
  return [
    json.loads(bytes(row)) for row in multihost_utils.process_allgather(padded)
  ]


def on_all(call: Callable[[], T]) -> T:
  """What a call returns here, where it succeeds on every process.

  Raises:
    Mistake: on every process, where one of them meets a mistake.
  """
  try:
    result, mistake = call(), ''
  except command.Mistake as error:
    mistake = str(error)
  told = gather(mistake)
  if len(told) > 1:
    told = [f'Process {i}: {text}' for i, text in enumerate(told) if text]
  if any(told):
    raise command.Mistake('\n'.join(told))
  return result


def _version(package: str) -> str:
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return 'not installed'


def software() -> dict[str, str]:
  """Versions of all that a result depends on, and a hash of every source."""
  root = Path(__file__).parents[2]
  files = sorted(
    path
    for package in ('conadv_optax', 'reference')
    for path in (root / package).rglob('*.py')
  )
  return {
    'python': platform.python_version(),
    **{name: _version(name) for name in _PACKAGES},
    **{
      str(path.relative_to(root)): hashlib.sha256(
        path.read_bytes()
      ).hexdigest()[:12]
      for path in files
    },
  }


def differences(held: list[dict[str, Any]]) -> list[str]:
  """A line for every field that the processes do not agree on.

  Args:
    held: what each process holds, by field.
  """
  absent = 'nothing'
  lines = []
  for name in sorted({name for fields in held for name in fields}):
    values = [json.dumps(fields.get(name, absent)) for fields in held]
    usual, _ = collections.Counter(values).most_common(1)[0]
    odd = [
      f'process {index} has {value}'
      for index, value in enumerate(values)
      if value != usual
    ]
    if odd:
      lines.append(f'  {name}: {", ".join(odd)}; the others have {usual}')
  return lines


def check_alike(fields: dict[str, Any]) -> None:
  """Refuses processes that would not run the same program.

  Args:
    fields: what must be the same everywhere, by name.

  Raises:
    Mistake: on every process, naming those that differ, and in what.
  """
  lines = differences(gather(fields))
  if lines:
    raise command.Mistake(
      'All processes must have the same config, data, code and versions.\n'
      + '\n'.join(lines)
      + '\nLikely the code was copied, or the command changed, on some hosts '
      'alone: copy it to all and give all the same command.'
    )
