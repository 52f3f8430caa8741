"""Checkpoints: everything that a resumed run needs to be the same run."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grain
import jax
import ml_collections
import orbax.checkpoint as ocp

from reference import step


def comparable(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Field to value as JSON has it, without `run`."""

  def flatten(tree: dict[str, Any], prefix: str) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
      if isinstance(value, dict):
        flat |= flatten(value, f'{prefix}{name}.')
      else:
        flat[prefix + name] = value
    return flat

  fields = json.loads(config.to_json())
  del fields['run']
  return flatten(fields, '')


def _check_config(
  manager: ocp.CheckpointManager,
  config: ml_collections.ConfigDict,
  workdir: Path,
) -> None:
  newest = manager.latest_step()
  if newest is None:
    return
  stored = manager.restore(
    newest, args=ocp.args.Composite(config=ocp.args.JsonRestore())
  ).config
  given = comparable(config)
  absent = 'nothing'
  differences = [
    f'  {name}: given {given.get(name, absent)!r}, stored '
    f'{stored.get(name, absent)!r}'
    for name in sorted(given.keys() | stored.keys())
    if given.get(name, absent) != stored.get(name, absent)
  ]
  if differences:
    raise ValueError(
      'A work folder belongs to one config, and resumes its run. '
      f'{workdir} holds step {newest} of another:\n'
      + '\n'.join(differences)
      + '\nLikely a field was changed and the folder was not: take another, '
      f'`--workdir={workdir}_2`.'
    )


@contextlib.contextmanager
def open_manager(
  workdir: Path, config: ml_collections.ConfigDict
) -> Iterator[ocp.CheckpointManager]:
  """The manager of the checkpoints in a work folder, which is made if needed.

  On leaving, checkpoints that are still being written are finished.

  Args:
    workdir: the checkpoints are in `workdir/checkpoints`, the newest
      `config.run.keep` of them.
    config: of the run that wants to write here.

  Raises:
    ValueError: when the newest checkpoint is of another config. Fields under
      `run` may differ: they change how a run is watched, not what it learns.
  """
  with ocp.CheckpointManager(
    workdir.absolute() / 'checkpoints',
    options=ocp.CheckpointManagerOptions(
      preservation_policy=ocp.checkpoint_managers.LatestN(config.run.keep)
    ),
  ) as manager:
    _check_config(manager, config, workdir)
    yield manager


def save(
  manager: ocp.CheckpointManager,
  state: step.TrainState,
  batches: grain.DatasetIterator,
  config: ml_collections.ConfigDict,
) -> None:
  """Saves the state, the position in the data and the config."""
  manager.save(
    int(state.step),
    args=ocp.args.Composite(
      state=ocp.args.StandardSave(state),
      data=grain.checkpoint.CheckpointSave(batches),
      config=ocp.args.JsonSave(comparable(config)),
    ),
  )


def restore(
  manager: ocp.CheckpointManager,
  state: step.TrainState,
  batches: grain.DatasetIterator,
) -> step.TrainState:
  """The newest checkpoint; the iterator is set to its position.

  Args:
    manager: of a work folder that holds a checkpoint.
    state: of the shapes and shardings to restore to.
    batches: the training iterator.
  """
  restored = manager.restore(
    manager.latest_step(),
    args=ocp.args.Composite(
      state=ocp.args.StandardRestore(
        jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
      ),
      data=grain.checkpoint.CheckpointRestore(batches),
    ),
  )
  return restored.state
