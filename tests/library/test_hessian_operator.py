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
  net_loss,
  random_arrays,
)

from conadv_optax import hessian
from conadv_optax.core.micro_batches import cut, join, part_of


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
  dense = jax.jit(
    jax.hessian(lambda x: net_loss(params, {**batch, 'image': x}))
  )
  expected = dense(batch['image']).reshape(24, 24)
  assert np.max(np.abs(expected)) > 1e-3
  chex.assert_trees_all_close(
    as_matrix(matvec, batch['image']), np.asarray(expected), atol=1e-6
  )


def masked_problem(dtype=jnp.int32):
  """Logistic losses of which the second of three strided parts has none."""
  x, w = random_arrays(2, (12, 4), (4,))
  mask = np.array([1, 0, 1] * 2 + [1, 0, 0] * 2)
  batch = {'x': x, 'mask': jnp.asarray(mask, dtype)}
  x, w = np.float64(x), np.float64(w)
  p = 1 / (1 + np.exp(-x @ w))
  curvature = mask * p * (1 - p) / mask.sum()
  return batch, jnp.asarray(w, jnp.float32), curvature


def masked_loss(w, batch):
  mask = batch['mask'].astype(jnp.float32)
  losses = jnp.logaddexp(0.0, batch['x'] @ w)
  return jnp.sum(losses * mask) / jnp.sum(mask)


def mask_of(batch):
  return batch['mask'].sum()


@pytest.mark.parametrize(
  ('dtype', 'micro_batches'),
  [(jnp.float32, 1), (jnp.int32, 3), (bool, 4), (jnp.float32, 3)],
)
def test_a_mean_over_a_mask_is_that_of_the_whole_batch(dtype, micro_batches):
  batch, w, curvature = masked_problem(dtype)
  x = np.float64(batch['x'])
  arguments = {'micro_batches': micro_batches, 'denominator': mask_of}
  matvec = hessian.operator(masked_loss, w, batch, **arguments)
  np.testing.assert_allclose(
    as_matrix(matvec, w), (x * curvature[:, None]).T @ x, atol=1e-6
  )
  matvec = hessian.input_operator(
    masked_loss, w, batch, inputs='x', **arguments
  )
  vectors, w = np.random.default_rng(0).normal(size=(12, 4)), np.float64(w)
  expected = curvature[:, None] * (vectors @ w)[:, None] * w
  np.testing.assert_allclose(
    jax.jit(matvec)(jnp.asarray(vectors, jnp.float32)), expected, atol=1e-6
  )


@pytest.mark.parametrize(
  ('returned', 'says'),
  [
    (lambda batch: batch['mask'], r'It returned float32\[12\].*sum is missing'),
    (lambda batch: jax.lax.complex(1.0, 1.0), r'It returned complex64\[\]'),
  ],
)
@pytest.mark.parametrize('micro_batches', [1, 3])
def test_a_denominator_that_is_no_real_scalar_is_told(
  returned, says, micro_batches
):
  batch, w, _ = masked_problem(jnp.float32)
  matvec = hessian.operator(
    masked_loss, w, batch, micro_batches=micro_batches, denominator=returned
  )
  says = says if micro_batches == 1 else says.replace('12', '4')
  with pytest.raises(TypeError, match=says):
    matvec(w)


MESHES = {
  'one axis': ((8,), ('data',), P('data')),
  'two axes': ((4, 2), ('data', 'model'), P(('data', 'model'))),
}
AXIS_TYPES = [AxisType.Auto, AxisType.Explicit]


def make_mesh(places, axis_type):
  shape, axes, spec = MESHES[places]
  mesh = jax.make_mesh(shape, axes, axis_types=(axis_type,) * len(axes))
  return mesh, NamedSharding(mesh, spec)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('make', 'places', 'axis_type'),
  [
    (hessian.operator, 'one axis', AxisType.Explicit),
    (hessian.operator, 'two axes', AxisType.Auto),
    (hessian.input_operator, 'one axis', AxisType.Auto),
    (hessian.input_operator, 'two axes', AxisType.Explicit),
  ],
)
def test_micro_batches_of_a_sharded_batch_stay_on_their_devices(
  make, places, axis_type
):
  params, batch = make_net(), make_batch(32)
  mesh, sharding = make_mesh(places, axis_type)
  is_of_inputs = make is hessian.input_operator

  def product(params, batch):
    matvec = make(net_loss, params, batch, micro_batches=2)
    return matvec(batch['image'] if is_of_inputs else params)

  expected = jax.jit(product)(params, batch)
  placed = jax.device_put(params, NamedSharding(mesh, P()))
  sharded = jax.device_put(batch, sharding)
  compiled = jax.jit(product).lower(placed, sharded).compile()
  for found in (compiled(placed, sharded), product(placed, sharded)):
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-6)
  text = compiled.as_text()
  assert is_of_inputs or 'all-reduce' in text
  for moved in ('all-gather', 'all-to-all', 'collective-permute'):
    assert moved not in text


