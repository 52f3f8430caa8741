r"""Attacks: how the inputs are perturbed.

An attack climbs the loss inside a ball around the clean input,

  \hat x \leftarrow \Pi\left(\hat x + \alpha\, d(\nabla_x L(\hat x))\right),

with :math:`d` the sign (L-infinity) or the unit vector (L2) of the gradient
and :math:`\Pi` the projection to the ball and to the bounds of the input.
All of it is computed in float32 whatever the dtype of the input.

References:
  Madry et al., `Towards Deep Learning Models Resistant to Adversarial Attacks
  <https://arxiv.org/abs/1706.06083>`_, 2018
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jax.typing import ArrayLike

from conadv_optax.attacks.balls import BALLS, Norm, Region
from conadv_optax.attacks.targets import Targets
from conadv_optax.core.calls import pytree
from conadv_optax.core.numeric import (
  at_least_float32,
  check_choice,
  check_count,
  check_no_schedule,
  check_not_negative,
  check_share,
  concrete,
  describe,
)
from conadv_optax.core.types import Attack


def pgd(
  epsilon: ArrayLike,
  *,
  step_size: ArrayLike | None = None,
  steps: int = 1,
  norm: Norm = 'linf',
  batch_axes: int = 1,
  random_start: bool = True,
  start_from_clean: ArrayLike = 0.0,
  restarts: int = 1,
  bounds: tuple[ArrayLike, ArrayLike] | None = None,
  targets: Targets | None = None,
) -> Attack:
  r"""Projected gradient descent on the negative loss.

  .. math::

    \hat x_0 = \Pi(x + u), \qquad
    \hat x_{i+1} = \Pi\left(\hat x_i + \alpha\, d(\nabla_x L(\hat x_i))\right)

  where :math:`u` is uniform in the ball (0 without a random start),
  :math:`d(g)` is :math:`\mathrm{sign}(g)` for 'linf' and :math:`g / \|g\|_2` of
  each example for 'l2', and :math:`\Pi` projects to the ball of radius
  `epsilon` around :math:`x`, then to `bounds`. In 'l2' Foolbox and torchattacks
  do the same; ART and CleverHans take the bounds first. With `targets` the step
  descends towards the target instead of climbing away from the label. An
  example whose gradient is zero, or holds a NaN, takes no step. If entries of a
  gradient are infinite, a step in 'l2' goes along these alone, equally far
  along each.

  If `inputs` are several leaves, an example spans all of them, as if they were
  concatenated: one ball, one norm.

  When a step attacks the batch that it trains on, an untargeted one-step attack
  leaks the label through batch statistics (Mei et al., Fast AdvProp);
  `random_targets` avoids this.

  Args:
    epsilon: radius of the ball, in the units of the input. A float, or an array
      that broadcasts to the input, such as one value per channel. An array with
      'l2' scales the axes of the ball: :math:`\|(\hat x - x)/\epsilon\|_2 \le
      1`. May be traced: for a schedule, build
      `conadv.wrap(loss_fn, attack=conadv.pgd(schedule(count)))` inside the
      jitted step, which compiles once. For several leaves a list or dict like
      `inputs` gives each its own.
    step_size: the step :math:`\alpha`, like `epsilon`. None: `epsilon` for one
      step, `2.5 * epsilon / steps` for more.
    steps: number of steps, at least 1.
    norm: 'linf' or 'l2'.
    batch_axes: how many leading axes of the inputs have an L2 ball at each
      place: 1 for a ball at each example, 2 for a ball at each token of
      embeddings (batch, tokens, features). What is said of an example holds for
      each ball.
    random_start: start at a uniform point of the ball.
    start_from_clean: with a random start, the probability of starting at the
      clean input instead. Each start draws once for the whole batch.
    restarts: the number of random starts. Each example keeps the end where its
      loss is highest (with `targets`, lowest). Each start takes one more
      forward pass, and needs the loss of each example: with `has_branch`, let
      `loss_fn` return an array (batch,) for the branch 'attack' instead of the
      mean. With batch statistics the losses are those among the ends of one
      start.
    bounds: `(low, high)` of a valid input, each like `epsilon`; the result
      never leaves them, even where the clean input is outside by more than the
      radius. In a short dtype they are rounded inwards.
    targets: `targets(key, batch)` returns the batch with target labels.

  Returns:
    An `Attack`. Its result has the shape and dtype of the input, which must be
    floating. In a short dtype the result is rounded towards the clean input, so
    that it stays in the ball; an `epsilon` below the resolution vanishes.

  Raises:
    TypeError: for a function, such as a schedule, in place of a number, `steps`
      or `bounds` of another type, or `restarts` with a loss that is a mean.
    ValueError: for a negative radius or step, `bounds` that are no pair or have
      low above high, fewer than one step, an unknown norm, a probability
      outside [0, 1], several restarts without a random start, an array that
      does not broadcast to the input, or a tree that is not like the inputs.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> attack = conadv.pgd(0.1, steps=3, bounds=(0., 1.))
    >>> x = jnp.array([[0.5, 0.95]])
    >>> climb = jax.grad(lambda x: jnp.sum(x ** 2))
    >>> chex.assert_trees_all_close(
    ...     attack.craft(jax.random.key(0), climb, x), jnp.array([[0.6, 1.]]))

  References:
    Madry et al., `Towards Deep Learning Models Resistant to Adversarial
    Attacks <https://arxiv.org/abs/1706.06083>`_, 2018
  """
  check_choice('norm', norm, tuple(BALLS))
  check_count('steps', steps)
  check_count('batch_axes', batch_axes)
  check_count('restarts', restarts)
  check_not_negative('epsilon', epsilon)
  if step_size is None:
    factor = 1.0 if steps == 1 else 2.5 / steps
    step_size = jax.tree.map(lambda radius: factor * radius, epsilon)
  check_not_negative('step_size', step_size)
  check_share('start_from_clean', start_from_clean, 'a probability')
  if restarts > 1 and not random_start:
    raise ValueError(
      'Restarts begin at random points of the ball; from one point all end '
      f'alike. Given restarts={restarts}, random_start=False. Leave out '
      '`random_start`, or `restarts`.'
    )
  low, high = (-jnp.inf, jnp.inf) if bounds is None else _unpack(bounds)
  sign = 1.0 if targets is None else -1.0
  size = jax.tree.map(lambda size: sign * size, step_size)
  chance = start_from_clean if random_start else None
  climb = _Climb(
    epsilon, size, steps, norm, batch_axes, chance, restarts, sign, low, high
  )
  one_gradient = steps == 1 and restarts == 1
  from_clean = one_gradient and not random_start and targets is None
  return Attack(
    craft=Partial(_Climb.craft if restarts == 1 else _Climb.worst, climb),
    prepare=targets,
    reuse=Partial(_Climb.reuse, climb) if from_clean else None,
    draws=random_start or targets is not None,
    one_step=Partial(_Climb.one_step, climb) if one_gradient else None,
    needs_losses=restarts > 1,
  )


@pytree('epsilon', 'step_size', 'chance', 'low', 'high')
class _Climb:
  """What `pgd` was given, and the functions of its `Attack`."""

  epsilon: Any
  step_size: Any
  steps: int
  norm: Norm
  batch_axes: int
  chance: ArrayLike | None
  restarts: int
  sign: float
  low: Any
  high: Any

  def around(self, inputs: Any) -> Region:
    clean = _measurable(inputs, self.batch_axes)
    numbers = {
      'epsilon': self.epsilon,
      'step_size': self.step_size,
      'bounds[0]': self.low,
      'bounds[1]': self.high,
    }
    of_leaves = {
      name: _of_leaves(name, value, clean) for name, value in numbers.items()
    }
    _check_ordered(of_leaves['bounds[0]'], of_leaves['bounds[1]'])
    of_each = (
      jax.tree.map(functools.partial(_broadcast, name), clean, value)
      for name, value in of_leaves.items()
    )
    return Region(BALLS[self.norm], self.batch_axes, clean, *of_each)

  def start(self, key: jax.Array | None, region: Region) -> Any:
    if self.chance is None:
      return region.clean
    assert key is not None  # `wrap` and its siblings have seen to it.
    coin_key, noise_key = jax.random.split(key)
    chance = jnp.asarray(self.chance, float)
    from_clean = jax.random.bernoulli(coin_key, chance)
    noise = region.draw(noise_key)
    return region.project(
      jax.tree.map(
        lambda x, u: x + jnp.where(from_clean, 0.0, u), region.clean, noise
      )
    )

  def one_step(
    self, key: jax.Array | None, inputs: Any
  ) -> tuple[Any, Callable[[Any], Any]]:
    region = self.around(inputs)
    begin = self.start(key, region)
    return begin, lambda gradient: region.rounded(
      region.step(begin, gradient), inputs
    )

  def craft(
    self,
    key: jax.Array | None,
    gradient_fn: Callable[[Any], Any],
    inputs: Any,
  ) -> Any:
    # Not a loop of one: XLA unrolls that after it has chosen how to run the
    # convolutions, and the whole ConAdv step took 1.4 times as long on a CPU.
    if self.steps == 1:
      begin, finish = self.one_step(key, inputs)
      return finish(gradient_fn(begin))
    region = self.around(inputs)

    def advance(_: Any, x: Any) -> Any:
      return region.step(x, gradient_fn(x))

    x = jax.lax.fori_loop(0, self.steps, advance, self.start(key, region))
    return region.rounded(x, inputs)

  def worst(
    self,
    key: jax.Array | None,
    gradient_fn: Callable[[Any], Any],
    inputs: Any,
    losses_fn: Callable[[Any], jax.Array],
  ) -> Any:
    assert key is not None  # `wrap` and its siblings have seen to it.
    keys = jax.random.split(key, self.restarts)

    def climbed(i: ArrayLike) -> tuple[Any, jax.Array]:
      x = self.craft(keys[i], gradient_fn, inputs)
      return x, self.sign * losses_fn(x)

    def better(new: tuple[Any, jax.Array], best: Any) -> Any:
      # Where a loss is NaN it is higher than nothing.
      is_higher = new[1] > best[1]
      return jax.tree.map(
        lambda new, old: jnp.where(
          jnp.expand_dims(is_higher, range(1, new.ndim)), new, old
        ),
        new,
        best,
      )

    first = climbed(0)
    lowest = jnp.where(False, first[1], -jnp.inf)
    return jax.lax.fori_loop(
      1,
      self.restarts,
      lambda i, best: better(climbed(i), best),
      better(first, (inputs, lowest)),
    )[0]

  def reuse(self, gradient: Any, inputs: Any) -> Any:
    return self.one_step(None, inputs)[1](gradient)


def _unpack(bounds: tuple[Any, Any]) -> tuple[Any, Any]:
  check_no_schedule('bounds', bounds)
  if isinstance(bounds, dict):
    raise TypeError(
      '`bounds` is a pair, (low, high), also for several leaves. Given a dict. '
      "Write `bounds=({'left': 0., 'right': 0.}, {'left': 1., 'right': 2.})`."
    )
  try:
    low, high = bounds
  except (TypeError, ValueError) as error:
    raise type(error)(
      f'`bounds` is a pair, (low, high). Given {describe(bounds)}. Write '
      '`bounds=(0., 1.)`; each may be an array, one value a channel say.'
    ) from error
  for bound in jax.tree.leaves(bounds):
    check_no_schedule('bounds', bound)
  if jax.tree_util.all_leaves([low, high]):
    _check_ordered(low, high)
  return low, high


def _check_ordered(low: Any, high: Any) -> None:
  """Low is nowhere above high, and in some leaf there is room between them."""
  leaves = zip(jax.tree.leaves(low), jax.tree.leaves(high), strict=True)
  pairs = [(concrete(low), concrete(high)) for low, high in leaves]
  is_fixed = []
  for least, most in pairs:
    if least is None or most is None:
      return
    given = f'bounds=({least.tolist()}, {most.tolist()})'
    if not np.all(least <= most):
      raise ValueError(
        '`bounds` is (low, high), with low nowhere above high. Given '
        f'{given}. Likely they are swapped: `bounds=(0., 1.)`.'
      )
    is_fixed.append(np.all(least == most))
  if all(is_fixed):
    raise ValueError(
      f'`bounds` leave no room between low and high. Given {given}. Likely a '
      'pair for each leaf: write all that is low first, `bounds=([0., 0.], '
      '[1., 1.])`.'
    )


def _measurable(inputs: Any, batch_axes: int) -> Any:
  """Every leaf in the widest dtype of them, at least float32."""
  leaves = [at_least_float32(x) for x in jax.tree.leaves(inputs)]
  widest = max((x.dtype for x in leaves), key=lambda dtype: dtype.itemsize)
  of_balls = {x.shape[:batch_axes] for x in leaves}
  if len(of_balls) > 1 or len(*of_balls) < batch_axes:
    given = ', '.join(map(describe, leaves))
    raise ValueError(
      'A ball has a place along the first `batch_axes` axes, which are those '
      f'of all leaves. Given batch_axes={batch_axes} for inputs of {given}. '
      'Write `batch_axes=1`, a ball for each example, whose axis comes first.'
    )
  return jax.tree.map(lambda x: x.astype(widest), inputs)


def _of_leaves(name: str, value: Any, inputs: Any) -> Any:
  """`value` for each leaf of the inputs, one for all or a tree like them."""
  if jax.tree_util.all_leaves([inputs]):
    return value if jax.tree_util.all_leaves([value]) else jnp.asarray(value)
  try:
    return jax.tree.broadcast(value, inputs)
  except ValueError as error:
    raise ValueError(
      f'`{name}` is one number or array for all leaves of `inputs`, or one for '
      f'each in a container like theirs. Given {value!r:.80} for inputs of '
      f'{jax.tree.map(describe, inputs)}. Likely an entry is missing, or it is '
      'a tuple in place of a list.'
    ) from error


def _broadcast(name: str, inputs: jax.Array, value: Any) -> jax.Array:
  """`value` with the axes of the input, of size 1 where it is the same."""
  value = jnp.asarray(value, inputs.dtype)
  try:
    jax.eval_shape(lambda x: jnp.broadcast_to(x, inputs.shape), value)
  except ValueError as error:
    raise ValueError(
      f'`{name}` must broadcast to the input. Given {describe(value)} for an '
      f'input of {describe(inputs)}. One value a channel has the shape '
      f'({inputs.shape[-1] if inputs.ndim else ""},), channels last.'
    ) from error
  return jnp.expand_dims(value, range(inputs.ndim - value.ndim))
