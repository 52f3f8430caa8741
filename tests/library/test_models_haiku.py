"""Haiku: `hk.nets.ResNet` with BatchNorm, and an MLP, as complete programs.

Haiku's own layers mix dtypes, so these run under JAX's standard promotion.
"""

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from model_checks import (
  CLASSES,
  MOMENTUM,
  check_falls,
  convolve,
  make_images,
  moments,
)

import conadv_optax as conadv

cross_entropy = optax.softmax_cross_entropy_with_integer_labels
BRANCHES = ('main', 'adversarial')
NET = 'res_net/~/'
RATE = 0.3


@hk.without_apply_rng
@hk.transform_with_state
def resnet(image, is_training):
  # A block with an identity and one with a projection: there are no others.
  model = hk.nets.ResNet(
    (1, 1, 0, 0),
    CLASSES,
    bn_config={'decay_rate': MOMENTUM},
    bottleneck=False,
    channels_per_group=(8, 16, 16, 16),
    use_projection=(False, True, True, True),
    initial_conv_config={'output_channels': 8},
  )
  return model(image, is_training)


def resnet_loss(params, net_state, batch):
  logits, net_state = resnet.apply(params, net_state, batch['image'], True)
  return jnp.mean(cross_entropy(logits, batch['label'])), net_state


def start_resnet(first_batch):
  """A program whose adversarial weight may change while it runs."""
  init = jax.jit(resnet.init, static_argnums=2)
  params, net_state = init(jax.random.key(0), first_batch['image'], True)
  params, net_state = conadv.dual_bn.split(params, net_state)
  tx = optax.sgd(RATE)

  def grad_fn(weights=None):
    return conadv.wrap(
      resnet_loss,
      staleness=1,
      attack=conadv.pgd(0.1),
      weights=weights,
      has_state=True,
    )

  @jax.jit
  def train_step(carry, batch, key, weights):
    params, net_state, opt_state, state = carry
    (_, aux), grads, state = grad_fn(weights).value_and_grad(
      params, state, batch, model_state=net_state, key=key
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, aux.model_state, opt_state, state), aux.losses

  state = jax.jit(grad_fn().init)(
    params, [first_batch], model_state=net_state, key=jax.random.key(1)
  )
  return (params, net_state, tx.init(params), state), train_step


def check_resnet_statistics(before, after):
  """Each counter by one, and the first layer's moments by hand."""
  params, old_state, _, state = jax.device_get(before)
  _, new_state, _, _ = jax.device_get(after)
  images = {
    'main': state.queue.batch['image'][0],
    'adversarial': state.queue.adversarial[0],
  }
  for branch in BRANCHES:
    old = conadv.dual_bn.select(old_state, branch)
    new = conadv.dual_bn.select(new_state, branch)
    for module, values in new.items():
      assert values['counter'] == old[module]['counter'] + 1, module
    kernel = conadv.dual_bn.select(params, branch)[f'{NET}initial_conv']['w']
    seen = moments(convolve(images[branch], kernel, stride=2))
    for name, moment in zip(('mean_ema', 'var_ema'), seen, strict=True):
      module = f'{NET}initial_batchnorm/~/{name}'
      np.testing.assert_allclose(
        np.ravel(new[module]['hidden']),
        MOMENTUM * np.ravel(old[module]['hidden']) + (1 - MOMENTUM) * moment,
        rtol=1e-3,
        atol=1e-5,
      )


def moved(before, after):
  """Which parts of the parameters an update has moved."""
  (old, *_), (new, *_) = jax.device_get((before, after))
  norms = {name for name in old.main if 'batchnorm' in name}
  is_moved = jax.tree.map(lambda a, b: bool(np.any(a != b)), old, new)
  return {
    'norm of main': any(
      jax.tree.leaves([is_moved.main[name] for name in norms])
    ),
    'norm of adversarial': any(jax.tree.leaves(is_moved.branches)),
    'shared': any(
      jax.tree.leaves([is_moved.main[name] for name in set(old.main) - norms])
    ),
  }


