"""Which parameters an optimizer treats as weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_optax import dual_bn
from conadv_optax.core.norm_layers import is_norm_parameter
from conadv_optax.core.numeric import describe

TAKEN_FOR_A_SCHEDULE = (
  'Likely under `optax.inject_hyperparams`, which takes a function for a '
  'schedule and calls it with the step: write '
  "`optax.inject_hyperparams(conadv.lars, static_args='mask')(...)`."
)


def exclude_norm_and_bias(params: Any, *, model_state: Any = None) -> Any:
  """True for the weights, False for biases and the parameters of norm layers.

  A norm layer's parameters are known by structure where there is one to read:
  the leaves that `dual_bn.split` gave to another branch, and those that have
  an entry in `model_state`. Every other leaf goes by its rank: 0 and 1 are
  excluded, as biases and norm parameters are in Flax. Haiku's BatchNorm keeps
  parameters of rank 4; unless they are split, say where the state is:
  `mask=functools.partial(exclude_norm_and_bias, model_state=state)`. Say it
  too where `optax.masked` or `optax.multi_transform` takes a branch out as a
  whole, because then it shows nothing.

  Args:
    params: parameters, `Branched` or not, arrays of any shape.
    model_state: the statistics of the model, `Branched` or not.

  Returns:
    A tree of the structure of `params` with Python bools for leaves, the mask
    of `conadv.lars` and of `optax.masked`.

  Raises:
    ValueError: for a step count in place of parameters.

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
    raise ValueError(
      'A mask is a function of the parameters. Given a single integer, '
      f'{describe(params)}. {TAKEN_FOR_A_SCHEDULE}'
    )
  state = dual_bn.main(model_state)
  norm = is_norm_parameter(dual_bn.main(params), state)
  mask = jax.tree.map(
    lambda leaf, is_norm: len(leaf.shape) > 1 and not is_norm,
    dual_bn.main(params),
    norm,
  )
  if not isinstance(params, dual_bn.Branched):
    return mask
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
