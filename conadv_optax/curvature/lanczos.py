r"""The Lanczos iteration on pytrees, with full re-orthogonalisation.

:math:`k` products with a symmetric matrix :math:`A` give an orthonormal basis
:math:`Q` of :math:`k` vectors in which it is tridiagonal,
:math:`T = Q^\top A Q`. Where the vectors reached from the start are exhausted
(an invariant subspace: a matrix of low rank, a repeated eigenvalue, zero) the
iteration goes on from a random vector outside of them, and :math:`T` falls
apart into blocks. So nothing is divided by zero, and copies of a repeated
eigenvalue are found.

References:
  Ghorbani et al., `An Investigation into Neural Net Optimization via Hessian
  Eigenvalue Density <https://arxiv.org/abs/1901.10159>`_, 2019
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from conadv_optax.core.numeric import cast_like, dot, unit
from conadv_optax.curvature.vectors import random_like

# A vector this much shorter than the product that it comes from is rounding.
_ROUNDING = 10 * float(jnp.finfo(jnp.float32).eps)


class Lanczos(NamedTuple):
  """What the iteration leaves.

  Attributes:
    diagonal: float32[k], the diagonal of T.
    off_diagonal: float32[k], the diagonal beside it; the last entry links to
      the vector that comes next, and stands outside T.
    basis: the orthonormal vectors, stacked along a leading axis of length k.
  """

  diagonal: jax.Array
  off_diagonal: jax.Array
  basis: Any


def lanczos(
  matvec: Callable[[Any], Any], start: Any, degree: int, key: jax.Array
) -> Lanczos:
  """`degree` products with `matvec`, from a float32 start other than zero."""
  # Zeros that are spread over devices as the vectors are.
  basis = jax.tree.map(
    lambda x: jnp.broadcast_to(0 * x, (degree, *x.shape)), start
  )

  def step(carry: Any, j_and_key: Any) -> Any:
    vector, basis, scale = carry
    j, fresh_key = j_and_key
    basis = jax.tree.map(lambda q, x: q.at[j].set(x), basis, vector)
    # A matrix of the user's own may be wider.
    product = cast_like(matvec(vector), vector)
    diagonal = dot(vector, product)
    scale = jnp.maximum(scale, optax.tree.norm(product))
    rest = _orthogonal(product, basis)
    length = optax.tree.norm(rest)
    exhausted = length <= _ROUNDING * scale
    off_diagonal = jnp.where(exhausted, 0.0, length)
    rest = jax.lax.cond(
      exhausted,
      lambda: _orthogonal(random_like(fresh_key, rest), basis),
      lambda: rest,
    )
    return (unit(rest), basis, scale), (diagonal, off_diagonal)

  (_, basis, _), (diagonal, off_diagonal) = jax.lax.scan(
    step,
    (unit(start), basis, jnp.float32(0)),
    (jnp.arange(degree), jax.random.split(key, degree)),
  )
  return Lanczos(diagonal, off_diagonal, basis)


def ritz(result: Lanczos) -> tuple[jax.Array, jax.Array]:
  """Eigenvalues of T in increasing order, and its eigenvectors as columns."""
  beside = result.off_diagonal[:-1]
  return jnp.linalg.eigh(
    jnp.diag(result.diagonal) + jnp.diag(beside, 1) + jnp.diag(beside, -1)
  )


def combine(coefficients: jax.Array, basis: Any) -> Any:
  """Rows of coefficients times the basis: a vector for each row."""
  return jax.tree.map(
    lambda q: jnp.tensordot(
      coefficients, q, axes=1, precision=jax.lax.Precision.HIGHEST
    ),
    basis,
  )


def _orthogonal(vector: Any, basis: Any) -> Any:
  """`vector` without its part in the basis; twice, against rounding."""
  for _ in range(2):
    coefficients = jax.vmap(dot, (0, None))(basis, vector)
    vector = optax.tree.sub(vector, combine(coefficients, basis))
  return vector
