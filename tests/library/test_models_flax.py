"""Flax Linen: a CNN with BatchNorm, and a net with LayerNorm and dropout.

`train_cnn` is a complete program; `test_text_models` trains a transformer.
"""

import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training import train_state
from model_checks import (
  CLASSES,
  MOMENTUM,
  check_falls,
  check_gradients,
  check_statistics,
  convolve,
  make_images,
  moments,
)

import conadv_optax as conadv

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class CNN(nn.Module):
  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Conv(8, (3, 3), use_bias=False)(x)
    x = nn.BatchNorm(use_running_average=not train, momentum=MOMENTUM)(x)
    x = nn.relu(x)
    return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


class TrainState(train_state.TrainState):
  batch_stats: Any
  conadv: conadv.ConAdvState


def cnn_loss(params, batch_stats, batch):
  logits, updates = CNN().apply(
    {'params': params, 'batch_stats': batch_stats},
    batch['image'],
    train=True,
    mutable=['batch_stats'],
  )
  loss = jnp.mean(cross_entropy(logits, batch['label']))
  return loss, updates['batch_stats']


def init_cnn(image):
  init = jax.jit(CNN().init, static_argnames='train')
  variables = init(jax.random.key(0), image, train=False)
  return conadv.dual_bn.split(variables['params'], variables['batch_stats'])


def train_cnn(batches, steps):
  """The ordinary program of Flax, three lines changed."""
  params, batch_stats = init_cnn(batches[0]['image'])
  grad_fn = conadv.wrap(
    cnn_loss, staleness=1, attack=conadv.pgd(0.2), has_state=True
  )
  state = TrainState.create(
    apply_fn=CNN().apply,
    params=params,
    tx=conadv.lars(0.5, weight_decay=1e-4, trust_coefficient=0.05),
    batch_stats=batch_stats,
    conadv=jax.jit(grad_fn.init)(
      params, batches[:1], model_state=batch_stats, key=jax.random.key(1)
    ),
  )

  @jax.jit(donate_argnums=0)
  def train_step(state, batch, key):
    (_, aux), grads, conadv_state = grad_fn.value_and_grad(
      state.params,
      state.conadv,
      batch,
      model_state=state.batch_stats,
      key=jax.random.fold_in(key, state.step),
    )
    state = state.apply_gradients(
      grads=grads, batch_stats=aux.model_state, conadv=conadv_state
    )
    return state, aux.losses

  losses = []
  for step in range(1, steps + 1):
    batch = batches[step % len(batches)]
    state, loss = train_step(state, batch, jax.random.key(2))
    losses.append(jax.device_get(loss))
  return state, losses


@pytest.mark.slow
def test_cnn_trains_and_its_main_branch_evaluates():
  state, losses = train_cnn([make_images(seed) for seed in range(4)], 30)
  check_falls(losses, by=0.5)
  variables = {
    'params': conadv.dual_bn.main(state.params),
    'batch_stats': conadv.dual_bn.main(state.batch_stats),
  }
  test = make_images(99)
  init = functools.partial(CNN().init, train=False)
  plain = jax.eval_shape(init, jax.random.key(0), test['image'])
  chex.assert_trees_all_equal_shapes_and_dtypes(variables, dict(plain))
  # An evaluation model has no train mode to fall back on.
  evaluate = jax.jit(state.apply_fn, static_argnames='train')
  logits = evaluate(variables, test['image'], train=False)
  assert np.mean(np.argmax(logits, axis=-1) == test['label']) > 0.9


@pytest.mark.slow
def test_cnn_statistics_are_those_of_each_branch():
  batches = [make_images(seed) for seed in range(4)]
  params, batch_stats = init_cnn(batches[0]['image'])
  check_statistics(
    conadv.wrap(cnn_loss, attack=conadv.pgd(0.5), has_state=True),
    params,
    batch_stats,
    batches,
    lambda params, image: moments(convolve(image, params['Conv_0']['kernel'])),
    lambda stats: (stats['BatchNorm_0']['mean'], stats['BatchNorm_0']['var']),
  )


@pytest.mark.slow
def test_cnn_gradients_are_those_of_each_branch():
  batch = make_images(0)
  params, batch_stats = init_cnn(batch['image'])
  assert sorted(
    name
    for name, leaves in params.branches['adversarial'].items()
    if jax.tree.leaves(leaves)
  ) == ['BatchNorm_0']
  check_gradients(
    lambda weights: conadv.wrap(
      cnn_loss, attack=conadv.pgd(0.5), has_state=True, weights=weights
    ),
    params,
    batch_stats,
    batch,
    jax.random.key(0),
  )


class Mixer(nn.Module):
  """The inputs are patches, already floats."""

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(16)(x)
    y = nn.Dense(16)(nn.gelu(nn.LayerNorm()(x)))
    x += nn.Dropout(0.1, deterministic=not train)(y)
    return nn.Dense(CLASSES)(jnp.mean(nn.LayerNorm()(x), axis=1))


def patches_of(batch):
  """4 x 4 patches in reading order, as `[batch, patch, pixel]`."""
  image = batch['image']
  size, side = image.shape[:2]
  patches = image.reshape(size, side // 4, 4, side // 4, 4)
  patches = patches.transpose(0, 1, 3, 2, 4).reshape(size, -1, 16)
  return {'patches': patches, 'label': batch['label']}


def mixer_loss(params, batch, *, key):
  logits = Mixer().apply(
    {'params': params}, batch['patches'], train=True, rngs={'dropout': key}
  )
  return jnp.mean(cross_entropy(logits, batch['label']))


def init_mixer(batch):
  init = jax.jit(Mixer().init, static_argnames='train')
  return init(jax.random.key(0), batch['patches'], train=False)['params']


@pytest.mark.slow
def test_dropout_is_drawn_from_the_key():
  batch = patches_of(make_images(0))
  params = init_mixer(batch)
  grad_fn = conadv.wrap(
    mixer_loss,
    staleness=0,
    attack=conadv.fgsm(0.0),
    inputs='patches',
    has_key=True,
  )
  step = jax.jit(
    lambda key: grad_fn.value_and_grad(
      params, grad_fn.init(params, []), batch, key=key
    )[0]
  )
  _, aux = step(jax.random.key(0))
  chex.assert_trees_all_equal(step(jax.random.key(0))[1], aux)
  assert step(jax.random.key(1))[1].losses['main'] != aux.losses['main']
  # The passes differ in nothing but the units that they drop.
  assert aux.losses['main'] != aux.losses['adversarial']
  with pytest.raises(ValueError, match='key='):
    grad_fn.value_and_grad(params, grad_fn.init(params, []), batch)


@pytest.mark.slow
def test_layer_norms_can_be_branched_by_a_predicate():
  batch = patches_of(make_images(0))
  params = init_mixer(batch)
  params, nothing = conadv.dual_bn.split(
    params, None, is_norm=lambda path, leaf: 'LayerNorm' in str(path)
  )
  assert nothing is None
  check_gradients(
    lambda weights: conadv.wrap(
      mixer_loss,
      attack=conadv.pgd(0.5),
      inputs='patches',
      has_key=True,
      weights=weights,
    ),
    params,
    None,
    batch,
    jax.random.key(0),
  )
