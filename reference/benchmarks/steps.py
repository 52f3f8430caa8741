"""The steps whose cost is compared, each a line of `ROWS`.

All train the same ResNet with the same optimizer, and differ in how the
gradient is made.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import conadv_optax as conadv
from reference.run import models, objective

EPSILON = 0.1


class Step(NamedTuple):
  """A step of training, as two pure functions.

  Attributes:
    init: `init(key, batch)` returns the carry, all that a step changes.
    step: `step(carry, batch)` returns `(carry, loss)`.
  """

  init: Callable[[jax.Array, Any], Any]
  step: Callable[[Any, Any], tuple[Any, jax.Array]]


Maker = Callable[[models.ResNet, Mesh], Step]


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    make: the step, for a model and a mesh with axes 'data' and 'role'.
    beside: the line that it is compared with, apart from 'plain'.
    mesh: length of the two axes.
    share: its batch as a share of that of the others.
  """

  make: Maker
  beside: str = 'plain'
  mesh: tuple[int, int] = (1, 1)
  share: float = 1.0


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


def make_optimizer() -> optax.GradientTransformationExtraArgs:
  """One that costs little, the same for all."""
  return optax.with_extra_args_support(optax.sgd(1e-3, momentum=0.9))


def make_variables(model: models.ResNet, key: jax.Array, batch: Any) -> Any:
  """Parameters and statistics."""
  variables = model.init(key, batch['image'][:1], train=False)
  return variables['params'], variables['batch_stats']


def with_optimizer(
  model: models.ResNet, tx: optax.GradientTransformationExtraArgs
) -> Step:
  """The step that a user has before."""
  loss_fn = make_loss(model)

  def init(key: jax.Array, batch: Any) -> Any:
    params, stats = make_variables(model, key, batch)
    return params, stats, tx.init(params)

  def step(carry: Any, batch: Any) -> Any:
    params, stats, opt_state = carry

    def gradient(params: Any, _: Any) -> Any:
      return jax.grad(loss_fn, has_aux=True)(params, stats, batch)[0]

    (loss, new_stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
      params, stats, batch
    )
    # Of the two optimizers, SAM alone asks for another gradient.
    updates, opt_state = tx.update(grads, opt_state, params, grad_fn=gradient)
    return (optax.apply_updates(params, updates), new_stats, opt_state), loss

  return Step(init, step)


def plain(model: models.ResNet, mesh: Mesh) -> Step:
  """Forward and backward on the batch."""
  del mesh
  return with_optimizer(model, make_optimizer())


def sam(model: models.ResNet, mesh: Mesh) -> Step:
  """Two gradients, one after the other."""
  del mesh
  ascent = optax.chain(optax.contrib.normalize(), optax.sgd(0.05))
  tx = optax.contrib.sam(make_optimizer(), ascent, opaque_mode=True)
  return with_optimizer(model, tx)


def two_views(model: models.ResNet, mesh: Mesh) -> Step:
  """The plain step on every image and its mirror image, in one pass."""
  one = plain(model, mesh)

  def step(carry: Any, batch: Any) -> Any:
    image, label = batch['image'], batch['label']
    views = {
      'image': jnp.concatenate([image, image[:, :, ::-1]]),
      'label': jnp.concatenate([label, label]),
    }
    return one.step(carry, views)

  return Step(one.init, step)


def attack_pass(model: models.ResNet, mesh: Mesh) -> Step:
  """Forward, and backward to the images without weight gradients."""
  del mesh
  loss_fn = make_loss(model)

  def init(key: jax.Array, batch: Any) -> Any:
    return *make_variables(model, key, batch), batch['image']

  def step(carry: Any, batch: Any) -> Any:
    params, stats, _ = carry

    def loss_of(image: jax.Array) -> jax.Array:
      return loss_fn(params, stats, {**batch, 'image': image})[0]

    loss, gradient = jax.value_and_grad(loss_of)(batch['image'])
    return (params, stats, gradient), loss

  return Step(init, step)


