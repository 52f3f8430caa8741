r"""Fast AdvProp: adversarial examples at the price of a fifth of the batch.

References:
  Mei et al., `Fast AdvProp <https://arxiv.org/abs/2204.09838>`_, 2022
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax import dual_bn
from conadv_optax.core import checks
from conadv_optax.core.numeric import (
  add_weighted,
  at_least_float32,
  concrete,
  weighted,
)
from conadv_optax.core.paths import LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import (
  Attack,
  Batch,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
  LossFn,
)


def fast_advprop(
  loss_fn: LossFn,
  *,
  attack: Attack,
  inputs: LeafSpec = 'image',
  adversarial_fraction: float = 0.2,
  attack_weight: ArrayLike = 0.5,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
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
  number of examples that went through it in place of the whole batch.

  A step costs :math:`|C| + 2 |A|` passes over an example: 1.2 plain steps with
  the published split of 4 to 1, for which 105 epochs become 88. The attack must
  take one gradient, and no targets, because training on wrong labels would not
  help: the published one is `pgd` with one step of 1/255 of the pixels' range,
  and a random start.

  What it shares with `wrap(loss_fn, 0, adversarial_fraction=0.2)` is that a
  part of the batch is attacked. There the part is trained on clean as well, and
  the gradient of the attack is thrown away. As there, each branch's statistics
  are updated once a step, by its last pass.

  An untargeted one-step attack leaks labels through the statistics of the very
  batch that it was made for; the authors' code shuffles the adversarial
  examples among devices against that, which `data_parallel` does not.

  Reductions: without perturbation, and with a loss that treats each example by
  itself, it is the plain step on the whole batch. `attack_weight=0` trains on
  the clean and the finished adversarial examples alone.

  Args:
    loss_fn: as for `wrap`, with the same `has_state`, `has_aux`, `has_key`: the
      mean over the examples that it is given.
    attack: an attack of one gradient, in the units of the inputs.
    inputs: the leaf of the batch to perturb, as for `wrap`.
    adversarial_fraction: the share of the batch to attack, in (0, 1): the first
      `int(adversarial_fraction * batch)` examples, at least one.
    attack_weight: :math:`w` in [0, 1].
    has_state: whether `loss_fn` takes and returns a model state.
    has_aux: whether `loss_fn` returns `(loss, aux)`, or
      `(loss, (model_state, aux))`.
    has_key: whether `loss_fn` also takes `key=`.

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
  weight = concrete(attack_weight)
  if weight is not None and not 0 <= weight <= 1:
    raise ValueError(
      '`attack_weight` is the share of an attacked example that its attack '
      f'pass counts, in [0, 1]. Given attack_weight={attack_weight!r}.'
    )
  leaf = _leaf(inputs, argument='inputs')

  def split(batch: Batch) -> tuple[Batch, Batch, int, int]:
    """What is attacked, the rest, and the examples of each."""
    size = leaf.get(batch).shape[0]
    checks.check_batch_axis(batch, size)
    count = max(1, int(adversarial_fraction * size))
    if count == size:
      raise ValueError(
        'One part of each batch is attacked and the other trained on clean, so '
        f'it needs two examples or more. Given a batch of {size}.'
      )
    attacked = jax.tree.map(lambda x: x[:count], batch)
    rest = jax.tree.map(lambda x: x[count:], batch)
    return attacked, rest, count, size - count

  def branch_loss(
    params: Any,
    at: jax.Array,
    branch: str,
    model_state: Any,
    batch: Batch,
    key: jax.Array | None,
  ) -> tuple[jax.Array, tuple[Any, Any]]:
    """The loss in the norm layers of a branch, with `at` for inputs."""
    state = dual_bn.select(model_state, branch)
    output = loss_fn(
      dual_bn.select(params, branch),
      *([state] if has_state else []),
      leaf.set(batch, at.astype(leaf.get(batch).dtype)),
      **({'key': key} if has_key else {}),
    )
    loss, new_state, aux = checks.unpack_loss(output, state, has_state, has_aux)
    return at_least_float32(loss), (new_state, aux)

  def init(
    params: Any,
    first_batches: Sequence[Batch],
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> ConAdvState:
    del params, model_state, key
    checks.check_first_batches(first_batches, 0)
    return ConAdvState((), ())

  def value_and_grad(
    params: Any,
    state: ConAdvState,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, ConAdvState]:
    batch = jax.tree.map(jnp.asarray, batch)
    checks.check_model_state(params, model_state, has_state)
    checks.check_key(attack.draws or has_key, key)
    checks.check_inputs(leaf.get(batch))
    attacked, rest, num_attacked, num_clean = split(batch)
    start_key, *pass_keys = (
      jax.random.split(key, 4) if key is not None else (None,) * 4
    )
    w = jnp.asarray(attack_weight, jnp.float32)
    examples = {
      'attack': num_attacked * w,
      'adversarial': num_attacked * (1 - w),
      'main': jnp.asarray(num_clean, jnp.float32),
    }
    keys = dict(zip(examples, pass_keys, strict=True))
    losses: dict[str, jax.Array] = {}
    states: dict[str, Any] = {}
    auxes: dict[str, Any] = {}

    def add_pass(
      name: str, at: jax.Array, part: Batch, total: Any
    ) -> tuple[Any, Any]:
      """`total` and one pass's gradient; for the attack that at `at` too."""
      # One pass at a time, or the compiler keeps the activations of all.
      theta, (at, total) = jax.lax.optimization_barrier((params, (at, total)))
      branch = 'adversarial' if name == 'attack' else name
      (losses[name], (states[name], auxes[name])), gradients = (
        jax.value_and_grad(
          branch_loss, argnums=(0, 1) if name == 'attack' else 0, has_aux=True
        )(theta, at, branch, model_state, part, keys[name])
      )
      direction = None
      if name == 'attack':
        gradients, direction = gradients
      return add_weighted(total, examples[name], gradients), direction

    assert attack.one_step is not None  # `_check_attack` has seen to it.
    start, finish = attack.one_step(start_key, leaf.get(attacked))
    total = jax.tree.map(lambda x: jnp.zeros_like(at_least_float32(x)), params)
    total, direction = add_pass('attack', start, attacked, total)
    perturbed = at_least_float32(finish(direction))
    total, _ = add_pass('adversarial', perturbed, attacked, total)
    clean = at_least_float32(leaf.get(rest))
    total, _ = add_pass('main', clean, rest, total)

    new_model_state = states['main']
    if isinstance(model_state, dual_bn.Branched):
      new_model_state = model_state
      for branch in ('main', 'adversarial'):
        new_model_state = dual_bn.replace(
          new_model_state, branch, states[branch]
        )
    grads = jax.tree.map(
      lambda sum_, seen, p: (sum_ / seen).astype(p.dtype),
      total,
      _examples_seen(params, {'main': num_clean, 'adversarial': num_attacked}),
      params,
    )
    loss: Any = sum(weighted(examples[name], losses[name]) for name in losses)
    loss = loss / (num_clean + num_attacked)
    aux = ConAdvAux(losses, new_model_state, auxes if has_aux else None)
    return (loss, aux), grads, state

  return GradientFunction(init, value_and_grad, staleness=0)


def _check_attack(attack: Any) -> None:
  checks.check_attack(attack, reuse_gradient=False)
  if attack.one_step is None or attack.prepare is not None:
    raise ValueError(
      'Fast AdvProp trains on the gradient of the attack too, so it needs an '
      'attack of one step, towards no targets. Write '
      '`attack=conadv.pgd(epsilon)` or `attack=conadv.fgsm(epsilon)`.'
    )


def _examples_seen(params: Any, of_branch: dict[str, int]) -> Any:
  """For each leaf, how many examples go through it, at least one."""
  leaves, treedef = jax.tree.flatten(params)
  numbered = jax.tree.unflatten(treedef, range(len(leaves)))
  seen = [0] * len(leaves)
  for branch, examples in of_branch.items():
    for number in jax.tree.leaves(dual_bn.select(numbered, branch)):
      seen[number] += examples
  return jax.tree.unflatten(treedef, [max(1, examples) for examples in seen])
