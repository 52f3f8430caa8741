"""A trained model: read from a run's work folder or from an export.

It is read on one machine with any devices, whatever wrote it: arrays come as
NumPy's, and of a checkpoint nothing but parameters and statistics is read.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax import traverse_util
from safetensors.numpy import load_file

import conadv_optax as conadv
from reference.command import Mistake
from reference.run import agreement, checkpoint, methods, metrics

WEIGHTS, DESCRIPTION = 'model.safetensors', 'model.json'
# The layout of an export that holds a model under its own names.
FLAX = 'flax'


class Trained(NamedTuple):
  """A trained model; `parts.make_model(config, num_classes=...)` is its module.

  Attributes:
    step: steps that it was trained for.
    config: of its run, without the fields under `run`.
    classes: their keys, by label, such as the names of their folders; '0', '1'
      and so on where nothing says.
    names: what people call them, by label; the same where nothing says.
    params: parameters of one branch, under the module's own names.
    batch_stats: its statistics, likewise; {} where there are none.
    metrics: what the run measured at that step, by name.
    record: what else is known of it, as JSON has it: the images, the changes
      that the run went through, what it began with, the versions.
  """

  step: int
  config: ml_collections.ConfigDict
  classes: tuple[str, ...]
  names: tuple[str, ...]
  params: dict[str, Any]
  batch_stats: dict[str, Any]
  metrics: metrics.Row
  record: dict[str, Any]


def load(
  path: Path, *, step: int | None = None, branch: str = 'main'
) -> Trained:
  """Reads a model from a work folder or from what `reference.export` wrote.

  Args:
    path: the folder.
    step: of the checkpoint, by default the newest; an export has but one.
    branch: whose norm layers; an export has but the main ones.

  Raises:
    Mistake: when there is no model, no such step or branch, or it cannot be
      read.
  """
  if (path / DESCRIPTION).exists():
    return _load_export(path, step, branch)
  if (path / 'checkpoints').is_dir():
    return _load_checkpoint(path, step, branch)
  raise Mistake(
    'A model is read from the work folder of a run, which holds '
    f'`checkpoints`, or from an export, which holds `{DESCRIPTION}`. Given '
    f'{path}, which {"holds neither" if path.is_dir() else "is no folder"}. '
    f'Likely misspelt, or not the folder itself: `ls {path.parent}`.'
  )


def _select(tree: dict[str, Any], branch: str) -> dict[str, Any]:
  # Read without its types, a branched tree is a dict.
  if tree.keys() != set(conadv.dual_bn.Branched._fields):
    return tree
  return conadv.dual_bn.select(conadv.dual_bn.Branched(**tree), branch)


def _check_branch(stats: dict[str, Any], branch: str) -> None:
  names = ['main', *stats.get('branches', {})]
  if branch not in names:
    raise Mistake(
      f'A branch is one of those that the run trained: {", ".join(names)}. '
      f'Given {branch!r}.'
    )


def _read_state(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """Parameters and statistics of a checkpoint, with all their branches."""
  handler = ocp.PyTreeCheckpointHandler()
  tree = handler.metadata(folder).tree
  wanted = {name: tree[name] for name in ('params', 'model_state')}
  read = handler.restore(
    folder,
    args=ocp.args.PyTreeRestore(
      item=wanted,
      restore_args=jax.tree.map(
        lambda _: ocp.RestoreArgs(restore_type=np.ndarray), wanted
      ),
      partial_restore=True,
    ),
  )
  return read['params'], read['model_state']


def _read_versions(folder: Path) -> dict[str, str]:
  """The packages that wrote a checkpoint."""
  # Orbax's manager would warn of each item that it is not asked to read.
  about = json.loads((folder / '_CHECKPOINT_METADATA').read_text())
  return {
    name: version
    for name, version in (about.get('custom_metadata') or {}).items()
    # Beside them there is a hash of each source file.
    if not name.endswith('.py')
  }


def _load_checkpoint(path: Path, step: int | None, branch: str) -> Trained:
  with checkpoint.open_reader(path) as reader:
    steps = sorted(reader.all_steps())
    if not steps or step not in (None, *steps):
      kept = ', '.join(map(str, steps)) or 'none'
      wanted = 'any' if step is None else f'step {step}'
      raise Mistake(
        f'A model is read from a checkpoint. {path} keeps those of steps: '
        f'{kept}. Given {wanted}. A run keeps the newest `run.keep`.'
      )
    number = steps[-1] if step is None else step
    try:
      about = checkpoint.read_about_step(reader, path, number)
      folder = path.absolute() / 'checkpoints' / str(number)
      params, stats = _read_state(folder / 'state')
      versions = _read_versions(folder)
    except Exception as error:
      # Damage shows in many ways: in JSON, in arrays, in what is missing.
      others = [f'`--step={other}`' for other in steps if other != number]
      raise Mistake(
        f'The checkpoint of step {number} in {path} cannot be read: '
        f'{type(error).__name__}: {error}\nLikely the storage is damaged, or '
        'the run has replaced it by a newer one. Others there: '
        f'{", ".join(others) or "none"}.'
      ) from error
  _check_branch(stats, branch)
  params, stats = _select(params, branch), _select(stats, branch)
  config = _config(about)
  params, stats = jax.device_get(methods.as_one(config, (params, stats)))
  if about.dataset is None:
    # Of before: then all models were ResNets.
    classes = tuple(map(str, range(len(params['head']['bias']))))
  else:
    classes = tuple(about.dataset['classes'])
  return Trained(
    number,
    config,
    classes,
    tuple(about.names or classes),
    params,
    stats,
    _metrics_of(path / 'metrics.csv', number),
    {
      'dataset': about.dataset,
      'changes': about.changes,
      'init_from': about.init_from,
      'versions': versions,
    },
  )


def _config(about: agreement.About) -> ml_collections.ConfigDict:
  """The config, without what says where it ran."""
  fields = {
    tuple(name.split('.')): value
    for name, value in about.config.items()
    if name not in ('processes', 'devices')
  }
  return ml_collections.ConfigDict(traverse_util.unflatten_dict(fields))


def _metrics_of(path: Path, step: int) -> metrics.Row:
  rows = metrics.read_rows(path)[0] if path.exists() else []
  found = [row for row in rows if row['step'] == step]
  return found[-1] if found else {}


def _load_export(path: Path, step: int | None, branch: str) -> Trained:
  try:
    about = json.loads((path / DESCRIPTION).read_text())
    flat = load_file(path / WEIGHTS)
  except Exception as error:
    raise Mistake(
      f'An export is {DESCRIPTION} and {WEIGHTS}, as `reference.export` wrote '
      f'them. {path} cannot be read: {type(error).__name__}: {error}\nLikely '
      'the copy broke off: copy it again.'
    ) from error
  if about['layout'] != FLAX:
    raise Mistake(
      "A model is read under Flax's names. Given "
      f'{path}, which has the layout {about["layout"]!r}. Export the run once '
      f'more without `--layout`, `--out={path}_flax`.'
    )
  if step not in (None, about['step']) or branch != 'main':
    raise Mistake(
      'An export holds the main branch of one step. Given step '
      f'{step or about["step"]} and branch {branch!r} of {path}, which is of '
      f'step {about["step"]}. The work folder of the run may hold others.'
    )
  variables = traverse_util.unflatten_dict(flat, sep='/')
  return Trained(
    about['step'],
    ml_collections.ConfigDict(about['config']),
    tuple(about['classes']),
    # One of before has none.
    tuple(about.get('class_names', about['classes'])),
    variables['params'],
    variables.get('batch_stats', {}),
    about['metrics'],
    {
      name: about[name]
      for name in ('dataset', 'changes', 'init_from', 'versions')
    },
  )
