"""The steps whose cost is compared, each a line of `ROWS`.

All train the same ResNet with the same optimizer, and differ in how the
gradient is made.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

import conadv_optax as conadv
from reference.benchmarks.by_hand import (
  EPSILON,
  Maker,
  Step,
  advprop_by_hand,
  attack_pass,
  conadv_by_hand,
  make_loss,
  make_optimizer,
  make_variables,
  plain,
  sam,
  two_views,
)
from reference.run import models, objective


class Row(NamedTuple):
  """A line of the table.

  Attributes:
    make: the step, for a model and a mesh with axes 'data' and 'role'.
    beside: the line that it is compared with, apart from 'plain'.
    mesh: length of the two axes.
    share: its batch as a share of that of the others.
    loops: whether it loops over parts of its batch. The compiler counts the
      FLOPs of one turn, so they are left out.
  """

  make: Maker
  beside: str = 'plain'
  mesh: tuple[int, int] = (1, 1)
  share: float = 1.0
  loops: bool = False


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
  'accumulate': Row(of(plain_in_parts, branched=False), loops=True),
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
