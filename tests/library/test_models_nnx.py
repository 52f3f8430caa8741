"""Flax NNX: a CNN with BatchNorm, with plain Optax and with `nnx.Optimizer`.

The two `train_` functions are complete programs.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
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


class CNN(nnx.Module):
  def __init__(self, *, rngs):
    self.conv = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(8, momentum=MOMENTUM, rngs=rngs)
    self.head = nnx.Linear(8 * 8 * 8, CLASSES, rngs=rngs)

  def __call__(self, x):
    x = nnx.relu(self.norm(self.conv(x)))
    return self.head(x.reshape(x.shape[0], -1))


def make_loss(graphdef):
  def loss_fn(params, batch_stats, batch):
    # A copy: Flax updates no statistics under another trace.
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    loss = jnp.mean(cross_entropy(model(batch['image']), batch['label']))
    return loss, nnx.state(model, nnx.BatchStat)

  return loss_fn


def train_with_optax(batches, steps):
  """Parameters and statistics branched, any Optax optimizer."""
  model = CNN(rngs=nnx.Rngs(0))
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, batch_stats = conadv.dual_bn.split(params, batch_stats)
  grad_fn = conadv.wrap(
    make_loss(graphdef), staleness=1, attack=conadv.pgd(0.2), has_state=True
  )
  tx = optax.sgd(0.1, momentum=0.9)
  state = jax.jit(grad_fn.init)(
    params, batches[:1], model_state=batch_stats, key=jax.random.key(1)
  )

  @jax.jit(donate_argnums=0)
  def train_step(carry, batch, key):
    params, batch_stats, opt_state, state = carry
    (_, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, model_state=batch_stats, key=key
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, aux.model_state, opt_state, state), aux.losses

  carry, losses = (params, batch_stats, tx.init(params), state), []
  for step in range(1, steps + 1):
    batch = batches[step % len(batches)]
    key = jax.random.fold_in(jax.random.key(2), step)
    carry, loss = train_step(carry, batch, key)
    losses.append(jax.device_get(loss))

  params, batch_stats, _, _ = carry
  model = nnx.merge(
    graphdef, conadv.dual_bn.main(params), conadv.dual_bn.main(batch_stats)
  )
  return model, losses


def train_with_nnx_optimizer(batches, steps):
  """Statistics branched, parameters shared: the model holds the main branch."""
  model = CNN(rngs=nnx.Rngs(0))
  optimizer = nnx.Optimizer(model, optax.sgd(0.1, momentum=0.9), wrt=nnx.Param)
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, batch_stats = conadv.dual_bn.split(params, batch_stats, affine=False)
  grad_fn = conadv.wrap(
    make_loss(graphdef), staleness=1, attack=conadv.pgd(0.2), has_state=True
  )
  state = jax.jit(grad_fn.init)(
    params, batches[:1], model_state=batch_stats, key=jax.random.key(1)
  )

  @nnx.jit
  def train_step(model, optimizer, batch_stats, state, batch, key):
    (_, aux), grads, state = grad_fn.value_and_grad(
      nnx.state(model, nnx.Param),
      state,
      batch,
      model_state=batch_stats,
      key=key,
    )
    optimizer.update(model, grads)
    nnx.update(model, conadv.dual_bn.main(aux.model_state))
    return aux.model_state, state, aux.losses

  losses = []
  for step in range(1, steps + 1):
    batch = batches[step % len(batches)]
    key = jax.random.fold_in(jax.random.key(2), step)
    batch_stats, state, loss = train_step(
      model, optimizer, batch_stats, state, batch, key
    )
    losses.append(jax.device_get(loss))
  return model, losses


def check_training(train):
  model, losses = train([make_images(seed) for seed in range(4)], 30)
  check_falls(losses, by=0.5)
  test = make_images(99)
  model.eval()
  before = nnx.state(model, nnx.BatchStat)
  logits = nnx.jit(lambda model, image: model(image))(model, test['image'])
  assert np.mean(np.argmax(logits, axis=-1) == test['label']) > 0.9
  chex.assert_trees_all_equal(nnx.state(model, nnx.BatchStat), before)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    nnx.state(model), nnx.state(CNN(rngs=nnx.Rngs(0)))
  )


@pytest.mark.slow
def test_cnn_trains_and_its_main_branch_evaluates():
  check_training(train_with_optax)


@pytest.mark.slow
def test_cnn_trains_with_the_optimizer_of_nnx():
  check_training(train_with_nnx_optimizer)


def split_cnn():
  model = CNN(rngs=nnx.Rngs(0))
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  return make_loss(graphdef), *conadv.dual_bn.split(params, batch_stats)


@pytest.mark.slow
def test_cnn_statistics_are_those_of_each_branch():
  loss_fn, params, batch_stats = split_cnn()
  check_statistics(
    conadv.wrap(loss_fn, attack=conadv.pgd(0.5), has_state=True),
    params,
    batch_stats,
    [make_images(seed) for seed in range(4)],
    lambda params, image: moments(
      convolve(image, params['conv']['kernel'][...])
    ),
    lambda stats: (stats['norm']['mean'][...], stats['norm']['var'][...]),
  )


def test_cnn_gradients_are_those_of_each_branch():
  loss_fn, params, batch_stats = split_cnn()
  own = params.branches['adversarial']
  assert [name for name in own if jax.tree.leaves(own[name])] == ['norm']
  check_gradients(
    lambda weights: conadv.wrap(
      loss_fn, attack=conadv.pgd(0.5), has_state=True, weights=weights
    ),
    params,
    batch_stats,
    make_images(0),
    jax.random.key(0),
  )
