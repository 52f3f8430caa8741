r"""Fast AdvProp: adversarial examples at the price of a fifth of the batch.

References:
  Mei et al., `Fast AdvProp <https://arxiv.org/abs/2204.09838>`_, 2022
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax import dual_bn
from conadv_optax.core.batches import first_part, rest_of
from conadv_optax.core.calls import Call, gradient_function, pytree
from conadv_optax.core.numeric import (
  check_share,
  inverse,
  scale,
  share_of,
)
from conadv_optax.core.paths import Leaf, LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import (
  Attack,
  Batch,
  ConAdvState,
  Denominators,
  Divisor,
  GradientFunction,
  LossFn,
)
from conadv_optax.training.craft import (
  check_attack,
  check_crafted,
  check_inputs,
)
from conadv_optax.training.loss import Loss, split_key
from conadv_optax.training.passes import Pass, collect, train
from conadv_optax.training.queue import check_state


def fast_advprop(
  loss_fn: LossFn,
  *,
  attack: Attack,
  inputs: LeafSpec = 'image',
  adversarial_fraction: float = 0.2,
  attack_weight: ArrayLike = 0.5,
  denominator: Callable[[Batch], ArrayLike] | None = None,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
  has_branch: bool = False,
) -> GradientFunction:
  r"""Clean and adversarial examples unpaired, and no pass for the attack alone.

  The first part :math:`A` of the batch is attacked, the rest :math:`C` is not.
  The pass that finds the attack's direction counts as training too, with weight
  :math:`w`:

  .. math::

    g = \frac{1}{|A| + |C|} \left[
      \sum_{i \in C} \nabla L(x_i)
      + \sum_{i \in A} \left( w \nabla L(x_i + u_i)
      + (1 - w) \nabla L(\hat x_i) \right) \right]

  where :math:`u` is the attack's random start, if it has one. Where parameters
  and model state are `dual_bn.Branched`, :math:`A` goes through the norm layers
  of the adversarial branch, and each norm layer's gradient is divided by the
  number of examples that went through that layer, not by the whole batch.

  A step costs :math:`|C| + 2 |A|` passes over an example: 1.2 plain steps with
  the published split of 4 to 1, for which 105 epochs become 88. The attack must
  take one gradient, and no targets, because training on wrong labels would not
  help. The published attack is `pgd` with one step of 1/255 of the pixels'
  range, and a random start. At a large batch a larger radius was better (the
  site's results).

  `wrap(loss_fn, 0, adversarial_fraction=0.2)` attacks a part of the batch too,
  but trains on that part clean as well, and throws the gradient of the attack
  away. In both, each branch's statistics are updated once a step, by its last
  pass.

  An untargeted one-step attack leaks labels through the statistics of the batch
  that it was made for. Against this the authors' code shuffles the adversarial
  examples among devices, which `data_parallel` does not.

  Reductions: without perturbation, and with a loss that treats each example by
  itself, it is the plain step on the whole batch. `attack_weight=0` trains on
  the clean and the finished adversarial examples alone.

  Args:
    loss_fn: as for `wrap`, with the same `has_state`, `has_aux`, `has_key`: the
      mean over the examples that it is given.
    attack: an attack of one gradient, in the units of the inputs. In float16,
      scale the loss as for training, or its gradient underflows.
    inputs: the leaf of the batch to perturb, as for `wrap`.
    adversarial_fraction: the share :math:`p` to attack, in (0, 1): the first
      :math:`\lfloor p B \rfloor` examples, at least one.
    attack_weight: :math:`w` in [0, 1].
    denominator: what the loss is a mean of, as for `wrap`; it takes the place
      of the number of examples.
    has_state: whether `loss_fn` takes and returns a model state.
    has_aux: whether `loss_fn` returns `(loss, aux)`, or
      `(loss, (model_state, aux))`.
    has_key: whether `loss_fn` also takes `key=`.
    has_branch: whether `loss_fn` also takes `branch=`: 'attack', 'adversarial'
      or 'main'.

  Returns:
    A `GradientFunction` of staleness 0. Its loss is weighted like its gradient;
    `aux.losses` and `aux.aux` have the entries 'attack', 'adversarial' and
    'main', one for each pass.

  Raises:
    TypeError: for integer inputs, an attack that is none, or a `loss_fn` that
      returns something else than it should.
    ValueError: for an attack of several gradients or with targets, a fraction
      outside (0, 1), a weight outside [0, 1], a batch of one example, or a
      missing key or model state.
    KeyError: when the batch has no leaf `inputs`, or a `Branched` tree no
      adversarial branch.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.fast_advprop(
    ...     lambda w, batch: jnp.mean(batch['x'] ** 2) * w,
    ...     attack=conadv.fgsm(1.), inputs='x')
    >>> w, batch = jnp.array(1.), {'x': jnp.array([1., 2., 2., 2., 2.])}
    >>> (loss, aux), grads, state = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), batch)
    >>> # The first example counts half as 1 and half as the adversarial 2.
    >>> chex.assert_trees_all_close(
    ...     aux.losses, {'attack': 1., 'adversarial': 4., 'main': 4.})
    >>> mean = (0.5 * 1 + 0.5 * 4 + 4 * 4) / 5
    >>> chex.assert_trees_all_close((loss, grads), (mean, mean))

  References:
    Mei et al., `Fast AdvProp <https://arxiv.org/abs/2204.09838>`_, 2022
  """
  _check_attack(attack)
  if not 0 < adversarial_fraction < 1:
    raise ValueError(
      '`adversarial_fraction` is the share of the batch that is attacked in '
      'place of being trained on clean, in (0, 1). Given adversarial_fraction='
      f'{adversarial_fraction!r}. The published split of 4 to 1 is '
      '`adversarial_fraction=0.2`.'
    )
  what = 'the share of an attacked example that its attack pass counts'
  check_share('attack_weight', attack_weight, what)
  return gradient_function(
    _FastAdvProp(
      attack,
      attack_weight,
      Loss(loss_fn, has_state, has_aux, has_key, has_branch, denominator),
      _leaf(inputs, argument='inputs'),
      adversarial_fraction,
    ),
    0,
    has_denominators=denominator is not None,
  )


@pytree('attack', 'attack_weight')
class _FastAdvProp:
  attack: Attack
  attack_weight: ArrayLike
  loss: Loss
  leaf: Leaf
  fraction: float
  state_kind = ConAdvState

  def init(self, call: Call) -> ConAdvState:
    del call
    return ConAdvState((), ())

  def denominators(self, state: ConAdvState, batch: Batch) -> Denominators:
    del state
    return self._divisors(*self._split(batch))

  def value_and_grad(self, call: Call) -> tuple[Any, Any, ConAdvState]:
    call = call.in_jax()
    self.loss.check(call, draws=self.attack.draws)
    check_state(call.state, 0)
    check_inputs(self.leaf.get(call.batch))
    attacked, rest = self._split(call.batch)
    start_key, *keys = split_key(call.key, 4)
    divisors = call.denominators or self._divisors(attacked, rest)
    seen = {branch: divisor.mean for branch, divisor in divisors.items()}
    w = jnp.asarray(self.attack_weight, float)
    weights = {
      'attack': seen['adversarial'] * w,
      'adversarial': seen['adversarial'] * (1 - w),
      'main': seen['main'],
    }

    def add(done: Any, name: str, key: Any, part: Batch, at: Any = None) -> Any:
      branch = 'main' if name == 'main' else 'adversarial'
      passes = {name: Pass(branch, part, key, weights[name], at)}
      return train(self.loss, call, passes, leaf=self.leaf, before=done)

    assert self.attack.one_step is not None  # `_check_attack` has seen to it.
    inputs = self.leaf.get(attacked)
    start, finish = self.attack.one_step(start_key, inputs)
    done = add(None, 'attack', keys[0], attacked, start)
    crafted = check_crafted(finish(done.of_inputs), inputs)
    attacked = self.leaf.set(attacked, crafted)
    done = add(done, 'adversarial', keys[1], attacked)
    done = add(done, 'main', keys[2], rest)
    # The sums are means where they are divided by what went into each leaf.
    total = jax.tree.map(
      lambda total, seen: scale(inverse(seen), total),
      done.gradients,
      _of_leaves(call.params, seen),
    )
    (loss, aux), grads = collect(
      done._replace(gradients=total), call, self.loss.has_aux
    )
    loss = scale(inverse(jnp.asarray(sum(seen.values()))), loss)
    return (loss, aux), grads, call.state

  def _split(self, batch: Batch) -> tuple[Batch, Batch]:
    """What is attacked, and the rest."""
    size = self.leaf.examples(batch)
    if share_of(self.fraction, size) == size:
      raise ValueError(
        'One part of each batch is attacked and the other trained on clean, so '
        f'it needs two examples or more. Given a batch of {size}.'
      )
    attacked = first_part(batch, self.fraction, size)
    return attacked, rest_of(batch, self.fraction, size)

  def _divisors(self, attacked: Batch, rest: Batch) -> Denominators:
    """What the losses are divided by, by default how many examples."""

    def divisor(part: Batch) -> Divisor:
      size = jnp.asarray(self.leaf.examples(part), float)
      if self.loss.denominator is not None:
        size = self.loss.divisor(part).mean
      # The loss is that of all examples, in whatever branch.
      return Divisor(size, size, size)

    return {'adversarial': divisor(attacked), 'main': divisor(rest)}


def _check_attack(attack: Any) -> None:
  check_attack(attack)
  if attack.one_step is None or attack.prepare is not None:
    raise ValueError(
      'Fast AdvProp trains on the gradient of the attack too, so it needs an '
      'attack of one step, without restarts and towards no targets. Write '
      '`attack=conadv.pgd(epsilon)` or `attack=conadv.fgsm(epsilon)`.'
    )


def _of_leaves(params: Any, seen: dict[str, jax.Array]) -> Any:
  """For each leaf what the losses of the branches that it is in divide by."""
  leaves, treedef = jax.tree.flatten(params)
  numbered = jax.tree.unflatten(treedef, range(len(leaves)))
  total: dict[int, Any] = {}
  for branch in seen:
    for number in jax.tree.leaves(dual_bn.select(numbered, branch)):
      total[number] = total.get(number, 0.0) + seen[branch]
  # A leaf in neither has no gradient.
  return jax.tree.map(lambda number: total.get(number, 1.0), numbered)