class Both(NamedTuple):
  """Parameters or statistics of two branches, written out by hand.

  Attributes:
    main: of the model.
    adversarial: the norm layers' part for adversarial examples, by path.
  """

  main: Any
  adversarial: Any


def make_both(params: Any, stats: Any) -> Both:
  """A second copy of what belongs to norm layers."""
  modules = {path[:-1] for path in flax.traverse_util.flatten_dict(stats)}
  flat = flax.traverse_util.flatten_dict(params)
  return Both(params, {k: v for k, v in flat.items() if k[:-1] in modules})


def adversarial_of(both: Both) -> Any:
  """The model's parameters with the norm layers of adversarial examples."""
  flat = flax.traverse_util.flatten_dict(both.main)
  return flax.traverse_util.unflatten_dict({**flat, **both.adversarial})


def fgsm_by_hand(loss_fn: Any, both: Both, stats: Any, batch: Any) -> jax.Array:
  """The batch's images, each a step away from its label."""
  clean = batch['image']

  def loss_of(image: jax.Array) -> jax.Array:
    return loss_fn(adversarial_of(both), stats, {**batch, 'image': image})[0]

  stepped = clean + EPSILON * jnp.sign(jax.grad(loss_of)(clean))
  return jnp.clip(stepped, clean - EPSILON, clean + EPSILON)


def advprop_by_hand(model: models.ResNet, mesh: Mesh) -> Step:
  """Attack, then one gradient of the sum of both losses."""
  del mesh
  loss_fn, tx = make_loss(model), make_optimizer()

  def init(key: jax.Array, batch: Any) -> Any:
    params, stats = make_variables(model, key, batch)
    both = make_both(params, stats)
    return both, stats, stats, tx.init(both)

  def step(carry: Any, batch: Any) -> Any:
    both, stats, adv_stats, opt_state = carry
    attacked = fgsm_by_hand(loss_fn, both, adv_stats, batch)

    def sum_of_losses(both: Both) -> Any:
      loss, new_stats = loss_fn(both.main, stats, batch)
      adv_loss, new_adv_stats = loss_fn(
        adversarial_of(both), adv_stats, {**batch, 'image': attacked}
      )
      return 0.5 * (loss + adv_loss), (new_stats, new_adv_stats)

    (loss, (stats, adv_stats)), grads = jax.value_and_grad(
      sum_of_losses, has_aux=True
    )(both)
    updates, opt_state = tx.update(grads, opt_state, both)
    both = optax.apply_updates(both, updates)
    return (both, stats, adv_stats, opt_state), loss

  return Step(init, step)


def conadv_by_hand(model: models.ResNet, mesh: Mesh) -> Step:
  """Staleness 1, and one pass at a time, as the library has it."""
  del mesh
  loss_fn, tx = make_loss(model), make_optimizer()

  def init(key: jax.Array, batch: Any) -> Any:
    params, stats = make_variables(model, key, batch)
    both = make_both(params, stats)
    attacked = fgsm_by_hand(loss_fn, both, stats, batch)
    return both, stats, stats, tx.init(both), batch, attacked

  def adversarial_loss(both: Both, stats: Any, batch: Any) -> Any:
    return loss_fn(adversarial_of(both), stats, batch)

  def main_loss(both: Both, stats: Any, batch: Any) -> Any:
    return loss_fn(both.main, stats, batch)

  def step(carry: Any, batch: Any) -> Any:
    both, stats, adv_stats, opt_state, waiting, attacked = carry
    crafted = fgsm_by_hand(loss_fn, both, adv_stats, batch)
    theta, crafted = jax.lax.optimization_barrier((both, crafted))
    (adv_loss, adv_stats), adv_grads = jax.value_and_grad(
      adversarial_loss, has_aux=True
    )(theta, adv_stats, {**waiting, 'image': attacked})
    theta, adv_grads = jax.lax.optimization_barrier((both, adv_grads))
    (loss, stats), grads = jax.value_and_grad(main_loss, has_aux=True)(
      theta, stats, waiting
    )
    grads = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, grads, adv_grads)
    updates, opt_state = tx.update(grads, opt_state, both)
    both = optax.apply_updates(both, updates)
    carry = (both, stats, adv_stats, opt_state, batch, crafted)
    return carry, 0.5 * (loss + adv_loss)

  return Step(init, step)


