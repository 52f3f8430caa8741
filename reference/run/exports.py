"""A trained model as files that need nothing of this project."""

import inspect
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import traverse_util
from safetensors.numpy import save

from reference.command import Mistake
from reference.data import input_pipeline
from reference.run import models, torchvision_layout, trained

LAYOUTS = (trained.FLAX, 'torchvision')
MODULE = 'resnet.py'


class Exported(NamedTuple):
  """What was written.

  Attributes:
    files: what each file holds, by its path.
    parameters: how many numbers the weights have, without the statistics.
  """

  files: dict[Path, str]
  parameters: int


def check_empty(out: Path) -> None:
  """Refuses a folder that holds anything.

  Raises:
    Mistake: naming another.
  """
  if out.is_dir() and not any(out.iterdir()):
    return
  if out.exists() or out.is_symlink():
    what = 'holds files' if out.is_dir() else 'is a file'
    raise Mistake(
      f'An export goes into a new folder, so that none is overwritten. {out} '
      f'{what}. Take another: `--out={out}_2`.'
    )


def _describe(model: trained.Trained, layout: str) -> dict[str, Any]:
  """What the JSON beside the weights says."""
  data = model.config.data
  arguments = json.loads(model.config.model.to_json())
  if not arguments.get('build'):
    arguments.pop('build', None)
  return {
    'layout': layout,
    'step': model.step,
    'model': {'num_classes': len(model.classes), **arguments},
    'classes': list(model.classes),
    'class_names': list(model.names),
    'input': {
      'size': data.size,
      'channels': len(data.mean),
      'crop': data.eval_crop,
      'crop_in_words': inspect.getdoc(
        input_pipeline.EVAL_CROPS[data.eval_crop]
      ),
      'resize': 'bicubic, without antialiasing',
      'divisor': 255,
      'mean': list(data.mean),
      'std': list(data.std),
    },
    'metrics': {
      # JSON has no infinity.
      name: value if math.isfinite(value) else None
      for name, value in model.metrics.items()
    },
    'config': json.loads(model.config.to_json()),
    **model.record,
  }


def _tensors(model: trained.Trained, layout: str) -> dict[str, np.ndarray]:
  if layout == 'torchvision':
    torchvision_layout.check(model.config.model, model.params)
    return torchvision_layout.convert(
      model.config.model.stage_sizes,
      model.params,
      model.batch_stats,
      step=model.step,
    )
  return traverse_util.flatten_dict(
    {'params': model.params, 'batch_stats': model.batch_stats}, sep='/'
  )


def write(
  model: trained.Trained, out: Path, *, layout: str = trained.FLAX
) -> Exported:
  """Writes weights, their description and, of a ResNet, its module.

  Args:
    model: to write.
    out: the folder, made if needed.
    layout: 'flax', the names of the module; or 'torchvision', a state_dict.

  Raises:
    Mistake: when the folder holds anything or cannot be written to, or
      torchvision has no such model.
  """
  check_empty(out)
  tensors = _tensors(model, layout)
  about = _describe(model, layout)
  weights, description = out / trained.WEIGHTS, out / trained.DESCRIPTION
  files = {weights: 'parameters and statistics', description: 'what they are'}
  try:
    out.mkdir(parents=True, exist_ok=True)
    unfinished = out / f'{trained.WEIGHTS}.unfinished'
    # By Python, whose errors say what the disk said.
    unfinished.write_bytes(save(tensors))
    os.replace(unfinished, weights)
    if layout == trained.FLAX and not model.config.model.get('build'):
      module = out / MODULE
      shutil.copyfile(models.__file__, module)
      files[module] = 'the Flax module'
    # Last, as it makes the folder an export.
    description.write_text(json.dumps(about, indent=2) + '\n')
  except OSError as error:
    raise Mistake(
      f'{out} could not be written: {error}. Likely the disk is full or the '
      'folder belongs to another user: `df -h`, `ls -ld`. An export that is '
      f'not complete has no {trained.DESCRIPTION}; take another folder.'
    ) from error
  return Exported(files, sum(x.size for x in jax.tree.leaves(model.params)))
