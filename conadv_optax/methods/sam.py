r"""Sharpness-aware minimization and its forms.

All take a second gradient at a point uphill. They differ in where that point is
(layer-wise, adaptive, sparse), how often it is taken (LookSAM), and how much of
it is used (the gradient-norm penalty, GSAM).

References:
  Foret et al., `Sharpness-Aware Minimization for Efficiently Improving
  Generalization <https://arxiv.org/abs/2010.01412>`_, 2021
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.calls import Around, Call, around, pytree
from conadv_optax.core.numeric import (
  add_scale,
  cast_like,
  check_choice,
  check_count,
  check_scalar,
  check_share,
  dot,
  inverse,
  norm,
  tree_at_least_float32,
  unit,
  zeros_like,
)
from conadv_optax.core.types import (
  GradientFunction,
  LossFn,
)
from conadv_optax.methods.perturbed_point import (
  Adaptive,
  Axis,
  Mask,
  first_pass,
  held,
  hold,
  mean_over,
  perturbed,
)
from conadv_optax.training.plain import as_gradient_function


class SamState(NamedTuple):
  """State of `sam`.

  Attributes:
    inner: the state of the gradient function inside.
    phase: int32 scalar, the steps since the last sharp gradient, or `()` with
      `every=1`.
    direction: the part of a sharp gradient that is kept, like the parameters
      and at least float32; a `PerGroup` of it without `axis`, and `()` with
      `every=1`.
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
  adaptive: Adaptive = None,
  mask: Mask | None = None,
  gap_weight: ArrayLike | None = None,
  axis: Axis = None,
) -> GradientFunction:
  r"""Sharpness-aware minimization: the gradient at the worst point nearby.

  With :math:`g = \nabla L(w)` and norms in float32 over the whole tree,

  .. math::

    g_s = \nabla L\left(w + \rho \frac{g}{\|g\|}\right), \qquad
    \hat g = (1 - a)\, g + a\, g_s

  takes the place of the gradient. :math:`a = 1` is SAM. A smaller :math:`a` is
  the penalty of the gradient norm, whose loss is
  :math:`L + a \rho \|\nabla L\|` to first order in :math:`\rho`.

  LookSAM, `every` = :math:`k > 1`, takes :math:`g_s` at each k-th step from the
  first on, and keeps the part of it that is orthogonal to the gradient. Each
  step in between costs one gradient, and uses

  .. math::

    g_v = g_s - \frac{\langle g_s, g \rangle}{\|g\|^2}\, g, \qquad
    g_s \approx g + \alpha \frac{\|g\|}{\|g_v\|}\, g_v

  Where :math:`g_s` is parallel to :math:`g` but for rounding, nothing is kept.
  Both gradients are of the same batch with the same key. Loss, aux, batch
  statistics and the state inside are those of the first, at :math:`w`, so
  statistics move once a step. A gradient of zero perturbs nothing, and
  :math:`\rho = 0` gives the gradient itself. The aux has no second moment from
  inside, as that is of other gradients: ask the `data_parallel` or `accumulate`
  outside for it.

  The second gradient may be taken at another point,
  :math:`w + \rho\, m \circ d`:

  .. math::

    d_l = \frac{\|w_l\|}{\sqrt{\sum_k \|w_k\|^2}} \frac{g_l}{\|g_l\|}
    \ \text{('layer')}, \qquad
    d = \frac{w^2 g}{\| |w| g \|}\ \text{('element')}

  'layer' moves each leaf in proportion to its own norm, as LARS does, and all
  of them together by :math:`\rho` (the sum is over leaves with a gradient).
  With `every` this is Look-LayerSAM, except for the length of the whole move,
  on which public code does not agree: set another by `radius`, which may be
  traced. 'element' is adaptive SAM, without the constant that its authors add
  to :math:`|w|`. In both, weights of zero stay. Sparse SAM has a mask
  :math:`m`, 1 where a parameter moves; the norm is that of the whole gradient.
  A mask makes dense code no faster. `sparse_sam` finds a mask while training.

  GSAM subtracts the part of the gradient that is orthogonal to the second one:

  .. math::

    g_s - \alpha_g \left(
      g - \frac{\langle g, g_s \rangle}{\|g_s\|^2}\, g_s \right)

  Keep parameters in float32. In bfloat16 neighbouring numbers are 0.4 to 0.8 %
  apart, and a move of less than half of that is lost. Of ten million weights of
  deviation 0.02 at a radius of 0.05 only 18 % move, and all together 0.43 times
  as far as they should. The model may still compute in bfloat16: weights that
  it rounds move by a whole step or not at all, and together 1.00 times as far.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    radius: :math:`\rho`, how far the second gradient is taken. For a schedule
      call `sam` where the step is compiled, with `radius=schedule(count)`.
    every: :math:`k`, the steps from one second gradient to the next, static.
    reuse_weight: :math:`\alpha`, how long the reused part is beside the
      gradient, whatever its own length was. The paper has 0.7. Where
      :math:`\|g_v\|` is a tenth of :math:`\|g\|`, say, this can keep a model
      from training at all, and 0.1 is a better start.
    penalty: :math:`a`, from 0 to 1, the share of the second gradient.
    adaptive: 'layer', 'element', or None.
    mask: :math:`m`, a tree of bools, or of arrays of bools, like the parameters
      (a prefix will do), or a function of the parameters that returns one.
      `conadv.exclude_norm_and_bias` fits. None perturbs all.
    gap_weight: :math:`\alpha_g` of GSAM. None subtracts nothing.
    axis: the axis of the mesh whose devices perturb together, by the mean of
      their gradients, inside `data_parallel` over that axis alone. The gradient
      is sent once more for this (twice with `every > 1` or `gap_weight`). None:
      each device, and each micro-batch of an `accumulate` outside, perturbs by
      its own gradient. With `axis`, put `accumulate` inside: its micro-batches
      perturb together.

  Returns:
    A `GradientFunction` with the staleness of `grad_fn`, whose gradients have
    the structure and dtypes of the parameters.

  Raises:
    TypeError: for a `grad_fn` that is no function, an `every` that is no int, a
      number that is a schedule or no scalar, a mask that is not made of bools,
      or a state of another gradient function.
    ValueError: for a negative radius or weight, an `every` below 1, a penalty
      outside of 0 to 1, an unknown `adaptive`, an array in the mask of another
      shape than its parameter, or an axis that is not there.

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

    Kwon et al., `ASAM: Adaptive Sharpness-Aware Minimization for
    Scale-Invariant Learning of Deep Neural Networks
    <https://arxiv.org/abs/2102.11600>`_, 2021

    Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified
    Perturbation Approach <https://arxiv.org/abs/2210.05177>`_, 2022

    Zhuang et al., `Surrogate Gap Minimization Improves Sharpness-Aware Training
    <https://arxiv.org/abs/2203.08065>`_, 2022
  """
  grad_fn = as_gradient_function(grad_fn)
  check_scalar('radius', radius)
  check_scalar('reuse_weight', reuse_weight)
  check_count('every', every)
  check_share(
    'penalty',
    penalty,
    'the share of the second gradient (to add c times the norm of the gradient '
    'to the loss, write `penalty=c / radius`)',
  )
  if adaptive is not None:
    check_choice('adaptive', adaptive, ('layer', 'element'))
  if gap_weight is not None:
    check_scalar('gap_weight', gap_weight)
  made = _Sam(
    grad_fn,
    radius,
    reuse_weight,
    penalty,
    mask,
    gap_weight,
    adaptive,
    every,
    axis,
  )
  return around(made)