@pytest.mark.parametrize('axis_type', AXIS_TYPES)
@pytest.mark.parametrize('places', MESHES)
@pytest.mark.parametrize('jit', [False, True])
def test_parts_are_strided_and_stay_where_they_are(places, axis_type, jit):
  _, sharding = make_mesh(places, axis_type)
  batch = np.arange(96).reshape(32, 3)

  def take_apart(batch):
    parts = cut(batch, 4)
    return jnp.stack([part_of(parts, jnp.int32(i)) for i in range(4)])

  apart, together = map(jax.jit if jit else lambda f: f, (take_apart, join))
  parts = apart(jax.device_put(batch, sharding))
  np.testing.assert_array_equal(parts, [batch[i::4] for i in range(4)])
  assert parts.sharding.spec[:2] == (None, *sharding.spec)
  joined = together(parts)
  np.testing.assert_array_equal(joined, batch)
  assert joined.sharding.spec[0] == sharding.spec[0]


@pytest.mark.parametrize('places', MESHES)
def test_explicit_parts_that_do_not_fill_the_devices_are_told(places):
  _, sharding = make_mesh(places, AxisType.Explicit)
  batch = jax.device_put({'x': np.ones((8, 3))}, sharding)
  says = r"the 16 parts, 2 micro-batches on each of 8 devices\. Leaf \['x'\]"
  with pytest.raises(ValueError, match=says):
    cut(batch, 2)


@pytest.mark.parametrize('micro_batches', [1, 2])
def test_calls_outside_of_jit_compile_once(micro_batches):
  traces = 0

  def loss(w, batch):
    nonlocal traces
    traces += 1
    return jnp.mean((batch['image'] @ w) ** 2)

  w, batch = jnp.ones(2), {'image': jnp.ones((4, 2))}
  of_weights, of_inputs = (
    make(loss, w, batch, micro_batches=micro_batches)
    for make in (hessian.operator, hessian.input_operator)
  )
  counts = []
  for _ in range(3):
    of_weights(w)
    of_inputs(batch['image'])
    counts.append(traces)
  assert counts[0] == counts[-1]


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


def test_a_float16_mean_over_a_large_batch_keeps_its_digits():
  # An example adds 5e-9 to the mean, less than float16 holds.
  x, w, v = (
    jnp.float16(a) for a in random_arrays(5, (65_536, 4), (4,), (65_536, 4))
  )

  def loss_fn(w, batch):
    return jnp.mean(jax.nn.softplus(batch['x'] @ w - 8))

  matvec = as_matrix(hessian.operator(loss_fn, w, {'x': x}), jnp.float32(w))
  of_inputs = hessian.input_operator(loss_fn, w, {'x': x}, inputs='x')
  product = jax.jit(of_inputs)(jnp.float32(v))
  x, w, v = (np.float64(a) for a in (x, w, v))
  p = 1 / (1 + np.exp(8 - x @ w))
  curvature = (p * (1 - p))[:, None] / len(x)
  for found, expected in (
    (matvec, (x * curvature).T @ x),
    (product, curvature * (v @ w)[:, None] * w),
  ):
    error = np.linalg.norm(found - expected) / np.linalg.norm(expected)
    assert error < 5e-3


def test_statistics_go_in_as_a_closure():
  scale, x = random_arrays(4, (3,), (8, 3))

  def loss(w, batch_stats, batch):
    return jnp.mean((w[None] * (batch - batch_stats[None])) ** 4), batch_stats

  stats = jnp.full(3, 0.5)
  matvec = hessian.operator(lambda w, b: loss(w, stats, b)[0], scale, x)
  expected = jax.jit(jax.hessian(lambda w: loss(w, stats, x)[0]))(scale)
  chex.assert_trees_all_close(
    as_matrix(matvec, scale), np.asarray(expected), rtol=1e-5, atol=1e-5
  )
