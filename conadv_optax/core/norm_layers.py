"""Finds the parameters of norm layers by structure, not by name.

A parameter belongs to a norm layer when the model state has an entry at the
same module path: a module that owns both parameters and statistics normalises.
"""

from collections.abc import Iterable
from typing import Any

import jax

from conadv_optax.core.paths import path_names

# Haiku's BatchNorm keeps its statistics in child modules of these names.
_HAIKU_STATISTICS = ('mean_ema', 'var_ema')
# Flax Linen collections that a user may pass whole.
_COLLECTIONS = ('params', 'batch_stats')


def module_path(path: tuple[Any, ...]) -> tuple[str, ...]:
  """The path of a leaf as plain names: module, then variable."""
  names = [str(name) for name in path_names(path)]
  # Flax NNX holds a variable's array in an attribute of its own.
  if names and names[-1] == 'value' and hasattr(path[-1], 'name'):
    names.pop()
  if len(names) > 1 and names[0] in _COLLECTIONS:
    names.pop(0)
  # Haiku joins nested module names: 'net/~/norm'.
  parts = [part for name in names for part in name.split('/')]
  return tuple(part for part in parts if part != '~')


def _modules_with_state(model_state: Any) -> Iterable[tuple[str, ...]]:
  for path, _ in jax.tree_util.tree_flatten_with_path(model_state)[0]:
    module = module_path(path)[:-1]
    yield module
    if module and module[-1] in _HAIKU_STATISTICS:
      yield module[:-1]


def is_norm_parameter(params: Any, model_state: Any) -> Any:
  """A tree of bools like `params`: True for the parameters of norm layers.

  Args:
    params: single-branch parameters of a Flax Linen, Flax NNX or Haiku model.
    model_state: the single-branch statistics that go with them.

  Returns:
    A tree of the structure of `params` with Python bools for leaves.
  """
  modules = set(_modules_with_state(model_state))
  return jax.tree_util.tree_map_with_path(
    lambda path, _: module_path(path)[:-1] in modules, params
  )
