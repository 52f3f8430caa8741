"""ABSA in the reference pipeline, against steps by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digit_steps import (
  Small,
  arrays,
  assert_close,
  descend,
  digit_images,
  first_state,
  gradient_by_hand,
  loss_by_hand,
  make_batch,
  make_mesh,
  start,
  tiny,
)
from jax.flatten_util import ravel_pytree

import conadv_optax as conadv
from reference.run import absa, methods, parts


def test_the_schedule_stands_outside_of_the_optimizer_once():
  """The step hands on the rate; LARS itself has that of 1."""
  config = tiny('absa', **{'lars.weight_decay': 0.0, 'lars.momentum': 0.0})
  tx, _, _ = parts.make_optimizer(config, images=1437)
  params, grads = (
    {'kernel': jnp.ones((2, 2))},
    {'kernel': jnp.full((2, 2), 4.0)},
  )
  updates, _ = tx.update(
    grads,
    tx.init(params),
    params,
    micro_batches=jnp.int32(1),
    learning_rate_scale=jnp.float32(0.5),
  )
  # Of the norm of the parameters, 2, a thousandth, at half the rate.
  np.testing.assert_allclose(
    jnp.linalg.norm(updates['kernel']), 0.5 * 0.001 * 2, rtol=1e-5
  )


@pytest.mark.slow
def test_absa_attacks_a_fifth_and_steps_after_its_micro_batches():
  config = tiny('absa', **{'methods.absa.epsilon': 0.05})
  schedule = optax.linear_schedule(1.0, 0.0, 100)
  tx = conadv.adaptive_multi_steps(optax.sgd(1.0))
  state, take, place = start(config, model=Small(), tx=tx, schedule=schedule)
  grown = conadv.AbsaState(
    micro_batches=jnp.int32(2),
    attacked=jnp.int32(1),
    learning_rate_scale=jnp.float32(2),
    reference=jnp.float32(0),
    waited=jnp.int32(0),
    evaluations=jnp.int32(0),
  )
  sharding = state.absa.micro_batches.sharding
  state = state._replace(absa=jax.device_put(grown, sharding))
  before, batches = arrays(state), [make_batch(seed) for seed in range(2)]

  # The first three of sixteen, by the sign of the gradient of the pixels.
  pixels = batches[0]['image'] / 255
  slope_of = jax.jit(
    jax.grad(
      lambda x: loss_by_hand(
        before.params,
        before.model_state,
        {'image': 255 * x, 'label': batches[0]['label'][:3]},
        is_training=False,
      )
    )
  )
  slope = slope_of(np.float32(pixels[:3]))
  attacked = np.clip(pixels[:3] + 0.05 * np.sign(slope), 0, 1)
  mixed = {
    **batches[0],
    'image': 255 * np.concatenate([attacked, pixels[3:]]),
  }
  first = gradient_by_hand(before.params, before.model_state, mixed)

  state, values = take(state, place(batches[0]))
  middle = arrays(state)
  assert_close(middle.params, before.params, atol=0)
  assert float(values['learning_rate']) == 2.0
  second = gradient_by_hand(before.params, middle.model_state, batches[1])
  state, values = take(state, place(batches[1]))
  mean = jax.tree.map(lambda a, b: (a + b) / 2, first, second)
  # The rate is that of the first micro-batch.
  assert_close(
    arrays(state).params, descend(before.params, mean, 2.0), atol=1e-4
  )
  assert float(values['learning_rate']) == pytest.approx(2 * 0.99)
  assert float(values['micro_batches']) == 2


@pytest.mark.slow
def test_absa_grows_once_an_epoch_by_the_largest_eigenvalue():
  config = tiny('absa', batch_size=40, **{'methods.absa.patience': 2})
  train_part = digit_images().train[:100]
  source = digit_images()._replace(train=train_part)
  mesh, tx = make_mesh(1), conadv.adaptive_multi_steps(optax.sgd(1.0))
  grad_fn = methods.make_gradient(Small(), config, mesh)
  state = first_state(config, Small(), tx, grad_fn, mesh, [])
  place = parts.make_placement(mesh)
  grow = absa.make_growth(Small(), config, source, place, mesh, host=0, hosts=1)
  # 100 images in batches of 40: an epoch ends within steps 3, 5, 8.
  evaluations = []
  for done in range(1, 9):
    state = grow(state, done)
    evaluations.append(int(state.absa.evaluations))
  assert evaluations == [0, 0, 1, 1, 2, 2, 2, 3]
  assert int(state.absa.micro_batches) == 2

  chosen = np.random.default_rng(0).permutation(100)[:40]
  images, labels = zip(*(train_part[i] for i in chosen), strict=True)
  batch = {'image': np.stack(images), 'label': np.array(labels)}
  flat, unravel = ravel_pytree(arrays(state).params)
  hessian = jax.jit(
    jax.hessian(
      lambda flat: loss_by_hand(
        unravel(flat), state.model_state, batch, is_training=False
      )
    )
  )(jnp.asarray(flat))
  largest = np.linalg.eigvalsh(np.float64(hessian))[-1]
  np.testing.assert_allclose(state.absa.reference, largest, rtol=0.02)
