"""The guard against a loop in plain Python, with buffers given back."""

import chex
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conadv_optax as conadv


def oracle(accuracies, max_drop):
  """The epoch whose model one ends with, and whether training stopped."""
  previous = 0.0
  for epoch, accuracy in enumerate(accuracies):
    if accuracy - previous < -max_drop:
      return epoch - 1, True
    previous = accuracy
  return len(accuracies) - 1, False


@settings(max_examples=50, deadline=None)
@given(
  # In binary fractions, which float32 subtracts exactly.
  right=st.lists(st.integers(0, 64), min_size=1, max_size=8),
  max_drop=st.sampled_from([0.0, 0.125, 0.25]),
)
def test_it_is_a_loop_that_stops(right, max_drop):
  accuracies = [n / 64 for n in right]
  guard = conadv.overfitting_guard(max_drop=max_drop)
  tree = {'epoch': jnp.int32(-1), 'w': jnp.zeros(2, jnp.bfloat16)}
  state, stopped = guard.init(tree), []
  for epoch, accuracy in enumerate(accuracies):
    tree = {'epoch': jnp.int32(epoch), 'w': jnp.full(2, epoch, jnp.bfloat16)}
    tree, state = guard.update(accuracy, state, tree)
    stopped.append(bool(state.tripped))
  epoch, stops = oracle(accuracies, max_drop)
  assert int(tree['epoch']) == epoch
  chex.assert_trees_all_equal(tree['w'], jnp.full(2, epoch, jnp.bfloat16))
  chex.assert_trees_all_equal(state.kept, tree)
  assert stopped == [stops and e > epoch for e in range(len(accuracies))]
  assert float(state.robust_accuracy) == accuracies[epoch]


@pytest.mark.parametrize('jit', [False, True])
def test_it_outlives_a_step_that_gives_its_buffers_back(jit):
  guard = conadv.overfitting_guard()
  update = jax.jit(guard.update) if jit else guard.update
  train = jax.jit(lambda w: w + 1, donate_argnums=0)
  w = jnp.zeros(3)
  state = guard.init(w)
  for accuracy in (0.3, 0.5):
    w = train(w)
    w, state = update(accuracy, state, w)
  w = train(train(w))
  w, state = update(0.2, state, w)
  assert bool(state.tripped)
  chex.assert_trees_all_equal(w, jnp.full(3, 2.0))
  # It stays tripped, however good the accuracy is.
  w, state = update(1.0, state, train(w))
  assert bool(state.tripped)
  chex.assert_trees_all_equal(w, jnp.full(3, 2.0))


def test_an_accuracy_that_is_not_a_number_trips_it():
  guard = conadv.overfitting_guard()
  state = guard.init(jnp.zeros(3))
  w, state = guard.update(jnp.nan, state, jnp.full(3, jnp.nan))
  assert bool(state.tripped)
  chex.assert_trees_all_equal(w, jnp.zeros(3))


def test_the_state_keeps_its_form():
  guard = conadv.overfitting_guard()
  tree = {'w': jnp.ones(2, jnp.bfloat16), 'step': jnp.int32(0)}
  state = guard.init(tree)
  _, new = jax.jit(guard.update)(jnp.bfloat16(0.5), state, tree)
  chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
  assert state.robust_accuracy.dtype == jnp.float32


@pytest.mark.parametrize('share', [-0.2, 20.0])
def test_what_is_not_a_share_is_told(share):
  with pytest.raises(ValueError, match=f'max_drop={share}.*per cent'):
    conadv.overfitting_guard(max_drop=share)
  guard = conadv.overfitting_guard()
  state = guard.init(jnp.ones(2))
  with pytest.raises(ValueError, match=f'robust_accuracy={share}.*per cent'):
    guard.update(share, state, jnp.ones(2))


@pytest.mark.parametrize('jit', [False, True])
@pytest.mark.parametrize('tree', [jnp.ones(2), {'w': jnp.ones([])}])
def test_arguments_in_another_order_are_told(tree, jit):
  guard = conadv.overfitting_guard()
  update = jax.jit(guard.update) if jit else guard.update
  write = r'Write `guard\.update\(robust_accuracy, state, tree\)`'
  for order in (
    (tree, guard.init(tree), 0.5),
    (guard.init(tree), 0.5, tree),
    (0.5, tree, guard.init(tree)),
  ):
    with pytest.raises(TypeError, match=write):
      update(*order)


def test_a_schedule_for_the_drop_is_told():
  with pytest.raises(TypeError, match=r'max_drop=schedule\(count\)'):
    conadv.overfitting_guard(max_drop=lambda count: 0.2)
