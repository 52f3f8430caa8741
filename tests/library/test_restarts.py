"""Attacks that see the loss of each example: restarts that keep the worst."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from jax.sharding import PartitionSpec as P
from meshes import CLOSE, KINDS, make_mesh, on

import conadv_optax as conadv

SIZE = 16
rng = np.random.default_rng(0)
W = rng.normal(size=3).astype(np.float32)
BATCH = {
  'image': rng.normal(size=(SIZE, 3)).astype(np.float32),
  'label': rng.integers(0, 2, SIZE),
}


def losses_of(w, batch):
  # Many hills, so that where a climb ends depends on where it starts.
  height = jnp.sin(6 * batch['image']) @ w
  return jnp.where(batch['label'] == 0, height, -height)


def loss_fn(w, batch, *, branch):
  losses = losses_of(w, batch)
  return losses if branch == 'attack' else losses.mean()


def attack_with(restarts, **kwargs):
  return conadv.pgd(1.0, steps=3, step_size=0.1, restarts=restarts, **kwargs)


@pytest.mark.parametrize('targeted', [False, True])
def test_each_example_keeps_its_worst_start(targeted):
  key = jax.random.key(3)
  # With two classes the wrong one is certain.
  targets = conadv.random_targets(2) if targeted else None
  attack = attack_with(4, targets=targets)
  found = jax.jit(
    lambda batch: conadv.perturb(losses_of, W, batch, attack=attack, key=key)
  )(BATCH)
  aimed = {**BATCH, 'label': 1 - BATCH['label']} if targeted else BATCH
  sign = -1 if targeted else 1
  climb = jax.jit(jax.grad(lambda x: losses_of(W, {**aimed, 'image': x}).sum()))
  once = conadv.pgd(1.0, steps=1, step_size=0.0)
  start = jax.jit(lambda key, x: once.craft(key, jnp.zeros_like, x))
  ends = []
  # The keys that `perturb` and `pgd` split from the one that they are given.
  craft_key = jax.random.split(key, 3)[1]
  for start_key in jax.random.split(craft_key, 4):
    x = np.asarray(start(start_key, BATCH['image']))
    for _ in range(3):
      x = x + sign * 0.1 * np.sign(climb(x))
      x = np.clip(x, BATCH['image'] - 1, BATCH['image'] + 1)
    ends.append(x)
  losses = np.stack([losses_of(W, {**aimed, 'image': x}) for x in ends])
  chosen = (sign * losses).argmax(0)
  assert len(set(chosen.tolist())) > 2
  wanted = np.stack(ends)[chosen, np.arange(SIZE)]
  np.testing.assert_allclose(found['image'], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_in_training_on_one_device_and_on_meshes():
  grad_fn = conadv.wrap(loss_fn, 1, attack=attack_with(8), has_branch=True)
  single = conadv.wrap(loss_fn, 1, attack=attack_with(1), has_branch=True)

  @functools.partial(jax.jit, static_argnums=0)
  def step(grad_fn, w, batch):
    key = jax.random.key(0)
    state = grad_fn.init(w, [batch], key=key)
    (_, aux), grads, _ = grad_fn.value_and_grad(w, state, batch, key=key)
    return aux.losses['adversarial'], grads

  lower, _ = step(single, W, BATCH)
  loss, grads = step(grad_fn, W, BATCH)
  assert loss > lower + 0.1
  for kind in KINDS:
    mesh = make_mesh(4, kind=kind)
    with jax.set_mesh(mesh):
      _, spread = step(grad_fn, on(mesh, W), on(mesh, BATCH, 'data'))
    chex.assert_trees_all_close(spread, grads, **CLOSE)
  loss, _ = step(conadv.data_parallel(grad_fn, make_mesh(4)), W, BATCH)
  assert loss > lower + 0.1


def test_an_array_of_losses_is_climbed_as_their_mean_is():
  def mean(w, batch, *, branch):
    del branch
    return losses_of(w, batch).mean()

  results = []
  for fn in (mean, loss_fn):
    grad_fn = conadv.wrap(
      fn,
      0,
      attack=conadv.Attack(
        lambda key, gradient_fn, x: x + gradient_fn(x), draws=False
      ),
      has_branch=True,
      denominator=lambda batch: jnp.float32(SIZE),
    )
    results.append(grad_fn.value_and_grad(W, grad_fn.init(W, []), BATCH)[:2])
  chex.assert_trees_all_close(*results, rtol=1e-5)


def test_a_loss_that_is_no_number_is_never_the_worst():
  def losses_fn(w, batch):
    x = batch['image'][:, 0]
    return jnp.where(x > 0.0, jnp.nan, x)

  batch = {'image': jnp.zeros((64, 1))}
  attack = conadv.pgd(1.0, step_size=0.0, restarts=6)
  found = jax.jit(
    lambda batch, key: conadv.perturb(
      losses_fn, W, batch, attack=attack, key=key
    )
  )(batch, jax.random.key(0))
  assert (found['image'] <= 0).all()
  assert (found['image'] < 0).any()


def test_restarts_in_a_shard_map_of_the_users_own():
  mesh = make_mesh(4)

  def attacked(w, batch, key):
    return conadv.perturb(losses_of, w, batch, attack=attack_with(3), key=key)[
      'image'
    ]

  spread = jax.shard_map(
    attacked,
    mesh=mesh,
    in_specs=(P(), P('data'), P()),
    out_specs=P('data'),
  )
  key = jax.random.key(0)
  first = jax.tree.map(lambda x: x[: SIZE // 4], BATCH)
  np.testing.assert_allclose(
    jax.jit(spread)(W, BATCH, key)[: SIZE // 4],
    jax.jit(attacked)(W, first, key),
    rtol=1e-5,
  )


def test_losses_of_something_else_are_refused():
  with pytest.raises(TypeError) as error:
    conadv.perturb(
      lambda w, batch: batch['image'].mean(0),
      W,
      BATCH,
      attack=conadv.fgsm(0.1),
    )
  assert_says(error, 'each of the 16', 'float32[3]')


def test_a_mean_is_refused_where_losses_are_compared():
  grad_fn = conadv.wrap(
    lambda w, batch: losses_of(w, batch).mean(), 0, attack=attack_with(2)
  )
  with pytest.raises(TypeError) as error:
    grad_fn.value_and_grad(W, grad_fn.init(W, []), BATCH, key=jax.random.key(0))
  assert_says(error, 'each of the 16', 'float32[]', "branch == 'attack'")


def test_restarts_need_a_start_that_differs():
  with pytest.raises(ValueError) as error:
    conadv.pgd(0.1, restarts=2, random_start=False)
  assert_says(error, 'restarts=2', 'random_start')


@pytest.mark.parametrize('maker', [conadv.wrap, conadv.fast_advprop])
def test_one_gradient_cannot_restart(maker):
  kwargs = {'reuse_gradient': True} if maker is conadv.wrap else {}
  with pytest.raises(ValueError, match='one step'):
    maker(loss_fn, attack=conadv.pgd(0.1, restarts=2), **kwargs)
