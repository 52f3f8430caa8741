"""What a step is made of: craft, and train."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax import dual_bn
from conadv_optax.core.batches import first_part
from conadv_optax.core.calls import Call, pytree
from conadv_optax.core.numeric import (
  add_weighted,
  at_least_float32,
  cast_like,
  concrete,
  describe,
  is_inexact,
  weighted,
)
from conadv_optax.core.paths import Leaf
from conadv_optax.core.types import (
  Attack,
  Batch,
  ConAdvAux,
  Denominators,
  GradientFunction,
  Passes,
)
from conadv_optax.training.loss import Loss, split_key


@pytree('attack', 'weights')
class Step:
  """What the steps with an adversarial branch share.

  Attributes:
    attack: how the inputs are perturbed.
    weights: the weight of each branch's loss, by name.
    loss: the loss of a branch.
    leaf: the inputs, in a batch.
    views: the inputs of each extra branch, by name.
    fraction: the share of a batch that is attacked.
  """

  attack: Attack
  weights: Mapping[str, ArrayLike]
  loss: Loss
  leaf: Leaf
  views: Mapping[str, Leaf]
  fraction: float

  def check(self, call: Call, batches: Sequence[Batch]) -> None:
    """Raises where a call passes what the step cannot take."""
    self.loss.check(call, draws=self.attack.draws)
    for batch in batches:
      check_inputs(self.leaf.get(batch))

  def passes(self) -> Passes | None:
    """Craft and train apart, where they can be."""
    return None

  def part(self, batch: Batch) -> Batch:
    """The examples that are attacked."""
    return first_part(batch, self.fraction, self.leaf.get(batch).shape[0])

  def keys(self, key: jax.Array | None) -> tuple[Any, dict[str, Any]]:
    """The attack's own key and those of the branches, from that of a call."""
    branches = ('main', 'adversarial', *self.views)
    attack_key, *branch_keys = split_key(key, 1 + len(branches))
    return attack_key, dict(zip(branches, branch_keys, strict=True))

  def craft(self, call: Call, batch: Batch, key: Any) -> jax.Array:
    """The attack pass: adversarial inputs of the first part of a batch."""
    batch = self.part(batch)

    def loss(batch: Batch, key: Any) -> jax.Array:
      return self.loss(
        'adversarial', call.params, call.model_state, batch, key
      )[0]

    divisor = None
    if self.loss.denominator is not None:
      divisor = self.loss.divisor(batch)
    return craft(self.attack, self.leaf, loss, batch, key, divisor=divisor)

  def divisors(self, clean: Batch, attacked: Batch) -> Denominators:
    """What the losses of these examples are divided by."""
    examples = self._examples(clean, attacked)
    return {name: self.loss.divisor(batch) for name, batch in examples.items()}

  def train(
    self,
    call: Call,
    clean: Batch,
    attacked: Batch,
    *,
    inputs: jax.Array | None = None,
    after: Any = None,
  ) -> tuple[tuple[tuple[jax.Array, ConAdvAux], Any], Any]:
    """`((loss, aux), grads), input_gradient`: one pass for each branch.

    Args:
      call: the call of the step.
      clean: the clean examples.
      attacked: the adversarial ones.
      inputs: the clean inputs, where the gradient in them is wanted too.
      after: what is to be computed first.
    """
    _, keys = self.keys(call.key)
    of_pass = {'main': inputs}
    passes = {
      name: Pass(name, batch, keys[name], self.weights[name], of_pass.get(name))
      for name, batch in self._examples(clean, attacked).items()
    }
    trained = train(self.loss, call, passes, leaf=self.leaf, after=after)
    return collect(trained, call, self.loss.has_aux), trained.of_inputs

  def _examples(self, clean: Batch, attacked: Batch) -> dict[str, Batch]:
    views = {
      name: self.leaf.set(clean, view.get(clean))
      for name, view in self.views.items()
    }
    return {'adversarial': attacked, 'main': clean, **views}


def craft(
  attack: Attack,
  leaf: Leaf,
  loss: Callable[[Batch, Any], jax.Array],
  batch: Batch,
  key: jax.Array | None,
  *,
  divisor: ArrayLike | None = None,
) -> jax.Array:
  """The attack pass: adversarial inputs of a batch.

  Args:
    attack: how they are found.
    leaf: where they are in the batch.
    loss: `loss(batch, key)`, a mean, at least float32.
    batch: the clean examples.
    key: of the attack.
    divisor: what the loss is divided by; None is the number of examples.
  """
  prepare_key, craft_key, loss_key = split_key(key, 3)
  clean = leaf.get(batch)
  if attack.prepare is not None:
    batch = attack.prepare(prepare_key, batch)
  # The gradient of a mean is that of an example over their number, which
  # float16 does not hold. On its way back it is 64 times that of an example, or
  # as much as float16 allows; a power of two changes no digit.
  size = jnp.asarray(clean.shape[0] if divisor is None else divisor)
  exponent = jnp.floor(jnp.log2(size.astype(jnp.float32)))
  scale = jnp.exp2(jnp.clip(exponent + 6.0, 0.0, 15.0))

  def gradient_fn(perturbed: jax.Array) -> jax.Array:
    def scaled(perturbed: jax.Array) -> jax.Array:
      value = loss(leaf.set(batch, perturbed.astype(clean.dtype)), loss_key)
      return scale.astype(value.dtype) * value

    return jax.grad(scaled)(perturbed) / scale.astype(perturbed.dtype)

  return check_crafted(attack.craft(craft_key, gradient_fn, clean), clean)


