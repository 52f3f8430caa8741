r"""Concurrent Adversarial Learning (ConAdv).

Step :math:`t` trains on the clean batch :math:`B_t` and on its adversarial
copy, which was crafted :math:`\tau` steps ago, and crafts the copy of
:math:`B_{t+\tau}`. Both read only :math:`\theta_t`, so neither waits.

References:
  Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
  <https://arxiv.org/abs/2106.00221>`_, 2022
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax import dual_bn
from conadv_optax.attacks.pgd import pgd
from conadv_optax.core import checks
from conadv_optax.core.numeric import add_weighted, at_least_float32, weighted
from conadv_optax.core.paths import LeafSpec
from conadv_optax.core.paths import leaf as _leaf
from conadv_optax.core.types import (
  Attack,
  Batch,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
  LossFn,
  Passes,
  Queue,
)
from conadv_optax.training import queue

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
  reuse_gradient: bool = False,
  has_state: bool = False,
  has_aux: bool = False,
  has_key: bool = False,
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

  Where parameters and model state are `dual_bn.Branched`, each branch uses its
  own norm layers, and the attack those of the adversarial branch, in training
  mode; the statistics that the attack computes are thrown away. A plain model
  state is shared, and the main branch's update of it is kept.

  With `reuse_gradient`, call :math:`t` trains on the newest clean batch and on
  the adversarial copy of the batch :math:`\tau` calls back, and the input
  gradient of the clean pass makes the next copy: no attack pass. It differs
  from the paper in two things. The clean and the adversarial examples of a step
  come from different batches, and the attack sees the main branch's norm. The
  clean halves of `first_batches` are not trained on.

  Reductions: `staleness=0` is AdvProp; weights 1 for 'main' and 0 for
  'adversarial' give the plain step; `epsilon=0` with a shared norm gives the
  plain step with every example counted twice.

  Args:
    loss_fn: `loss_fn(params, batch)` returns the mean loss, a floating scalar.
      With `has_state`, `loss_fn(params, model_state, batch)` returns
      `(loss, model_state)`; `has_aux` and `has_key` change it as below. It sees
      the ordinary trees of one branch.
    staleness: :math:`\tau`, how many steps old the parameters of an attack
      are. 0 attacks the batch that is trained on, then trains; give the attack
      `random_targets` then, or it leaks the labels through batch statistics.
    attack: how the inputs are perturbed, in their units. None is `pgd` with one
      step of the largest published run's radius, 18/255 in units of inputs
      normalised to mean 0 and standard deviation 1 (with a random start unless
      `reuse_gradient`).
    inputs: the leaf of the batch to perturb, a floating array with a leading
      batch axis: a key, a tuple of keys, or a `(get, set)` pair of functions
      `get(batch)`, `set(batch, value)`. `()` is the batch itself. `get` may
      convert, uint8 pixels to floats say: clean batches then wait as they are,
      and `loss_fn` must take the leaf as it is and as `get` returns it.
    weights: the weight of each branch's loss, by name, floats or scalar arrays,
      finite and not negative. None: equal, summing to 1. Algorithm 1 of the
      paper is the plain sum, `{'main': 1., 'adversarial': 1.}`. A branch of
      weight 0 adds nothing, not even a NaN.
    extra_branches: further clean views, each a branch with a norm of its own:
      `{'augmented': 'image_augmented'}` names the leaf that takes the place of
      `inputs`.
    adversarial_fraction: the share :math:`p` of each batch to attack: its
      first `int(p * batch)` examples, at least one. The adversarial loss is
      the mean over those. Of a batch that `jit` spreads over devices the first
      part lies on the first of them; `data_parallel` takes a part of each.
    reuse_gradient: take the attack's gradient from the training pass.
    has_state: whether `loss_fn` takes and returns a model state.
    has_aux: whether `loss_fn` returns `(loss, aux)`, or
      `(loss, (model_state, aux))`.
    has_key: whether `loss_fn` also takes `key=`, for dropout say.

  Returns:
    A `GradientFunction`. Its loss is the weighted sum of the branches' and, as
    all losses here, at least float32; gradients have the structure and dtypes
    of the parameters; the state has the same shapes and dtypes at every call.

  Raises:
    TypeError: for a staleness that is not an int, integer inputs, an attack
      that is none, or a `loss_fn` that returns something else than it should.
    ValueError: for a negative staleness, weights that do not match the
      branches or are no finite numbers of 0 or more, first batches of the wrong
      number or shape, a later batch of another shape, a state of another
      staleness, a missing key or model state, or a combination that
      `reuse_gradient` does not allow.
    KeyError: when the batch has no leaf `inputs`, or a `Branched` tree not
      every branch.

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
  checks.check_staleness(staleness, reuse_gradient)
  checks.check_fraction(adversarial_fraction)
  if attack is None:
    attack = pgd(_EPSILON, random_start=not reuse_gradient)
  checks.check_attack(attack, reuse_gradient)
  extra = dict(extra_branches or {})
  branches = ('main', 'adversarial', *extra)
  checks.check_branches(branches, weights)
  if weights is None:
    weights = dict.fromkeys(branches, 1 / len(branches))
  leaf = _leaf(inputs, argument='inputs')
  views = {
    name: _leaf(spec, argument=f'extra_branches[{name!r}]')
    for name, spec in extra.items()
  }

  def branch_loss(
    branch: str,
    params: Any,
    perturbed: jax.Array | None,
    model_state: Any,
    batch: Batch,
    key: jax.Array | None,
  ) -> tuple[jax.Array, tuple[Any, Any]]:
    """The loss of one branch, as a function of parameters and inputs."""
    if perturbed is not None:
      dtype = leaf.get(batch).dtype
      batch = leaf.set(batch, perturbed.astype(dtype))
    state = dual_bn.select(model_state, branch)
    output = loss_fn(
      dual_bn.select(params, branch),
      *([state] if has_state else []),
      batch,
      **({'key': key} if has_key else {}),
    )
    loss, new_state, aux = checks.unpack_loss(output, state, has_state, has_aux)
    return at_least_float32(loss), (new_state, aux)

  def first_part(batch: Batch) -> Batch:
    """The examples that are attacked."""
    if adversarial_fraction == 1:
      return batch
    size = leaf.get(batch).shape[0]
    checks.check_batch_axis(batch, size)
    count = max(1, int(adversarial_fraction * size))
    return jax.tree.map(lambda x: x[:count], batch)

  def keys_of(key: jax.Array | None) -> tuple[Any, dict[str, Any]]:
    """The attack's own key and those of the branches, from that of a call."""
    attack_key, *branch_keys = _split(key, 1 + len(branches))
    return attack_key, dict(zip(branches, branch_keys, strict=True))

  def craft(
    params: Any, model_state: Any, batch: Batch, key: jax.Array | None
  ) -> jax.Array:
    """The attack pass: adversarial inputs of the first part of the batch."""
    prepare_key, craft_key, loss_key = _split(key, 3)
    batch = first_part(batch)
    clean = leaf.get(batch)
    if attack.prepare is not None:
      batch = attack.prepare(prepare_key, batch)

    def gradient_fn(perturbed: jax.Array) -> jax.Array:
      gradient = jax.grad(branch_loss, argnums=2, has_aux=True)
      return gradient(
        'adversarial', params, perturbed, model_state, batch, loss_key
      )[0]

    return attack.craft(craft_key, gradient_fn, clean)

  def train(
    params: Any,
    model_state: Any,
    clean: Batch,
    attacked: Batch,
    keys: Mapping[str, jax.Array | None],
    *,
    after: Any = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, Any]:
    """The training passes: one for each branch, on its examples.

    One pass at a time, and none before `after` is computed: left to itself the
    compiler interleaves them and keeps the activations of all.
    """
    examples = {'adversarial': attacked, 'main': clean}
    for name, view in views.items():
      examples[name] = leaf.set(clean, view.get(clean))
    losses, auxes, new_model_state = {}, {}, model_state
    total: Any = None
    gradients: Any = None
    input_gradient: Any = None
    for branch, batch in examples.items():
      theta, (after, total) = jax.lax.optimization_barrier(
        (params, (after, total))
      )
      also_inputs = reuse_gradient and branch == 'main'
      (loss, (branch_state, auxes[branch])), gradients = jax.value_and_grad(
        branch_loss, argnums=(1, 2) if also_inputs else 1, has_aux=True
      )(
        branch,
        theta,
        at_least_float32(leaf.get(batch)) if also_inputs else None,
        model_state,
        batch,
        keys[branch],
      )
      if also_inputs:
        gradients, input_gradient = gradients
      after = losses[branch] = loss
      total = add_weighted(total, weights[branch], gradients)
      if isinstance(model_state, dual_bn.Branched):
        new_model_state = dual_bn.replace(new_model_state, branch, branch_state)
      elif branch == 'main':
        new_model_state = branch_state
    grads = jax.tree.map(lambda s, g: s.astype(g.dtype), total, gradients)
    total_loss: Any = sum(
      weighted(weights[name], losses[name]) for name in branches
    )
    aux = ConAdvAux(losses, new_model_state, auxes if has_aux else None)
    return (total_loss, aux), grads, input_gradient

  def examples_of(waiting: Queue) -> tuple[Batch, Batch]:
    """The clean examples and the attacked ones of an entry of the ring."""
    part = first_part(waiting.batch)
    return waiting.batch, leaf.set(part, waiting.adversarial)

  def reuse(batch: Batch, gradient: jax.Array) -> Batch:
    """The first part of the batch, perturbed by a training pass's gradient."""
    assert attack.reuse is not None  # `check_attack` has seen to it.
    batch = first_part(batch)
    clean = leaf.get(batch)
    return leaf.set(batch, attack.reuse(gradient[: clean.shape[0]], clean))

  def check(
    params: Any,
    model_state: Any,
    batches: Sequence[Batch],
    key: jax.Array | None,
  ) -> None:
    checks.check_model_state(params, model_state, has_state)
    checks.check_key(attack.draws or has_key, key)
    for batch in batches:
      checks.check_inputs(leaf.get(batch))

  def init(
    params: Any,
    first_batches: Sequence[Batch],
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> ConAdvState:
    checks.check_first_batches(first_batches, staleness)
    batches = jax.tree.map(jnp.asarray, list(first_batches))
    for batch in batches[1:]:
      checks.check_like(batch, batches[0], 'Every one of `first_batches`')
    if staleness > 0:
      check(params, model_state, batches, key)
    # Compiled, so that every part of the state lies on the devices of the rest.
    return jax.jit(fill)(params, model_state, batches, key)

  def fill(
    params: Any,
    model_state: Any,
    first_batches: list[Batch],
    key: jax.Array | None,
  ) -> ConAdvState:
    """The state whose ring holds the first batches and their copies."""
    if staleness == 0:
      return ConAdvState((), ())
    batches = jax.tree.map(lambda *leaves: jnp.stack(leaves), *first_batches)
    adversarial = jax.lax.map(
      lambda args: craft(params, model_state, *args),
      (batches, None if key is None else jax.random.split(key, staleness)),
    )
    if not reuse_gradient:
      return queue.fill(Queue(batches, adversarial))
    attacked = jax.vmap(first_part)(batches)
    return queue.fill(Queue(leaf.set(attacked, adversarial), None))

  def value_and_grad(
    params: Any,
    state: ConAdvState,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, ConAdvState]:
    newest = jax.tree.map(jnp.asarray, batch)
    check(params, model_state, [newest], key)
    checks.check_state(state, staleness)
    attack_key, branch_keys = keys_of(key)
    oldest = queue.oldest(state)
    if staleness > 0:
      like = newest
      if reuse_gradient:
        # As the queue holds it, where `inputs` may be of another dtype.
        part = first_part(newest)
        like = leaf.set(part, leaf.get(part))
      checks.check_like(like, oldest.batch, 'A later batch')

    if reuse_gradient:
      output, grads, input_gradient = train(
        params, model_state, newest, oldest.batch, branch_keys
      )
      waiting = Queue(reuse(newest, input_gradient), None)
    else:
      crafted = craft(params, model_state, newest, attack_key)
      waiting = Queue(newest, crafted)
      pair = examples_of(oldest if staleness > 0 else waiting)
      output, grads, _ = train(
        params, model_state, *pair, branch_keys, after=crafted
      )
    if staleness > 0:
      state = queue.push(state, waiting)
    return output, grads, state

  def craft_alone(
    params: Any, model_state: Any, batch: Batch, key: jax.Array | None
  ) -> jax.Array:
    """`craft` for a caller who has checked nothing."""
    check(params, model_state, [batch], key)
    return craft(params, model_state, batch, keys_of(key)[0])

  def train_alone(
    params: Any, model_state: Any, waiting: Queue, key: jax.Array | None
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any]:
    """`train` on an entry of the ring, likewise."""
    check(params, model_state, [waiting.batch], key)
    pair = examples_of(waiting)
    return train(params, model_state, *pair, keys_of(key)[1])[:2]

  passes = None
  if not reuse_gradient:
    passes = Passes(
      craft_alone, train_alone, lambda batch: leaf.get(first_part(batch))
    )
  return GradientFunction(init, value_and_grad, staleness, passes)


def _split(key: jax.Array | None, num: int) -> Any:
  return (None,) * num if key is None else jax.random.split(key, num)
