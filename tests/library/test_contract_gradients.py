"""The contract of every public wrapper of gradients, in each of its forms."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from public_names import cases, make_batch, make_model_state, make_params

import conadv_optax as conadv

RATE = 0.1
EPSILON = 0.05
OPTIMIZERS = {
  'chain': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
  'multi_steps': optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2),
  'masked': optax.chain(
    optax.masked(
      optax.sgd(0.1, momentum=0.5),
      lambda params: jax.tree.map(lambda x: x.ndim > 1, params),
    ),
    optax.masked(
      optax.set_to_zero(),
      lambda params: jax.tree.map(lambda x: x.ndim <= 1, params),
    ),
  ),
  'inject_hyperparams': optax.inject_hyperparams(conadv.lars)(
    learning_rate=0.5, weight_decay=1e-4, trust_coefficient=0.1
  ),
}


class Wrapper:
  """A wrapper, and its programs, which all checks have in common.

  Attributes:
    case: the function and its example arguments.
    optimizer: the name of one, of all wrappers each in turn.
    begin: `begin()` gives what a step carries, before the first.
    step: a call whose numbers are arguments; its state is given back.
    traces: how often `step` was traced.
    numbers: as the examples of an attack and of weights have them.
  """

  def __init__(self, case, optimizer):
    self.case, self.optimizer, self.traces = case, optimizer, 0
    branches = ['main', 'adversarial']
    branches += _arguments_of_wrap(case).get('extra_branches', {})
    self.numbers = {
      'epsilon': EPSILON,
      'weights': {name: 0.5 + i for i, name in enumerate(branches)},
    }
    params, model_state = start(case, branched=True)
    init = jax.jit(initializer(self.make(**self.numbers)))

    def step(state, params, model_state, batch, t, numbers):
      self.traces += 1
      return call(self.make(**numbers), params, state, batch, model_state, t)

    # A donated buffer that cannot be used is a warning, hence an error here.
    self.step = jax.jit(step, donate_argnames='state')
    self.begin = lambda: (params, model_state, init(params, model_state))

  def make(self, epsilon, weights):
    """With the numbers in place of those of the examples."""
    reuses = _arguments_of_wrap(self.case).get('reuse_gradient')
    attack = (conadv.fgsm if reuses else conadv.pgd)(epsilon)
    return self.case.make(attack=attack, weights=weights)

  def after(self, ts, carry=None, numbers=None):
    """What is carried after calls and steps of descent, and the last output."""
    params, model_state, state = carry or self.begin()
    numbers = jax.tree.map(np.float32, numbers or self.numbers)
    for t in ts:
      loss, aux, grads, state = self.step(
        state, params, model_state, make_batch(t), np.int32(t), numbers
      )
      params, model_state = descend(params, grads), aux.model_state
    return (params, model_state, state), (loss, aux, grads)


@pytest.fixture(
  scope='module',
  params=[
    pytest.param((*case.values, optimizer), id=case.id)
    for case, optimizer in zip(
      cases('gradient'), itertools.cycle(OPTIMIZERS), strict=False
    )
  ],
)
def wrapper(request):
  return Wrapper(*request.param)


def start(case, dtype=jnp.float32, branched=False):
  """Parameters and a model state, on the devices of the case."""
  params, model_state = make_params(dtype), make_model_state()
  if branched:
    params, model_state = conadv.dual_bn.split(
      params, model_state, branches=('adversarial', 'augmented')
    )
  if not _arguments_of_wrap(case).get('has_state', False):
    model_state = None
  # Where they are from a checkpoint, too: elsewhere `step` compiles again.
  device = jax.devices()[0]
  if 'mesh' in case.arguments:
    device = NamedSharding(case.arguments['mesh'], PartitionSpec())
  return jax.device_put((params, model_state), device)


def _arguments_of_wrap(case):
  """The arguments of `wrap`, wherever it was called."""
  return case.arguments.get('grad_fn', case.arguments)


def initializer(grad_fn, dtype=jnp.float32):
  batches = [make_batch(-1 - i, dtype) for i in range(grad_fn.staleness)]

  def init(params, model_state):
    key = jax.random.key(7)
    return grad_fn.init(params, batches, model_state=model_state, key=key)

  return init


def call(grad_fn, params, state, batch, model_state, t):
  (loss, aux), grads, state = grad_fn.value_and_grad(
    params,
    state,
    batch,
    model_state=model_state,
    key=jax.random.fold_in(jax.random.key(8), t),
  )
  return loss, aux, grads, state


@jax.jit
def descend(params, grads):
  return jax.tree.map(
    lambda p, g: p - jnp.asarray(RATE, p.dtype) * g, params, grads
  )


@pytest.mark.slow
def test_wrapper_gives_its_buffers_back_and_keeps_the_form_of_its_state(
  wrapper,
):
  carry = wrapper.begin()
  for t in range(3):
    *_, given = carry
    carry, _ = wrapper.after([t], carry)
    *_, state = carry
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, given)
    for new, old in zip(*map(jax.tree.leaves, (state, given)), strict=True):
      assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@pytest.mark.slow
def test_wrapper_compiles_once_while_numbers_change(wrapper):
  carry, branches = wrapper.begin(), list(wrapper.numbers['weights'])
  for t in range(6):
    weights = {name: 0.1 + (t + i) % 4 for i, name in enumerate(branches)}
    numbers = {'epsilon': 0.01 * t, 'weights': weights}
    carry, (loss, aux, _) = wrapper.after([t], carry, numbers)
    if set(aux.losses) == set(branches):
      # A branch that has no turn leaves its weight to the main branch.
      main = aux.losses['main']
      losses = {
        name: np.where(np.isnan(x), main, x) for name, x in aux.losses.items()
      }
      total = sum(weights[name] * losses[name] for name in branches)
      chex.assert_trees_all_close(loss, total, rtol=1e-5)
    elif len(aux.losses) == 1:
      # One branch has no weight.
      chex.assert_trees_all_close(loss, aux.losses['main'], rtol=1e-5)
  assert wrapper.traces == 1


@pytest.mark.slow
def test_wrapper_in_a_scan_with_fixed_numbers_is_a_loop_with_traced_ones(
  wrapper,
):
  grad_fn = wrapper.make(**wrapper.numbers)
  batches = jax.tree.map(lambda *x: np.stack(x), *map(make_batch, range(5)))

  def step(carry, xs):
    params, model_state, state = carry
    batch, t = xs
    *output, state = call(grad_fn, params, state, batch, model_state, t)
    _, aux, grads = output
    return (descend(params, grads), aux.model_state, state), tuple(output)

  @jax.jit
  def scan(carry):
    return jax.lax.scan(step, carry, (batches, np.arange(5, dtype=np.int32)))

  carry, outputs = scan(wrapper.begin())
  expected, last = wrapper.after(range(5))
  losses, _, grads = outputs
  chex.assert_tree_all_finite((carry, losses, grads, last))
  chex.assert_trees_all_close(carry, expected, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: np.asarray(x)[-1], outputs),
    last,
    rtol=1e-4,
    atol=1e-6,
  )


def test_wrapper_continues_from_a_checkpoint_bit_for_bit(wrapper, tmp_path):
  half, _ = wrapper.after(range(4))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'carry', half)
    checkpointer.wait_until_finished()
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
    restored = checkpointer.restore(tmp_path / 'carry', shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(half)
  chex.assert_trees_all_equal(restored, half)
  chex.assert_trees_all_equal_dtypes(restored, half)
  chex.assert_trees_all_equal(
    wrapper.after(range(4, 7), restored), wrapper.after(range(7))
  )


@functools.cache
def compiled(optimizer):
  tx = OPTIMIZERS[optimizer]

  # MultiSteps divides a gradient by an integer count.
  @jax.numpy_dtype_promotion('standard')
  @jax.jit
  def update(grads, opt_state, params):
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  # Zeros need no argument, but an explicit mesh is known from one alone.
  return jax.jit(tx.init, keep_unused=True), update


def test_wrapper_feeds_any_optimizer(wrapper):
  params, model_state, state = wrapper.begin()
  init, update = compiled(wrapper.optimizer)
  opt_state, batch, losses = init(params), make_batch(0), []
  numbers = jax.tree.map(np.float32, wrapper.numbers)
  for t in range(40):
    loss, aux, grads, state = wrapper.step(
      state, params, model_state, batch, np.int32(t), numbers
    )
    params, opt_state = update(grads, opt_state, params)
    model_state = aux.model_state
    losses.append(loss)
  chex.assert_trees_all_equal_shapes_and_dtypes(params, wrapper.begin()[0])
  # Once the ring holds the one batch, its loss falls.
  first = losses[wrapper.case.make().staleness]
  assert losses[-1] < 0.7 * first, wrapper.optimizer


@pytest.mark.parametrize(
  ('dtype', 'branched'),
  [(jnp.float32, False), (jnp.bfloat16, True)],
  ids=['float32', 'bfloat16-branched'],
)
def test_wrapper_traced_from_shapes_keeps_dtypes_and_structures(
  wrapper, dtype, branched
):
  step, arguments = first_step(wrapper.case, dtype, branched)
  shapes = jax.tree.map(
    # With the shardings, which are part of a type on an explicit mesh.
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    arguments,
  )
  state, (loss, aux, grads, new_state) = jax.eval_shape(step, *shapes)
  params, model_state = arguments
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    (aux.model_state, new_state), (model_state, state)
  )
  assert isinstance(grads, conadv.dual_bn.Branched) == branched
  for scalar in (loss, *aux.losses.values()):
    chex.assert_shape(scalar, ())
    assert scalar.dtype == jnp.float32
  if wrapper.case.make().staleness:
    queue = queue_of(state)
    kept = jax.tree.map(lambda x: x.dtype, queue.batch)
    assert kept == jax.tree.map(lambda x: x.dtype, make_batch(0, dtype))
    perturbed = queue.adversarial
    assert perturbed is None or perturbed.dtype == dtype


def first_step(case, dtype, branched):
  grad_fn, batch = case.make(), make_batch(0, dtype)
  init = initializer(grad_fn, dtype)

  @jax.jit
  def step(params, model_state):
    state = init(params, model_state)
    return state, call(grad_fn, params, state, batch, model_state, np.int32(0))

  return step, start(case, dtype, branched)


def queue_of(state):
  """The queue, however deep in the states of other wrappers."""
  parts = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, conadv.ConAdvState)
  )
  (part,) = (x for x in parts if isinstance(x, conadv.ConAdvState))
  return part.queue


# In the forms that `test_low_precision.py` does not compare with float32.
@pytest.mark.slow
@pytest.mark.parametrize(
  'case', cases('gradient', forms=('everything-', 'staleness-3-fisher'))
)
def test_wrapper_is_finite_in_bfloat16(case):
  step, arguments = first_step(case, jnp.bfloat16, branched=True)
  chex.assert_tree_all_finite(step(*arguments))
