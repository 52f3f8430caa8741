"""Eigenvalues, trace and density against dense matrices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
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
from conadv_optax.curvature.lanczos import lanczos, ritz

KEY = jax.random.key(0)


def symmetric(eigenvalues, seed=0):
  """A matrix of these eigenvalues, and its eigenvectors as columns."""
  size = len(eigenvalues)
  q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
  matrix = (q * np.asarray(eigenvalues)) @ q.T
  return jnp.asarray(matrix, jnp.float32), q


def split_tree(vector):
  """A vector as a tree of two leaves, and a matrix that multiplies it."""
  return {'a': vector[:2], 'b': vector[2:].reshape(-1, 1)}


def tree_matvec(matrix):
  def matvec(tree):
    vector = jnp.concatenate([tree['a'], tree['b'][:, 0]])
    return split_tree(matrix @ vector)

  return matvec


def waves(w, x):
  """A loss whose types are clear on a mesh of explicit axes too."""
  each = jnp.tanh(jnp.sum(x * w['a'][None], axis=1))[:, None] * w['b'][None]
  return jnp.mean(jnp.sum(jnp.sin(each), axis=1))


def top_of_waves(w, x):
  matvec = hessian.operator(waves, w, x, micro_batches=2)
  return hessian.top_eigenpairs(matvec, w, 2, key=KEY)


@jax.jit
def analyse(w, x):
  matvec = hessian.operator(waves, w, x, micro_batches=2)
  return (
    top_of_waves(w, x),
    hessian.trace(matvec, w, key=KEY, samples=2),
    hessian.spectral_density(matvec, w, key=KEY, degree=2, probes=2),
  )


def make_waves():
  """Parameters and batch."""
  a, b, x = random_arrays(7, (4,), (8,), (32, 4))
  return {'a': a, 'b': b}, x


def spread(axis_type):
  """The batch over two axes of a mesh, and the parameters over the third."""
  axes = ('x', 'y', 'model')
  mesh = jax.make_mesh((2, 2, 2), axes, axis_types=(axis_type,) * 3)
  return jax.device_put(
    make_waves(),
    (NamedSharding(mesh, P('model')), NamedSharding(mesh, P(('x', 'y')))),
  )


@pytest.mark.slow
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_on_eight_devices_it_is_the_same(axis_type):
  found, *rest = analyse(*spread(axis_type))
  expected, *of_rest = analyse(*make_waves())
  close = {'rtol': 1e-3, 'atol': 1e-4}
  chex.assert_trees_all_close(found.values, expected.values, **close)
  chex.assert_trees_all_close(rest, of_rest, **close)
  # The sign of a vector is anyone's.
  chex.assert_trees_all_close(
    *jax.tree.map(jnp.abs, (found.vectors, expected.vectors)), **close
  )
  for vectors in jax.tree.leaves(found.vectors):
    assert vectors.sharding.spec == P(None, 'model')


@pytest.mark.slow
def test_outside_of_jit_explicit_axes_are_the_same():
  # Where nothing is compiled it draws a start; the others draw in a loop.
  found = top_of_waves(*spread(AxisType.Explicit))
  expected, _, _ = analyse(*make_waves())
  np.testing.assert_allclose(found.values, expected.values, rtol=1e-4)
  assert found.vectors['a'].sharding.spec == P(None, 'model')


@pytest.mark.slow
def test_vectors_are_float32_with_64_bits_enabled():
  with jax.enable_x64(True):
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), make_waves())
    found = analyse(*wide)
  assert {x.dtype for x in jax.tree.leaves(found)} == {jnp.dtype(jnp.float32)}
  chex.assert_trees_all_close(
    found[0].values, analyse(*make_waves())[0].values, rtol=1e-4, atol=1e-6
  )


def test_a_matrix_of_the_users_own_may_be_wider():
  with jax.enable_x64(True):
    diagonal = jnp.array([1.0, 5.0, -9.0, 3.0])
    found = hessian.top_eigenpairs(
      lambda v: diagonal * v.astype(diagonal.dtype),
      diagonal,
      2,
      key=jax.random.key(0),
    )
  assert found.values.dtype == jnp.float32
  np.testing.assert_allclose(found.values, [5, 3], rtol=1e-5)


@pytest.mark.slow
def test_top_eigenpairs_of_a_net():
  params, batch = make_net(), make_batch()
  values, vectors = np.linalg.eigh(dense_hessian(params, batch))

  @jax.jit
  def top(params, batch):
    matvec = hessian.operator(net_loss, params, batch, micro_batches=4)
    return hessian.top_eigenpairs(matvec, params, 3, key=KEY)

  pairs = jax.device_get(top(params, batch))
  np.testing.assert_allclose(pairs.values, values[::-1][:3], rtol=1e-4)
  for i in range(3):
    vector = [x[i].ravel() for x in jax.tree.leaves(pairs.vectors)]
    overlap = abs(np.concatenate(vector) @ vectors[:, -1 - i])
    np.testing.assert_allclose(overlap, 1, atol=1e-3)


def test_top_is_the_largest_and_not_the_largest_in_size():
  matrix, _ = symmetric([-50.0, -3.0, 0.0, 1.0, 2.0, 7.0])

  @jax.jit
  def top(matrix):
    like = split_tree(jnp.zeros(6))
    return hessian.top_eigenpairs(tree_matvec(matrix), like, 2, key=KEY)

  np.testing.assert_allclose(top(matrix).values, [7, 2], rtol=1e-4)
  np.testing.assert_allclose(top(-matrix).values, [50, 3], rtol=1e-4)


@jax.jit
def all_eigenpairs(matrix):
  return hessian.top_eigenpairs(
    tree_matvec(matrix), split_tree(jnp.zeros(6)), 6, key=KEY
  )


@settings(max_examples=30, deadline=None)
@given(
  eigenvalues=st.lists(st.integers(-9, 9), min_size=6, max_size=6),
  seed=st.integers(0, 99),
)
def test_as_many_products_as_dimensions_find_every_eigenvalue(
  eigenvalues, seed
):
  # Repeated ones and zeros among them, so that the iteration runs dry.
  matrix, _ = symmetric(eigenvalues, seed)
  values, vectors, residuals = all_eigenpairs(matrix)
  np.testing.assert_allclose(values, np.sort(eigenvalues)[::-1], atol=2e-4)
  rows = np.concatenate([vectors['a'], vectors['b'][..., 0]], axis=1)
  np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=1e-4)
  np.testing.assert_allclose(residuals, 0, atol=1e-3)


@pytest.mark.parametrize('value', [0.0, 1.0, -2.0])
def test_a_multiple_of_the_identity_has_one_eigenvalue_over_and_over(value):
  pairs = all_eigenpairs(value * jnp.eye(6))
  chex.assert_trees_all_close(pairs.values, jnp.full(6, value), rtol=1e-5)


def test_residuals_bound_the_distance_to_an_eigenvalue():
  spectrum = np.linspace(-1, 3, 40) ** 3
  matrix, _ = symmetric(spectrum)
  pairs = jax.jit(
    lambda matrix: hessian.top_eigenpairs(
      lambda v: matrix @ v, jnp.zeros(40), 3, key=KEY, iterations=8
    )
  )(matrix)
  vectors = np.asarray(pairs.vectors)
  actual = np.linalg.norm(
    vectors @ np.asarray(matrix) - pairs.values[:, None] * vectors, axis=1
  )
  np.testing.assert_allclose(pairs.residuals, actual, rtol=1e-3, atol=1e-4)
  assert actual[2] > 0.1, 'Nothing is bounded once it has converged.'
  for value, residual in zip(pairs.values, pairs.residuals, strict=True):
    assert np.min(np.abs(spectrum - value)) <= residual + 1e-4


def test_lanczos_is_never_below_power_iteration_of_the_same_cost():
  matrix, _ = symmetric(np.linspace(0.1, 2, 30) ** 2)

  @jax.jit
  def both(start):
    power, _ = optax.power_iteration(
      lambda v: matrix @ v, v0=start, num_iters=10, error_tolerance=0.0
    )
    values, _ = ritz(lanczos(lambda v: matrix @ v, start, 11, KEY))
    return power, values[-1]

  for start in random_arrays(5, *[(30,)] * 3):
    power, largest = both(start)
    assert power < largest <= 4 + 1e-5


@pytest.mark.parametrize('iterations', [1, 10])
def test_an_iteration_costs_one_product(iterations):
  calls = []
  diagonal = jnp.arange(20.0)

  def matvec(v):
    jax.debug.callback(lambda: calls.append(0))
    return diagonal * v

  jax.block_until_ready(
    jax.jit(
      lambda: hessian.top_eigenpairs(
        matvec, diagonal, 1, key=KEY, iterations=iterations
      )
    )()
  )
  jax.effects_barrier()
  assert len(calls) == iterations


def test_a_loss_without_curvature_has_eigenvalues_of_zero():
  @jax.jit
  def analyse(params, x):
    matvec = hessian.operator(lambda w, x: jnp.mean(x @ w), params, x)
    return (
      hessian.top_eigenpairs(matvec, params, 2, key=KEY, iterations=3),
      hessian.trace(matvec, params, key=KEY, samples=2),
      hessian.spectral_density(matvec, params, key=KEY, degree=3, probes=1),
    )

  pairs, trace, spectrum = analyse(*random_arrays(6, (5,), (4, 5)))
  chex.assert_tree_all_finite(pairs)
  chex.assert_trees_all_equal(pairs.values, jnp.zeros(2))
  chex.assert_trees_all_equal(pairs.residuals, jnp.zeros(2))
  assert tuple(map(float, trace)) == (0, 0)
  chex.assert_trees_all_equal(spectrum.nodes, jnp.zeros((1, 3)))
  chex.assert_trees_all_close(jnp.sum(spectrum.weights), 1.0)


@functools.cache
def make_trained_net():
  """Its parameters, a batch, and the Hessian there."""
  params, batch = make_net(), make_batch(64)
  gradient = jax.grad(net_loss)

  def step(_, params):
    grads = gradient(params, batch)
    return jax.tree.map(lambda w, g: w - 0.5 * g, params, grads)

  params = jax.jit(lambda p: jax.lax.fori_loop(0, 100, step, p))(params)
  return params, batch, dense_hessian(params, batch)


@pytest.mark.slow
def test_trace_of_a_net_is_within_its_standard_error():
  params, batch, dense = make_trained_net()
  samples = 400
  estimate = jax.jit(
    lambda: hessian.trace(
      hessian.operator(net_loss, params, batch),
      params,
      key=KEY,
      samples=samples,
    )
  )()
  off_diagonal = dense - np.diag(np.diag(dense))
  error = np.sqrt(2 * np.sum(off_diagonal**2) / samples)
  np.testing.assert_allclose(estimate.standard_error, error, rtol=0.2)
  assert abs(estimate.mean - np.trace(dense)) < 3 * error


def density_of(params, batch, **arguments):
  matvec = hessian.operator(net_loss, params, batch)
  density = jax.jit(
    lambda: hessian.spectral_density(matvec, params, key=KEY, **arguments)
  )
  return jax.device_get(density())


@pytest.mark.slow
def test_spectral_density_has_the_moments_of_a_net_within_a_percent():
  params, batch, dense = make_trained_net()
  eigenvalues = np.linalg.eigvalsh(dense)
  # The moments of a start are 0.5 and 0.8 of themselves apart: the mean of
  # 10,000 has a standard error of 0.5 and 0.8 percent.
  spectrum = density_of(params, batch, degree=2, probes=10_000)
  for power in (1, 2):
    moment = np.sum(spectrum.weights * spectrum.nodes**power)
    np.testing.assert_allclose(moment, np.mean(eigenvalues**power), rtol=0.01)


@pytest.mark.slow
def test_spectral_density_lies_where_the_eigenvalues_of_a_net_do():
  params, batch, dense = make_trained_net()
  eigenvalues = np.linalg.eigvalsh(dense)
  spectrum = density_of(params, batch, degree=12, probes=1000)
  edges = np.linspace(eigenvalues[0], eigenvalues[-1], 20)
  ours = [np.sum(spectrum.weights[spectrum.nodes <= edge]) for edge in edges]
  exact = [np.mean(eigenvalues <= edge) for edge in edges]
  assert np.max(np.abs(np.subtract(ours, exact))) < 0.06


def test_quadrature_of_degree_k_is_exact_for_2k_minus_1_moments():
  # All starts weigh the eigenvalues of a diagonal matrix alike.
  diagonal = jnp.array([-2.0, -1.0, 0.0, 0.5, 1.5, 3.0])
  density = jax.jit(
    lambda: hessian.spectral_density(
      lambda v: diagonal * v, diagonal, key=KEY, degree=3, probes=2
    )
  )
  spectrum = jax.device_get(density())
  chex.assert_shape(tuple(spectrum), (2, 3))
  for power in range(6):
    moment = np.sum(spectrum.weights * spectrum.nodes**power)
    exact = np.mean(np.asarray(diagonal) ** power)
    np.testing.assert_allclose(moment, exact, rtol=1e-4, atol=1e-5)
  sixth = np.sum(spectrum.weights * spectrum.nodes**6)
  assert abs(sixth - np.mean(np.asarray(diagonal) ** 6)) > 1


def test_weights_find_the_multiplicity_of_a_known_spectrum():
  matrix, _ = symmetric([0.0] * 15 + [1.0] * 4 + [5.0])
  density = jax.jit(
    lambda: hessian.spectral_density(
      lambda v: matrix @ v, jnp.zeros(20), key=KEY, degree=20, probes=1000
    )
  )
  spectrum = jax.device_get(density())
  for value, share in ((0, 0.75), (1, 0.2), (5, 0.05)):
    mass = np.sum(spectrum.weights[np.abs(spectrum.nodes - value) < 0.01])
    np.testing.assert_allclose(mass, share, atol=0.01)


def test_smoothed_density_is_a_sum_of_gaussians():
  spectrum = hessian.Spectrum(
    jnp.array([[-1.0, 9.0], [0.0, 4.0]]), jnp.array([[0.1, 0.4], [0.3, 0.2]])
  )
  grid = np.linspace(-2, 10, 4001, dtype=np.float32)
  smoothed = jax.jit(hessian.smoothed_density)
  density = smoothed(spectrum, grid)
  variance = 1e-5 * 10
  expected = sum(
    w
    * np.exp(-((grid - x) ** 2) / (2 * variance))
    / np.sqrt(2 * np.pi * variance)
    for x, w in ((-1, 0.1), (9, 0.4), (0, 0.3), (4, 0.2))
  )
  np.testing.assert_allclose(density, expected, rtol=1e-2, atol=1e-3)
  np.testing.assert_allclose(np.trapezoid(density, grid), 1, rtol=1e-3)
  wide = smoothed(spectrum, grid, variance=1.0)
  assert np.max(wide) < 0.3


def test_errors_say_what_is_wrong():
  params, batch = make_net(), make_batch()
  matvec = hessian.operator(net_loss, params, batch)
  with pytest.raises(TypeError, match=r"'calls'.*int32.*If it is a counter"):
    hessian.operator(net_loss, {'calls': jnp.int32(1)}, batch)
  with pytest.raises(TypeError, match='the mean is missing'):
    hessian.operator(lambda w, x: w * x, jnp.ones(3), jnp.ones(3))(jnp.ones(3))
  with pytest.raises(TypeError, match='leave it out'):
    hessian.operator(lambda w, x: (w, x), jnp.ones([]), batch)(jnp.ones([]))
  with pytest.raises(
    TypeError, match=r'complex64\[2\].*`\(x\.real, x\.imag\)`'
  ):
    hessian.operator(net_loss, jnp.ones(2, jnp.complex64), batch)
  with pytest.raises(ValueError, match='multiple of the 3 micro-batches'):
    hessian.operator(net_loss, params, batch, micro_batches=3)(params)
  with pytest.raises(ValueError, match='micro_batches=0'):
    hessian.operator(net_loss, params, batch, micro_batches=0)(params)
  with pytest.raises(ValueError, match='shapes that it was taken at'):
    matvec(params['dense'])
  with pytest.raises(ValueError, match='shapes that it was taken at'):
    matvec({**params, 'head': jnp.ones((2, 4))})
  with pytest.raises(KeyError, match="Did you mean `inputs='image'`"):
    hessian.input_operator(net_loss, params, batch, inputs='images')
  with pytest.raises(TypeError, match='int32'):
    hessian.input_operator(net_loss, params, batch, inputs='label')
  with pytest.raises(ValueError, match='n=5 for 4 iterations'):
    hessian.top_eigenpairs(matvec, params, 5, key=KEY, iterations=4)
  with pytest.raises(ValueError, match=r'n=3 .* in 2 dimensions'):
    hessian.top_eigenpairs(lambda v: v, jnp.ones(2), 3, key=KEY)
  with pytest.raises(ValueError, match='n=0'):
    hessian.top_eigenpairs(matvec, params, 0, key=KEY)
  with pytest.raises(ValueError, match='samples=1'):
    hessian.trace(matvec, params, key=KEY, samples=1)
  with pytest.raises(ValueError, match='degree=0'):
    hessian.spectral_density(matvec, params, key=KEY, degree=0)
  with pytest.raises(TypeError, match=r'probes=2\.5'):
    hessian.spectral_density(matvec, params, key=KEY, probes=2.5)
