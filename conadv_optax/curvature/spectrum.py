"""Eigenvalues of a symmetric matrix from products with it.

References:
  Yao et al., `PyHessian: Neural Networks Through the Lens of the Hessian
  <https://arxiv.org/abs/1912.07145>`_, 2020
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import check_count, dot
from conadv_optax.curvature.lanczos import combine, lanczos, ritz
from conadv_optax.curvature.operators import Operator
from conadv_optax.curvature.points import float32_point
from conadv_optax.curvature.vectors import random_like


class Eigenpairs(NamedTuple):
  r"""Eigenvalues and their vectors, the largest first.

  Attributes:
    values: float32[n].
    vectors: a pytree whose leaves have a leading axis of length n; the vectors
      are orthonormal.
    residuals: float32[n], :math:`\|A v - \lambda v\|`. An eigenvalue of the
      matrix lies within this distance of each value.
  """

  values: jax.Array
  vectors: Any
  residuals: jax.Array


class Trace(NamedTuple):
  """An estimate of the trace.

  Attributes:
    mean: float32 scalar, the mean over the samples.
    standard_error: float32 scalar, the standard error of that mean.
  """

  mean: jax.Array
  standard_error: jax.Array


class Spectrum(NamedTuple):
  """The density of the eigenvalues as point masses that sum to 1.

  Attributes:
    nodes: float32[probes, degree], where the masses lie.
    weights: float32[probes, degree], the masses.
  """

  nodes: jax.Array
  weights: jax.Array


def top_eigenpairs(
  matvec: Operator,
  like: Any,
  n: int,
  *,
  key: jax.Array,
  iterations: int = 20,
) -> Eigenpairs:
  r"""The `n` algebraically largest eigenvalues and their vectors, by Lanczos.

  .. math::

    A v_i = \lambda_i v_i, \qquad \lambda_1 \ge \lambda_2 \ge \ldots

  Each iteration is one product, as in power iteration, and the first value is
  never below that of power iteration from the same start. Negative eigenvalues
  count as the smallest, however large in size. To find these, pass the negated
  operator, `lambda v: jax.tree.map(jnp.negative, matvec(v))`. The basis takes
  the memory of `iterations` vectors.

  Args:
    matvec: the matrix, symmetric, as a function of a float32 pytree.
    like: a pytree of the shapes of the vectors: the parameters, say.
    n: number of eigenpairs.
    key: draws the start.
    iterations: number of products, at least `n`. No more are made than there
      are dimensions; with as many the result is exact but for rounding.

  Returns:
    `Eigenpairs`. The values of a zero matrix are 0. A second copy of a repeated
    eigenvalue is found only when the iteration runs out of other vectors.

  Raises:
    TypeError: for vectors that are not floating.
    ValueError: for an `n` below 1 or above the iterations or the dimensions.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> diagonal = jnp.array([1., 5., -9., 3.])
    >>> pairs = conadv.hessian.top_eigenpairs(
    ...     lambda v: diagonal * v, diagonal, 2, key=jax.random.key(0))
    >>> chex.assert_trees_all_close(
    ...     pairs.values, jnp.array([5., 3.]), rtol=1e-5)
    >>> rough = conadv.hessian.top_eigenpairs(
    ...     lambda v: diagonal * v, diagonal, 1, key=jax.random.key(0),
    ...     iterations=3)
    >>> error = (diagonal - rough.values[0]) * rough.vectors[0]
    >>> chex.assert_trees_all_close(
    ...     rough.residuals[0], jnp.linalg.norm(error), rtol=1e-3)

  References:
    Yao et al., `PyHessian: Neural Networks Through the Lens of the Hessian
    <https://arxiv.org/abs/1912.07145>`_, 2020
  """
  space = float32_point(like)
  check_count('iterations', iterations)
  check_count('n', n)
  size = optax.tree.size(space)
  iterations = min(iterations, size)
  if n > iterations:
    raise ValueError(
      'As many eigenpairs can be found as there are products, and not more '
      f'than there are dimensions. Given n={n} for {iterations} iterations in '
      f'{size} dimensions. Write '
      + (f'`n={size}`.' if n > size else f'`iterations={2 * n}`.')
    )
  start_key, fresh_key = jax.random.split(key)
  start = random_like(start_key, space)
  result = lanczos(matvec, start, iterations, fresh_key)
  values, columns = ritz(result)
  top = columns[:, ::-1][:, :n]
  return Eigenpairs(
    values=values[::-1][:n],
    vectors=combine(top.T, result.basis),
    residuals=jnp.abs(result.off_diagonal[-1] * top[-1]),
  )


def trace(
  matvec: Operator, like: Any, *, key: jax.Array, samples: int = 32
) -> Trace:
  r"""Hutchinson's estimate of the trace.

  .. math::

    \mathrm{tr}\, A \approx \frac1s \sum_{i=1}^{s} z_i^\top A z_i,
    \qquad z_i \in \{-1, 1\}^d \text{ uniform}

  It is exact for a diagonal matrix.

  Args:
    matvec: the matrix, symmetric, as a function of a float32 pytree.
    like: a pytree of the shapes of the vectors.
    key: draws the samples.
    samples: number of products, at least 2; one is in memory at a time.

  Returns:
    `Trace`, the mean and its standard error.

  Raises:
    TypeError: for vectors that are not floating.
    ValueError: for fewer than two samples.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> diagonal = jnp.array([1., 5., -9., 3.])
    >>> estimate = conadv.hessian.trace(
    ...     lambda v: diagonal * v, diagonal, key=jax.random.key(0))
    >>> chex.assert_trees_all_close(
    ...     estimate, conadv.hessian.Trace(jnp.float32(0.), jnp.float32(0.)))
    >>> # Here a sample is 2 or -2, so that their mean says how they spread.
    >>> estimate = conadv.hessian.trace(
    ...     lambda v: v[::-1], jnp.zeros(2), key=jax.random.key(0), samples=32)
    >>> chex.assert_trees_all_close(
    ...     estimate.standard_error, jnp.sqrt((4. - estimate.mean ** 2) / 31),
    ...     rtol=1e-5)

  References:
    Yao et al., `PyHessian: Neural Networks Through the Lens of the Hessian
    <https://arxiv.org/abs/1912.07145>`_, 2020
  """
  space = float32_point(like)
  check_count('samples', samples, least=2)

  def sample(key: jax.Array) -> jax.Array:
    z = random_like(key, space, jax.random.rademacher)
    return dot(z, matvec(z))

  values = jax.lax.map(sample, jax.random.split(key, samples))
  error = jnp.std(values, ddof=1) / samples**0.5
  return Trace(jnp.mean(values), error)


def spectral_density(
  matvec: Operator,
  like: Any,
  *,
  key: jax.Array,
  degree: int = 64,
  probes: int = 4,
) -> Spectrum:
  r"""The density of the eigenvalues, by stochastic Lanczos quadrature.

  .. math::

    \frac1d \sum_{i=1}^{d} f(\lambda_i) \approx \frac1p \sum_{j=1}^{p}
    \sum_{i=1}^{k} \omega_{ij} f(\theta_{ij}), \qquad
    \omega_{ij} = (e_1^\top y_{ij})^2

  for the eigenpairs :math:`(\theta_{ij}, y_{ij})` of the tridiagonal matrix
  of :math:`k` Lanczos steps from a start in :math:`\{-1, 1\}^d`. The moments
  of one start are exact up to :math:`2k - 1`. The basis takes the memory of
  `degree` vectors; the probes run one after the other.

  Args:
    matvec: the matrix, symmetric, as a function of a float32 pytree.
    like: a pytree of the shapes of the vectors.
    key: draws the starts.
    degree: number of products of a probe, :math:`k`. No more are made than
      there are dimensions.
    probes: number of starts, :math:`p`.

  Returns:
    `Spectrum`, nodes and weights; `smoothed_density` makes a curve of them.
    Times the dimension, the mean of `f` is the trace of `f(A)`.

  Raises:
    TypeError: for vectors that are not floating.
    ValueError: for a degree or a number of probes below 1.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> diagonal = jnp.array([1., 5., -9., 3.])
    >>> spectrum = conadv.hessian.spectral_density(
    ...     lambda v: diagonal * v, diagonal, key=jax.random.key(0))
    >>> second_moment = jnp.sum(spectrum.weights * spectrum.nodes ** 2)
    >>> chex.assert_trees_all_close(
    ...     second_moment, jnp.mean(diagonal ** 2), rtol=1e-4)

  References:
    Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
    Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
  """
  space = float32_point(like)
  check_count('degree', degree)
  check_count('probes', probes)
  degree = min(degree, optax.tree.size(space))

  def probe(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    start_key, fresh_key = jax.random.split(key)
    start = random_like(start_key, space, jax.random.rademacher)
    nodes, columns = ritz(lanczos(matvec, start, degree, fresh_key))
    return nodes, columns[0] ** 2

  nodes, weights = jax.lax.map(probe, jax.random.split(key, probes))
  return Spectrum(nodes, weights / probes)


def smoothed_density(
  spectrum: Spectrum,
  grid: jax.Array,
  *,
  variance: ArrayLike | None = None,
) -> jax.Array:
  r"""A spectrum as a curve: a Gaussian for each of its point masses.

  .. math::

    \phi(t) = \sum_i \omega_i\, \mathcal{N}(t; \theta_i, \sigma^2)

  Args:
    spectrum: what `spectral_density` returned.
    grid: float32[g], where to evaluate the density.
    variance: :math:`\sigma^2`. None: :math:`10^{-5} \max(1, \theta_{\max} -
      \theta_{\min})`. The grid must be finer than :math:`\sigma`.

  Returns:
    float32[g], the density; its integral over the line is 1.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> spectrum = conadv.hessian.Spectrum(
    ...     jnp.array([[-1., 1.]]), jnp.array([[0.5, 0.5]]))
    >>> grid = jnp.linspace(-3., 3., 601)
    >>> density = conadv.hessian.smoothed_density(
    ...     spectrum, grid, variance=0.01)
    >>> chex.assert_trees_all_close(jnp.trapezoid(density, grid), 1., rtol=1e-3)

  References:
    Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
    Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
  """
  nodes, weights = spectrum.nodes.ravel(), spectrum.weights.ravel()
  if variance is None:
    variance = 1e-5 * jnp.maximum(1.0, jnp.max(nodes) - jnp.min(nodes))
  sigma = jnp.sqrt(jnp.asarray(variance, nodes.dtype))
  heights = jax.scipy.stats.norm.pdf(grid[:, None], nodes[None], sigma)
  return jnp.dot(heights, weights, precision=jax.lax.Precision.HIGHEST)
