"""What the calls of the library take and return."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from jax.typing import ArrayLike

Batch = Any
"""A pytree of arrays that share a leading axis, the batch."""

LossFn = Callable[..., Any]


class Divisor(NamedTuple):
  """What a loss is divided by in each group, scalars of JAX's default float.

  Attributes:
    mean: over the groups.
    most: of any group.
    weight: of the loss in that of a step, beside those of other branches.
  """

  mean: jax.Array
  most: jax.Array
  weight: ArrayLike = 1.0


Denominators = Mapping[str, Divisor]
"""What the loss of each branch is divided by, by name."""


class ConAdvState(NamedTuple):
  """What a step leaves for the steps after it: a ring of `tau` batches.

  Attributes:
    slot: int32 scalar, where the oldest batch of the ring lies: the number of
      calls, modulo `tau`. With `every=k` it is modulo `tau * k`, so that it
      also says whose turn it is. `()` when there is nothing to count.
    queue: `Queue` of arrays with a leading axis of length `tau`, or `()`.
  """

  slot: Any
  queue: Any


class Queue(NamedTuple):
  """The batches that wait, each array with a leading axis of length `tau`.

  Attributes:
    batch: the clean batches. With `reuse_gradient` the clean half is not
      needed again, and `inputs` hold the adversarial copy.
    adversarial: the adversarial copy of `inputs` alone, or None with
      `reuse_gradient`.
  """

  batch: Batch
  adversarial: Any


class PerGroup(NamedTuple):
  """A part of a state of which each group keeps its own.

  A group is a device of `data_parallel` or a micro-batch of `accumulate`; both
  give the arrays a leading axis with one entry for each group.

  Attributes:
    value: a pytree of arrays.
  """

  value: Any


class ConAdvAux(NamedTuple):
  """What a step returns beside the loss.

  Attributes:
    losses: the unweighted loss of each branch, at least float32, by name.
    model_state: the model state after the step, of the structure passed in, or
      None without `has_state`.
    aux: the user's own auxiliary output of each branch, by name, or None
      without `has_aux`.
    second_moment: the mean over groups (devices, or micro-batches) of their
      squared gradients, float32, of the structure of the parameters; None
      unless `data_parallel` or `accumulate` was asked for it.
  """

  losses: dict[str, jax.Array]
  model_state: Any
  aux: dict[str, Any] | None
  second_moment: Any = None


class Passes(NamedTuple):
  """The two halves of a step, which do not wait for each other.

  Both take the key of the call and find their own in it.

  Attributes:
    craft: `craft(params, model_state, batch, key)`, the attack pass: the
      adversarial inputs of a clean batch.
    train: `train(params, model_state, waiting, key, denominators)`, all by
      position and the last one or none, the training passes on a clean batch
      and its adversarial inputs, a `Queue` without the leading axis of the
      ring. Returns `(loss, aux), grads`; with `denominators`, as a group's part
      of a mean.
    clean: `clean(batch)`, the inputs that `craft` perturbs.
  """

  craft: Callable[..., Any]
  train: Callable[..., tuple[tuple[jax.Array, Any], Any]]
  clean: Callable[[Batch], Any]


class GradientFunction(NamedTuple):
  """A gradient with memory: two pure functions, as in `optax`.

  Inside of a `shard_map` of your own each device has the gradient of its own
  loss, to be averaged: `jax.lax.pmean(grads, axis)`. Of a loss that is the same
  on all devices, by a `pmean` in it, all have the whole gradient already.

  Attributes:
    init: `init(params, first_batches, *, model_state=None, key=None)` returns
      the state; `first_batches` holds the first `staleness` batches.
    value_and_grad: `value_and_grad(params, state, batch, *, model_state=None,
      key=None)` returns `(loss, aux), grads, state`, `aux` being a `ConAdvAux`.
    staleness: how many batches `init` wants.
    passes: the `Passes` that a step is made of, or None where they cannot be
      taken apart.
    denominators: `denominators(state, batch)` returns what the loss of each
      branch will be divided by, by name: a NamedTuple of the mean over groups,
      the most of any, and the weight of that loss. None where losses are means
      over examples. Where it is given, `value_and_grad` also takes
      `denominators=`, those of a mean over groups of which the call is one: the
      loss of a branch then counts by its own denominator over that, and what is
      returned is at least float32.
  """

  init: Callable[..., ConAdvState]
  value_and_grad: Callable[..., tuple[tuple[jax.Array, Any], Any, ConAdvState]]
  staleness: int
  passes: Passes | None = None
  denominators: Callable[[Any, Batch], Denominators] | None = None


class Attack(NamedTuple):
  """How inputs are perturbed. Bring your own by filling it in.

  `inputs` is an array with a leading batch axis, or a list or dict of them
  where `wrap` was given several leaves.

  Attributes:
    craft: `craft(key, gradient_fn, inputs)` returns the adversarial inputs, of
      the shape and dtype of `inputs`. `gradient_fn` maps perturbed inputs, at
      least float32, to the gradient of the loss there, of the same dtype.
    prepare: `prepare(key, batch)` returns the batch whose loss `gradient_fn`
      differentiates, or None when that is the batch itself. Targets are drawn
      here. Training never sees what it returns.
    reuse: `reuse(gradient, inputs)` returns the adversarial inputs from the
      gradient at the clean inputs, or None where one such gradient is not
      enough; `reuse_gradient=True` needs it.
    draws: whether `craft` or `prepare` reads `key`.
    one_step: `one_step(key, inputs)` returns `(start, finish)`: where the one
      gradient is taken, at least float32, and `finish(gradient)`, the
      adversarial inputs. None for more gradients; `fast_advprop` needs it.
    needs_losses: whether `craft` takes a fourth argument, `losses_fn`, which
      maps inputs of the shape and dtype of `inputs` to the loss of each
      example there, (batch,), at least float32.
  """

  craft: Callable[..., Any]
  prepare: Callable[[jax.Array | None, Batch], Batch] | None = None
  reuse: Callable[[Any, Any], Any] | None = None
  draws: bool = True
  one_step: (
    Callable[[jax.Array | None, Any], tuple[Any, Callable[[Any], Any]]] | None
  ) = None
  needs_losses: bool = False