@pytest.mark.slow
@jax.numpy_dtype_promotion('standard')
def test_resnet_trains_with_a_norm_for_each_branch():
  batches = [
    make_images(seed, size=6, side=16, channels=3) for seed in range(2)
  ]
  carry, train_step = start_resnet(batches[0])
  weights, losses = dict.fromkeys(BRANCHES, jnp.float32(0.5)), []
  for step in range(8):
    key = jax.random.fold_in(jax.random.key(2), step)
    before, batch = carry, batches[(step + 1) % 2]
    carry, loss = train_step(carry, batch, key, weights)
    check_resnet_statistics(before, carry)
    losses.append(jax.device_get(loss))
  check_falls(losses, by=0.7)

  for branch, other in (BRANCHES, BRANCHES[::-1]):
    alone = {branch: jnp.float32(1), other: jnp.float32(0)}
    after, _ = train_step(carry, batches[0], jax.random.key(3), alone)
    assert moved(carry, after) == {
      'shared': True,
      f'norm of {branch}': True,
      f'norm of {other}': False,
    }
    # A weight of 0 leaves the loss out; its statistics are kept up to date.
    check_resnet_statistics(carry, after)

  params, net_state = map(conadv.dual_bn.main, carry[:2])
  image = batches[0]['image']
  plain = jax.eval_shape(lambda: resnet.init(jax.random.key(0), image, True))
  chex.assert_trees_all_equal_shapes_and_dtypes((params, net_state), plain)
  evaluate = jax.jit(resnet.apply, static_argnums=3)
  logits, same_state = evaluate(params, net_state, image, False)
  chex.assert_shape(logits, (6, CLASSES))
  chex.assert_tree_all_finite(logits)
  chex.assert_trees_all_equal(same_state, net_state)
  # The main branch's statistics are used, and it has learnt.
  loss = np.mean(cross_entropy(logits, batches[0]['label']))
  assert loss < losses[0]['main']


@hk.without_apply_rng
@hk.transform
def mlp(image):
  return hk.nets.MLP([32, CLASSES])(hk.Flatten()(image))


def mlp_loss(params, batch):
  logits = mlp.apply(params, batch['image'])
  hits = jnp.argmax(logits, axis=-1) == batch['label']
  loss = jnp.mean(cross_entropy(logits, batch['label']))
  return loss, {'accuracy': jnp.mean(hits)}


def train_mlp(batches, steps):
  """Without norm layers there is nothing to split."""
  params = jax.jit(mlp.init)(jax.random.key(0), batches[0]['image'])
  grad_fn = conadv.wrap(
    mlp_loss,
    staleness=2,
    attack=conadv.pgd(
      0.3, steps=2, targets=conadv.random_targets(CLASSES, label='label')
    ),
    has_aux=True,
  )
  tx = optax.adam(3e-3)
  state = jax.jit(grad_fn.init)(params, batches[:2], key=jax.random.key(1))

  @jax.jit
  def train_step(params, opt_state, state, batch, key):
    (_, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, key=key
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return params, opt_state, state, aux

  opt_state, history = tx.init(params), []
  for step in range(2, steps + 2):
    key = jax.random.fold_in(jax.random.key(2), step)
    batch = batches[step % len(batches)]
    params, opt_state, state, aux = train_step(
      params, opt_state, state, batch, key
    )
    history.append(jax.device_get(aux))
  return params, history


@pytest.mark.slow
@jax.numpy_dtype_promotion('standard')
def test_mlp_trains_and_gives_its_own_outputs_by_branch():
  params, history = train_mlp([make_images(seed) for seed in range(4)], 40)
  check_falls([aux.losses for aux in history], by=0.3)
  assert set(history[-1].aux) == set(BRANCHES)
  for outputs in history[-1].aux.values():
    assert outputs['accuracy'] > 0.9
  test = make_images(99)
  logits = jax.jit(mlp.apply)(params, test['image'])
  assert np.mean(np.argmax(logits, axis=-1) == test['label']) > 0.9
