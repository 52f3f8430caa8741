"""torchvision's ResNet in evaluation, in NumPy, from its names of weights."""

import numpy as np


class StateDict(dict):
  """Weights by name, which knows what was never read."""

  def __init__(self, state):
    super().__init__(state)
    self.unread = set(state)

  def __getitem__(self, name):
    self.unread.discard(name)
    return super().__getitem__(name)


def windows(x, side, stride, padding, fill):
  edge = (padding, padding)
  x = np.pad(x, ((0, 0), (0, 0), edge, edge), constant_values=fill)
  view = np.lib.stride_tricks.sliding_window_view(x, (side, side), (2, 3))
  return view[:, :, ::stride, ::stride]


def conv(state, name, x, *, stride=1):
  weight = state[f'{name}.weight']
  side = weight.shape[2]
  seen = windows(x, side, stride, side // 2, 0.0)
  out = np.tensordot(seen, weight, axes=((1, 4, 5), (1, 2, 3)))
  return out.transpose(0, 3, 1, 2)


def norm(state, name, x):
  weight, bias, mean, var = (
    state[f'{name}.{part}'].reshape(-1, 1, 1)
    for part in ('weight', 'bias', 'running_mean', 'running_var')
  )
  return (x - mean) / np.sqrt(var + 1e-5) * weight + bias


def relu(x):
  return np.maximum(x, 0)


def block(state, name, x, *, kind, stride):
  if kind == 'basic':
    y = relu(
      norm(state, f'{name}.bn1', conv(state, f'{name}.conv1', x, stride=stride))
    )
    y = norm(state, f'{name}.bn2', conv(state, f'{name}.conv2', y))
  else:
    y = relu(norm(state, f'{name}.bn1', conv(state, f'{name}.conv1', x)))
    y = conv(state, f'{name}.conv2', y, stride=stride)
    y = relu(norm(state, f'{name}.bn2', y))
    y = norm(state, f'{name}.bn3', conv(state, f'{name}.conv3', y))
  if f'{name}.downsample.0.weight' in state:
    x = conv(state, f'{name}.downsample.0', x, stride=stride)
    x = norm(state, f'{name}.downsample.1', x)
  return relu(x + y)


def logits(state, x, *, kind, sizes):
  """Of images (N, C, H, W)."""
  x = relu(norm(state, 'bn1', conv(state, 'conv1', x, stride=2)))
  x = windows(x, 3, 2, 1, -np.inf).max((4, 5))
  for stage, size in enumerate(sizes, 1):
    for index in range(size):
      stride = 2 if stage > 1 and index == 0 else 1
      x = block(state, f'layer{stage}.{index}', x, kind=kind, stride=stride)
  return x.mean((2, 3)) @ state['fc.weight'].T + state['fc.bias']
