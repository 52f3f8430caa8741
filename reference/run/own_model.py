"""A model of the user's own, which `config.model.build` names.

    # my_models.py
    def vit(*, num_classes, width=64): return ViT(num_classes, width)

    python -m reference.main --config.model.build=my_models:vit

The function gets `num_classes` and, as keywords, what else stands in
`config.model`. It returns a Linen module that is called as `module(images,
train=True)`; or, if it takes `rngs`, an NNX module that is called as
`module(images)`, of which Flax's `train()` and `eval()` set the mode.
"""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from flax import nnx, traverse_util

from reference.command import Mistake
from reference.data import named
from reference.run import models

_OF_RESNET = ('stage_sizes', 'filters', 'block', 'stem', 'dtype', 'padding')
_KEPT = ('params', 'batch_stats')


def build(config: ml_collections.ConfigDict, num_classes: int) -> models.Model:
  """The model that `config.build` names.

  Args:
    config: the `model` part of a config. Fields of the ResNet's that the
      function does not take are left out; any other must be one that it takes.
    num_classes: width of the logits.

  Raises:
    Mistake: when there is no such function, it takes other arguments, or
      returns no model.
  """
  function = named.load(config.build, 'model.build')
  given = config.to_dict() | {'num_classes': num_classes}
  del given['build']
  parameters = inspect.signature(function).parameters
  if not any(x.kind is x.VAR_KEYWORD for x in parameters.values()):
    given = {
      name: value
      for name, value in given.items()
      if name in parameters or name not in _OF_RESNET
    }
  if 'dtype' in given:
    given['dtype'] = jnp.dtype(given['dtype'])
  rngs = {'rngs': None} if 'rngs' in parameters else {}
  try:
    inspect.signature(function).bind(**given, **rngs)
  except TypeError as error:
    raise Mistake(
      f'The function that `model.build` names gets {", ".join(given)}, all by '
      f'keyword. Given {config.build!r}, which is of the form '
      f'{function.__name__}{inspect.signature(function)}: {error}. Take the '
      'keywords, `def make(*, num_classes, width): ...`, or the field from '
      '`config.model`.'
    ) from None
  if rngs:
    return OwnNnx(lambda rngs: function(**given, rngs=rngs), num_classes)
  module = function(**given)
  if not isinstance(module, nn.Module):
    kind = type(module).__name__
    raise Mistake(
      'A function that takes no `rngs` returns a Linen module. Given '
      f'{config.build!r}, which returns a {kind}. Likely it is an NNX module: '
      '`def make(*, num_classes, rngs): return Net(num_classes, rngs=rngs)`.'
    )
  if 'train' not in inspect.signature(type(module).__call__).parameters:
    raise Mistake(
      'A Linen module is called as `module(images, train=True)` in training '
      f'and with False in evaluation. Given {config.build!r}, whose '
      f'{type(module).__name__} takes no `train`. Write '
      '`def __call__(self, images, *, train): ...`, and in it '
      '`nn.Dropout(0.1, deterministic=not train)`.'
    )
  return OwnLinen(module, num_classes)


def _checked(logits: Any, images: jax.Array, num_classes: int) -> jax.Array:
  """The logits, float32."""
  wanted = images.shape[0], num_classes
  given = getattr(logits, 'shape', type(logits).__name__)
  if given != wanted:
    raise Mistake(
      f'A model returns logits of shape {wanted}, one for each class of each '
      f'image. Given {given} for images {images.shape}. Likely the head is '
      'missing, or the mean over the pixels: `nn.Dense(num_classes)(x.mean('
      '(1, 2)))`.'
    )
  return logits.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class OwnLinen:
  """A Linen module whose logits are looked at."""

  module: nn.Module
  num_classes: int

  def init(
    self, key: jax.Array, images: jax.Array, *, train: bool
  ) -> Mapping[str, Any]:
    """Parameters, and statistics where there are."""
    logits, variables = self.module.init_with_output(key, images, train=train)
    _checked(logits, images, self.num_classes)
    others = sorted(set(variables) - set(_KEPT))
    if others:
      raise Mistake(
        'Of a Linen model the collections `params` and `batch_stats` are '
        f'kept. Given a {type(self.module).__name__} with {others} too. Keep '
        'statistics as `self.variable("batch_stats", name, init)`.'
      )
    return variables

  def apply(
    self,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool,
    **keywords: Any,
  ) -> Any:
    """As that of the module."""
    output = self.module.apply(variables, images, train=train, **keywords)
    if not keywords.get('mutable'):
      return _checked(output, images, self.num_classes)
    logits, updated = output
    return _checked(logits, images, self.num_classes), updated


def _named(state: nnx.State) -> dict[str, Any]:
  """Its arrays in plain dicts, with names for keys as checkpoints have them."""
  flat = traverse_util.flatten_dict(nnx.to_pure_dict(state))
  return traverse_util.unflatten_dict(
    {tuple(map(str, path)): leaf for path, leaf in flat.items()}
  )


@dataclasses.dataclass(frozen=True)
class OwnNnx:
  """An NNX module in the form of a Linen module.

  Parameters and batch statistics are plain dicts under the module's names. All
  other variables are what `make` makes them; random streams start anew from the
  key of each call.
  """

  make: Callable[[nnx.Rngs], nnx.Module]
  num_classes: int

  def init(
    self, key: jax.Array, images: jax.Array, *, train: bool
  ) -> dict[str, Any]:
    """Parameters, and statistics where there are."""
    model = self.make(nnx.Rngs(key))
    if not isinstance(model, nnx.Module):
      raise Mistake(
        'A function that takes `rngs` returns an NNX module. Given one that '
        f'returns a {type(model).__name__}. A Linen module needs none: '
        '`def make(*, num_classes): ...`.'
      )
    variables = {
      'params': _named(nnx.state(model, nnx.Param)),
      'batch_stats': _named(nnx.state(model, nnx.BatchStat)),
    }
    self.apply(variables, images, train=train, rngs={'params': key})
    return variables

  def apply(
    self,
    variables: Mapping[str, Any],
    images: jax.Array,
    *,
    train: bool,
    mutable: Any = False,
    rngs: Mapping[str, jax.Array] | None = None,
  ) -> Any:
    """Logits; and where something is mutable, the new statistics."""
    # Its own parameters are overwritten, so nothing computes them.
    model = self.make(nnx.Rngs(0))
    parts: Any = nnx.split(model, nnx.Param, nnx.BatchStat, nnx.RngKey, ...)
    graph, params, stats, keys, rest = parts
    nnx.replace_by_pure_dict(params, variables['params'])
    nnx.replace_by_pure_dict(stats, variables.get('batch_stats', {}))
    if rngs:
      streams, treedef = jax.tree.flatten(keys)
      keys = jax.tree.unflatten(
        treedef,
        [
          # Layers under `nnx.vmap` have a key each.
          jax.random.split(jax.random.fold_in(rngs['params'], i), stream.shape)
          for i, stream in enumerate(streams)
        ],
      )
    model = nnx.merge(graph, params, stats, keys, rest)
    model.train() if train else model.eval()
    logits = _checked(model(images), images, self.num_classes)
    if not mutable:
      return logits
    return logits, {'batch_stats': _named(nnx.state(model, nnx.BatchStat))}
