r"""One model, several BatchNorms: a norm of its own for each kind of example.

Clean and adversarial examples have different statistics. A `Branched` tree
holds the model's ordinary tree for 'main' and, for every other branch, only
the leaves in which that branch differs. The model does not change, because
`select` gives it an ordinary tree.

    params, model_state = split(params, model_state)
    model.apply(select(params, 'adversarial'), ...)
    export(main(params))

References:
  Xie et al., `Adversarial Examples Improve Image Recognition
  <https://arxiv.org/abs/1911.09665>`_, 2020
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conadv_optax.core.norm_layers import is_norm_parameter
from conadv_optax.core.paths import path_names

__all__ = ['Branched', 'main', 'replace', 'select', 'split']


class Branched(NamedTuple):
  """A tree with branches.

  Attributes:
    main: the model's full tree, under its ordinary names.
    branches: for each other branch, by name, a tree like `main` with None
      where the branch shares the leaf.
  """

  main: Any
  branches: dict[str, Any]


def _is_none(x: Any) -> bool:
  return x is None


def _branch(tree: Branched, branch: str) -> Any:
  if branch not in tree.branches:
    names = ['main', *tree.branches]
    raise KeyError(
      f'The tree has no branch {branch!r}; it has {names}. Name every branch '
      'when the model is split: `conadv.dual_bn.split(params, model_state, '
      f'branches={(*tree.branches, branch)!r})`.'
    )
  return tree.branches[branch]


def split(
  params: Any,
  model_state: Any,
  *,
  branches: Sequence[str] = ('adversarial',),
  affine: bool = True,
  is_norm: Callable[[tuple[Any, ...], jax.Array], bool] | None = None,
) -> tuple[Any, Any]:
  """Gives every branch its own statistics and, by default, scale and bias.

  The new branches start as copies of the main one. The whole model state is
  split. Parameters are split if they belong to a norm layer, that is, if their
  module also has an entry in `model_state`; all others stay shared. This covers
  Flax Linen, Flax NNX and Haiku. If a module, such as the model's root, keeps
  state beside parameters that belong to no norm layer, pass `is_norm`.

  Args:
    params: parameters of the model, any shapes and dtypes.
    model_state: its statistics (Linen's `batch_stats`, NNX's `BatchStat`
      state, Haiku's state), or None if the model has none.
    branches: names of the branches beside 'main'.
    affine: whether the norm layers' parameters are split too. If False,
      `params` is returned as it is.
    is_norm: `is_norm(path, leaf)` decides instead which parameters to split;
      `path` is the tuple of keys of the leaf. Norm layers without state need
      this.

  Returns:
    `(params, model_state)`, each `Branched` where it was split.

  Raises:
    ValueError: when a tree is split already, a branch is called 'main', two
      branches have the same name, or no norm layer is found.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> params = {'conv': {'kernel': jnp.ones((3, 3))},
    ...           'norm': {'scale': jnp.ones(3)}}
    >>> model_state = {'norm': {'mean': jnp.zeros(3)}}
    >>> params, model_state = conadv.dual_bn.split(params, model_state)
    >>> chex.assert_trees_all_equal(
    ...     params.branches['adversarial'],
    ...     {'conv': {'kernel': None}, 'norm': {'scale': jnp.ones(3)}})

  References:
    Xie et al., `Adversarial Examples Improve Image Recognition
    <https://arxiv.org/abs/1911.09665>`_, 2020
  """
  if isinstance(params, Branched) or isinstance(model_state, Branched):
    raise ValueError(
      '`split` takes the trees of the model as it was initialised. Given a '
      'tree that is `Branched` already. Likely `split` was called twice: name '
      "all branches in one call, `branches=('adversarial', 'augmented')`."
    )
  if 'main' in branches or len(set(branches)) != len(branches):
    raise ValueError(
      "`branches` must be different names beside 'main', which is always "
      f"there. Given {tuple(branches)!r}; say `branches=('adversarial',)`."
    )

  def copy(tree: Any) -> Any:
    # Copies, because a donated buffer must not stand in the tree twice.
    return jax.tree.map(jnp.copy, tree)

  if jax.tree.leaves(model_state):
    state = Branched(
      model_state, {name: copy(model_state) for name in branches}
    )
  else:
    state = model_state
  if not affine:
    return params, state
  if is_norm is None:
    chosen = is_norm_parameter(params, model_state)
  else:
    chosen = jax.tree_util.tree_map_with_path(
      lambda path, leaf: bool(is_norm(path_names(path), leaf)), params
    )
  if not any(jax.tree.leaves(chosen)):
    paths = [
      path_names(path)
      for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]
    ]
    raise ValueError(
      'A norm layer is recognised by an entry of `model_state` at the path of '
      f'its parameters, and none of the {len(paths)} parameters (the first: '
      f'{paths[:3]}) has one. If the norm layers keep no state, say which they '
      "are: `split(..., is_norm=lambda path, leaf: 'norm' in "
      'str(path).lower())`; if they have no scale and bias, `split(..., '
      'affine=False)`.'
    )
  own = jax.tree.map(
    lambda leaf, is_own: jnp.copy(leaf) if is_own else None, params, chosen
  )
  return Branched(params, {name: copy(own) for name in branches}), state


def select(tree: Any, branch: str) -> Any:
  """The ordinary tree of one branch, for `model.apply`.

  Args:
    tree: a `Branched` tree, or an ordinary one that all branches share.
    branch: 'main' or the name of another branch.

  Returns:
    A tree of the model's own structure.

  Raises:
    KeyError: when a `Branched` tree has no such branch.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> tree = conadv.dual_bn.Branched(
    ...     {'w': jnp.ones(2), 'scale': jnp.ones(2)},
    ...     {'adversarial': {'w': None, 'scale': jnp.zeros(2)}})
    >>> chex.assert_trees_all_equal(
    ...     conadv.dual_bn.select(tree, 'adversarial'),
    ...     {'w': jnp.ones(2), 'scale': jnp.zeros(2)})
  """
  if not isinstance(tree, Branched):
    return tree
  if branch == 'main':
    return tree.main
  return jax.tree.map(
    lambda own, shared: shared if own is None else own,
    _branch(tree, branch),
    tree.main,
    is_leaf=_is_none,
  )


def replace(tree: Branched, branch: str, new: Any) -> Branched:
  """Writes a branch back, the counterpart of `select`.

  For 'main' the whole main tree is replaced. For another branch only its own
  leaves are replaced, and the leaves that it shares stay as they are.

  Args:
    tree: a `Branched` tree.
    branch: 'main' or the name of another branch.
    new: an ordinary tree of the model's structure.

  Returns:
    A `Branched` tree of the structure of `tree`.

  Raises:
    TypeError: when `tree` is not `Branched`.
    KeyError: when it has no such branch.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> state = {'norm': {'mean': jnp.zeros(3)}}
    >>> _, state = conadv.dual_bn.split({}, state, affine=False)
    >>> new = {'norm': {'mean': jnp.ones(3)}}
    >>> state = conadv.dual_bn.replace(state, 'adversarial', new)
    >>> chex.assert_trees_all_equal(
    ...     conadv.dual_bn.main(state), {'norm': {'mean': jnp.zeros(3)}})
    >>> chex.assert_trees_all_equal(
    ...     conadv.dual_bn.select(state, 'adversarial'), new)
  """
  if not isinstance(tree, Branched):
    raise TypeError(
      f'`replace` writes a branch of a `Branched` tree. Given a '
      f'{type(tree).__name__}, which has none. Split it first: `params, '
      'model_state = conadv.dual_bn.split(params, model_state)`.'
    )
  if branch == 'main':
    return tree._replace(main=new)
  own = jax.tree.map(
    lambda old, value: None if old is None else value,
    _branch(tree, branch),
    new,
    is_leaf=_is_none,
  )
  return tree._replace(branches={**tree.branches, branch: own})


def main(tree: Any) -> Any:
  """The main tree: what to evaluate and export, under ordinary names.

  Args:
    tree: a `Branched` tree, or an ordinary one.

  Returns:
    The tree of the model as it was initialised, trained, with nothing extra.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> model_state = {'norm': {'mean': jnp.zeros(3)}}
    >>> _, split = conadv.dual_bn.split({}, model_state, affine=False)
    >>> chex.assert_trees_all_equal(conadv.dual_bn.main(split), model_state)
  """
  return tree.main if isinstance(tree, Branched) else tree
