"""The contract of every public wrapper of gradients, in each of its forms."""

import itertools

import chex
import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from public_names import cases, make_batch, make_model_state, make_params

import conadv_optax as conadv

wrappers = pytest.mark.parametrize('case', cases('gradient'))
RATE = 0.1


def start(case, grad_fn, dtype=jnp.float32, branched=False):
  """What a step carries, before the first."""
  params, model_state = make_params(dtype), make_model_state()
  if branched:
    params, model_state = conadv.dual_bn.split(
      params, model_state, branches=('adversarial', 'augmented')
    )
  if not has_state(case):
    model_state = None
  if 'mesh' in case.arguments:
    everywhere = NamedSharding(case.arguments['mesh'], PartitionSpec())
    params, model_state = jax.device_put((params, model_state), everywhere)
  state = jax.jit(grad_fn.init)(
    params,
    first_batches(grad_fn, dtype),
    model_state=model_state,
    key=jax.random.key(7),
  )
  return params, model_state, state


def first_batches(grad_fn, dtype=jnp.float32):
  return [make_batch(-1 - i, dtype) for i in range(grad_fn.staleness)]


def has_state(case):
  return wrapped(case).get('has_state', False)


def wrapped(case):
  """The arguments of `wrap`, wherever it was called."""
  return case.arguments.get('grad_fn', case.arguments)


def queue_of(state):
  """The queue, however deep in the states of other wrappers."""
  parts = jax.tree.leaves(
    state, is_leaf=lambda x: isinstance(x, conadv.ConAdvState)
  )
  (part,) = (x for x in parts if isinstance(x, conadv.ConAdvState))
  return part.queue


def call(grad_fn, carry, batch, t):
  """One call, and the plain gradient step that follows it."""
  params, model_state, state = carry
  (loss, aux), grads, state = grad_fn.value_and_grad(
    params,
    state,
    batch,
    model_state=model_state,
    key=jax.random.fold_in(jax.random.key(8), t),
  )
  params = jax.tree.map(
    lambda p, g: p - jnp.asarray(RATE, p.dtype) * g, params, grads
  )
  return (params, aux.model_state, state), (loss, aux, grads)


def compiled(grad_fn):
  return jax.jit(lambda carry, batch, t: call(grad_fn, carry, batch, t))


def loop(step, carry, ts):
  """The same compiled call, repeated."""
  for t in ts:
    carry, output = step(carry, make_batch(t), jnp.int32(t))
  return carry, output


@pytest.mark.slow
@wrappers
def test_wrapper_in_a_scan_is_a_loop(case):
  grad_fn = case.make()
  batches = jax.tree.map(lambda *x: jnp.stack(x), *map(make_batch, range(5)))

  @jax.jit
  def scan(carry):
    return jax.lax.scan(
      lambda carry, xs: call(grad_fn, carry, *xs),
      carry,
      (batches, jnp.arange(5)),
    )

  begin = start(case, grad_fn, branched=True)
  carry, outputs = scan(begin)
  chex.assert_tree_all_finite(outputs)
  expected, last = loop(compiled(grad_fn), begin, range(5))
  chex.assert_trees_all_close(carry, expected, rtol=1e-4, atol=1e-6)
  chex.assert_trees_all_close(
    jax.tree.map(lambda x: x[-1], outputs), last, rtol=1e-4, atol=1e-6
  )


@pytest.mark.slow
@wrappers
def test_wrapper_gives_its_buffers_back_and_keeps_the_form_of_its_state(case):
  grad_fn = case.make()
  params, model_state, state = start(case, grad_fn)

  # A donated buffer that cannot be used is a warning, hence an error here.
  @jax.jit(donate_argnums=0)
  def step(state, batch, t):
    (*_, state), _ = call(grad_fn, (params, model_state, state), batch, t)
    return state

  for t in range(3):
    given = state
    state = step(given, make_batch(t), jnp.int32(t))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    chex.assert_trees_all_equal_shapes_and_dtypes(state, given)
    for new, old in zip(*map(jax.tree.leaves, (state, given)), strict=True):
      assert new.sharding.is_equivalent_to(old.sharding, new.ndim)


