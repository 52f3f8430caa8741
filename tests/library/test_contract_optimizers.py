"""The contract of every public optimizer, and of every schedule for one."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax.training.train_state import TrainState
from public_names import (
  cases,
  make_batch,
  make_model_state,
  make_params,
  plain_loss,
)

import conadv_optax as conadv

optimizers = pytest.mark.parametrize('case', cases('optimizer'))
# Without those that wrap another optimizer, with a rate of its own.
rated_optimizers = pytest.mark.parametrize(
  'case',
  [
    case
    for case in cases('optimizer')
    if 'learning_rate' in inspect.signature(case.values[0].function).parameters
  ],
)
# With those that scale a gradient for the optimizer after them.
transformations = pytest.mark.parametrize(
  'case', cases('optimizer') + cases('scaling')
)
dtypes = pytest.mark.parametrize(
  'dtype', [jnp.float32, jnp.bfloat16], ids=lambda dtype: dtype.__name__
)


gradient = jax.jit(jax.grad(plain_loss))


def grads_at(params, seed=0):
  return gradient(params, make_batch(seed))


def run(tx, params, seeds=(0, 1, 2), **extra_args):
  """The updates of a few steps, one by one, and the state after them."""
  state, every = tx.init(params), []
  for seed in seeds:
    grads = grads_at(params, seed)
    updates, state = tx.update(grads, state, params, **extra_args)
    params = optax.apply_updates(params, updates)
    every.append(updates)
  return every, state


@transformations
def test_optimizer_ignores_unknown_arguments(case):
  tx, params = case.make(), make_params()
  chex.assert_trees_all_equal(
    run(tx, params, value=1.0, unknown='argument'), run(tx, params)
  )


@transformations
def test_optimizer_says_what_of_its_state_is_like_the_parameters(case):
  tx, params = case.make(), make_params()
  state = tx.init(params)
  marked = optax.tree_map_params(tx, lambda x: 'like', state)
  shapes = [x.shape for x in jax.tree.leaves(params)]
  leaves = zip(jax.tree.leaves(marked), jax.tree.leaves(state), strict=True)
  found = [x.shape for mark, x in leaves if isinstance(mark, str)]
  assert found == shapes * (len(found) // len(shapes))


@transformations
def test_optimizer_is_a_link_of_a_chain(case):
  tx, params = case.make(), make_params()
  chained = optax.chain(optax.clip(0.01), tx, optax.scale(0.5))
  got, _ = run(chained, params, seeds=(0,), value=1.0)
  clipped = jax.tree.map(lambda g: jnp.clip(g, -0.01, 0.01), grads_at(params))
  alone, _ = tx.update(clipped, tx.init(params), params)
  chex.assert_trees_all_close(got[0], jax.tree.map(lambda u: 0.5 * u, alone))


@transformations
def test_optimizer_sees_only_what_a_mask_lets_through(case):
  tx, params = case.make(), make_params()
  mask = {'dense': True, 'head': True, 'norm': False}
  masked, grads = optax.masked(tx, mask), grads_at(params)
  got, _ = masked.update(grads, masked.init(params), params)

  def without(tree):
    return {name: tree[name] for name in ('dense', 'head')}

  rest, _ = tx.update(without(grads), tx.init(without(params)), without(params))
  chex.assert_trees_all_close(without(got), rest)
  chex.assert_trees_all_equal(got['norm'], grads['norm'])


@transformations
def test_optimizer_steps_once_for_several_batches(case):
  tx, params = case.make(), make_params()
  several = optax.MultiSteps(tx, every_k_schedule=2)
  state, single = several.init(params), tx.init(params)
  # MultiSteps divides a gradient by an integer count.
  update = jax.numpy_dtype_promotion('standard')(jax.jit(several.update))
  for first, second in ((0, 1), (2, 3)):
    grads = [grads_at(params, seed) for seed in (first, second)]
    updates, state = update(grads[0], state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    updates, state = update(grads[1], state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
    expected, single = tx.update(mean, single, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-4, atol=1e-6)
    params = optax.apply_updates(params, updates)


@rated_optimizers
def test_optimizer_takes_a_new_learning_rate_without_recompiling(case):
  params = make_params()
  tx = optax.inject_hyperparams(case.function)(**case.arguments)
  grads, state, traces = grads_at(params), tx.init(params), []

  @jax.jit
  def update(grads, state, params):
    traces.append(0)
    return tx.update(grads, state, params)

  for rate in (0.5, 1.0, 0.0, 3.0):
    state.hyperparams['learning_rate'] = jnp.float32(rate)
    updates, _ = update(grads, state, params)
    plain = case.make(learning_rate=rate)
    expected, _ = plain.update(grads, plain.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)
  assert len(traces) == 1


@rated_optimizers
def test_optimizer_compiles_once_for_traced_learning_rates(case):
  params, traces = make_params(), []

  @jax.jit
  def step(learning_rate, params, state, grads):
    traces.append(0)
    tx = case.make(learning_rate=learning_rate)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  state = case.make().init(params)
  for t in range(6):
    rate, grads, before = jnp.float32(1 / (1 + t)), grads_at(params), params
    fixed = case.make(learning_rate=1 / (1 + t))
    expected, _ = fixed.update(grads, state, params)
    params, state = step(rate, params, state, grads)
    chex.assert_trees_all_close(
      params, optax.apply_updates(before, expected), rtol=1e-5, atol=1e-6
    )
  assert len(traces) == 1


@transformations
def test_optimizer_in_a_scan_is_a_loop(case):
  tx, params = case.make(), make_params()

  def step(carry, batch):
    params, state = carry
    grads = jax.grad(plain_loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), updates

  batches = jax.tree.map(lambda *x: jnp.stack(x), *map(make_batch, range(3)))
  (_, state), updates = jax.lax.scan(step, (params, tx.init(params)), batches)
  every, last = run(tx, params)
  stacked = jax.tree.map(lambda *x: jnp.stack(x), *every)
  chex.assert_trees_all_close(
    (updates, state), (stacked, last), rtol=1e-4, atol=1e-6
  )


@transformations
def test_optimizer_state_goes_through_a_cond(case):
  tx, params = case.make(), make_params()
  _, state = run(tx, params)
  grads = grads_at(params)

  @jax.jit
  def maybe(flag):
    return jax.lax.cond(
      flag,
      lambda: tx.update(grads, state, params),
      lambda: (jax.tree.map(jnp.zeros_like, grads), state),
    )

  chex.assert_trees_all_close(
    maybe(True), tx.update(grads, state, params), rtol=1e-5
  )
  chex.assert_trees_all_equal(maybe(False)[1], state)


@transformations
def test_optimizer_gives_its_buffers_back(case):
  tx, params = case.make(), make_params()
  expected, _ = run(tx, params, seeds=(0,))
  expected = optax.apply_updates(params, expected[0])

  def step(params, state, batch):
    grads = jax.grad(plain_loss)(params, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state

  # A donated buffer that cannot be used is a warning, hence an error here.
  step = jax.jit(step, donate_argnums=(0, 1))
  given = (params, tx.init(params))
  params, state = step(*given, make_batch(0))
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
  chex.assert_trees_all_close(params, expected, rtol=1e-5)
  step(params, state, make_batch(1))


@transformations
def test_optimizer_initialises_from_shapes(case):
  tx, params = case.make(), make_params(jnp.bfloat16)
  shapes = jax.eval_shape(lambda: params)
  state = tx.init(params)
  chex.assert_trees_all_equal_shapes_and_dtypes(tx.init(shapes), state)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(tx.init, shapes), jax.eval_shape(lambda: state)
  )


@transformations
@dtypes
def test_optimizer_keeps_dtypes(case, dtype):
  tx, params = case.make(), make_params(dtype)
  (*_, updates), state = run(tx, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
  chex.assert_tree_all_finite((updates, state))


@rated_optimizers
@dtypes
def test_optimizer_finds_the_minimum_of_a_quadratic(case, dtype):
  steps = 400
  tx = case.make(learning_rate=optax.linear_schedule(0.5, 0.0, steps))
  target = make_params(dtype)
  params = jax.tree.map(lambda x: jnp.full_like(x, 0.5), target)

  def loss_fn(params):
    gaps = jax.tree.map(lambda p, t: jnp.sum((p - t) ** 2), params, target)
    return sum(jax.tree.leaves(gaps))

  def step(carry, _):
    params, state = carry
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), loss

  _, losses = jax.lax.scan(step, (params, tx.init(params)), length=steps)
  assert losses[-1] < 1e-2 * losses[0]


@transformations
def test_optimizer_drives_a_train_state(case):
  tx, params = case.make(), make_params()
  state = TrainState.create(apply_fn=None, params=params, tx=tx)
  for seed in range(3):
    state = state.apply_gradients(grads=grads_at(state.params, seed))
  every, opt_state = run(tx, params)
  for updates in every:
    params = optax.apply_updates(params, updates)
  chex.assert_trees_all_equal(state.params, params)
  chex.assert_trees_all_equal(state.opt_state, opt_state)


@optimizers
@dtypes
def test_optimizer_state_survives_a_checkpoint(case, dtype, tmp_path):
  tx, params = case.make(), make_params(dtype)
  _, state = run(tx, params)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'state', state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(
      tmp_path / 'state', jax.eval_shape(tx.init, params)
    )
  chex.assert_trees_all_equal(restored, state)
  chex.assert_trees_all_equal_dtypes(restored, state)


@transformations
def test_optimizer_treats_the_main_branch_as_the_ordinary_tree(case):
  tx, plain = case.make(), make_params()
  params, model_state = conadv.dual_bn.split(plain, make_model_state())
  del model_state
  grads = grads_at(plain)
  own = {
    'dense': {'kernel': None},
    'head': {'kernel': None},
    'norm': {'scale': -jnp.ones(4)},
  }
  branched = conadv.dual_bn.Branched(grads, {'adversarial': own})
  update = jax.jit(tx.update)
  updates, state = update(branched, tx.init(params), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
  expected, _ = tx.update(grads, tx.init(plain), plain)
  chex.assert_trees_all_close(updates.main, expected, rtol=1e-4, atol=1e-6)
  moved = updates.branches['adversarial']['norm']['scale']
  assert jnp.all(moved > 0), 'Each branch follows its own gradient.'
  update(branched, state, optax.apply_updates(params, updates))


@pytest.mark.parametrize('case', cases('schedule'))
def test_schedule_takes_python_and_traced_steps(case):
  schedule = case.make()
  if not callable(schedule):
    schedule = optax.constant_schedule(schedule)
  compiled = jax.jit(schedule)
  for step in (0, 1, 4, 5, 6, 19, 20, 21, 99):
    value = compiled(jnp.int32(step))
    chex.assert_shape(value, ())
    np.testing.assert_allclose(value, schedule(step), rtol=1e-5)
    assert np.isfinite(value)
    assert value >= 0
  params = make_params()
  tx = optax.sgd(schedule)
  chex.assert_tree_all_finite(run(tx, params))