class Pass(NamedTuple):
  """A training pass.

  Attributes:
    branch: whose norm layers it goes through.
    batch: its examples.
    key: of its loss.
    weight: of its loss in the sum.
    inputs: where the gradient in the inputs is wanted too, or None.
  """

  branch: str
  batch: Batch
  key: jax.Array | None
  weight: ArrayLike
  inputs: jax.Array | None = None


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
  returns, at least float32.
  """
  done = before or Trained({}, {}, {}, {})
  for name, one in passes.items():
    params, total = call.params, done.gradients
    if jax.tree.leaves((after, total)):
      params, (after, total) = jax.lax.optimization_barrier(
        (params, (after, total))
      )
    (after, (state, aux)), gradients, of_inputs = _one_pass(
      loss, leaf, call._replace(params=params), one
    )
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
  loss: Loss, leaf: Leaf | None, call: Call, one: Pass
) -> tuple[Any, Any, Any]:
  """`(loss, (model_state, aux)), gradients, of_inputs`."""
  share = None
  if call.denominators is not None:
    share = loss.divisor(one.batch) / call.denominators[one.branch]

  def part(x: Any) -> Any:
    if share is None or not is_inexact(x):
      return x
    return weighted(share, at_least_float32(jnp.asarray(x)))

  def objective(params: Any, inputs: Any) -> tuple[jax.Array, Any]:
    batch = one.batch
    if inputs is not None:
      assert leaf is not None
      batch = leaf.set(batch, inputs.astype(leaf.get(batch).dtype))
    value, rest = loss(one.branch, params, call.model_state, batch, one.key)
    # Inside of what is differentiated: where a loss talks to other devices, its
    # gradient is a sum over the losses of all.
    return part(value), rest

  wants_inputs = one.inputs is not None
  (value, (state, aux)), gradients = jax.value_and_grad(
    objective, argnums=(0, 1) if wants_inputs else 0, has_aux=True
  )(call.params, one.inputs)
  if share is not None:
    # Of padding alone: the derivative of 0 / 0 is no number, even times 0.
    gradients = jax.tree.map(
      lambda g: jnp.where((share == 0) & jnp.isnan(g), jnp.zeros_like(g), g),
      gradients,
    )
  state = jax.tree.map(part, state)
  # An array of the user's is one value an example.
  aux = jax.tree.map(lambda x: x if jnp.ndim(x) else part(x), aux)
  gradients, of_inputs = gradients if wants_inputs else (gradients, None)
  return (value, (state, aux)), gradients, of_inputs


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
  for branch in sorted(trained.states, key=lambda name: name == 'main'):
    state, weight = trained.states[branch], trained.weights[branch]
    number = concrete(weight)
    if number is not None:
      chosen = state if number != 0 else chosen
    else:
      chosen = jax.tree.map(
        lambda x, y, weight=weight: jnp.where(weight != 0, x, y), state, chosen
      )
  return chosen


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


def check_attack(attack: Any) -> None:
  """The attack is an `Attack`."""
  if not isinstance(attack, Attack):
    raise TypeError(
      '`attack` must be a `conadv.Attack`. Given a '
      f'{type(attack).__name__}. Likely the call is missing: '
      '`attack=conadv.pgd(8 / 255)`.'
    )


def check_crafted(crafted: Any, clean: jax.Array) -> jax.Array:
  """What an attack returned has the shape and dtype of the inputs."""
  shape, dtype = jnp.shape(crafted), getattr(crafted, 'dtype', None)
  if shape != clean.shape or dtype != clean.dtype:
    raise TypeError(
      'An attack must return adversarial inputs of the shape and dtype of the '
      f'inputs, {describe(clean)}. It returned {describe(crafted)}. Likely it '
      'computes in float32, as it should, and does not convert at the end: '
      '`return perturbed.astype(inputs.dtype)`.'
    )
  return crafted


def check_fraction(fraction: Any) -> None:
  """A share of the batch, more than none of it."""
  if not 0 < fraction <= 1:
    raise ValueError(
      '`adversarial_fraction` is the share of each batch that is attacked, in '
      f'(0, 1]. Given adversarial_fraction={fraction!r}. To train on clean '
      'examples alone, leave `wrap` out.'
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
