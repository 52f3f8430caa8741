"""The parameters of one run as the beginning of another, `--init_from`."""

import hashlib
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from flax import traverse_util

from reference.command import Mistake
from reference.data.wording import some
from reference.run import checkpoint, models, trained

# The path of a variable of the model.
Variable = tuple[str, ...]


class Start(NamedTuple):
  """What a run begins with.

  Attributes:
    leaves: parameters and statistics by their path among the variables. What
      is not there, as a new head, is drawn.
    record: where they are from and what differs, as JSON has it.
  """

  leaves: dict[Variable, np.ndarray]
  record: dict[str, Any]


def _shapes(
  model: models.Model, config: ml_collections.ConfigDict
) -> dict[Variable, jax.ShapeDtypeStruct]:
  size, channels = config.data.size, len(config.data.mean)
  variables = jax.eval_shape(
    lambda key: model.init(
      key, jnp.zeros((1, size, size, channels)), train=False
    ),
    jax.random.key(0),
  )
  return traverse_util.flatten_dict(variables)


def _names(paths: Collection[Variable]) -> list[str]:
  return sorted('/'.join(path) for path in paths)


def _changed_fields(
  then: ml_collections.ConfigDict, now: ml_collections.ConfigDict
) -> list[str]:
  """What a model computes beside its parameters."""
  # Configs of before that was a field had this padding.
  before, after = (
    {'model.padding': 'same', **checkpoint.fields(x)} for x in (then, now)
  )
  return [
    f'{name} {before.get(name)!r} -> {after.get(name)!r}'
    for name in sorted(before | after)
    if name.startswith(('model.', 'data.mean', 'data.std'))
    and (before.get(name) or None) != (after.get(name) or None)
  ]


def _check_fit(
  path: Path,
  given: dict[Variable, np.ndarray],
  wanted: dict[Variable, jax.ShapeDtypeStruct],
  changed: list[str],
) -> None:
  lacking = _names(wanted.keys() - given.keys())
  unknown = _names(given.keys() - wanted.keys())
  shapes = [
    f'{"/".join(name)} {given[name].shape} for {wanted[name].shape}'
    for name in sorted(wanted.keys() & given.keys())
    if given[name].shape != wanted[name].shape
  ]
  lines = [
    f'  {what}: {some(names)}'
    for what, names in (
      ('not there', lacking),
      ('not in this model', unknown),
      ('of another shape', shapes),
      ('the config there -> here', changed),
    )
    if names
  ]
  if lacking or unknown or shapes:
    raise Mistake(
      'Parameters to begin with must fit the model, all but its head. Those '
      f'of {path} do not:\n'
      + '\n'.join(lines)
      + '\nLikely the config is of another model: take that of the run which '
      'they are from, with its `config.model` and images of as many channels.'
    )


def digest(leaves: dict[Variable, np.ndarray]) -> str:
  """A hash of all values, the same where all are."""
  found = hashlib.sha256()
  for name in sorted(leaves):
    found.update(np.ascontiguousarray(leaves[name]).tobytes())
  return found.hexdigest()[:12]


def fit(
  path: Path,
  config: ml_collections.ConfigDict,
  classes: Sequence[str],
  *,
  make_model: Callable[[int], models.Model],
) -> Start:
  """Reads a model, and takes what of it fits a new run.

  The head stays where the classes are the same in the same order. Otherwise it
  is new, whatever their number. It is what changes its shape with that.

  Args:
    path: a work folder or an export.
    config: of the new run.
    classes: of its images.
    make_model: takes the number of classes to the model of the new run.

  Raises:
    Mistake: when there is no model, or it does not fit, naming what differs.
  """
  found = trained.load(path)
  given = traverse_util.flatten_dict(
    {'params': found.params, 'batch_stats': found.batch_stats}
  )
  wanted = _shapes(make_model(len(classes)), config)
  wider = _shapes(make_model(len(classes) + 1), config)
  head = {name for name in wanted if wanted[name].shape != wider[name].shape}
  changed = _changed_fields(found.config, config)
  notes = [f'Another config: {change}.' for change in changed]
  # A checkpoint of before has no names.
  named = found.record['dataset'] is not None
  if len(found.classes) != len(classes) or (
    named and found.classes != tuple(classes)
  ):
    notes.append(
      f'Its {len(found.classes):,} classes are not the {len(classes):,} here, '
      f'so the head is new: {some(_names(head))}.'
    )
    given = {name: x for name, x in given.items() if name not in head}
    wanted = {name: x for name, x in wanted.items() if name not in head}
  _check_fit(path, given, wanted, changed)
  leaves = {name: x.astype(wanted[name].dtype) for name, x in given.items()}
  record = {'path': str(path.absolute()), 'step': found.step, 'notes': notes}
  return Start(leaves, record)