def of(
  make_gradient: Callable[[Any, Mesh], conadv.GradientFunction],
  *,
  branched: bool = True,
  change: Callable[[Any], Any] = lambda tx: tx,
) -> Maker:
  """The step of a user of the library.

  Args:
    make_gradient: the gradient, from a loss function and a mesh.
    branched: whether adversarial examples have a norm of their own.
    change: makes another optimizer of the common one.
  """

  def make(model: models.ResNet, mesh: Mesh) -> Step:
    tx = change(make_optimizer())
    grad_fn = make_gradient(make_loss(model), mesh)

    def init(key: jax.Array, batch: Any) -> Any:
      params, stats = make_variables(model, key, batch)
      if branched:
        params, stats = conadv.dual_bn.split(params, stats)
      batches = [batch] * grad_fn.staleness
      state = grad_fn.init(params, batches, model_state=stats)
      return params, stats, tx.init(params), state

    def step(carry: Any, batch: Any) -> Any:
      params, stats, opt_state, state = carry
      (loss, aux), grads, state = grad_fn.value_and_grad(
        params, state, batch, model_state=stats
      )
      updates, opt_state = tx.update(
        grads, opt_state, params, second_moment=aux.second_moment
      )
      params = optax.apply_updates(params, updates)
      return (params, aux.model_state, opt_state, state), loss

    return Step(init, step)

  return make


def library(
  spread: Any = None,
  *,
  attack_downscale: int = 1,
  adversarial_downscale: int = 1,
  **arguments: Any,
) -> Maker:
  """The step of `conadv.wrap`.

  Args:
    spread: `spread(grad_fn, mesh)` puts the gradient on several devices.
    attack_downscale: what the attack's pass divides the sides of images by.
    adversarial_downscale: what all passes on adversarial examples do.
    **arguments: of `conadv.wrap`.
  """

  def make_gradient(loss_fn: Any, mesh: Mesh) -> conadv.GradientFunction:
    def of_branch(
      params: Any, model_state: Any, batch: Any, *, branch: str
    ) -> Any:
      factor = attack_downscale if branch == 'attack' else 1
      image = objective.downscale(batch['image'], factor)
      return loss_fn(params, model_state, {**batch, 'image': image})

    grad_fn = conadv.wrap(
      of_branch,
      attack=scoped(conadv.fgsm(EPSILON)),
      inputs=(
        lambda batch: objective.downscale(
          batch['image'], adversarial_downscale
        ),
        lambda batch, image: {**batch, 'image': image},
      ),
      has_state=True,
      has_branch=True,
      **arguments,
    )
    return grad_fn if spread is None else spread(grad_fn, mesh)

  return of(make_gradient)


def plain_on_devices(
  loss_fn: Any, mesh: Mesh, *, second_moment: bool = False
) -> conadv.GradientFunction:
  """The plain gradient, a group of the batch on each device."""
  return conadv.data_parallel(
    conadv.plain(loss_fn, has_state=True), mesh, second_moment=second_moment
  )


def fast_advprop(
  loss_fn: Any, mesh: Mesh, *, adversarial_fraction: float = 0.2
) -> conadv.GradientFunction:
  """A part of the batch attacked, by a gradient that trains too."""
  del mesh
  return conadv.fast_advprop(
    loss_fn,
    attack=scoped(conadv.fgsm(EPSILON)),
    adversarial_fraction=adversarial_fraction,
    has_state=True,
  )


def plain_in_parts(
  loss_fn: Any, mesh: Mesh, *, unroll: bool = False
) -> conadv.GradientFunction:
  """The plain gradient, in four micro-batches on one device."""
  del mesh
  return conadv.accumulate(
    conadv.plain(loss_fn, has_state=True), 4, unroll=unroll
  )


