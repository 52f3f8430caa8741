r"""Sharpness-aware minimization, LookSAM and the gradient-norm penalty.

All three take a second gradient at :math:`w + \rho\, g / \|g\|`, and differ in
how often, and in how much of it they take.

References:
  Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
  Generalization <https://arxiv.org/abs/2010.01412>`_, 2021

  Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
  <https://arxiv.org/abs/2203.02714>`_, 2022

  Zhao et al., `Penalizing Gradient Norm for Efficiently Improving
  Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  at_least_float32,
  check_count,
  check_not_negative,
  concrete,
  tree_at_least_float32,
  unit,
)
from conadv_optax.core.types import (
  Batch,
  ConAdvAux,
  GradientFunction,
  LossFn,
  PerGroup,
)
from conadv_optax.training.plain import as_gradient_function


class SamState(NamedTuple):
  """State of `sam`.

  Attributes:
    inner: the state of the gradient function inside.
    phase: int32 scalar, the steps since the last sharp gradient, or `()` with
      `every=1`.
    direction: what a sharp gradient has beside the gradient, like the
      parameters and at least float32; a `PerGroup` of it without `axis`, and
      `()` with `every=1`.
  """

  inner: Any
  phase: Any
  direction: Any


def sam(
  grad_fn: GradientFunction | LossFn,
  radius: ArrayLike,
  *,
  every: int = 1,
  reuse_weight: ArrayLike = 0.7,
  penalty: ArrayLike = 1.0,
  axis: str | None = None,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
) -> GradientFunction:
  r"""Sharpness-aware minimization: the gradient at the worst point nearby.

  With :math:`g = \nabla L(w)` and norms in float32 over the whole tree,

  .. math::

    g_s = \nabla L\left(w + \rho \frac{g}{\|g\|}\right), \qquad
    \hat g = (1 - a)\, g + a\, g_s

  takes the place of the gradient: SAM with :math:`a = 1`, and with less the
  penalty of the gradient norm, whose loss is
  :math:`L + a \rho \|\nabla L\|` to first order in :math:`\rho`.

  LookSAM, `every` = :math:`k > 1`, takes :math:`g_s` at each k-th step from the
  first on, and keeps the part of it that is orthogonal to the gradient. The
  steps between cost one gradient, and use

  .. math::

    g_v = g_s - \frac{\langle g_s, g \rangle}{\|g\|^2}\, g, \qquad
    g_s \approx g + \alpha \frac{\|g\|}{\|g_v\|}\, g_v

  Both gradients are of the same batch with the same key. Loss, aux, batch
  statistics and the state inside are those of the first, at :math:`w`, so that
  statistics move once a step. A gradient of zero perturbs nothing, and
  :math:`\rho = 0` gives the gradient itself. The aux has no second moment of
  what is inside, whose gradients are others: ask the `data_parallel` or
  `accumulate` outside for it.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    radius: :math:`\rho`, how far the second gradient is taken.
    every: :math:`k`, the steps from one second gradient to the next, static.
    reuse_weight: :math:`\alpha`, how much of the kept part is used between.
    penalty: :math:`a`, from 0 to 1, the share of the second gradient.
    axis: the axis of the mesh whose devices perturb together, by the mean of
      their gradients, which is sent once more for that (twice with
      `every > 1`); inside `data_parallel` over that axis. None: each device,
      and each micro-batch of an `accumulate` outside, perturbs by its own.
      With `axis`, put `accumulate` inside: its micro-batches do so together.
    has_state: of a loss function, as for `plain`.
    has_aux: of a loss function, as for `plain`.
    has_key: of a loss function, as for `plain`.

  Returns:
    A `GradientFunction` with the staleness of `grad_fn`, whose gradients have
    the structure and dtypes of the parameters.

  Raises:
    TypeError: for a `grad_fn` that is no function.
    ValueError: for a negative radius or weight, an `every` that is not an int
      of at least 1, a penalty outside of 0 to 1, `has_state`, `has_aux` or
      `has_key` of what is not a loss function, or an axis that is not there.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.sam(lambda w, batch: jnp.sum(batch * w ** 2), 0.1)
    >>> w, batch = jnp.array([3., 4.]), jnp.ones(2)
    >>> (loss, aux), grads, state = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), batch)
    >>> # The gradient is (6, 8), so the second is taken at w + (0.06, 0.08).
    >>> chex.assert_trees_all_close(grads, jnp.array([6.12, 8.16]), rtol=1e-6)
    >>> chex.assert_trees_all_close(loss, 25.)

  References:
    Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
    Generalization <https://arxiv.org/abs/2010.01412>`_, 2021

    Liu et al., `Towards Efficient and Scalable Sharpness-Aware Minimization
    <https://arxiv.org/abs/2203.02714>`_, 2022

    Zhao et al., `Penalizing Gradient Norm for Efficiently Improving
    Generalization in Deep Learning <https://arxiv.org/abs/2202.03599>`_, 2022
  """
  grad_fn = as_gradient_function(
    grad_fn, has_state=has_state, has_aux=has_aux, has_key=has_key
  )
  check_not_negative('radius', radius)
  check_not_negative('reuse_weight', reuse_weight)
  check_count('every', every)
  _check_penalty(penalty)

  def init(
    params: Any,
    first_batches: Sequence[Batch],
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> Any:
    inner = grad_fn.init(
      params, first_batches, model_state=model_state, key=key
    )
    if every == 1:
      return SamState(inner, (), ())
    direction = jax.tree.map(jnp.zeros_like, tree_at_least_float32(params))
    return SamState(
      inner,
      jnp.zeros([], jnp.int32),
      PerGroup(direction) if axis is None else direction,
    )

  def value_and_grad(
    params: Any,
    state: SamState,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, Any]:
    (loss, aux), grads, inner = grad_fn.value_and_grad(
      params, state.inner, batch, model_state=model_state, key=key
    )
    # That of an `accumulate` inside is not of the gradient returned here.
    output = loss, aux._replace(second_moment=None)
    gradient = _mean(tree_at_least_float32(grads), axis)

    def sharp() -> Any:
      """The gradient at the worst point of the ball."""
      perturbed = jax.tree.map(
        lambda w, d: (
          at_least_float32(w) + jnp.asarray(radius, d.dtype) * d
        ).astype(w.dtype),
        params,
        unit(gradient),
      )
      _, sharp_grads, _ = grad_fn.value_and_grad(
        perturbed, state.inner, batch, model_state=model_state, key=key
      )
      return tree_at_least_float32(sharp_grads)

    def mixed(gradient: Any, sharp_gradient: Any) -> Any:
      def mix(like: jax.Array, g: jax.Array, s: jax.Array) -> jax.Array:
        a = jnp.asarray(penalty, g.dtype)
        return ((1 - a) * g + a * s).astype(like.dtype)

      return jax.tree.map(mix, grads, gradient, sharp_gradient)

    if every == 1:
      # Linear from here on, so the mean over devices can wait.
      new_grads = mixed(tree_at_least_float32(grads), sharp())
      return output, new_grads, SamState(inner, (), ())

    is_due = state.phase == 0
    # The mean over devices stands outside of the branches, so that no device
    # can wait for another in a branch that the other does not take.
    sharp_gradient = _mean(
      jax.lax.cond(
        is_due, sharp, lambda: jax.tree.map(jnp.zeros_like, gradient)
      ),
      axis,
    )
    old = state.direction.value if axis is None else state.direction
    direction = _where(is_due, _orthogonal(sharp_gradient, gradient), old)
    length = optax.tree.norm(gradient) * jnp.asarray(reuse_weight, jnp.float32)
    reused = optax.tree.add_scale(gradient, length, unit(direction))
    new_grads = mixed(gradient, _where(is_due, sharp_gradient, reused))
    new_state = SamState(
      inner,
      (state.phase + 1) % every,
      PerGroup(direction) if axis is None else direction,
    )
    return output, new_grads, new_state

  return GradientFunction(init, value_and_grad, grad_fn.staleness)


def _check_penalty(penalty: Any) -> None:
  number = concrete(penalty)
  if number is not None and not 0 <= number <= 1:
    raise ValueError(
      '`penalty` is the share of the second gradient, from 0 (none) to 1 '
      f'(SAM). Given penalty={penalty!r}. To add c times the norm of the '
      'gradient to the loss, write `penalty=c / radius`.'
    )


def _mean(tree: Any, axis: str | None) -> Any:
  """The mean over the devices of `axis`."""
  if axis is None:
    return tree
  try:
    return jax.lax.pmean(tree, axis)
  except NameError as error:
    raise ValueError(
      '`axis` names the axis of a mesh over which devices perturb together. '
      f'Given axis={axis!r} where there is none. Likely `data_parallel` is '
      'missing, or inside of `sam`: write `conadv.data_parallel(conadv.sam('
      f'grad_fn, radius, axis={axis!r}), mesh, axis={axis!r})`.'
    ) from error


def _where(condition: jax.Array, x: Any, y: Any) -> Any:
  return jax.tree.map(lambda a, b: jnp.where(condition, a, b), x, y)


def _orthogonal(x: Any, to: Any) -> Any:
  """What is left of `x` without its part along `to`."""
  direction = unit(to)
  return optax.tree.add_scale(x, -optax.tree.vdot(x, direction), direction)
