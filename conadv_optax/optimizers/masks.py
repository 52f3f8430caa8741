"""Which parameters an optimizer treats as weights."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_optax import dual_bn
from conadv_optax.core.norm_layers import is_norm_parameter, module_path
from conadv_optax.core.numeric import describe
from conadv_optax.core.paths import path_names

TAKEN_FOR_A_SCHEDULE = (
  'Likely under `optax.inject_hyperparams`, which takes a function for a '
  'schedule and calls it with the step: write '
  "`optax.inject_hyperparams(conadv.lars, static_args='mask')(...)`."
)

# The last names of biases and norm parameters, in Flax and in Haiku.
_NOT_WEIGHTS = {'bias', 'scale', 'b', 'offset'}


def exclude_norm_and_bias(
  params: Any,
  *,
  model_state: Any = None,
  is_norm_or_bias: Callable[[tuple[Any, ...], Any], bool] | None = None,
) -> Any:
  """True for the weights, False for biases and the parameters of norm layers.

  Norm layers are found by structure where there is one to read: their
  parameters are the leaves that `dual_bn.split` gave to another branch, and
  those that have an entry in `model_state`. Every other leaf is judged by rank
  and name. Excluded are the ranks 0 and 1 and, at any rank, what Flax or Haiku
  call 'bias', 'scale', 'b' or 'offset', as in attention or under a scan over
  layers. A weight with such a name, the b of a LoRA say, needs
  `is_norm_or_bias`. For other names pass the state:
  `mask=functools.partial(exclude_norm_and_bias, model_state=state)`. Do so too
  where `optax.masked` or `optax.multi_transform` takes a whole branch out,
  because it then shows nothing.

  Args:
    params: parameters, `Branched` or not, arrays of any shape.
    model_state: the statistics of the model, `Branched` or not.
    is_norm_or_bias: `is_norm_or_bias(path, leaf)` decides alone which leaves
      are excluded; `path` is the tuple of keys of the leaf, in its branch.

  Returns:
    A tree of the structure of `params` with Python bools for leaves, the mask
    of `conadv.lars` and of `optax.masked`.

  Raises:
    TypeError: for a step count in place of parameters.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> params = {'kernel': jnp.ones((3, 4)), 'bias': jnp.ones(4)}
    >>> chex.assert_trees_all_equal(
    ...     conadv.exclude_norm_and_bias(params),
    ...     {'kernel': True, 'bias': False})

  References:
    You et al., `Large Batch Training of Convolutional Networks
    <https://arxiv.org/abs/1708.03888>`_, 2017
  """
  if getattr(params, 'shape', None) == () and jnp.issubdtype(
    params.dtype, jnp.integer
  ):
    raise TypeError(
      'A mask is a function of the parameters. Given a single integer, '
      f'{describe(params)}. {TAKEN_FOR_A_SCHEDULE}'
    )
  main = dual_bn.main(params)
  norm = is_norm_parameter(main, dual_bn.main(model_state))

  def is_weight(path: Any, leaf: Any, is_norm: bool = False) -> bool:
    if is_norm_or_bias is not None:
      return not is_norm_or_bias(path_names(path), leaf)
    has_other_name = _NOT_WEIGHTS.isdisjoint(module_path(path)[-1:])
    return has_other_name and jnp.ndim(leaf) > 1 and not is_norm

  mask = jax.tree_util.tree_map_with_path(is_weight, main, norm)
  if not isinstance(params, dual_bn.Branched):
    return mask
  if is_norm_or_bias is not None:
    branches = {
      name: jax.tree_util.tree_map_with_path(is_weight, branch)
      for name, branch in params.branches.items()
    }
    return dual_bn.Branched(mask, branches)
  for branch in params.branches.values():
    # One that is masked out as a whole shows nothing.
    if jax.tree.leaves(branch, is_leaf=lambda x: x is None):
      mask = jax.tree.map(_without_own, branch, mask, is_leaf=_is_gap)
  return dual_bn.Branched(mask, jax.tree.map(lambda _: False, params.branches))


def _is_gap(x: Any) -> bool:
  return x is None or isinstance(x, optax.MaskedNode)


def _without_own(own: Any, weight: Any) -> Any:
  """False where the branch has a leaf of its own, masked out or not."""
  # Where a whole part of the tree is masked out, `weight` is that part.
  return weight if own is None or not isinstance(weight, bool) else False
