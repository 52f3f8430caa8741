"""Pixels in [0, 1] and the units of normalised inputs."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  check_no_schedule,
  check_not_negative,
  concrete,
)


class Normalized(NamedTuple):
  """A radius and bounds in the units of normalised inputs."""

  epsilon: jax.Array
  bounds: tuple[jax.Array, jax.Array]


def normalized(
  epsilon: ArrayLike, mean: ArrayLike, std: ArrayLike
) -> Normalized:
  r"""Converts a radius in [0, 1] pixels to inputs :math:`(x - mean) / std`.

  .. math::

    \epsilon' = \epsilon / std, \qquad
    bounds' = \left(-mean / std,\ (1 - mean) / std\right)

  Args:
    epsilon: radius in units of pixels in [0, 1], such as `8 / 255`.
    mean: what was subtracted from the pixels, a float or one value per channel.
    std: what the pixels were divided by, in the same form; positive.

  Returns:
    A NamedTuple `(epsilon, bounds)` of float32 arrays for `pgd` and the like.

  Raises:
    TypeError: for a function in place of a number.
    ValueError: for a negative epsilon, or a `std` that is not positive.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> epsilon, bounds = conadv.normalized(8 / 255, mean=0.5, std=0.5)
    >>> chex.assert_trees_all_close(epsilon, 16 / 255)
    >>> chex.assert_trees_all_close(bounds, (-1., 1.))
    >>> attack = conadv.pgd(epsilon, bounds=bounds)

  References:
    Madry et al., `Towards Deep Learning Models Resistant to Adversarial
    Attacks <https://arxiv.org/abs/1706.06083>`_, 2018
  """
  check_not_negative('epsilon', epsilon)
  check_no_schedule('mean', mean)
  check_no_schedule('std', std)
  spread = concrete(std)
  if spread is not None and not np.all(spread > 0):
    raise ValueError(
      f'`std` must be positive. Given std={spread.tolist()}. A channel that is '
      'constant has nothing to normalise: give it std 1.'
    )
  epsilon, mean, std = (
    jnp.asarray(x, jnp.float32) for x in (epsilon, mean, std)
  )
  return Normalized(epsilon / std, (-mean / std, (1.0 - mean) / std))
