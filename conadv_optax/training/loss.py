"""The loss of a branch, and what is asked of it."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax import dual_bn
from conadv_optax.core.calls import Call
from conadv_optax.core.micro_batches import weight_of
from conadv_optax.core.numeric import at_least_float32, describe
from conadv_optax.core.paths import named
from conadv_optax.core.types import Batch, Divisor, LossFn


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
  """A user's loss function, what it takes, returns, and is a mean of."""

  function: LossFn
  has_state: bool = False
  has_aux: bool = False
  has_key: bool = False
  has_branch: bool = False
  denominator: Callable[[Batch], ArrayLike] | None = None

  def __call__(
    self,
    branch: str,
    params: Any,
    model_state: Any,
    batch: Batch,
    key: Any,
    *,
    name: str | None = None,
    by_example: bool = False,
  ) -> tuple[jax.Array, tuple[Any, Any]]:
    """`loss, (model_state, aux)` of one branch, the loss at least float32.

    Args:
      branch: whose parameters and state the loss gets.
      params: the parameters of all.
      model_state: the model state of all.
      batch: the examples.
      key: of the loss.
      name: what the loss is told that it is for; None is the branch.
      by_example: whether it may return an array in place of the mean.
    """
    state = dual_bn.select(model_state, branch)
    output = self.function(
      dual_bn.select(params, branch),
      *([state] if self.has_state else []),
      batch,
      **({'key': key} if self.has_key else {}),
      **({'branch': name or branch} if self.has_branch else {}),
    )
    return self._unpack(output, state, 1 if by_example else 0)

  def divisor(self, batch: Batch, weight: ArrayLike = 1.0) -> Divisor:
    """What the loss of `batch` was divided by, and its weight in a step's."""
    value = weight_of(batch, self.denominator)
    return Divisor(value, value, jnp.asarray(weight, float))

  def check(self, call: Call, *, draws: bool = False) -> None:
    """What a call passes is what the loss takes."""
    for tree in (call.params, call.model_state):
      _check_no_module(tree)
    _check_model_state(call.params, call.model_state, self.has_state)
    check_key(draws or self.has_key, call.key)

  def _unpack(
    self, output: Any, model_state: Any, most_axes: int
  ) -> tuple[jax.Array, tuple[Any, Any]]:
    has_state, has_aux = self.has_state, self.has_aux
    length = f' of {len(output)}' if isinstance(output, tuple | list) else ''
    form = {
      (False, False): 'the loss alone',
      (True, False): '`(loss, model_state)`',
      (False, True): '`(loss, aux)`',
      (True, True): '`(loss, (model_state, aux))`',
    }[has_state, has_aux]
    parts = [output]
    for _ in range(has_state + has_aux):
      if not isinstance(parts[-1], tuple | list) or len(parts[-1]) != 2:
        break
      parts[-1:] = parts[-1]
    loss = parts[0]
    if len(parts) != 1 + has_state + has_aux or isinstance(loss, tuple | list):
      raise TypeError(
        f'With has_state={has_state}, has_aux={has_aux}, `loss_fn` must return '
        f'{form}. It returned a {type(output).__name__}{length}. If a second '
        'part is the model state, say `has_state=True`; if it is anything '
        'else, `has_aux=True`. Where there are no such arguments, write '
        '`conadv.plain(loss_fn, has_state=True)` for a gradient function; for '
        '`perturb`, `sharpness` or `hessian` leave it out: `lambda params, '
        'batch: loss_fn(params, model_state, batch)[0]`.'
      )
    loss = jnp.asarray(loss)
    if loss.ndim > most_axes or not jnp.issubdtype(loss.dtype, jnp.floating):
      raise TypeError(
        '`loss_fn` must return a floating scalar, the mean over the batch. It '
        f'returned {describe(loss)}. Likely the mean is missing: '
        '`return jnp.mean(losses)`.'
      )
    new_state = parts[1] if has_state else None
    if has_state:
      _check_same_state(new_state, model_state)
    aux = parts[-1] if has_aux else None
    return at_least_float32(loss), (new_state, aux)


def split_key(key: jax.Array | None, num: int) -> Any:
  """`num` keys, or as many times None."""
  return (None,) * num if key is None else jax.random.split(key, num)


def check_key(draws: bool, key: Any) -> Any:
  """The key, which is there wherever something draws."""
  if draws and key is None:
    raise ValueError(
      'Random numbers are drawn here (a random start, targets, noise, or '
      '`has_key=True`), which needs `key=`. Given none. Add to this call '
      '`key=jax.random.fold_in(key, step)`, or another fresh key each step.'
    )
  return key


def _is_module(x: Any) -> bool:
  """Whether it is a module of Flax NNX, which need not be installed."""
  return any(
    kind.__module__.startswith('flax.nnx') and kind.__name__ == 'Module'
    for kind in type(x).__mro__
  )


def _check_no_module(tree: Any) -> None:
  leaves = jax.tree.leaves(tree, is_leaf=_is_module)
  modules = [type(x).__name__ for x in leaves if _is_module(x)]
  if modules:
    raise TypeError(
      'The parameters and the model state are trees of arrays. Given an NNX '
      f'module, {modules[0]}. Split it: `graphdef, params, '
      'model_state = nnx.split(model, nnx.Param, nnx.BatchStat)`, and merge in '
      '`loss_fn`: `nnx.merge(graphdef, params, model_state, copy=True)`.'
    )


def _check_model_state(params: Any, model_state: Any, has_state: bool) -> None:
  """A model state exactly where `loss_fn` takes one, branched like `params`."""
  if has_state and model_state is None:
    raise ValueError(
      '`has_state=True` says that `loss_fn` takes a model state. Given none. '
      'Add to this call `model_state=model_state`.'
    )
  if not has_state and model_state is not None:
    raise ValueError(
      '`model_state` was passed, but `has_state=False` says that `loss_fn` '
      'takes none. Say `has_state=True` where `loss_fn` was given. A loss in '
      '`sam`, `accumulate` and the like goes in as `conadv.plain(loss_fn, '
      'has_state=True)`.'
    )
  if (
    has_state
    and isinstance(params, dual_bn.Branched)
    and not isinstance(model_state, dual_bn.Branched)
    and jax.tree.leaves(model_state)
  ):
    raise ValueError(
      'The parameters are `Branched` and the model state is not: the branches '
      'would share statistics that their own scales do not fit. Likely one '
      'result of the split was dropped: `params, model_state = '
      'conadv.dual_bn.split(params, model_state)`. For shared statistics, '
      'leave both as they were.'
    )


def _check_same_state(new: Any, old: Any) -> None:
  spelled_new, spelled_old = (
    {path: describe(jnp.asarray(leaf)) for path, leaf in named(tree).items()}
    for tree in (new, old)
  )
  given: Any = jax.tree.structure(new)
  wanted: Any = jax.tree.structure(old)
  if spelled_new != spelled_old or given != wanted:
    different = sorted(
      set(spelled_new.items()) ^ set(spelled_old.items()), key=str
    )
    raise TypeError(
      'The model state that `loss_fn` returns must have the structure, shapes '
      'and dtypes of the one that it takes. They differ in '
      f'{different[:3] or (given, wanted)}. '
      "Likely a collection is wrapped: return `updates['batch_stats']` if "
      "`variables['batch_stats']` was passed. Or metrics are returned too: "
      'say `has_aux=True`, and return `(loss, (model_state, metrics))`. If a '
      '`FrozenDict` went in, pass `flax.core.unfreeze(batch_stats)`.'
    )
