"""The training passes: one after the other, each in one branch."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax import dual_bn
from conadv_optax.core.calls import Call
from conadv_optax.core.numeric import (
  add_weighted,
  at_least_float32,
  cast_like,
  concrete,
  full,
  is_inexact,
  ratio,
  scale,
  summed_like,
  tree_at_least_float32,
  varying_like,
  weighted,
)
from conadv_optax.core.paths import Leaf
from conadv_optax.core.types import Batch, ConAdvAux
from conadv_optax.training.loss import Loss


class Pass(NamedTuple):
  """A training pass.

  Attributes:
    branch: whose norm layers it goes through.
    batch: its examples.
    key: of its loss.
    weight: of its loss in the sum.
    inputs: where the gradient in the inputs is wanted too, or None.
    runs: whether it is run at all, a boolean scalar; None is always. Of one
      that is not, what is floating is NaN, and the model state stays.
  """

  branch: str
  batch: Batch
  key: jax.Array | None
  weight: ArrayLike
  inputs: Any = None
  runs: jax.Array | None = None


class Trained(NamedTuple):
  """What training passes leave.

  Attributes:
    losses: the loss of each pass.
    auxes: the user's own output of each.
    weights: the weight of each.
    states: the model state of each branch.
    gradients: the weighted sum, at least float32; None is zero.
    of_inputs: the gradient in the inputs, where a pass was asked for it.
  """

  losses: dict[str, jax.Array]
  auxes: dict[str, Any]
  weights: dict[str, ArrayLike]
  states: dict[str, Any]
  gradients: Any = None
  of_inputs: Any = None


def train(
  loss: Loss,
  call: Call,
  passes: Mapping[str, Pass],
  *,
  leaf: Leaf | None = None,
  before: Trained | None = None,
  after: Any = None,
) -> Trained:
  """The training passes, one at a time, and none before `after` is there.

  Left to itself the compiler interleaves them and keeps the activations of all.

  Where the call is one group's part of a mean over groups, so is what a pass
  returns, at least float32. Of padding alone it is nothing.
  """
  done = before or Trained({}, {}, {}, {})
  for name, one in passes.items():
    total = done.gradients
    # By itself JAX would sum the gradients of devices that each have a loss of
    # their own, but not those behind a barrier.
    params = varying_like(call.params, one.batch)
    if jax.tree.leaves((after, total)):
      params, _ = jax.lax.optimization_barrier((params, (after, total)))
    (after, (state, aux)), gradients, of_inputs = _one_pass(
      loss, leaf, call._replace(params=params), name, one
    )
    gradients = summed_like(after, gradients, call.params)
    done = Trained(
      {**done.losses, name: after},
      {**done.auxes, name: aux},
      {**done.weights, name: one.weight},
      {**done.states, one.branch: state},
      add_weighted(total, one.weight, gradients),
      done.of_inputs if of_inputs is None else of_inputs,
    )
  return done


def _one_pass(
  loss: Loss, leaf: Leaf | None, call: Call, name: str, one: Pass
) -> tuple[Any, Any, Any]:
  """`(loss, (model_state, aux)), gradients, of_inputs`."""
  share: Any = None
  rest_of_share: Any = None
  old = dual_bn.select(call.model_state, one.branch)
  is_part = call.denominators is not None
  if is_part or loss.denominator is not None:
    # Of a batch by itself the mean is its own, which is none of padding alone.
    divisors = call.denominators or {one.branch: loss.divisor(one.batch)}
    of_mean = divisors[one.branch]
    # At most 1 where the model's dtype may be short, the rest in float32.
    share = ratio(loss.divisor(one.batch).mean, of_mean.most)
    rest_of_share = ratio(of_mean.most, of_mean.mean)

  def part(x: Any) -> Any:
    if share is None or not is_inexact(x):
      return x
    x = jnp.asarray(x)
    wide = scale(rest_of_share, weighted(share, at_least_float32(x)))
    return wide if is_part else wide.astype(x.dtype)

  def part_of_state(new: Any, old: Any) -> Any:
    new = part(new)
    if share is None or not is_inexact(new):
      return new
    # What no group has an example for stays as it was.
    return jnp.where(of_mean.most > 0, new, jnp.asarray(old, new.dtype))

  def objective(params: Any, inputs: Any) -> tuple[jax.Array, Any]:
    batch = one.batch
    if inputs is not None:
      assert leaf is not None
      batch = leaf.set(batch, cast_like(inputs, leaf.get(batch)))
    at = one.branch, params, call.model_state, batch, one.key
    value, rest = loss(*at, name=name)
    # Inside of what is differentiated: where a loss talks to other devices, its
    # gradient is a sum over the losses of all.
    counted = value if share is None else weighted(share, value)
    return counted, (part(value), rest)

  wants_inputs = one.inputs is not None
  gradient = functools.partial(
    jax.grad(objective, argnums=(0, 1) if wants_inputs else 0, has_aux=True),
    call.params,
    one.inputs,
  )
  if one.runs is None:
    gradients, (value, (state, aux)) = gradient()
  else:
    gradients, (value, (state, aux)) = jax.lax.cond(
      one.runs, gradient, lambda: _not_run(gradient, old)
    )
  if share is not None:
    # Of padding alone: the derivative of 0 / 0 is no number, even times 0.
    gradients = jax.tree.map(
      lambda g: jnp.where((share == 0) & jnp.isnan(g), jnp.zeros_like(g), g),
      gradients,
    )
    gradients = scale(rest_of_share, tree_at_least_float32(gradients))
  state = jax.tree.map(part_of_state, state, old)
  # An array of the user's is one value an example.
  aux = jax.tree.map(lambda x: x if jnp.ndim(x) else part(x), aux)
  gradients, of_inputs = gradients if wants_inputs else (gradients, None)
  return (value, (state, aux)), gradients, of_inputs


def _not_run(gradient: Callable[[], Any], model_state: Any) -> Any:
  """What `gradient` returns, of a pass that is not run."""

  def filled(tree: Any, value: float) -> Any:
    return jax.tree.map(lambda x: full(x, value if is_inexact(x) else 0), tree)

  gradients, (value, (_, aux)) = jax.eval_shape(gradient)
  return filled(gradients, 0), (
    filled(value, jnp.nan),
    (model_state, filled(aux, jnp.nan)),
  )


def collect(
  trained: Trained, call: Call, has_aux: bool
) -> tuple[tuple[jax.Array, ConAdvAux], Any]:
  """`(loss, aux), grads` of all passes."""
  loss = sum(
    weighted(trained.weights[name], x) for name, x in trained.losses.items()
  )
  state = call.model_state
  if isinstance(state, dual_bn.Branched):
    for branch, new in trained.states.items():
      state = dual_bn.replace(state, branch, new)
  else:
    state = _shared_state(trained)
  aux = ConAdvAux(trained.losses, state, trained.auxes if has_aux else None)
  grads = trained.gradients
  if call.denominators is None:
    grads = cast_like(grads, call.params)
  return (jnp.asarray(loss), aux), grads


def _shared_state(trained: Trained) -> Any:
  """That of the main branch, or of another one where that has no weight."""
  chosen = trained.states['main']
  # Main has the last word, and before it the first of the others.
  others = [name for name in trained.states if name != 'main']
  for branch in [*reversed(others), 'main']:
    state, weight = trained.states[branch], trained.weights[branch]
    number = concrete(weight)
    if number is not None:
      chosen = state if number != 0 else chosen
    else:
      chosen = jax.tree.map(
        lambda x, y, weight=weight: jnp.where(weight != 0, x, y), state, chosen
      )
  return chosen
