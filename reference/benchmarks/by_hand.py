"""Steps as a user writes them without the library, to compare with.

All train the same ResNet with the same optimizer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from reference.run import models

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
