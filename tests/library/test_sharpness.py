"""The largest loss in a ball against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv

KEY = jax.random.key(0)
SIZE = 5


def quadratic(params, batch):
  """The mean of `w A w / 2 + g w + c`, in a tree of two leaves."""
  w = jnp.concatenate([params['a'], params['b'].ravel()])
  each = (
    0.5 * jnp.einsum('i,nij,j->n', w, batch['A'], w)
    + batch['g'] @ w
    + batch['c']
  )
  return jnp.mean(each)


def as_tree(w):
  return {'a': w[:2], 'b': w[2:].reshape(1, -1)}


@jax.jit
def sharpness(w, batch, radius):
  return conadv.sharpness(
    quadratic, as_tree(w), batch, radius, key=KEY, steps=200, micro_batches=2
  )


def make_problem(eigenvalues, slope, seed=0):
  """A batch whose mean has these eigenvalues and a gradient of this length."""
  rng = np.random.default_rng(seed)
  q, _ = np.linalg.qr(rng.normal(size=(SIZE, SIZE)))
  hessian = (q * np.asarray(eigenvalues)) @ q.T
  gradient = rng.normal(size=SIZE)
  gradient *= slope / np.linalg.norm(gradient)
  noise = rng.normal(size=(8, SIZE, SIZE))
  noise -= np.mean(noise, axis=0)
  batch = {
    'A': hessian + noise + noise.transpose(0, 2, 1),
    'g': gradient + noise[:, 0],
    'c': 0.5 + noise[:, 0, 0],
  }
  batch = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), batch)
  return batch, hessian, gradient


def largest_rise(hessian, gradient, radius):
  """Of `g d + d H d / 2` with |d| = radius, by bisection for its multiplier."""
  values, vectors = np.linalg.eigh(hessian)
  g = vectors.T @ gradient

  def length(shift):
    return np.linalg.norm(g / (values[-1] + shift - values))

  low, high = 1e-12, 1e6
  for _ in range(200):
    middle = np.sqrt(low * high)
    low, high = (middle, high) if length(middle) > radius else (low, middle)
  d = g / (values[-1] + high - values)
  return g @ d + d @ (values * d) / 2


@pytest.mark.parametrize('spectrum', [[1, 2, 3, 4, 9], [-9, -5, 0, 1, 3]])
def test_at_a_stationary_point_it_is_half_the_largest_eigenvalue(spectrum):
  batch, _, _ = make_problem(spectrum, 0.0)
  # Exactly zero, and not for rounding.
  batch['g'] = jnp.zeros_like(batch['g'])
  found = sharpness(jnp.zeros(SIZE), batch, 0.5)
  rise = 0.5 * spectrum[-1] * 0.5**2
  np.testing.assert_allclose(found.loss, 0.5, rtol=1e-5)
  np.testing.assert_allclose(found.largest, 0.5 + rise, rtol=2e-3)
  np.testing.assert_allclose(found.value, rise / 1.5, rtol=5e-3)


@settings(max_examples=30, deadline=None)
@given(
  spectrum=st.lists(
    st.floats(-5, 5), min_size=SIZE, max_size=SIZE, unique=True
  ),
  slope=st.floats(0.5, 3),
  radius=st.floats(0.1, 1),
  seed=st.integers(0, 99),
)
def test_elsewhere_it_is_the_solution_of_the_trust_region(
  spectrum, slope, radius, seed
):
  # Convex enough for the largest loss to lie on the sphere. With 40 steps a
  # gradient across the steepest curvature is seen to reach 0.87 of it.
  spectrum = np.sort(spectrum)
  spectrum[-1] = abs(spectrum[-1])
  batch, hessian, gradient = make_problem(spectrum, slope, seed)
  found = sharpness(jnp.zeros(SIZE), batch, radius)
  rise = found.largest - found.loss
  exact = largest_rise(hessian, gradient, radius)
  assert rise <= exact * (1 + 1e-3) + 1e-4
  assert rise >= 0.9 * exact


def test_a_linear_loss_rises_by_the_gradient_times_the_radius():
  batch, _, _ = make_problem(np.zeros(SIZE), 3.0)
  found = sharpness(jnp.ones(SIZE), batch, 0.5)
  np.testing.assert_allclose(found.largest - found.loss, 1.5, rtol=1e-3)


def test_a_maximum_inside_the_ball_is_not_lost():
  # The sphere lies below the centre, and the ascent comes back.
  batch, _, _ = make_problem([-5.0, -4.0, -3.0, -2.0, -1.0], 0.0)
  found = sharpness(jnp.zeros(SIZE), batch, 1.0)
  assert found.largest >= found.loss
  np.testing.assert_allclose(found.value, 0, atol=1e-3)


def test_a_flat_loss_or_a_radius_of_zero_is_not_sharp():
  batch, _, _ = make_problem([1, 2, 3, 4, 5], 1.0)
  assert float(sharpness(jnp.ones(SIZE), batch, 0.0).value) == 0
  flat = jax.tree.map(jnp.zeros_like, batch)
  assert tuple(map(float, sharpness(jnp.ones(SIZE), flat, 1.0))) == (0, 0, 0)


def test_the_direction_of_the_start_alone_is_random():
  batch, _, _ = make_problem([1, 2, 3, 4, 9], 1.0)

  @jax.jit
  def largest(key):
    params = as_tree(jnp.ones(SIZE))
    return [
      conadv.sharpness(
        quadratic, params, batch, 0.5, key=key, steps=steps
      ).largest
      for steps in (1, 40)
    ]

  (short, long), (other_short, other_long) = map(largest, jax.random.split(KEY))
  assert abs(short - other_short) > 1e-3
  np.testing.assert_allclose(long, other_long, rtol=2e-3)


@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_on_eight_devices_it_is_the_same(axis_type):
  # The batch lies over two axes, and the parameters over the third.
  axes = ('x', 'y', 'model')
  mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(axis_type,) * 3)
  rng = np.random.default_rng(0)
  w, x = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (4, (16, 4)))
  mean = np.mean(np.float64(x), axis=0)

  @jax.jit
  def find(w, x):
    return conadv.sharpness(
      lambda w, x: jnp.mean(jnp.sum(x * w[None], axis=1)),
      w,
      x,
      0.5,
      key=KEY,
      micro_batches=2,
    )

  found = find(
    jax.device_put(w, NamedSharding(mesh, P('model'))),
    jax.device_put(x, NamedSharding(mesh, P(('x', 'y')))),
  )
  loss, rise = mean @ np.float64(w), 0.5 * np.linalg.norm(mean)
  np.testing.assert_allclose(
    found, (loss, loss + rise, rise / (1 + abs(loss))), rtol=1e-3, atol=1e-5
  )


def test_a_mean_over_a_mask_is_that_of_the_whole_batch():
  rng = np.random.default_rng(0)
  x, w = rng.normal(size=(12, 4)), rng.normal(size=4)
  # The second of three strided parts has none.
  mask = np.array([1, 0, 1] * 2 + [1, 0, 0] * 2)

  @jax.jit
  def find(w, batch):
    return conadv.sharpness(
      lambda w, batch: (
        jnp.sum(batch['x'] @ w * batch['mask']) / jnp.sum(batch['mask'])
      ),
      w,
      batch,
      0.5,
      key=KEY,
      micro_batches=3,
      denominator=lambda batch: batch['mask'].sum(),
    )

  batch = {'x': jnp.float32(x), 'mask': jnp.float32(mask)}
  mean = mask @ x / mask.sum()
  loss, rise = mean @ w, 0.5 * np.linalg.norm(mean)
  np.testing.assert_allclose(
    find(jnp.float32(w), batch),
    (loss, loss + rise, rise / (1 + abs(loss))),
    rtol=1e-3,
  )


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.float64])
def test_it_works_with_64_bits_enabled(dtype):
  @jax.jit
  def find(w, batch):
    return conadv.sharpness(
      lambda w, batch: jnp.mean(batch) * jnp.sum(w),
      w,
      batch,
      0.5,
      key=KEY,
      steps=2,
    )

  with jax.enable_x64(True):
    found = find(jnp.zeros(4, dtype), jnp.ones(2, dtype))
  assert {x.dtype for x in found} == {jnp.dtype(dtype)}
  # Along the gradient, which is of length 2.
  np.testing.assert_allclose(found, (0, 1, 1), rtol=1e-2)


def test_errors_say_what_is_wrong():
  batch, _, _ = make_problem([1, 2, 3, 4, 9], 1.0)
  params = as_tree(jnp.ones(SIZE))

  def call(radius=1.0, params=params, loss_fn=quadratic, **arguments):
    return conadv.sharpness(
      loss_fn, params, batch, radius, key=KEY, **arguments
    )

  with pytest.raises(ValueError, match=r'radius=-1'):
    call(-1.0)
  with pytest.raises(ValueError, match='steps=0'):
    call(steps=0)
  with pytest.raises(ValueError, match='multiple of the 3 micro-batches'):
    call(micro_batches=3)
  with pytest.raises(TypeError, match='int32'):
    call(params={'a': jnp.arange(2), 'b': jnp.ones((1, 3))})
  with pytest.raises(TypeError, match=r'complex64\[1,3\].*x\.real'):
    call(params={'a': jnp.ones(2), 'b': jnp.ones((1, 3), jnp.complex64)})
  with pytest.raises(TypeError, match='the mean is missing'):
    call(loss_fn=lambda params, batch: batch['c'])