@pytree('grad_fn', 'radius', 'reuse_weight', 'penalty', 'mask', 'gap_weight')
class _Sam(Around):
  radius: ArrayLike
  reuse_weight: ArrayLike
  penalty: ArrayLike
  mask: Mask | None
  gap_weight: ArrayLike | None
  adaptive: Adaptive
  every: int
  axis: Axis
  state_kind = SamState

  def init(self, call: Call) -> SamState:
    inner = call.init(self.grad_fn)
    if self.every == 1:
      return SamState(inner, (), ())
    direction = zeros_like(tree_at_least_float32(call.params))
    return SamState(inner, jnp.zeros([], jnp.int32), hold(self.axis, direction))

  def value_and_grad(self, call: Call) -> tuple[Any, Any, SamState]:
    state, call = call.state, call._replace(state=call.state.inner)
    output, grads, gradient, inner = first_pass(
      self.grad_fn, call, self.axis, 'sam'
    )

    # Of the point: gradients of a group's share are float32 whatever it is.
    rounding = _rounding(call.params)

    def sharp() -> Any:
      """The gradient at the point uphill."""
      point = perturbed(
        call.params,
        gradient,
        self.radius,
        adaptive=self.adaptive,
        mask=self.mask,
      )
      there = call._replace(params=point)
      return tree_at_least_float32(there.value_and_grad(self.grad_fn)[1])

    if self.every == 1:
      if self.gap_weight is None:
        # Linear from here on, so the mean over devices can wait.
        mixed = self._mix(tree_at_least_float32(grads), sharp(), rounding)
      else:
        mixed = self._mix(gradient, self._mean(sharp()), rounding)
        mixed = self._own(self.share(state, call), grads, gradient, mixed)
      return output, cast_like(mixed, grads), SamState(inner, (), ())

    is_due = state.phase == 0
    # The mean over devices stands outside of the branches, so that no device
    # can wait for another in a branch that the other does not take.
    sharp_gradient = self._mean(
      jax.lax.cond(is_due, sharp, lambda: zeros_like(gradient))
    )
    old = held(self.axis, state.direction)
    beside = _orthogonal(sharp_gradient, gradient, rounding)
    direction = optax.tree.where(is_due, beside, old)
    length = norm(gradient)
    length *= jnp.asarray(self.reuse_weight, length.dtype)
    reused = add_scale(gradient, length, unit(direction))
    there = optax.tree.where(is_due, sharp_gradient, reused)
    mixed = self._mix(gradient, there, rounding)
    mixed = self._own(self.share(state, call), grads, gradient, mixed)
    phase = (state.phase + 1) % self.every
    new_state = SamState(inner, phase, hold(self.axis, direction))
    return output, cast_like(mixed, grads), new_state

  def _mix(self, gradient: Any, sharp_gradient: Any, rounding: float) -> Any:
    if self.gap_weight is not None:
      beside = _orthogonal(gradient, sharp_gradient, rounding)
      sharp_gradient = add_scale(
        sharp_gradient, -jnp.asarray(self.gap_weight), beside
      )

    def mix(g: jax.Array, s: jax.Array) -> jax.Array:
      a = jnp.asarray(self.penalty, g.dtype)
      return (1 - a) * g + a * s

    return jax.tree.map(mix, gradient, sharp_gradient)

  def _own(self, share: Any, grads: Any, mean: Any, mixed: Any) -> Any:
    """A device's part of the mean `mixed`.

    As far from it as the device's gradient is from the mean of all, so that
    devices still differ where that is measured.
    """
    if self.axis is None:
      return mixed
    shift = optax.tree.sub(mixed, mean)
    # Of these devices, which may be a part of those of the mean.
    share *= inverse(self._mean(share))
    return add_scale(tree_at_least_float32(grads), share, shift)

  def _mean(self, tree: Any) -> Any:
    return mean_over(self.axis, tree, 'sam')


def _rounding(params: Any) -> float:
  """The part of a gradient that rounding may turn, with room to spare."""
  dtypes = [jnp.result_type(x) for x in jax.tree.leaves(params)]
  coarsest = max((float(jnp.finfo(x).eps) for x in dtypes), default=0.0)
  return coarsest + 64 * float(jnp.finfo(jnp.float32).eps)


def _orthogonal(x: Any, to: Any, rounding: float) -> Any:
  """What is left of `x` without its part along `to`, if more than rounding.

  Nothing of what is not finite.
  """
  direction = unit(to)
  rest = add_scale(x, -dot(x, direction), direction)
  is_more = norm(rest) > rounding * norm(x)
  return jax.tree.map(lambda r: jnp.where(is_more, r, jnp.zeros_like(r)), rest)
