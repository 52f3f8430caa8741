r"""FGSM, and its form with a random start: attacks of one step.

References:
  Goodfellow et al., `Explaining and Harnessing Adversarial Examples
  <https://arxiv.org/abs/1412.6572>`_, 2015

  Wong et al., `Fast is better than free: Revisiting adversarial training
  <https://arxiv.org/abs/2001.03994>`_, 2020
"""

import jax
from jax.typing import ArrayLike

from conadv_optax.attacks.balls import Norm
from conadv_optax.attacks.pgd import pgd
from conadv_optax.attacks.targets import Targets
from conadv_optax.core.numeric import check_not_negative
from conadv_optax.core.types import Attack


def fgsm(
  epsilon: ArrayLike,
  *,
  norm: Norm = 'linf',
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
  targets: Targets | None = None,
) -> Attack:
  r"""Fast gradient sign method: one full step from the clean input.

  .. math::

    \hat x = \Pi\left(x + \epsilon\, d(\nabla_x L(x))\right)

  Use it with `reuse_gradient=True`, which needs one step from the clean input,
  without targets.

  Args:
    epsilon: radius of the ball and size of the step, as in `pgd`.
    norm: 'linf' or 'l2'.
    bounds: `(low, high)` of a valid input, as in `pgd`.
    targets: as in `pgd`.

  Returns:
    An `Attack`, as `pgd` returns.

  Raises:
    TypeError, ValueError: as `pgd` does.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> x = jnp.array([[0.5, -0.5]])
    >>> climb = jax.grad(lambda x: jnp.sum(x ** 2))
    >>> chex.assert_trees_all_close(
    ...     conadv.fgsm(0.1).craft(None, climb, x), jnp.array([[0.6, -0.6]]))

  References:
    Goodfellow et al., `Explaining and Harnessing Adversarial Examples
    <https://arxiv.org/abs/1412.6572>`_, 2015
  """
  return pgd(
    epsilon, norm=norm, random_start=False, bounds=bounds, targets=targets
  )


def fast_fgsm(
  epsilon: ArrayLike,
  *,
  step_size: ArrayLike | None = None,
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
  targets: Targets | None = None,
) -> Attack:
  r"""FGSM from a uniform point of the ball, with a step beyond its radius.

  .. math::

    \hat x = \Pi\left(x_0 + 1.25\,\epsilon\,
      \mathrm{sign}(\nabla_x L(x_0))\right),
    \qquad x_0 = \Pi(x + u), \qquad u \sim U(-\epsilon, \epsilon)

  Training on these examples alone can lose robustness within an epoch;
  `overfitting_guard` notices it.

  Args:
    epsilon: radius of the L-infinity ball, as in `pgd`.
    step_size: the step; None is `1.25 * epsilon`.
    bounds: `(low, high)` of a valid input, as in `pgd`.
    targets: as in `pgd`.

  Returns:
    An `Attack`, as `pgd` returns.

  Raises:
    TypeError, ValueError: as `pgd` does.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> x = jnp.zeros((4, 3))
    >>> climb = jax.grad(lambda x: jnp.sum(x))
    >>> x_adv = conadv.fast_fgsm(0.1).craft(jax.random.key(0), climb, x)
    >>> chex.assert_scalar_in(float(jnp.min(x_adv)), 0.025, 0.1)

  References:
    Wong et al., `Fast is better than free: Revisiting adversarial training
    <https://arxiv.org/abs/2001.03994>`_, 2020
  """
  if step_size is None:
    check_not_negative('epsilon', epsilon)
    step_size = jax.tree.map(lambda radius: 1.25 * radius, epsilon)
  return pgd(epsilon, step_size=step_size, bounds=bounds, targets=targets)