@pytest.mark.slow
@wrappers
def test_wrapper_can_be_traced_from_shapes(case):
  grad_fn = case.make()
  params, model_state, state = start(case, grad_fn)
  first = first_batches(grad_fn)
  key, batch = jax.random.key(7), make_batch(0)

  def shapes(tree):
    # With the shardings, which are part of a type on an explicit mesh.
    return jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree,
    )

  def init(params, first, model_state, key):
    return grad_fn.init(params, first, model_state=model_state, key=key)

  def value_and_grad(params, state, batch, model_state, key):
    return grad_fn.value_and_grad(
      params, state, batch, model_state=model_state, key=key
    )

  abstract = jax.eval_shape(init, *shapes((params, first, model_state, key)))
  chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)
  arguments = (params, state, batch, model_state, key)
  abstract = jax.eval_shape(value_and_grad, *shapes(arguments))
  chex.assert_trees_all_equal_shapes_and_dtypes(
    abstract, jax.jit(value_and_grad)(*arguments)
  )


@pytest.mark.slow
@wrappers
def test_wrapper_compiles_once_while_numbers_change(case):
  branches = ['main', 'adversarial']
  branches += wrapped(case).get('extra_branches', {})
  traces = []

  @jax.jit
  def step(carry, batch, t, epsilon, weights, learning_rate):
    traces.append(0)
    grad_fn = case.make(attack=conadv.fgsm(epsilon), weights=weights)
    tx = optax.sgd(learning_rate)
    params, _, _ = carry
    (_, model_state, state), (loss, aux, grads) = call(grad_fn, carry, batch, t)
    updates, _ = tx.update(grads, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    return (params, model_state, state), (loss, aux.losses)

  carry = start(case, case.make())
  for t in range(8):
    epsilon = 0.01 * t
    weights = {name: 0.1 + (t + i) % 4 for i, name in enumerate(branches)}
    if t == 5:
      # Numbers that are fixed in the program give the same.
      fixed = case.make(attack=conadv.fgsm(epsilon), weights=weights)
      (_, _, state), (loss, _, _) = loop(compiled(fixed), carry, [t])
    carry, (got, losses) = step(
      carry,
      make_batch(t),
      jnp.int32(t),
      jnp.float32(epsilon),
      jax.tree.map(jnp.float32, weights),
      jnp.float32(1 / (10 + t)),
    )
    if set(losses) == set(branches):
      total = sum(weights[name] * losses[name] for name in branches)
      chex.assert_trees_all_close(got, total, rtol=1e-5)
    elif len(losses) == 1:
      # One branch has no weight.
      chex.assert_trees_all_close(got, losses['main'], rtol=1e-5)
    if t == 5:
      chex.assert_trees_all_close(got, loss, rtol=1e-4)
      chex.assert_trees_all_close(carry[-1], state, rtol=1e-4, atol=1e-6)
  assert len(traces) == 1


@pytest.mark.slow
@wrappers
@pytest.mark.parametrize(
  ('dtype', 'branched'),
  [(jnp.float32, False), (jnp.bfloat16, True)],
  ids=['float32', 'bfloat16-branched'],
)
def test_wrapper_keeps_dtypes_and_structures(case, dtype, branched):
  grad_fn = case.make()
  carry = start(case, grad_fn, dtype, branched)
  params, _, state = carry
  batch = make_batch(0, dtype)
  new_carry, (loss, aux, grads) = jax.eval_shape(
    lambda *args: call(grad_fn, *args), carry, batch, jnp.int32(0)
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(new_carry, carry)
  assert isinstance(grads, conadv.dual_bn.Branched) == branched
  for scalar in (loss, *aux.losses.values()):
    chex.assert_shape(scalar, ())
    assert scalar.dtype == jnp.float32
  if grad_fn.staleness:
    queue = queue_of(state)
    kept = jax.tree.map(lambda x: x.dtype, queue.batch)
    assert kept == jax.tree.map(lambda x: x.dtype, batch)
    perturbed = queue.adversarial
    assert perturbed is None or perturbed.dtype == dtype


@pytest.mark.slow
@wrappers
def test_wrapper_is_finite_in_bfloat16(case):
  grad_fn = case.make()
  carry = start(case, grad_fn, jnp.bfloat16, branched=True)
  step = compiled(grad_fn)
  chex.assert_tree_all_finite(step(carry, make_batch(0, jnp.bfloat16), 0)[1])


def is_matrix(params):
  return jax.tree.map(lambda x: x.ndim > 1, params)


def is_not_matrix(params):
  return jax.tree.map(lambda x: x.ndim <= 1, params)


OPTIMIZERS = {
  'chain': optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05)),
  'multi_steps': optax.MultiSteps(optax.sgd(0.1), every_k_schedule=2),
  'masked': optax.chain(
    optax.masked(optax.sgd(0.1, momentum=0.5), is_matrix),
    optax.masked(optax.set_to_zero(), is_not_matrix),
  ),
  'inject_hyperparams': optax.inject_hyperparams(conadv.lars)(
    learning_rate=0.5, weight_decay=1e-4, trust_coefficient=0.1
  ),
}