def scoped(attack: conadv.Attack) -> conadv.Attack:
  """An attack whose operations carry its name in the compiler's schedule."""
  return attack._replace(craft=jax.named_scope('attack')(attack.craft))


def update_alone(tx: optax.GradientTransformation) -> Maker:
  """An optimizer without a gradient."""

  def make(model: models.ResNet, mesh: Mesh) -> Step:
    del mesh

    def init(key: jax.Array, batch: Any) -> Any:
      params, _ = make_variables(model, key, batch)
      return params, jax.tree.map(lambda p: 0.01 * p, params), tx.init(params)

    def step(carry: Any, batch: Any) -> Any:
      del batch
      params, grads, opt_state = carry
      updates, opt_state = tx.update(grads, opt_state, params)
      carry = optax.apply_updates(params, updates), grads, opt_state
      return carry, jnp.zeros([])

    return Step(init, step)

  return make


ROWS = {
  'plain': Row(plain),
  'two views': Row(two_views),
  'attack pass alone': Row(attack_pass),
  'AdvProp by hand': Row(advprop_by_hand),
  'AdvProp': Row(library(staleness=0), 'AdvProp by hand'),
  'ConAdv by hand': Row(conadv_by_hand),
  'ConAdv': Row(library(staleness=1), 'ConAdv by hand'),
  'ConAdv staleness 4': Row(library(staleness=4), 'ConAdv'),
  'half attack': Row(library(attack_downscale=2)),
  'half': Row(library(adversarial_downscale=2)),
  'half fraction 0.35': Row(
    library(adversarial_downscale=2, adversarial_fraction=0.35)
  ),
  'quarter': Row(library(adversarial_downscale=4)),
  'reuse': Row(library(reuse_gradient=True)),
  'fraction 0.2': Row(library(adversarial_fraction=0.2)),
  'reuse + fraction 0.2': Row(
    library(reuse_gradient=True, adversarial_fraction=0.2)
  ),
  'optax.contrib.sam': Row(sam),
  'sam': Row(
    of(
      lambda loss_fn, _: conadv.sam(
        conadv.plain(loss_fn, has_state=True), 0.05
      ),
      branched=False,
    ),
    'optax.contrib.sam',
  ),
  'extrapolate': Row(
    of(
      lambda loss_fn, _: conadv.extrapolate(
        conadv.plain(loss_fn, has_state=True), 0.01
      ),
      branched=False,
    )
  ),
  'fast_advprop': Row(of(fast_advprop)),
  'fast_advprop fraction 0.35': Row(
    of(functools.partial(fast_advprop, adversarial_fraction=0.35))
  ),
  'accumulate': Row(of(plain_in_parts, branched=False)),
  'accumulate unrolled': Row(
    of(functools.partial(plain_in_parts, unroll=True), branched=False),
    'accumulate',
  ),
  'plain data_parallel': Row(of(plain_on_devices, branched=False), mesh=(4, 1)),
  'scale_by_gsnr': Row(
    of(
      functools.partial(plain_on_devices, second_moment=True),
      branched=False,
      change=lambda tx: optax.chain(conadv.scale_by_gsnr(), tx),
    ),
    'plain data_parallel',
    (4, 1),
  ),
  'agvm': Row(
    of(
      functools.partial(plain_on_devices, second_moment=True),
      branched=False,
      change=functools.partial(conadv.agvm, groups=4, anchor='head'),
    ),
    'plain data_parallel',
    (4, 1),
  ),
  'data_parallel': Row(library(conadv.data_parallel), 'ConAdv', (4, 1)),
  'concurrent equal work': Row(
    library(conadv.concurrent), 'data_parallel', (1, 4)
  ),
  'concurrent equal share': Row(
    library(conadv.concurrent), 'data_parallel', (1, 4), 0.75
  ),
  'optax.lars alone': Row(update_alone(optax.lars(1e-3, weight_decay=1e-4))),
  'conadv.lars alone': Row(
    update_alone(
      conadv.lars(1e-3, weight_decay=1e-4, trust_ratio='joint', mask=True)
    ),
    'optax.lars alone',
  ),
}
