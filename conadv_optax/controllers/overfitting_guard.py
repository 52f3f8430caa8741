r"""A guard against catastrophic overfitting of fast adversarial training.

References:
  Wong et al., `Fast is better than free: Revisiting adversarial training
  <https://arxiv.org/abs/2001.03994>`_, 2020
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.controllers.order import check_order
from conadv_optax.core.numeric import check_no_schedule, concrete


class OverfittingGuardState(NamedTuple):
  """What `overfitting_guard` keeps between epochs.

  Attributes:
    kept: a copy of the tree as it was at the last check that passed.
    robust_accuracy: float32 scalar, the accuracy at that check; 0 before the
      first.
    tripped: bool scalar, whether training is to stop.
  """

  kept: Any
  robust_accuracy: jax.Array
  tripped: jax.Array


class OverfittingGuard(NamedTuple):
  """Two pure functions, as in `optax`.

  Attributes:
    init: `init(tree)` returns the state before training.
    update: `update(robust_accuracy, state, tree)` returns `(tree, state)`: the
      tree as given or, once the guard has tripped, the tree that was kept.
  """

  init: Callable[[Any], OverfittingGuardState]
  update: Callable[
    [ArrayLike, OverfittingGuardState, Any],
    tuple[Any, OverfittingGuardState],
  ]


def overfitting_guard(*, max_drop: ArrayLike = 0.2) -> OverfittingGuard:
  r"""Stops and restores when robustness is lost within an epoch.

  Training with a single-step attack can turn, within an epoch, into a model
  that withstands only this attack. The sign is a sudden fall of the accuracy
  :math:`a_e` under a stronger attack, measured after epoch :math:`e`:

  .. math::

    a_e < a_{e-1} - \text{max\_drop}

  Then the guard trips: it hands back the tree of epoch :math:`e - 1`, and keeps
  doing so. The published setting is PGD with 5 steps on one batch of training
  examples, each epoch, with `max_drop` 0.2. A slow decline does not trip it.

  Such training, on adversarial examples alone, is `wrap(loss_fn, 0,
  attack=fast_fgsm(epsilon), weights={'main': 0., 'adversarial': 1.})`.

  Args:
    max_drop: the largest fall of the accuracy that does not trip, in [0, 1].

  Returns:
    An `OverfittingGuard`. The tree is any pytree of arrays that is to be
    restored: parameters, or a tuple of parameters, model state and optimizer
    state; its copy costs its memory again. An accuracy of `nan` trips it.
    `update` works under `jit`; ask `bool(state.tripped)` outside.

  Raises:
    TypeError: for a function for `max_drop`, or an `update` with an accuracy
      that is no scalar or the tree in its place.
    ValueError: for a `max_drop` or an accuracy outside [0, 1].

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def logits(w, x):
    ...   return jnp.stack([x @ w, -x @ w], axis=-1)
    >>> def loss_fn(w, batch):
    ...   log_p = jax.nn.log_softmax(logits(w, batch['x']))
    ...   return -jnp.mean(
    ...       jnp.take_along_axis(log_p, batch['y'][:, None], axis=1))
    >>> attack = conadv.pgd(0.5, steps=5)
    >>> def robust_accuracy(w, batch, key):
    ...   gradient_fn = jax.grad(lambda x: loss_fn(w, {**batch, 'x': x}))
    ...   x = attack.craft(key, gradient_fn, batch['x'])
    ...   right = jnp.argmax(logits(w, x), axis=-1) == batch['y']
    ...   return jnp.mean(right, dtype=jnp.float32)
    >>> batch = {'x': jnp.array([[1., .1], [-1., -.1]]), 'y': jnp.array([0, 1])}
    >>> guard = conadv.overfitting_guard()
    >>> w = jnp.array([1., 0.])
    >>> state = guard.init(w)
    >>> # After an epoch. The margin of each example is 1, twice the radius.
    >>> w, state = guard.update(
    ...     robust_accuracy(w, batch, jax.random.key(0)), state, w)
    >>> chex.assert_trees_all_close(state.robust_accuracy, 1.)
    >>> # After an epoch that lost 0.1, less than `max_drop`.
    >>> w, state = guard.update(0.9, state, w)
    >>> assert not bool(state.tripped)
    >>> # After an epoch that went wrong: right on clean examples alone.
    >>> w = jnp.array([0., 1.])
    >>> w, state = guard.update(
    ...     robust_accuracy(w, batch, jax.random.key(1)), state, w)
    >>> assert bool(state.tripped)
    >>> chex.assert_trees_all_close(w, jnp.array([1., 0.]))

  References:
    Wong et al., `Fast is better than free: Revisiting adversarial training
    <https://arxiv.org/abs/2001.03994>`_, 2020
  """
  _check_share('max_drop', max_drop)

  def init_fn(tree: Any) -> OverfittingGuardState:
    return OverfittingGuardState(
      # Copies, because the training step may give its buffers back.
      jax.tree.map(jnp.copy, tree),
      jnp.zeros([], jnp.float32),
      jnp.zeros([], jnp.bool),
    )

  def update_fn(
    robust_accuracy: ArrayLike, state: OverfittingGuardState, tree: Any
  ) -> tuple[Any, OverfittingGuardState]:
    call = 'guard.update(robust_accuracy, state, tree)'
    check_order(call, state, OverfittingGuardState, measured=robust_accuracy)
    _check_share('robust_accuracy', robust_accuracy)
    accuracy = jnp.asarray(robust_accuracy, jnp.float32)
    lowest = state.robust_accuracy - jnp.asarray(max_drop, jnp.float32)
    # An accuracy of nan does not hold.
    holds = accuracy >= lowest
    tripped = state.tripped | ~holds
    tree = optax.tree.where(tripped, state.kept, tree)
    return tree, OverfittingGuardState(
      jax.tree.map(jnp.copy, tree),
      jnp.where(tripped, state.robust_accuracy, accuracy),
      tripped,
    )

  return OverfittingGuard(init_fn, update_fn)


def _check_share(name: str, value: ArrayLike) -> None:
  check_no_schedule(name, value)
  number = concrete(value)
  if number is not None and (number < 0 or number > 1):
    raise ValueError(
      f'`{name}` is a share of the examples, in [0, 1]. Given '
      f'{name}={number.tolist()}. Likely it is in per cent: divide it by 100.'
    )