def fed():
  """`wrap` with every optimizer, the others with one of them in turn.

  What an optimizer sees of them has the form of what it sees of `wrap`.
  """
  turns = itertools.cycle(OPTIMIZERS)
  return [
    pytest.param(*case.values, optimizer, id=f'{optimizer}-{case.id}')
    for case in cases('gradient', forms=('everything', 'reuse_gradient'))
    for optimizer in (
      OPTIMIZERS if case.id.startswith('wrap-') else [next(turns)]
    )
  ]


@pytest.mark.slow
@pytest.mark.parametrize(('case', 'optimizer'), fed())
# MultiSteps divides a gradient by an integer count.
@jax.numpy_dtype_promotion('standard')
def test_wrapper_feeds_any_optimizer(case, optimizer):
  grad_fn, tx = case.make(), OPTIMIZERS[optimizer]
  params, model_state, state = start(case, grad_fn, branched=True)
  batch = make_batch(0)
  steps = 40

  def step(carry, t):
    carry, opt_state = carry
    params, _, _ = carry
    (_, *rest), (loss, _, grads) = call(grad_fn, carry, batch, t)
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return ((params, *rest), opt_state), loss

  @jax.jit
  def train(carry):
    carry = carry, tx.init(carry[0])
    return jax.lax.scan(step, carry, jnp.arange(steps))

  (carry, _), losses = train((params, model_state, state))
  chex.assert_trees_all_equal_shapes_and_dtypes(carry[0], params)
  # Once the ring holds the one batch, its loss falls.
  assert losses[-1] < 0.7 * losses[grad_fn.staleness]


@pytest.mark.slow
@wrappers
def test_wrapper_continues_from_a_checkpoint_bit_for_bit(case, tmp_path):
  grad_fn = case.make()
  begin = start(case, grad_fn, branched=True)
  step = compiled(grad_fn)
  half, _ = loop(step, begin, range(4))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'carry', half)
    checkpointer.wait_until_finished()
    shapes = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
    restored = checkpointer.restore(tmp_path / 'carry', shapes)
  assert jax.tree.structure(restored) == jax.tree.structure(half)
  chex.assert_trees_all_equal(restored, half)
  chex.assert_trees_all_equal_dtypes(restored, half)
  chex.assert_trees_all_equal(
    loop(step, restored, range(4, 7)), loop(step, begin, range(7))
  )
