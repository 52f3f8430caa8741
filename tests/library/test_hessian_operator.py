"""Products with the Hessian, against dense matrices."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from small_net import (
  dense_hessian,
  make_batch,
  make_net,
  mesh_of_eight,
  net_loss,
  random_arrays,
)

from conadv_optax import hessian


def as_matrix(matvec, like):
  """The matrix of an operator, a product for each column."""
  flat, unravel = ravel_pytree(like)
  columns = jax.vmap(lambda v: ravel_pytree(matvec(unravel(v)))[0])
  return np.asarray(jax.jit(columns)(jnp.eye(flat.size))).T


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_operator_is_the_dense_hessian(micro_batches):
  params, batch = make_net(), make_batch()
  matvec = hessian.operator(
    net_loss, params, batch, micro_batches=micro_batches
  )
  chex.assert_trees_all_close(
    as_matrix(matvec, params), dense_hessian(params, batch), atol=1e-5
  )


def test_operator_is_the_closed_form_of_a_logistic_regression():
  x, w = random_arrays(2, (12, 4), (4,))
  matvec = hessian.operator(
    lambda w, x: jnp.mean(jnp.logaddexp(0.0, x @ w)), w, x, micro_batches=3
  )
  x, w = np.float64(x), np.float64(w)
  p = 1 / (1 + np.exp(-x @ w))
  expected = (x * (p * (1 - p))[:, None]).T @ x / len(x)
  np.testing.assert_allclose(as_matrix(matvec, w), expected, atol=1e-6)


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_input_operator_is_the_dense_hessian_in_the_inputs(micro_batches):
  params, batch = make_net(), make_batch(8)
  matvec = hessian.input_operator(
    net_loss, params, batch, micro_batches=micro_batches
  )
  dense = jax.hessian(lambda x: net_loss(params, {**batch, 'image': x}))
  expected = dense(batch['image']).reshape(24, 24)
  assert np.max(np.abs(expected)) > 1e-3
  chex.assert_trees_all_close(
    as_matrix(matvec, batch['image']), np.asarray(expected), atol=1e-6
  )


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize('make', [hessian.operator, hessian.input_operator])
def test_micro_batches_of_a_sharded_batch_stay_on_their_devices(
  make, axis_type
):
  mesh, params, batch = mesh_of_eight(axis_type), make_net(), make_batch(32)
  is_of_inputs = make is hessian.input_operator

  def product(params, batch):
    matvec = make(net_loss, params, batch, micro_batches=2)
    return matvec(batch['image'] if is_of_inputs else params)

  expected = product(params, batch)
  placed = jax.device_put(params, NamedSharding(mesh, P()))
  sharded = jax.device_put(batch, NamedSharding(mesh, P('data')))
  compiled = jax.jit(product).lower(placed, sharded).compile()
  chex.assert_trees_all_close(
    compiled(placed, sharded), expected, rtol=1e-4, atol=1e-6
  )
  text = compiled.as_text()
  assert is_of_inputs or 'all-reduce' in text
  for moved in ('all-gather', 'all-to-all', 'collective-permute'):
    assert moved not in text


def test_micro_batches_take_the_memory_of_one():
  # Activations of 512 x 256 numbers, of a batch of 512 x 4.
  kernel, x = random_arrays(3, (4, 256), (512, 4))

  def loss_fn(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)

  def temporary(micro_batches):
    product = jax.jit(
      lambda w, x: hessian.operator(loss_fn, w, x, micro_batches=micro_batches)(
        w
      )
    )
    memory = product.lower(kernel, x).compile().memory_analysis()
    return memory.temp_size_in_bytes

  assert temporary(16) < temporary(1) / 8


def test_a_bfloat16_model_has_float32_vectors():
  params, batch = make_net(jnp.bfloat16), make_batch()
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), params)
  matvec = hessian.operator(net_loss, params, batch, micro_batches=2)
  product = jax.jit(matvec)(wide)
  chex.assert_trees_all_equal_shapes_and_dtypes(product, wide)
  expected = hessian.operator(net_loss, wide, batch)
  chex.assert_trees_all_close(product, jax.jit(expected)(wide), atol=0.05)


def test_statistics_go_in_as_a_closure():
  scale, x = random_arrays(4, (3,), (8, 3))

  def loss(w, batch_stats, batch):
    return jnp.mean((w[None] * (batch - batch_stats[None])) ** 4), batch_stats

  stats = jnp.full(3, 0.5)
  matvec = hessian.operator(lambda w, b: loss(w, stats, b)[0], scale, x)
  expected = jax.hessian(lambda w: loss(w, stats, x)[0])(scale)
  chex.assert_trees_all_close(
    as_matrix(matvec, scale), np.asarray(expected), rtol=1e-5, atol=1e-5
  )
