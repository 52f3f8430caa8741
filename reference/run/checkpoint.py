"""Checkpoints: everything that a resumed run needs to be the same run."""

import contextlib
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import ml_collections
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from reference import command
from reference.run import agreement, hosts, step, storage


def fields(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Field to value as JSON has it."""

  def flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
      if isinstance(value, dict):
        flat |= flatten(value, f'{prefix}{name}.')
      else:
        flat[prefix + name] = value
    return flat

  return flatten(json.loads(config.to_json()), '')


def comparable(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """What a checkpoint's config must agree in: all but the fields of `run`.

  And the number of processes, as each saves its own position in the data, and
  of devices, as each has batch statistics of its own.
  """
  return {
    'processes': jax.process_count(),
    'devices': jax.device_count(),
    **{
      name: value
      for name, value in fields(config).items()
      if not name.startswith('run.')
    },
  }


def _folder(workdir: Path) -> Path:
  return workdir.absolute() / 'checkpoints'


def open_reader(workdir: Path) -> ocp.CheckpointManager:
  """A manager that waits for no other process.

  So one that fails to read does not leave the others waiting.
  """
  this = jax.process_index()
  return ocp.CheckpointManager(
    _folder(workdir),
    options=ocp.CheckpointManagerOptions(
      create=False,
      multiprocessing_options=ocp.options.MultiprocessingOptions(
        primary_host=this,
        active_processes={this},
        barrier_sync_key_prefix=f'reader_{this}',
      ),
    ),
  )


def _steps(workdir: Path) -> list[int]:
  """The checkpoints, newest first, as the first process sees them.

  On a shared folder another may still see an older listing.
  """
  steps: list[int] = []
  if hosts.is_first() and _folder(workdir).exists():
    with open_reader(workdir) as reader:
      steps = sorted(reader.all_steps(), reverse=True)
  return hosts.gather(steps)[0]


def _json_items(workdir: Path, number: int) -> dict[str, Any]:
  """How to read what a checkpoint says of its run.

  Those of before say less.
  """
  folder = _folder(workdir) / str(number)
  return {
    name: ocp.args.JsonRestore()
    for name in agreement.About._fields
    if name == 'config' or (folder / name).is_dir()
  }


def _about(items: ocp.args.Composite) -> agreement.About:
  return agreement.About(
    items.config,
    items.get('dataset'),
    items.get('changes') or [],
    items.get('init_from'),
    items.get('names') or (),
  )


def read_about_step(
  reader: ocp.CheckpointManager, workdir: Path, number: int
) -> agreement.About:
  """What the checkpoint of a step says of its run."""
  items = _json_items(workdir, number)
  return _about(reader.restore(number, args=ocp.args.Composite(**items)))


def read_about(workdir: Path) -> tuple[int, agreement.About] | None:
  """The step of the newest checkpoint, and what it says of its run.

  Returns:
    None where no checkpoint says anything.
  """
  steps = _steps(workdir)
  if not steps:
    return None
  with open_reader(workdir) as reader:
    for number in steps:
      # What is damaged `restore` tells.
      with contextlib.suppress(Exception):
        return number, read_about_step(reader, workdir, number)
  return None


def _set_aside(workdir: Path, number: int) -> Path:
  """Moves a damaged checkpoint to where nothing reads or deletes it."""
  aside = workdir / 'damaged_checkpoints'
  names = itertools.chain(
    [str(number)], (f'{number}_{count}' for count in itertools.count(2))
  )
  target = next(aside / name for name in names if not (aside / name).exists())
  aside.mkdir(exist_ok=True)
  (_folder(workdir) / str(number)).rename(target)
  return target


def _changed(then: dict[str, str], now: dict[str, str]) -> str:
  """What is not the software that wrote a checkpoint; '' where all is."""
  return ', '.join(
    f'{name} {then[name]} -> {now.get(name, "nothing")}'
    for name in then
    if then[name] != now.get(name)
  )


def restore(
  workdir: Path,
  state: step.TrainState,
  batches: grain.DatasetIterator,
  software: dict[str, str],
) -> tuple[step.TrainState, agreement.About] | None:
  """The newest checkpoint that is whole; the iterator is set to its position.

  Newer ones that are damaged are moved to `workdir/damaged_checkpoints`, once
  an older one has been read.

  Args:
    workdir: of the run.
    state: arrays, or their shapes, with the dtypes and shardings to restore to.
    batches: the training iterator.
    software: of this run; where it is not that of the checkpoint, it says so.

  Returns:
    The state and what the checkpoint says of its run, or None where there is no
    checkpoint.

  Raises:
    Mistake: when there are checkpoints and none can be read. They stay.
  """
  folder = _folder(workdir)
  numbers = _steps(workdir)
  if not numbers:
    return None
  target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
  damaged: dict[int, str] = {}
  with open_reader(workdir) as reader:
    for number in numbers:
      reason = None
      try:
        restored = reader.restore(
          number,
          args=ocp.args.Composite(
            state=ocp.args.StandardRestore(target),
            data=grain.checkpoint.CheckpointRestore(batches),
            **_json_items(workdir, number),
          ),
        )
        about = _about(restored)
        written_by = reader.metadata(number).custom_metadata
      except Exception as error:
        # Damage shows in many ways: in JSON, in arrays, in what is missing.
        reason = f'{type(error).__name__}: {error}'.splitlines()[0]
      reasons = [reason for reason in hosts.gather(reason) if reason]
      if not reasons:
        break
      damaged[number] = reasons[0]
  if len(damaged) == len(numbers):
    raise command.Mistake(
      f'To resume, one checkpoint must be whole. {folder} holds '
      f'{len(numbers)}, and none can be read:\n'
      + '\n'.join(f'  step {key}: {why}' for key, why in damaged.items())
      + '\nNothing was changed. Likely the storage is damaged or out of reach, '
      'or the code has changed since. To start anew, take another folder: '
      f'`--workdir={workdir}_2`.'
    )
  if hosts.is_first():
    for key, why in damaged.items():
      kept = _set_aside(workdir, key)
      print(
        f'The checkpoint of step {key} is damaged ({why}). It is kept as '
        f'{kept}, and the run resumes from step {number}.',
        flush=True,
      )
    if changed := _changed(written_by or {}, software):
      print(
        f'Since step {number} was saved, this has changed: {changed}. The run '
        'goes on, but may not be the one that it would have been.',
        flush=True,
      )
  multihost_utils.sync_global_devices('damaged checkpoints are set aside')
  return restored.state, about


@contextlib.contextmanager
def open_manager(
  workdir: Path, *, keep: int
) -> Iterator[ocp.CheckpointManager]:
  """The manager that writes the checkpoints of a work folder.

  What a killed run left unfinished is removed. On leaving, checkpoints that are
  still being written are finished.

  Args:
    workdir: the checkpoints are in `workdir/checkpoints`, made if needed.
    keep: how many, the newest, to keep. Older ones are deleted once a new one
      is whole.

  Raises:
    Mistake: when the storage did not take a checkpoint.
  """
  manager = ocp.CheckpointManager(
    _folder(workdir),
    options=ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(keep),
      cleanup_tmp_directories=True,
    ),
  )
  try:
    yield manager
  finally:
    with storage.explained(manager.directory):
      manager.close()


def finish(manager: ocp.CheckpointManager) -> None:
  """Waits until what was saved is whole.

  Raises:
    Mistake: when the storage did not take it.
  """
  with storage.explained(manager.directory):
    manager.wait_until_finished()


def save(
  manager: ocp.CheckpointManager,
  state: step.TrainState,
  batches: grain.DatasetIterator,
  about: agreement.About,
  software: dict[str, str],
) -> None:
  """Saves the state, the position in the data, what is said of it, versions.

  Files are written while the run goes on.

  Raises:
    Mistake: when the storage did not take the checkpoint before.
  """
  with storage.explained(manager.directory):
    manager.save(
      int(state.step),
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        data=grain.checkpoint.CheckpointSave(batches),
        **{
          name: ocp.args.JsonSave(value)
          for name, value in about._asdict().items()
        },
      ),
      custom_metadata=software,
    )
