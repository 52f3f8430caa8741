"""A ResNet's weights under torchvision's names, in PyTorch's layout.

Logits are equal up to rounding, as everything that a name does not say is the
same: the stride on the 3x3, the epsilon 1e-5 of BatchNorm, and with
`model.padding=symmetric` the padding. With `same` a strided window begins at an
even image's first pixel and not one before it, which no weights make up for.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flax import traverse_util

from reference.command import Mistake

# As torchvision's class has them; it takes any sizes of the stages.
_RULES = {
  'stem': 'imagenet',
  'padding': 'symmetric',
  'filters': 64,
}
_BLOCKS = ('basic', 'bottleneck')
_STAGES = 4
_CHANNELS = 3
_NAMES = {
  'scale': 'weight',
  'bias': 'bias',
  'mean': 'running_mean',
  'var': 'running_var',
}


def check(model: Mapping[str, Any], params: Mapping[str, Any]) -> None:
  """Refuses a model that torchvision has no class for.

  Args:
    model: the `model` part of the config.
    params: of the model.

  Raises:
    Mistake: naming what differs.
  """
  given = dict(model)
  if given.get('build'):
    wrong = [f'model.build is {given["build"]!r}, which is not ours']
  else:
    given.setdefault('padding', 'same')
    wrong = [
      f'model.{name} is {given[name]!r} and not {wanted!r}'
      for name, wanted in _RULES.items()
      if given[name] != wanted
    ]
    if given['block'] not in _BLOCKS:
      wrong.append(f'model.block is {given["block"]!r}')
    if len(given['stage_sizes']) != _STAGES:
      wrong.append(f'it has {len(given["stage_sizes"])} stages and not 4')
    channels = params['stem']['kernel'].shape[2]
    if channels != _CHANNELS:
      wrong.append(f'images have {channels} channel(s) and not 3')
  if wrong:
    raise Mistake(
      "torchvision's ResNets are those with an ImageNet stem, four stages from "
      '64 channels, and symmetric padding. Given another: '
      f'{"; ".join(wrong)}. Its logits there would not be those here. Export '
      "it under Flax's names, without `--layout`. A run that is to end in "
      'torchvision begins with `--config.model.stem=imagenet '
      '--config.model.padding=symmetric --config.model.filters=64 '
      "--config.model.stage_sizes='(2,2,2,2)'`, ResNet-18's."
    )


def _module(path: tuple[str, ...], stage_sizes: list[int]) -> str:
  """The name of the module that the path of one here stands for."""
  if len(path) == 1:
    return {'stem': 'conv1', 'stem_norm': 'bn1', 'head': 'fc'}[path[0]]
  index = int(path[0].rpartition('_')[2])
  stage = 0
  while index >= stage_sizes[stage]:
    index -= stage_sizes[stage]
    stage += 1
  block = f'layer{stage + 1}.{index}'
  if path[1] in ('shortcut', 'shortcut_norm'):
    return f'{block}.downsample.{int(path[1] == "shortcut_norm")}'
  kind, _, number = path[1].partition('_')
  return f'{block}.{"conv" if kind == "Conv" else "bn"}{int(number) + 1}'


def convert(
  stage_sizes: list[int],
  params: Mapping[str, Any],
  batch_stats: Mapping[str, Any],
  *,
  step: int,
) -> dict[str, np.ndarray]:
  """The `state_dict` of torchvision's ResNet.

  Args:
    stage_sizes: blocks of each stage.
    params: of a ResNet that `check` lets pass.
    batch_stats: its statistics.
    step: steps that it was trained for, the batches that BatchNorm has seen.
  """
  state: dict[str, np.ndarray] = {}
  for tree in (params, batch_stats):
    for path, leaf in traverse_util.flatten_dict(tree).items():
      module, name = _module(path[:-1], stage_sizes), path[-1]
      if name == 'kernel':
        # From (H, W, in, out) to (out, in, H, W), of the head to (out, in).
        leaf = leaf.transpose((3, 2, 0, 1) if leaf.ndim == 4 else (1, 0))
        state[f'{module}.weight'] = np.ascontiguousarray(leaf)
      else:
        state[f'{module}.{_NAMES[name]}'] = leaf
      if name == 'mean':
        state[f'{module}.num_batches_tracked'] = np.asarray(step, np.int64)
  return state
