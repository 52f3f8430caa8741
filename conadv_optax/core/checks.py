"""Checks of what the user passes to `wrap`, all of them at trace time."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from conadv_optax import dual_bn
from conadv_optax.core.numeric import concrete, describe
from conadv_optax.core.paths import path_names
from conadv_optax.core.types import (
  Attack,
  Batch,
  ConAdvState,
  GradientFunction,
  Passes,
)

_NEXT = '[next(batches) for _ in range(grad_fn.staleness)]'


def check_staleness(staleness: Any, reuse_gradient: bool) -> None:
  """`staleness` counts steps; a reused gradient is at least one step old."""
  if isinstance(staleness, bool) or not isinstance(staleness, int):
    raise TypeError(
      '`staleness` is a number of steps, a Python int, because the length of '
      f'the queue depends on it. Given staleness={staleness!r} of type '
      f'{type(staleness).__name__}. Write `staleness=1`; mark it static under '
      '`jax.jit`.'
    )
  if staleness < 0:
    raise ValueError(
      '`staleness` is how many steps old the parameters of an attack are, 0 or '
      f'more. Given staleness={staleness}.'
    )
  if reuse_gradient and staleness == 0:
    raise ValueError(
      '`reuse_gradient=True` makes the adversarial copy from the gradient of a '
      'training pass, so it can be trained on one step later at the earliest. '
      'Given staleness=0. Write `staleness=1`.'
    )


def check_attack(attack: Any, reuse_gradient: bool) -> None:
  """The attack is an `Attack`, and one gradient is enough where it must be."""
  if not isinstance(attack, Attack):
    raise TypeError(
      '`attack` must be a `conadv.Attack`. Given a '
      f'{type(attack).__name__}. Likely the call is missing: '
      '`attack=conadv.pgd(8 / 255)`.'
    )
  if reuse_gradient and attack.reuse is None:
    raise ValueError(
      '`reuse_gradient=True` has one gradient, at the clean inputs: it needs '
      'an attack of one step, without random start and without targets. Write '
      '`attack=conadv.fgsm(epsilon)`, or `reuse_gradient=False`.'
    )


def check_fraction(fraction: Any) -> None:
  """A share of the batch, more than none of it."""
  if not 0 < fraction <= 1:
    raise ValueError(
      '`adversarial_fraction` is the share of each batch that is attacked, in '
      f'(0, 1]. Given adversarial_fraction={fraction!r}. To train on clean '
      'examples alone, leave `wrap` out.'
    )


def check_branches(branches: Sequence[str], weights: Any) -> None:
  """Different names, and a number for each of them and for no other."""
  if len(set(branches)) != len(branches):
    raise ValueError(
      "The names 'main' and 'adversarial' are taken: `extra_branches` needs "
      f'others. Given {list(branches[2:])}.'
    )
  right = dict.fromkeys(branches, round(1 / len(branches), 3))
  if weights is not None and set(weights) != set(branches):
    raise ValueError(
      '`weights` needs one entry for each branch. Given '
      f'weights for {sorted(weights)}, but the branches are '
      f'{sorted(branches)}. Write `weights={right}`.'
    )
  for name, weight in (weights or {}).items():
    number = concrete(weight)
    is_scalar = jnp.shape(weight) == ()
    if not is_scalar or (number is not None and not 0 <= number < jnp.inf):
      given = describe(weight) if number is None else number.tolist()
      raise ValueError(
        'A weight of a branch is one finite number, not negative. Given '
        f'weights[{name!r}]={given}. Write `weights={right}`; weights of '
        'examples belong in `loss_fn`.'
      )


def check_key(draws: bool, key: jax.Array | None) -> None:
  """A key wherever something draws."""
  if draws and key is None:
    raise ValueError(
      'Random numbers are drawn here (a random start, targets, noise, or '
      '`has_key=True`), which needs `key=`. Given none. Add to this call '
      '`key=jax.random.fold_in(key, step)`, or another fresh key each step.'
    )


def check_model_state(params: Any, model_state: Any, has_state: bool) -> None:
  """A model state exactly where `loss_fn` takes one, branched like `params`."""
  if has_state and model_state is None:
    raise ValueError(
      '`has_state=True` says that `loss_fn` takes a model state. Given none. '
      'Add to this call `model_state=model_state`.'
    )
  if not has_state and model_state is not None:
    raise ValueError(
      '`model_state` was passed, but `has_state=False` says that `loss_fn` '
      'takes none. Write `conadv.wrap(loss_fn, has_state=True, ...)`.'
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


def check_inputs(inputs: Any) -> None:
  """The perturbed leaf is a floating-point batch."""
  if not hasattr(inputs, 'dtype') or not hasattr(inputs, 'shape'):
    raise TypeError(
      'The perturbed leaf must be an array with a leading batch axis. Given '
      f'{describe(inputs)}.'
    )
  if not jnp.issubdtype(inputs.dtype, jnp.floating):
    raise TypeError(
      'The perturbed leaf must be floating, because an attack moves it by '
      f'fractions. Given {describe(inputs)}. Likely raw pixels: normalise them '
      "before the call, `batch['image'].astype(jnp.float32) / 255`."
    )
  if inputs.ndim < 1 or inputs.shape[0] == 0:
    raise ValueError(
      'The perturbed leaf must have a leading batch axis of at least one '
      f'example. Given {describe(inputs)}.'
    )


def check_first_batches(first_batches: Any, staleness: int) -> None:
  """As many batches as the staleness."""
  if not isinstance(first_batches, list | tuple):
    right = {0: '[]', 1: '[batch]'}.get(staleness, _NEXT)
    raise TypeError(
      '`first_batches` must be a list of batches, as many as the staleness, '
      f'here {staleness}. Given a {type(first_batches).__name__}. Write '
      f'`grad_fn.init(params, {right})`.'
    )
  if len(first_batches) != staleness:
    raise ValueError(
      f'`init` wants the first {staleness} batches, as many as the staleness. '
      f'Given {len(first_batches)}. Write `first_batches = {_NEXT}`.'
    )


def check_state(state: ConAdvState, staleness: int) -> None:
  """The ring of as many batches as the staleness."""
  rings = jax.tree.leaves(state.queue)
  held = rings[0].shape[0] if rings else 0
  if held != staleness:
    raise ValueError(
      'The state holds as many batches as the staleness, here '
      f'staleness={staleness}. Given a state that holds {held}. Likely it is '
      'of a run with another staleness: restore all but the state, and write '
      f'`state = grad_fn.init(params, {_NEXT})`.'
    )


def check_like(batch: Batch, like: Batch, what: str) -> None:
  """The structure, shapes and dtypes of `batch` are those of `like`."""
  given, wanted = _structure(batch), _structure(like)
  if given != wanted:
    raise ValueError(
      f'{what} must have the structure of the first, because it takes its '
      f'place in the queue. Given {given}, after {wanted}.'
    )
  leaves = jax.tree_util.tree_leaves_with_path(batch)
  for (path, new), old in zip(leaves, jax.tree.leaves(like), strict=True):
    if new.shape != old.shape or new.dtype != old.dtype:
      raise ValueError(
        f'{what} must have the shapes and dtypes of the first, because it '
        f'takes its place in the queue. Leaf {list(path_names(path))} is '
        f'{describe(new)}, after {describe(old)}. Likely the last batch of an '
        'epoch is smaller: drop or pad it.'
      )


def check_batch_axis(batch: Batch, size: int) -> None:
  """Every leaf can be cut where the inputs are."""
  for path, value in jax.tree_util.tree_flatten_with_path(batch)[0]:
    if not value.shape or value.shape[0] != size:
      raise ValueError(
        '`adversarial_fraction` below 1 takes the first part of every leaf, so '
        f'each needs the leading batch axis of {size}. Leaf '
        f'{list(path_names(path))} is {describe(value)}.'
      )


def check_roles(
  mesh: Mesh, data_axis: str, role_axis: str, attackers: int
) -> None:
  """Rows of trainers and attackers, no more of these than of those."""
  if set(mesh.axis_names) != {data_axis, role_axis} or data_axis == role_axis:
    raise ValueError(
      'The mesh needs two axes, one along which the batch is split and one '
      'along which devices have roles. Given '
      f'data_axis={data_axis!r}, role_axis={role_axis!r} for a mesh with '
      f'{mesh.axis_names}. Write `jax.make_mesh((rows, devices_in_a_row), '
      f"('data', 'role'))`."
    )
  devices = mesh.shape[role_axis]
  if attackers not in range(1, devices // 2 + 1):
    raise ValueError(
      'Every row of the mesh needs an attacker, and at least as many trainers: '
      'one attacker crafts for whole trainers. Given '
      f'attackers={attackers!r} for rows of {devices} devices. Write '
      "`attackers=1`, and `jax.make_mesh((rows, 4), ('data', 'role'))` for "
      'three trainers to each.'
    )


def check_passes(grad_fn: GradientFunction, caller: str) -> Passes:
  """The passes of a gradient function, where it can be taken apart."""
  if not isinstance(grad_fn, GradientFunction):
    raise TypeError(
      f'`{caller}` takes a `conadv.GradientFunction`. Given a '
      f'{type(grad_fn).__name__}. Write `conadv.{caller}(conadv.wrap(loss_fn, '
      '...), ...)`.'
    )
  if grad_fn.passes is None:
    raise ValueError(
      f'`{caller}` needs the attack pass and the training passes apart, and '
      'this gradient function does not have them: with `reuse_gradient=True` '
      'there is no attack pass, and `data_parallel` has joined them. Pass what '
      '`conadv.wrap(loss_fn, ...)` returned, with `reuse_gradient=False`.'
    )
  return grad_fn.passes


def unpack_loss(
  output: Any, model_state: Any, has_state: bool, has_aux: bool
) -> tuple[jax.Array, Any, Any]:
  """`(loss, model_state, aux)` from what `loss_fn` returned, checked."""
  if not has_state and not has_aux:
    loss, new_state, aux = output, None, None
    if isinstance(output, tuple | list):
      raise TypeError(
        '`loss_fn` must return the loss alone. It returned a '
        f'{type(output).__name__} of {len(output)}. If the second part is the '
        'model state, say `has_state=True`; if it is anything else, '
        '`has_aux=True`.'
      )
  else:
    form = {
      (True, False): '(loss, model_state)',
      (False, True): '(loss, aux)',
      (True, True): '(loss, (model_state, aux))',
    }[has_state, has_aux]
    wrong = TypeError(
      f'With has_state={has_state}, has_aux={has_aux}, `loss_fn` must return '
      f'`{form}`. It returned '
      f'{describe(output) if hasattr(output, "dtype") else type(output)}.'
    )
    if not isinstance(output, tuple | list) or len(output) != 2:
      raise wrong
    loss, rest = output
    if has_state and has_aux:
      if not isinstance(rest, tuple | list) or len(rest) != 2:
        raise wrong
      new_state, aux = rest
    else:
      new_state, aux = (rest, None) if has_state else (None, rest)
  loss = jnp.asarray(loss)
  if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
    raise TypeError(
      '`loss_fn` must return a floating scalar, the mean over the batch. It '
      f'returned {describe(loss)}. Likely the mean is missing: '
      '`return jnp.mean(losses)`.'
    )
  if has_state:
    _check_same_state(new_state, model_state)
  return loss, new_state, aux


def _check_same_state(new: Any, old: Any) -> None:
  spelled_new, spelled_old = (
    {
      path_names(path): describe(jnp.asarray(value))
      for path, value in jax.tree_util.tree_flatten_with_path(tree)[0]
    }
    for tree in (new, old)
  )
  if spelled_new != spelled_old or _structure(new) != _structure(old):
    different = sorted(
      set(spelled_new.items()) ^ set(spelled_old.items()), key=str
    )
    raise TypeError(
      'The model state that `loss_fn` returns must have the structure, shapes '
      'and dtypes of the one that it takes. They differ in '
      f'{different[:3] or (_structure(new), _structure(old))}. '
      "Likely a collection is wrapped: return `updates['batch_stats']` if "
      "`variables['batch_stats']` was passed. Or metrics are returned too: "
      'say `has_aux=True`, and return `(loss, (model_state, metrics))`.'
    )


def _structure(tree: Any) -> Any:
  return jax.tree.structure(tree)
