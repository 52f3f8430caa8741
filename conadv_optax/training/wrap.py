r"""Concurrent Adversarial Learning (ConAdv).

Step :math:`t` trains on the clean batch :math:`B_t` and on its adversarial
copy, which was crafted :math:`\tau` steps ago, and crafts the copy of
:math:`B_{t+\tau}`. Both read only :math:`\theta_t`, so neither waits.

References:
  Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
  <https://arxiv.org/abs/2106.00221>`_, 2022
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jax.typing import ArrayLike

from conadv_optax.attacks.pgd import pgd
from conadv_optax.core.calls import Call, gradient_function, pytree
from conadv_optax.core.numeric import (
  check_count,
  check_no_schedule,
  concrete,
  describe,
)
from conadv_optax.core.paths import LeafSpec, form_of
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import (
  Attack,
  Batch,
  Denominators,
  GradientFunction,
  LossFn,
  Passes,
  Queue,
)
from conadv_optax.training.craft import check_attack, check_fraction
from conadv_optax.training.loss import Loss
from conadv_optax.training.queue import Ring, Turn
from conadv_optax.training.reuse import ReusedStep, check_reuse
from conadv_optax.training.steps import Step

# 9 of 255 levels on a scale from -1 to 1, taken as units of normalised inputs:
# the radius of the largest published run.
_EPSILON = 9 * 2 / 255


def wrap(
  loss_fn: LossFn,
  staleness: int = 1,
  *,
  attack: Attack | None = None,
  inputs: LeafSpec = 'image',
  weights: Mapping[str, ArrayLike] | None = None,
  extra_branches: Mapping[str, LeafSpec] | None = None,
  adversarial_fraction: float = 1.0,
  every: int = 1,
  reuse_gradient: bool = False,
  denominator: Callable[[Batch], ArrayLike] | None = None,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
  has_branch: bool = False,
) -> GradientFunction:
  r"""The gradient of clean and adversarial loss together, without the wait.

  .. math::

    g_t = \nabla_\theta \left[
      w_m L(\theta_t; B_t) + w_a L(\theta_t; \hat B_t(\theta_{t-\tau}))
    \right]

  where :math:`\hat B_t(\theta_{t-\tau})` was crafted at call :math:`t - \tau`
  with the parameters of that call. Each call passes the **newest** batch:
  after `first_batches` = :math:`B_0 \ldots B_{\tau-1}`, call :math:`t` passes
  :math:`B_{t+\tau}`, trains on :math:`B_t`, and crafts the copy of
  :math:`B_{t+\tau}`.

  If parameters and model state are `dual_bn.Branched`, each branch uses its own
  norm layers. The attack uses those of the adversarial branch, in training
  mode, and the statistics that it computes are thrown away. A plain model state
  is shared. The main branch's update of it is kept or, if that branch has
  weight 0, the update of the first branch with a weight above 0.

  With `reuse_gradient`, call :math:`t` trains on the newest clean batch and on
  the adversarial copy of the batch :math:`\tau` calls back. The input gradient
  of the clean pass makes the next copy, so there is no attack pass. This
  differs from the paper in two ways. The clean and the adversarial examples of
  a step come from different batches, and the attack uses the main branch's norm
  layers. The clean halves of `first_batches` are not trained on.

  Special cases: `staleness=0` is AdvProp; weights 1 for 'main' and 0 for
  'adversarial' give the plain step; `epsilon=0` with a shared norm gives the
  plain step with every example counted twice.

  Args:
    loss_fn: `loss_fn(params, batch)` returns the mean loss, a floating scalar.
      With `has_state`, `loss_fn(params, model_state, batch)` returns
      `(loss, model_state)`; `has_aux`, `has_key` and `has_branch` change it as
      below. It sees the ordinary trees of one branch.
    staleness: :math:`\tau`, how many steps old the parameters of an attack
      are. With 0 a step attacks its own batch, then trains on it; give the
      attack `random_targets`, or it leaks the labels through batch statistics.
    attack: how the inputs are perturbed, in their units. None is `pgd` with one
      step of the largest published run's radius, 18/255 in units of inputs
      normalised to mean 0 and standard deviation 1 (with a random start unless
      `reuse_gradient`).
    inputs: the leaf of the batch to perturb, a floating array with a leading
      batch axis: a key, a tuple of keys, or a `(get, set)` pair of functions
      `get(batch)`, `set(batch, value)`. `()` is the batch itself. `get` may
      convert the leaf, such as uint8 pixels to floats. Clean batches then wait
      as they are, so `loss_fn` must take the leaf both as it is and as `get`
      returns it. A list or dict of these perturbs several leaves at once:
      `['left', 'right']`.
    weights: the weight of each branch's loss, by name, floats or scalar arrays,
      finite and not negative. None: equal weights that sum to 1. Algorithm 1 of
      the paper is the plain sum, `{'main': 1., 'adversarial': 1.}`. A branch of
      weight 0 adds nothing, not even a NaN.
    extra_branches: further clean views, each a branch with its own norm layers.
      `{'augmented': 'image_augmented'}` names the leaf that takes the place of
      `inputs`; for several leaves, give a list or dict like that of `inputs`.
    adversarial_fraction: the share :math:`p` of each batch to attack: its
      first :math:`\lfloor p B \rfloor` examples, at least one. The adversarial
      loss is the mean over these examples. If `jit` spreads a batch over
      devices, they lie on the first devices; `data_parallel` takes a part of
      each device's share.
    every: of so many batches one has an adversarial copy: the first, and each
      k-th after it. The other batches pay for a plain step, in which the main
      branch has the weight of the adversarial one too. In such a step the loss
      and floating aux of 'adversarial' are NaN, and its model state stays. Not
      for convolutions on a CPU, which XLA makes slow inside a conditional.
    reuse_gradient: take the attack's gradient from the training pass. In
      float16, scale the loss as for training, or the gradient underflows.
    denominator: what the loss is a mean of, if not of the examples.
      `denominator(batch)` is the scalar that the loss of the batch was divided
      by, such as `lambda batch: batch['mask'].sum()`. Groups of examples
      (`data_parallel`, `accumulate`, `concurrent`) are then weighted by it, and
      the result is that of the whole batch at once. A group whose denominator
      is 0 adds nothing, not even a NaN. But if a loss talks to other devices,
      let it divide by `jnp.maximum(n, 1)`, or they get its NaN.
    has_state: whether `loss_fn` takes and returns a model state.
    has_aux: whether `loss_fn` returns `(loss, aux)`, or
      `(loss, (model_state, aux))`.
    has_key: whether `loss_fn` also takes `key=`, as for dropout.
    has_branch: whether `loss_fn` also takes `branch=`, what it is called for:
      'main', 'adversarial', the name of an extra branch, or 'attack' for the
      loss that the attack climbs (with `reuse_gradient` that is 'main', and
      'attack' in `init` alone). The attack can then do without label smoothing
      or the scale of a float16 loss (it has one of its own), use statistics in
      evaluation mode, or climb another loss than training.
      For 'attack' `loss_fn` may return the losses of the examples, (batch,),
      instead of their mean.

  Returns:
    A `GradientFunction`. Its loss is the weighted sum of the branches' losses
    and, like all losses here, at least float32. Gradients have the structure
    and dtypes of the parameters. The state has the same shapes and dtypes at
    every call.

  Raises:
    TypeError: for a staleness or an `every` that is not an int, a weight that
      is a function, integer inputs, an attack that is no `Attack` or returns
      another shape or dtype, a `loss_fn` that returns something else than it
      should, a denominator that is no scalar, an NNX module for parameters, a
      leaf of a batch that is no array, or a state of another gradient function.
    ValueError: for a negative staleness, an `every` below 1, weights that do
      not match the branches or are not finite numbers of 0 or more, first
      batches of the wrong number or shape, a later batch of another shape, a
      state of another staleness, a fraction outside (0, 1], extra branches that
      do not fit, a missing key, a model state that is missing, not asked for or
      not split as the parameters are, or a combination that `reuse_gradient`
      does not allow.
    KeyError: when the batch lacks the leaf `inputs`, or a `Branched` tree lacks
      a branch.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> def loss_fn(w, batch):
    ...   return jnp.mean((batch['x'] @ w - batch['y']) ** 2)
    >>> grad_fn = conadv.wrap(
    ...     loss_fn, staleness=1, attack=conadv.fgsm(0.1), inputs='x')
    >>> w = jnp.array([1.])
    >>> first, second = [{'x': jnp.full((4, 1), x), 'y': jnp.zeros(4)}
    ...                  for x in (2., 3.)]
    >>> state = grad_fn.init(w, [first])
    >>> (loss, aux), grads, state = grad_fn.value_and_grad(w, state, second)
    >>> # Trains on x = 2 and on its copy, 0.1 further from the target 0.
    >>> chex.assert_trees_all_close(
    ...     aux.losses, {'main': 2. ** 2, 'adversarial': 2.1 ** 2}, rtol=1e-5)
    >>> chex.assert_trees_all_close(loss, (2. ** 2 + 2.1 ** 2) / 2, rtol=1e-5)

  References:
    Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
    <https://arxiv.org/abs/2106.00221>`_, 2022
  """
  _check_staleness(staleness)
  check_fraction(adversarial_fraction)
  check_count('every', every)
  if attack is None:
    attack = pgd(_EPSILON, random_start=not reuse_gradient)
  check_attack(attack)
  extra = dict(extra_branches or {})
  branches = ('main', 'adversarial', *extra)
  _check_branches(branches, weights)
  _check_views(inputs, extra)
  if weights is None:
    weights = dict.fromkeys(branches, 1 / len(branches))
  fields = (
    attack,
    dict(weights),
    Loss(loss_fn, has_state, has_aux, has_key, has_branch, denominator),
    _leaf(inputs, argument='inputs'),
    {
      name: _leaf(spec, argument=f'extra_branches[{name!r}]')
      for name, spec in extra.items()
    },
    adversarial_fraction,
  )
  if reuse_gradient:
    check_reuse(attack, staleness, every)
  step = (ReusedStep if reuse_gradient else ConAdvStep)(*fields)
  return gradient_function(
    Ring(step, staleness, every),
    staleness,
    has_denominators=denominator is not None,
    passes=step.passes() if every == 1 else None,
  )


@pytree('attack', 'weights')
class ConAdvStep(Step):
  """Trains on the batch that has waited, and attacks the newest."""

  def enter(self, call: Call, batch: Batch, key: Any, attacks: Any) -> Queue:
    """The entry of a batch; without an attack its copy is the batch itself."""
    craft = functools.partial(self.craft, call, batch, key)
    if attacks is None:
      return Queue(batch, craft())
    copy = jax.lax.cond(attacks, craft, lambda: self.clean(batch))
    return Queue(batch, copy)

  def like(self, newest: Batch) -> Batch:
    """The batch of the entry of `newest`, in its shapes and dtypes."""
    return newest

  def run(
    self, call: Call, oldest: Any, turn: Turn
  ) -> tuple[tuple[Any, Any], Queue]:
    """`((loss, aux), grads), entry`: a step, and the entry of the newest."""
    attack_key = self.keys(call.key)[0]
    entry = self.enter(call, call.batch, attack_key, turn.attacks)
    # With staleness 0 nothing waits, and the newest is trained on.
    waiting = oldest or entry
    output = self._train(call, waiting, entry.adversarial, turn.trains)
    return output, entry

  def denominators(
    self, oldest: Any, newest: Batch, turn: Turn
  ) -> Denominators:
    """What the losses of a step are divided by."""
    clean = oldest.batch if oldest else newest
    return self.divisors(clean, self.part(clean), turn.trains)

  def _train(
    self, call: Call, waiting: Queue, after: Any = None, trains: Any = None
  ) -> Any:
    attacked = self.leaf.set(self.part(waiting.batch), waiting.adversarial)
    return self.train(
      call, waiting.batch, attacked, after=after, trains=trains
    )[0]

  def passes(self) -> Passes:
    """Craft and train apart, for callers who have checked nothing."""
    kind = type(self)
    alone = kind.craft_alone, kind.train_alone, kind.clean
    return Passes(*(Partial(method, self) for method in alone))

  def craft_alone(
    self, params: Any, model_state: Any, batch: Batch, key: Any
  ) -> Any:
    """The adversarial inputs of a batch."""
    call = Call(params, None, batch, model_state, key)
    self.check(call, [batch])
    return self.craft(call, batch, self.keys(key)[0])

  def train_alone(
    self, params: Any, model_state: Any, waiting: Queue, key: Any, *rest: Any
  ) -> Any:
    """`(loss, aux), grads` on an entry of the ring."""
    call = Call(params, None, waiting.batch, model_state, key, *rest)
    self.check(call, [waiting.batch])
    return self._train(call, waiting)

  def clean(self, batch: Batch) -> Any:
    """The inputs that are attacked."""
    return self.leaf.get(self.part(batch))


def _check_staleness(staleness: Any) -> None:
  """`staleness` counts steps."""
  if isinstance(staleness, bool) or not isinstance(staleness, int):
    raise TypeError(
      '`staleness` is a number of steps, a Python int, because the length of '
      f'the queue depends on it. Given staleness={staleness!r} of type '
      f'{type(staleness).__name__}. Write `staleness=1`; mark it static under '
      '`jax.jit`.'
    )
  if staleness < 0:
    raise ValueError(
      '`staleness` is how many steps old the parameters of an attack are, 0 or '
      f'more. Given staleness={staleness}.'
    )


def _check_views(inputs: LeafSpec, extra: Mapping[str, LeafSpec]) -> None:
  """Each view has as many leaves as the inputs whose place it takes."""
  for name, spec in extra.items():
    if form_of(spec) != form_of(inputs):
      raise ValueError(
        'A view of an extra branch takes the place of `inputs`, so it names as '
        f'many leaves, in a container like theirs. Given inputs={inputs!r} and '
        f"extra_branches={{{name!r}: {spec!r}}}. Write `inputs=['left', "
        "'right'], extra_branches={'augmented': ['left_2', 'right_2']}`."
      )


def _check_branches(branches: Sequence[str], weights: Any) -> None:
  """Different names, and a number for each of them and for no other."""
  if len(set(branches)) != len(branches):
    raise ValueError(
      "The names 'main' and 'adversarial' are taken: `extra_branches` needs "
      f'others. Given {list(branches[2:])}.'
    )
  right = dict.fromkeys(branches, round(1 / len(branches), 3))
  if weights is not None and set(weights) != set(branches):
    raise ValueError(
      '`weights` needs one entry for each branch. Given '
      f'weights for {sorted(weights)}, but the branches are '
      f'{sorted(branches)}. Write `weights={right}`.'
    )
  for name, weight in (weights or {}).items():
    check_no_schedule(f'weights[{name!r}]', weight)
    number = concrete(weight)
    is_scalar = jnp.shape(weight) == ()
    if not is_scalar or (number is not None and not 0 <= number < jnp.inf):
      given = describe(weight) if number is None else number.tolist()
      raise ValueError(
        'A weight of a branch is one finite number, not negative. Given '
        f'weights[{name!r}]={given}. Write `weights={right}`; weights of '
        'examples belong in `loss_fn`.'
      )
