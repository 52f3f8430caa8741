"""Steps of several gradients against a loop that keeps them in a list."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from meshes import make_mesh, on

import conadv_optax as conadv

PARAMS = {'w': jnp.array([1.0, -2.0]), 'b': jnp.float32(3.0)}


def make_grads(t):
  rng = np.random.default_rng(t)
  return {
    'w': jnp.asarray(rng.normal(size=2), jnp.float32),
    'b': jnp.asarray(rng.normal(), jnp.float32),
  }


def make_optimizer():
  return conadv.lars(0.1, weight_decay=1e-2, trust_coefficient=0.1, mask=True)


TX = conadv.adaptive_multi_steps(make_optimizer())
update = jax.jit(TX.update)


def run(calls):
  params, state, every = PARAMS, TX.init(PARAMS), []
  for t, (count, scale) in enumerate(calls):
    updates, state = update(
      make_grads(t),
      state,
      params,
      micro_batches=jnp.int32(count),
      learning_rate_scale=jnp.float32(scale),
    )
    params = optax.apply_updates(params, updates)
    every.append(params)
  return every


def naive_run(calls):
  """The same with a list, whose first call says how long it gets."""
  tx = make_optimizer()
  params, state, every = PARAMS, tx.init(PARAMS), []
  waiting, wanted = [], None
  for t, call in enumerate(calls):
    if not waiting:
      wanted = call
    waiting.append(make_grads(t))
    if len(waiting) == wanted[0]:
      mean = jax.tree.map(lambda *g: sum(g) / len(g), *waiting)
      updates, state = tx.update(mean, state, params)
      params = jax.tree.map(
        lambda w, u, c=wanted[1]: w + c * u, params, updates
      )
      waiting = []
    every.append(params)
  return every


@settings(max_examples=20, deadline=None)
@given(
  st.lists(
    st.tuples(st.integers(1, 4), st.sampled_from([1.0, 2.0, 0.5])),
    min_size=1,
    max_size=12,
  )
)
def test_no_gradient_is_lost_or_counted_in_two_steps(calls):
  chex.assert_trees_all_close(run(calls), naive_run(calls), rtol=1e-5)


def test_with_one_micro_batch_it_is_the_optimizer():
  for make in (make_optimizer, lambda: optax.sgd(0.1, momentum=0.9)):
    tx = make()
    ours = conadv.adaptive_multi_steps(tx)
    params, state, expected = PARAMS, ours.init(PARAMS), tx.init(PARAMS)
    for t in range(3):
      updates, state = ours.update(make_grads(t), state, params)
      wanted, expected = tx.update(make_grads(t), expected, params)
      chex.assert_trees_all_close(updates, wanted, rtol=1e-6)
      chex.assert_trees_all_close(state.inner, expected, rtol=1e-6)
      params = optax.apply_updates(params, updates)


def test_a_fixed_number_is_optax_multi_steps():
  tx = optax.sgd(0.1, momentum=0.9)
  ours = conadv.adaptive_multi_steps(tx)
  theirs = optax.MultiSteps(tx, every_k_schedule=3)
  state, expected = ours.init(PARAMS), theirs.init(PARAMS)
  # MultiSteps divides a gradient by an integer count.
  their_update = jax.numpy_dtype_promotion('standard')(jax.jit(theirs.update))
  our_update = jax.jit(ours.update)
  for t in range(7):
    updates, state = our_update(
      make_grads(t), state, PARAMS, micro_batches=jnp.int32(3)
    )
    wanted, expected = their_update(make_grads(t), expected, PARAMS)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-5, atol=1e-7)


def test_on_explicit_axes_outside_of_jit():
  mesh = make_mesh(4, kind=AxisType.Explicit)
  w = on(mesh, np.arange(4, dtype=np.float32), 'data')
  tx = conadv.adaptive_multi_steps(optax.sgd(0.1))
  with jax.set_mesh(mesh):
    state = tx.init(w)
    for count, updates in ((2, 0.0), (2, -0.1), (1, -0.1)):
      got, state = tx.update(w, state, w, micro_batches=jnp.int32(count))
      np.testing.assert_allclose(got, updates * np.arange(4), rtol=1e-6)
      assert got.sharding == w.sharding


def test_parameters_that_are_integers_have_a_sum_too():
  state = conadv.adaptive_multi_steps(optax.sgd(0.1)).init(
    {'count': jnp.ones(3, jnp.int32)}
  )
  assert state.gradients['count'].dtype == jnp.float32


def test_bfloat16_gradients_are_summed_in_float32():
  tx = conadv.adaptive_multi_steps(optax.sgd(1.0))
  params = jnp.zeros([], jnp.bfloat16)
  state = tx.init(params)
  step = jax.jit(tx.update)
  # In bfloat16 256 + 1 is 256.
  for gradient in (256.0, *[1.0] * 255):
    updates, state = step(
      jnp.bfloat16(gradient), state, params, micro_batches=jnp.int32(256)
    )
  assert updates.dtype == jnp.bfloat16
  np.testing.assert_allclose(float(updates), -511 / 256, rtol=4e-3)
  assert state.gradients.dtype == jnp.float32


# The optimizers add bfloat16 to float32.
@jax.numpy_dtype_promotion('standard')
@pytest.mark.parametrize(
  'tx', [optax.sgd(0.1), optax.sgd(0.1, momentum=0.9), optax.adamw(0.1)]
)
def test_bfloat16_gradients_may_give_float32_updates(tx):
  ours = conadv.adaptive_multi_steps(tx)
  theirs = optax.MultiSteps(tx, every_k_schedule=2)
  params = jnp.array([1.0, -2.0])
  state, expected = ours.init(params), theirs.init(params)
  # Their mean is exact in bfloat16.
  for gradient in ([0.5, 1.0], [1.5, -2.0]):
    grads = jnp.asarray(gradient, jnp.bfloat16)
    updates, state = ours.update(grads, state, params, micro_batches=2)
    wanted, expected = theirs.update(grads, expected, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, wanted)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-6)


# Optax mixes dtypes, and divides a gradient by an integer count.
@jax.numpy_dtype_promotion('standard')
@pytest.mark.parametrize(
  'tx',
  [optax.adam(0.1), optax.sgd(0.1, momentum=0.9), optax.adafactor(0.1)],
  ids=['adam', 'momentum', 'adafactor'],
)
def test_bfloat16_parameters_may_have_float32_gradients(tx):
  params = jnp.array([1.0, -2.0], jnp.bfloat16)
  ours = conadv.adaptive_multi_steps(tx)
  theirs = optax.MultiSteps(tx, every_k_schedule=2)
  state, expected = ours.init(params), theirs.init(params)
  step = jax.jit(lambda *a: ours.update(*a, micro_batches=2))
  for t in range(4):
    before, gradient = state, jnp.array([t, 2.0 - t])
    updates, state = step(gradient, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    wanted, expected = theirs.update(gradient, expected, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, wanted)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(state.inner, expected.inner_opt_state)


@pytest.mark.parametrize(
  'tx',
  [
    optax.sgd(0.1, momentum=0.9),
    conadv.lars(0.1, weight_decay=1e-2, mask=True),
    optax.adam(0.1),
  ],
  ids=['momentum', 'lars', 'adam'],
)
@jax.numpy_dtype_promotion('standard')
def test_parameters_may_be_complex(tx):
  params = {'w': jnp.array([1 + 2j, -1j]), 'b': jnp.float32(3.0)}
  ours = conadv.adaptive_multi_steps(tx)
  state, expected = ours.init(params), tx.init(params)
  our_update = jax.jit(
    lambda *a: ours.update(*a, micro_batches=3, learning_rate_scale=0.5)
  )
  their_update = jax.jit(tx.update)
  for t in range(6):
    grads = jax.tree.map(lambda w, t=t: np.float32(t + 1) * w, params)
    before = state
    updates, state = our_update(grads, state, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, before)
    wanted = jax.tree.map(np.zeros_like, params)
    if t % 3 == 2:
      # The mean of three in a row is that in the middle.
      mean = jax.tree.map(lambda w, t=t: np.float32(t) * w, params)
      wanted, expected = their_update(mean, expected, params)
    wanted = jax.tree.map(lambda u: np.float32(0.5) * u, wanted)
    chex.assert_trees_all_close(updates, wanted, rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(updates, params)


def test_a_key_in_the_state_of_the_optimizer_is_left_as_it_is():
  tx = optax.chain(
    optax.GradientTransformation(
      lambda params: jax.random.key(0),
      lambda g, key, params=None: (g, jax.random.fold_in(key, 1)),
    ),
    optax.sgd(0.1),
  )
  ours = conadv.adaptive_multi_steps(tx)
  _, state = ours.update(make_grads(0), ours.init(PARAMS), PARAMS)
  chex.assert_trees_all_equal(
    jax.random.key_data(state.inner[0]),
    jax.random.key_data(jax.random.fold_in(jax.random.key(0), 1)),
  )


def test_other_arguments_go_to_the_optimizer():
  def update_fn(updates, state, params=None, *, factor, **extra_args):
    del params, extra_args
    return jax.tree.map(lambda g: factor * g, updates), state

  tx = conadv.adaptive_multi_steps(
    optax.GradientTransformationExtraArgs(lambda params: (), update_fn)
  )
  updates, _ = tx.update(
    make_grads(0), tx.init(PARAMS), PARAMS, factor=3.0, unknown=1
  )
  expected = jax.tree.map(lambda g: 3 * g, make_grads(0))
  chex.assert_trees_all_close(updates, expected)
  plain = conadv.adaptive_multi_steps(optax.sgd(0.1))
  plain.update(make_grads(0), plain.init(PARAMS), PARAMS, unknown=1)


def test_state_is_donated_and_nothing_is_compiled_twice():
  traces = []

  def step(params, state, t, count):
    traces.append(0)
    grads = jax.tree.map(lambda w: w * t, params)
    updates, state = TX.update(grads, state, params, micro_batches=count)
    return optax.apply_updates(params, updates), state

  step = jax.jit(step, donate_argnums=(0, 1))
  params = jax.tree.map(jnp.copy, PARAMS)
  state = TX.init(params)
  for t, count in enumerate((1, 2, 2, 4, 4, 4, 8)):
    before = jax.tree.leaves((params, state))
    params, state = step(params, state, jnp.float32(t), jnp.int32(count))
    assert all(leaf.is_deleted() for leaf in before)
  assert len(traces) == 1


@pytest.mark.parametrize(
  ('count', 'given', 'kind'),
  [
    (0, '0', ValueError),
    (jnp.int32(-1), '-1', ValueError),
    (jnp.array([1, 2]), '[1, 2]', ValueError),
    (2.7, '2.7', TypeError),
    (jnp.float32(2), '2.0', TypeError),
    (True, 'True', TypeError),
  ],
)
def test_a_number_that_is_none_is_an_error(count, given, kind):
  with pytest.raises(kind) as error:
    TX.update(make_grads(0), TX.init(PARAMS), PARAMS, micro_batches=count)
  assert 'an integer scalar of at least 1' in str(error.value)
  assert f'micro_batches={given} ' in str(error.value)


@pytest.mark.parametrize('name', ['micro_batches', 'learning_rate_scale'])
def test_a_schedule_is_told_where_to_call_it(name):
  schedule = {name: optax.constant_schedule(2)}
  with pytest.raises(TypeError, match=f'`{name}=schedule'):
    TX.update(make_grads(0), TX.init(PARAMS), PARAMS, **schedule)


def test_a_fraction_that_cannot_be_seen_is_an_error():
  with pytest.raises(TypeError, match=r'Given float32\[\]'):
    update(make_grads(0), TX.init(PARAMS), PARAMS, micro_batches=2.7)


def test_a_number_below_one_that_cannot_be_seen_is_taken_for_one():
  updates, _ = update(
    make_grads(0), TX.init(PARAMS), PARAMS, micro_batches=jnp.int32(0)
  )
  expected, _ = update(make_grads(0), TX.init(PARAMS), PARAMS)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
