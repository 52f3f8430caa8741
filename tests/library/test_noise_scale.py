"""The noise scale against known covariances, and against NumPy."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_model, loss_fn, make_batch
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType

import conadv_optax as conadv


def of_groups(groups):
  """Mean gradient and second moment, as a step returns them."""
  mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), groups)
  return mean, jax.tree.map(
    lambda g: jnp.mean(g.astype(jnp.float32) ** 2, axis=0), groups
  )


def run(tracker, steps):
  """The estimate after some steps, each the gradients of all groups."""
  state = tracker.init()
  for groups in steps:
    grads, second_moment = of_groups(groups)
    scale, state = tracker.update(grads, state, second_moment=second_moment)
  return scale, state


def test_a_known_covariance_is_found_within_five_percent():
  groups, batch, steps = 8, 64, 2000
  rng = np.random.default_rng(0)
  # Of one example: gradient of norm 2, and covariance of trace 400.
  true = rng.normal(size=50)
  true *= 2 / np.linalg.norm(true)
  deviation = rng.uniform(0.2, 2.0, size=50)
  deviation *= np.sqrt(400 / np.sum(deviation**2))
  noise = rng.normal(size=(steps, groups, 50)) / np.sqrt(batch / groups)
  drawn = jnp.asarray(true + deviation * noise, jnp.float32)
  tracker = conadv.noise_scale(batch, groups, decay=0.999)

  def step(state, groups):
    grads, second_moment = of_groups(groups)
    scale, state = tracker.update(grads, state, second_moment=second_moment)
    return state, scale

  state, scales = jax.lax.scan(step, tracker.init(), drawn)
  np.testing.assert_allclose(state.noise, 400, rtol=0.05)
  np.testing.assert_allclose(state.signal, 4, rtol=0.05)
  np.testing.assert_allclose(scales[-1], 100, rtol=0.05)


@settings(max_examples=25, deadline=None)
@given(
  groups=st.sampled_from([2, 3, 8]),
  examples=st.integers(1, 5),
  steps=st.integers(1, 4),
  decay=st.sampled_from([0.0, 0.5, 0.99]),
  seed=st.integers(0, 2**16),
)
def test_the_formulas_are_those_of_the_paper(
  groups, examples, steps, decay, seed
):
  rng = np.random.default_rng(seed)
  drawn = [
    {'a': 1 + rng.normal(size=(groups, 3)), 'b': rng.normal(size=(groups, 2))}
    for _ in range(steps)
  ]
  small, big = examples, groups * examples
  noise = signal = 0.0
  for tree in drawn:
    flat = np.concatenate([tree['a'], tree['b']], axis=1)
    norm_small = np.mean([np.dot(g, g) for g in flat])
    norm_big = np.sum(np.mean(flat, axis=0) ** 2)
    s = (norm_small - norm_big) / (1 / small - 1 / big)
    g = (big * norm_big - small * norm_small) / (big - small)
    noise = decay * noise + (1 - decay) * s
    signal = decay * signal + (1 - decay) * g
  noise, signal = (x / (1 - decay**steps) for x in (noise, signal))

  scale, state = run(
    conadv.noise_scale(big, groups, decay=decay),
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), drawn),
  )
  np.testing.assert_allclose(state.noise, noise, rtol=1e-4)
  np.testing.assert_allclose(state.signal, signal, rtol=1e-3, atol=1e-4)
  if signal > 0.1:
    np.testing.assert_allclose(scale, noise / signal, rtol=1e-2)
  elif signal < -0.1:
    assert scale == np.inf


def test_the_gradients_are_those_of_the_devices():
  mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))
  grad_fn = conadv.data_parallel(
    # The gradient of each example is the example.
    conadv.plain(lambda w, batch: jnp.mean(batch @ w)),
    mesh,
    second_moment=True,
  )
  tracker = conadv.noise_scale(batch_size=32, groups=8)
  w = jnp.zeros(3)

  @jax.jit
  def step(batch):
    (_, aux), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
    return tracker.update(
      grads, tracker.init(), second_moment=aux.second_moment
    )

  examples = np.random.default_rng(0).normal(size=(32, 3)) + 2
  # The same examples, alike on each device: groups differ most.
  for batch in (examples, examples[np.argsort(examples[:, 0])]):
    devices = batch.reshape(8, 4, 3).mean(axis=1)
    # The unbiased variance of a group is that of an example over its size.
    noise = 4 * np.sum(np.var(devices, axis=0, ddof=1))
    signal = np.sum(devices.mean(axis=0) ** 2) - noise / 32
    scale, state = step(jnp.asarray(batch, jnp.float32))
    np.testing.assert_allclose(state.noise, noise, rtol=1e-4)
    np.testing.assert_allclose(state.signal, signal, rtol=1e-4)
    np.testing.assert_allclose(scale, noise / signal, rtol=1e-4)


@pytest.mark.slow
def test_it_follows_conadv_with_its_branches():
  grad_fn = conadv.accumulate(
    conadv.wrap(loss_fn, 0, attack=conadv.fgsm(0.1), has_state=True),
    4,
    second_moment=True,
  )
  params, model_state = conadv.dual_bn.split(*init_model())
  state = grad_fn.init(params, [])
  (_, aux), grads, _ = jax.jit(grad_fn.value_and_grad)(
    params, state, make_batch(1), model_state=model_state
  )
  tracker = conadv.noise_scale(batch_size=16, groups=4)
  scale, _ = tracker.update(
    grads, tracker.init(), second_moment=aux.second_moment
  )
  # Each micro-batch by itself, and the formulas on all leaves of both branches.
  alone = conadv.wrap(loss_fn, 0, attack=conadv.fgsm(0.1), has_state=True)
  of_groups = np.stack(
    [
      ravel_pytree(
        alone.value_and_grad(
          params,
          state,
          jax.tree.map(lambda x, k=k: x[k::4], make_batch(1)),
          model_state=model_state,
        )[1]
      )[0]
      for k in range(4)
    ]
  )
  noise = 4 * np.sum(np.var(of_groups, axis=0, ddof=1))
  signal = np.sum(of_groups.mean(axis=0) ** 2) - noise / 16
  np.testing.assert_allclose(scale, noise / signal, rtol=1e-3)


def test_bfloat16_gradients_give_float32_numbers():
  rng = np.random.default_rng(0)
  groups = jnp.asarray(1 + rng.normal(size=(8, 1000)), jnp.bfloat16)
  tracker = conadv.noise_scale(batch_size=8, groups=8)
  scale, state = run(tracker, [groups])
  expected, _ = run(tracker, [groups.astype(jnp.float32)])
  for number in (scale, *state):
    chex.assert_shape(number, ())
    assert number.dtype == jnp.float32
  np.testing.assert_allclose(scale, expected, rtol=0.01)


def test_complex_gradients_are_pairs_of_real_ones():
  rng = np.random.default_rng(0)
  groups = jnp.asarray(1 + rng.normal(size=(8, 5, 2)), jnp.float32)
  tracker = conadv.noise_scale(16, 8)
  second_moment = jnp.mean(jnp.sum(groups**2, axis=2), axis=0)
  grads = jnp.mean(jax.lax.complex(groups[..., 0], groups[..., 1]), axis=0)
  scale, state = tracker.update(
    grads, tracker.init(), second_moment=second_moment
  )
  numbers = np.asarray(groups, np.float64).reshape(8, 10)
  noise = 2 * np.sum(np.var(numbers, axis=0, ddof=1))
  signal = np.sum(numbers.mean(axis=0) ** 2) - noise / 16
  np.testing.assert_allclose(state.noise, noise, rtol=1e-5)
  np.testing.assert_allclose(state.signal, signal, rtol=1e-5)
  np.testing.assert_allclose(scale, noise / signal, rtol=1e-5)


@pytest.mark.parametrize(
  ('groups', 'expected'),
  [
    # Opposite gradients have a mean of zero: |G|^2 is estimated below zero.
    ([[1.0], [-1.0]], np.inf),
    ([[0.0], [0.0]], np.nan),
    ([[3.0], [3.0]], 0.0),
  ],
)
def test_the_limits_are_what_the_docs_say(groups, expected):
  scale, _ = run(conadv.noise_scale(2, 2), [jnp.asarray(groups)])
  np.testing.assert_equal(float(scale), expected)


@pytest.mark.parametrize('value', [np.nan, np.inf, 1e30])
@pytest.mark.parametrize('decay', [0.0, 0.9])
def test_a_step_that_is_not_finite_is_left_out(value, decay):
  tracker = conadv.noise_scale(2, 2, decay=decay)
  good = [jnp.array([[1.0], [2.0]]), jnp.array([[3.0], [2.0]])]
  # The square of 1e30 is more than float32 holds.
  bad = jnp.array([[1.0], [value]])
  expected = run(tracker, good)
  chex.assert_trees_all_equal(
    run(tracker, [bad, good[0], bad, good[1], bad]), expected
  )
  chex.assert_tree_all_finite(expected)
  scale, state = run(tracker, [bad])
  assert np.isnan(scale)
  chex.assert_trees_all_equal(state, tracker.init())


def test_equal_groups_have_no_negative_noise():
  # A third is rounded, and the square of the mean is above the mean square.
  for value in np.linspace(0.1, 1, 50):
    scale, state = run(conadv.noise_scale(3, 3), [jnp.full((3, 7), value)])
    assert 0 <= float(scale) < 1e-5
    assert float(state.noise) >= 0


@pytest.mark.parametrize(
  ('error', 'arguments', 'says'),
  [
    (ValueError, {'batch_size': 64, 'groups': 1}, 'groups=1'),
    (ValueError, {'batch_size': 12, 'groups': 8}, 'batch_size=12 with groups'),
    (ValueError, {'batch_size': 0, 'groups': 8}, 'batch_size=0'),
    (ValueError, {'batch_size': 64, 'groups': 8, 'decay': -0.1}, 'decay=-0.1'),
    (ValueError, {'batch_size': 64, 'groups': 8, 'decay': 1.0}, 'decay=1.0'),
    (TypeError, {'batch_size': 64.0, 'groups': 8}, 'batch_size=64.0'),
    (TypeError, {'batch_size': 64, 'groups': 8.0}, 'groups=8.0'),
    (
      TypeError,
      {'batch_size': 64, 'groups': 8, 'decay': lambda count: 0.9},
      'decay=schedule(count)',
    ),
  ],
)
def test_wrong_arguments_are_told(error, arguments, says):
  with pytest.raises(error, match=re.escape(says)):
    conadv.noise_scale(**arguments)


def test_arguments_in_another_order_are_told():
  tracker, grads = conadv.noise_scale(64, 8), jnp.ones(3)
  write = r'`tracker\.update\(grads, state, second_moment'
  with pytest.raises(TypeError, match=write):
    tracker.update(tracker.init(), grads, second_moment=grads)


def test_a_second_moment_that_is_none_or_not_these_gradients_is_told():
  tracker = conadv.noise_scale(64, 8)
  with pytest.raises(ValueError) as error:
    tracker.update(jnp.ones(3), tracker.init(), second_moment=None)
  assert 'second_moment=True' in str(error.value)
  assert 'second_moment=aux.second_moment' in str(error.value)
  with pytest.raises(ValueError, match='differ in'):
    tracker.update(
      {'a': jnp.ones(3)}, tracker.init(), second_moment={'a': jnp.ones(2)}
    )
