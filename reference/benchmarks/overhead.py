"""What `conadv.wrap` costs beside the same algorithm written out by hand.

  python -m reference.benchmarks.overhead

Programs of one ResNet take turns in one process: the plain step, the attack
pass alone, the hand-written ConAdv step, `conadv.wrap`, and `conadv.wrap` with
`reuse_gradient=True`. Printed are the median time of each with its quartiles,
and the ratio to the plain step of medians and of the compiler's FLOPs. A ConAdv
step is two training passes and an attack pass, so its ratio is 2 plus that of
the attack pass: where weight gradients dominate it is near 2.2, and where all
convolutions cost the same, 2.67.

The order of a program's arguments alone moves its time on a CPU by a few
percent, as buffers come to lie elsewhere. So each is compiled in several random
orders, and their times are pooled.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags, logging

import conadv_optax as conadv
from reference import models

_ROUNDS = flags.DEFINE_integer('rounds', 15, 'Timed calls of each order.')
_ORDERS = flags.DEFINE_integer('orders', 4, 'Orders of the arguments.')
_BATCH_SIZE = flags.DEFINE_integer('batch_size', 32, 'Examples in a batch.')
_IMAGE_SIZE = flags.DEFINE_integer('image_size', 32, 'Side in pixels.')
_FILTERS = flags.DEFINE_integer('filters', 16, 'Channels of the first stage.')

EPSILON = 0.1
CLASSES = 10
# Those of ResNet-18.
STAGES = (2, 2, 2, 2)


class Program(NamedTuple):
  """A step, compiled for several orders of its arguments.

  Attributes:
    steps: take the leaves of the carry, in an order of their own, and a batch;
      return new leaves and the loss.
    carries: the leaves for each.
    flops: by the compiler's count.
  """

  steps: list[Callable[..., Any]]
  carries: list[Any]
  flops: float


def main(argv: Sequence[str]) -> None:
  """Compiles, takes turns, prints."""
  del argv
  logging.set_verbosity(logging.WARNING)
  model = models.ResNet(
    num_classes=CLASSES,
    stage_sizes=STAGES,
    filters=_FILTERS.value,
    block='basic',
    stem='small',
    dtype=jnp.float32,
  )
  batch = make_batch()
  variables = model.init(jax.random.key(0), batch['image'], train=False)
  programs = {
    'plain step': plain(model, variables, batch),
    'attack pass alone': attack_pass(model, variables, batch),
    'hand-written ConAdv': hand_written(model, variables, batch),
    'conadv.wrap': wrapped(model, variables, batch, reuse_gradient=False),
    'conadv.wrap, reuse_gradient': wrapped(
      model, variables, batch, reuse_gradient=True
    ),
  }
  seconds = take_turns(programs, batch)
  report(programs, seconds)


def make_batch() -> dict[str, jax.Array]:
  """Noise for images: the time of a step does not depend on what they show."""
  rng = np.random.default_rng(0)
  size = (_BATCH_SIZE.value, _IMAGE_SIZE.value, _IMAGE_SIZE.value, 3)
  return {
    'image': jnp.asarray(rng.normal(size=size), jnp.float32),
    'label': jnp.asarray(rng.integers(CLASSES, size=size[0]), jnp.int32),
  }


def make_loss(model: models.ResNet) -> Callable[..., Any]:
  """`loss_fn(params, model_state, batch)` as a user writes it."""

  def loss_fn(params: Any, model_state: Any, batch: Any) -> Any:
    logits, updates = model.apply(
      {'params': params, 'batch_stats': model_state},
      batch['image'],
      train=True,
      mutable=['batch_stats'],
    )
    loss = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    return loss.mean(), updates['batch_stats']

  return loss_fn


def compile_step(step: Callable[..., Any], carry: Any, batch: Any) -> Program:
  """Ahead of time, with the carry donated, as a training loop does."""
  leaves, treedef = jax.tree.flatten(carry)
  steps: list[Callable[..., Any]] = []
  carries: list[Any] = []
  flops = 0.0
  for seed in range(_ORDERS.value):
    order = np.random.default_rng(seed).permutation(len(leaves))
    place = np.argsort(order)

    def ordered(
      shuffled: list[jax.Array],
      batch: Any,
      order: np.ndarray = order,
      place: np.ndarray = place,
    ) -> Any:
      carry, loss = step(
        jax.tree.unflatten(treedef, [shuffled[i] for i in place]), batch
      )
      new = jax.tree.leaves(carry)
      return [new[i] for i in order], loss

    own = [jnp.copy(leaves[i]) for i in order]
    compiled = jax.jit(ordered, donate_argnums=0).lower(own, batch).compile()
    cost: Any = compiled.cost_analysis()
    steps.append(compiled)
    carries.append(own)
    flops = cost['flops']
  return Program(steps, carries, flops)


def make_optimizer() -> optax.GradientTransformation:
  """One that costs little, the same for all."""
  return optax.sgd(1e-3, momentum=0.9)


def plain(model: models.ResNet, variables: Any, batch: Any) -> Program:
  """The step that a user has before."""
  loss_fn, tx = make_loss(model), make_optimizer()

  def step(carry: Any, batch: Any) -> Any:
    params, model_state, opt_state = carry
    (loss, model_state), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, model_state, batch
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, model_state, opt_state), loss

  params, model_state = variables['params'], variables['batch_stats']
  return compile_step(step, (params, model_state, tx.init(params)), batch)


def attack_pass(model: models.ResNet, variables: Any, batch: Any) -> Program:
  """Forward and backward to the inputs, without weight gradients."""
  loss_fn = make_loss(model)

  def step(carry: Any, batch: Any) -> Any:
    params, model_state, _ = carry

    def loss_of(image: jax.Array) -> jax.Array:
      return loss_fn(params, model_state, {**batch, 'image': image})[0]

    loss, gradient = jax.value_and_grad(loss_of)(batch['image'])
    return (params, model_state, gradient), loss

  carry = (variables['params'], variables['batch_stats'], batch['image'])
  return compile_step(step, carry, batch)


def wrapped(
  model: models.ResNet, variables: Any, batch: Any, *, reuse_gradient: bool
) -> Program:
  """The step of a user of the library."""
  loss_fn, tx = make_loss(model), make_optimizer()
  grad_fn = conadv.wrap(
    loss_fn,
    staleness=1,
    attack=conadv.fgsm(EPSILON),
    has_state=True,
    reuse_gradient=reuse_gradient,
  )

  def step(carry: Any, batch: Any) -> Any:
    params, model_state, opt_state, state = carry
    (loss, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, model_state=model_state
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, aux.model_state, opt_state, state), loss

  params, model_state = conadv.dual_bn.split(
    variables['params'], variables['batch_stats']
  )
  state = grad_fn.init(params, [batch], model_state=model_state)
  carry = (params, model_state, tx.init(params), state)
  return compile_step(step, carry, batch)


def hand_written(model: models.ResNet, variables: Any, batch: Any) -> Program:
  """The same algorithm without the library: staleness 1, two BatchNorms."""
  loss_fn, tx = make_loss(model), make_optimizer()

  def with_norm(params: Any, norm: Any) -> Any:
    flat = flax.traverse_util.flatten_dict(params)
    return flax.traverse_util.unflatten_dict({**flat, **norm})

  def adversarial_loss(both: Any, stats: Any, batch: Any) -> Any:
    return loss_fn(with_norm(both['main'], both['norm']), stats, batch)

  def main_loss(both: Any, stats: Any, batch: Any) -> Any:
    return loss_fn(both['main'], stats, batch)

  def attack(both: Any, stats: Any, batch: Any) -> jax.Array:
    def loss_of(image: jax.Array) -> jax.Array:
      return adversarial_loss(both, stats, {**batch, 'image': image})[0]

    clean = batch['image']
    stepped = clean + EPSILON * jnp.sign(jax.grad(loss_of)(clean))
    return jnp.clip(stepped, clean - EPSILON, clean + EPSILON)

  def step(carry: Any, batch: Any) -> Any:
    both, main_stats, adv_stats, opt_state, waiting, attacked = carry
    crafted = attack(both, adv_stats, batch)
    theta, crafted = jax.lax.optimization_barrier((both, crafted))
    (adv_loss, adv_stats), adv_grads = jax.value_and_grad(
      adversarial_loss, has_aux=True
    )(theta, adv_stats, {**waiting, 'image': attacked})
    theta, adv_grads = jax.lax.optimization_barrier((both, adv_grads))
    (loss, main_stats), grads = jax.value_and_grad(main_loss, has_aux=True)(
      theta, main_stats, waiting
    )
    grads = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, grads, adv_grads)
    updates, opt_state = tx.update(grads, opt_state, both)
    both = optax.apply_updates(both, updates)
    carry = (both, main_stats, adv_stats, opt_state, batch, crafted)
    return carry, 0.5 * (loss + adv_loss)

  params, stats = variables['params'], variables['batch_stats']
  modules = {path[:-1] for path in flax.traverse_util.flatten_dict(stats)}
  norm = {
    path: leaf
    for path, leaf in flax.traverse_util.flatten_dict(params).items()
    if path[:-1] in modules
  }
  both = {'main': params, 'norm': norm}
  carry = (both, stats, stats, tx.init(both), batch, attack(both, stats, batch))
  return compile_step(step, carry, batch)


def take_turns(
  programs: dict[str, Program], batch: Any
) -> dict[str, list[float]]:
  """Seconds of each call; the first round warms up and is not counted.

  Each round has an order of its own, so that none always follows the same.
  """
  rng = np.random.default_rng(0)
  seconds: dict[str, list[float]] = {name: [] for name in programs}
  for turn in range(_ROUNDS.value + 1):
    for which in range(_ORDERS.value):
      for name in rng.permutation(list(programs)):
        program = programs[name]
        start = time.perf_counter()
        program.carries[which], loss = jax.block_until_ready(
          program.steps[which](program.carries[which], batch)
        )
        if turn > 0:
          seconds[name].append(time.perf_counter() - start)
        assert np.isfinite(loss), name
  return seconds


def report(
  programs: dict[str, Program], seconds: dict[str, list[float]]
) -> None:
  """The table, and the ratio that the library answers for."""
  device = jax.devices()[0]
  print(
    f'jax {jax.__version__}, {device.device_kind}, {_ROUNDS.value} rounds of '
    f'{_ORDERS.value} orders, {_BATCH_SIZE.value} images of '
    f'{_IMAGE_SIZE.value} pixels'
  )
  base = programs['plain step']
  base_time = np.median(seconds['plain step'])
  print(f'{"":28} {"ms":>7} {"quartiles":>15} {"/ plain":>8} {"FLOPs":>6}')
  for name, program in programs.items():
    low, middle, high = np.percentile(seconds[name], [25, 50, 75])
    print(
      f'{name:28} {1e3 * middle:7.0f} {1e3 * low:7.0f}-{1e3 * high:<7.0f} '
      f'{middle / base_time:8.3f} {program.flops / base.flops:6.3f}'
    )
  ours, theirs = 'conadv.wrap', 'hand-written ConAdv'
  pairs = np.divide(seconds[ours], seconds[theirs])
  low, high = np.percentile(pairs, [25, 75])
  print(
    f'{ours} / {theirs}: ratio of medians '
    f'{np.median(seconds[ours]) / np.median(seconds[theirs]):.3f} '
    f'(quartiles of the pairs {low:.3f}-{high:.3f}), FLOPs '
    f'{programs[ours].flops / programs[theirs].flops:.4f}'
  )


if __name__ == '__main__':
  app.run(main)
