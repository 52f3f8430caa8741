"""Names of leaves, and reading or writing some of them.

A leaf is named by the keys that lead to it, whatever the container: dicts,
tuples, NamedTuples, dataclasses and every other registered pytree alike.
"""

import difflib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from conadv_optax.core.types import Batch

LeafSpec = Any
"""A key, a tuple of keys, or a `(get, set)` pair of functions.

Or a list or dict of these, for several leaves.
"""


class Leaf(NamedTuple):
  """Reads and writes one leaf of a batch, or a list or dict of several."""

  get: Callable[[Batch], Any]
  set: Callable[[Batch, Any], Batch]

  def examples(self, batch: Batch) -> int:
    """How many examples a batch has."""
    return jax.tree.leaves(self.get(batch))[0].shape[0]


def tree_of(mask: Any, params: Any) -> Any:
  """A mask, or what it makes of the parameters."""
  # A module can be called, and is a tree all the same.
  is_function = callable(mask) and jax.tree_util.all_leaves([mask])
  return mask(params) if is_function else mask


def key_name(entry: Any) -> Any:
  """The plain key of an entry of a `jax.tree_util` key path."""
  for attribute in ('key', 'name', 'idx'):
    if hasattr(entry, attribute):
      return getattr(entry, attribute)
  return str(entry)


def path_names(path: tuple[Any, ...]) -> tuple[Any, ...]:
  """The plain keys of a `jax.tree_util` key path."""
  return tuple(key_name(entry) for entry in path)


def named(
  tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> dict[tuple[Any, ...], Any]:
  """The leaves of a tree by the keys that lead to them."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  return {path_names(path): leaf for path, leaf in flat}


def _spell(names: tuple[Any, ...]) -> str:
  return repr(names[0]) if len(names) == 1 else repr(names)


def leaf(spec: LeafSpec, *, argument: str, is_one: bool = True) -> Leaf:
  """Turns what names one leaf, or a list or dict of that, into a `Leaf`.

  Args:
    spec: what the user passed.
    argument: the name of the user's argument, for the error message.
    is_one: whether it is all of that argument, and not one of several.

  Returns:
    A `Leaf` whose functions raise `KeyError` when the batch has no such leaf.
  """
  if isinstance(spec, list | dict):
    return _several(spec, argument)
  is_pair = isinstance(spec, tuple) and any(callable(part) for part in spec)
  if is_pair:
    if len(spec) != 2 or not all(callable(part) for part in spec):
      raise TypeError(
        f'`{argument}` must be a key, a tuple of keys, or a (get, set) pair of '
        f'functions, or a list of these. Given {spec!r}. A pair looks like '
        f'`{argument}=(lambda b: b.x, lambda b, x: b.replace(x=x))`.'
      )
    return Leaf(*spec)
  wanted = spec if isinstance(spec, tuple) else (spec,)

  def find(batch: Batch) -> tuple[list[Any], Any, int]:
    flat, treedef = jax.tree_util.tree_flatten_with_path(batch)
    names = [path_names(path) for path, _ in flat]
    if wanted not in names:
      spelled = [_spell(name) for name in names]
      near = difflib.get_close_matches(_spell(wanted), spelled, n=1, cutoff=0.5)
      hint = near or spelled[:1]
      code = f'`{argument}={hint[0]}`' if is_one else ''.join(hint)
      fix = f' Did you mean {code}?' if hint else ''
      raise KeyError(
        f'`{argument}` must name one leaf of the batch. Given '
        f'{_spell(wanted) if wanted else wanted}, but the leaves of the batch '
        f'are {", ".join(spelled) or "none"}.{fix}'
      )
    return [value for _, value in flat], treedef, names.index(wanted)

  def get(batch: Batch) -> jax.Array:
    leaves, _, index = find(batch)
    return leaves[index]

  def set_(batch: Batch, value: jax.Array) -> Batch:
    leaves, treedef, index = find(batch)
    leaves[index] = value
    return jax.tree_util.tree_unflatten(treedef, leaves)

  return Leaf(get, set_)


def form_of(spec: LeafSpec) -> Any:
  """The lists and dicts of a `LeafSpec`, around a 0 for each leaf."""
  return jax.tree.map(
    lambda _: 0, spec, is_leaf=lambda x: not isinstance(x, list | dict)
  )


def _several(specs: Any, argument: str) -> Leaf:
  names = specs if isinstance(specs, dict) else range(len(specs))
  parts = {
    name: leaf(specs[name], argument=argument, is_one=False) for name in names
  }
  # A pair of functions may read anything.
  plain = [str(specs[name]) for name in names if isinstance(specs[name], str)]
  if not parts or len(set(plain)) < len(plain):
    raise ValueError(
      f'`{argument}` must name a leaf of the batch, or several, each once. '
      f"Given {specs!r}. Write `{argument}=['left', 'right']`."
    )

  def get(batch: Batch) -> Any:
    values = {name: part.get(batch) for name, part in parts.items()}
    return values if isinstance(specs, dict) else list(values.values())

  def set_(batch: Batch, values: Any) -> Batch:
    for name, part in parts.items():
      batch = part.set(batch, values[name])
    return batch

  return Leaf(get, set_)
