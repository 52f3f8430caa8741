"""Attacks against NumPy, and the promise that nothing leaves its ball."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import conadv_optax as conadv

KEY = jax.random.key(0)
# Rounding of the sums in float32, relative to inputs of size about 1.
ULP = 1e-6


def toy(shape=(4, 3, 2), seed=0):
  rng = np.random.default_rng(seed)
  x = rng.uniform(0.2, 0.8, shape).astype(np.float32)
  target = rng.uniform(0, 1, shape).astype(np.float32)
  # The gradient of sum((x - target)**2) / 2 is x - target.
  return jnp.asarray(x), target, lambda x: x - jnp.asarray(target)


def numpy_pgd(x, target, epsilon, size, steps, norm, bounds, sign=1.0):
  clean = x = np.asarray(x, np.float64)
  for _ in range(steps):
    g = sign * (x - target)
    if norm == 'linf':
      x = clean + np.clip(x + size * np.sign(g) - clean, -epsilon, epsilon)
    else:
      for i in range(len(x)):
        g[i] /= np.linalg.norm(g[i])
      x = x + size * g
      for i in range(len(x)):
        length = np.linalg.norm(x[i] - clean[i])
        x[i] = clean[i] + (x[i] - clean[i]) * min(1, epsilon / length)
    x = np.clip(x, *bounds)
  return x


# Every pair of values of any two arguments.
@pytest.mark.parametrize(
  ('norm', 'steps', 'bounds', 'step_size'),
  [
    ('linf', 1, (0.0, 1.0), None),
    ('linf', 2, (0.3, 0.7), 0.03),
    ('linf', 7, (0.0, 1.0), 0.03),
    ('linf', 7, (0.3, 0.7), None),
    ('l2', 1, (0.3, 0.7), 0.03),
    ('l2', 2, (0.0, 1.0), None),
    ('l2', 7, (0.0, 1.0), None),
    ('l2', 7, (0.3, 0.7), 0.03),
  ],
)
def test_pgd_is_the_numpy_loop(norm, steps, bounds, step_size):
  x, target, gradient_fn = toy()
  x = jnp.clip(x, *bounds)
  epsilon = 0.1 if norm == 'linf' else 0.3
  attack = conadv.pgd(
    epsilon,
    step_size=step_size,
    steps=steps,
    norm=norm,
    random_start=False,
    bounds=bounds,
  )
  size = step_size or (epsilon if steps == 1 else 2.5 * epsilon / steps)
  expected = numpy_pgd(x, target, epsilon, size, steps, norm, bounds)
  result = attack.craft(None, gradient_fn, x)
  np.testing.assert_allclose(result, expected, atol=2e-6)


def test_targets_make_the_attack_descend():
  x, target, gradient_fn = toy()
  attack = conadv.pgd(
    0.05, random_start=False, targets=lambda key, batch: batch
  )
  result = attack.craft(None, gradient_fn, x)
  np.testing.assert_allclose(
    result, np.asarray(x) - 0.05 * np.sign(np.asarray(x) - target), atol=ULP
  )


floats = st.floats(-2, 2, width=32)


@given(
  data=st.data(),
  dtype=st.sampled_from(['float32', 'bfloat16', 'float16']),
  norm=st.sampled_from(['linf', 'l2']),
  steps=st.integers(1, 3),
  epsilon=st.one_of(st.just(0.0), st.floats(1e-4, 3)),
  random_start=st.booleans(),
  half_width=st.floats(0, 2),
)
@settings(max_examples=60, deadline=None)
def test_result_stays_in_ball_and_bounds(
  data, dtype, norm, steps, epsilon, random_start, half_width
):
  shape = data.draw(
    st.sampled_from([(1,), (3,), (2, 3), (1, 2, 2), (3, 1, 2, 1)])
  )
  low, high = -half_width, half_width
  x = data.draw(hnp.arrays(np.float32, shape, elements=floats))
  x = jnp.clip(jnp.asarray(x), low, high).astype(dtype)
  # A bound that the dtype cannot hold is one that the clean input may miss.
  low = min(low, float(jnp.min(x)))
  high = max(high, float(jnp.max(x)))
  slope = jnp.asarray(data.draw(hnp.arrays(np.float32, shape, elements=floats)))
  attack = conadv.pgd(
    epsilon,
    steps=steps,
    norm=norm,
    random_start=random_start,
    bounds=(low, high),
  )
  seed = data.draw(st.integers(0, 2**31 - 1))
  result = attack.craft(
    jax.random.key(seed), lambda x: slope * (1 + jnp.abs(x)), x
  )
  chex.assert_equal_shape_suffix([result, x], x.ndim)
  assert result.dtype == x.dtype
  x, result = np.asarray(x, np.float64), np.asarray(result, np.float64)
  assert np.all(np.isfinite(result))
  assert np.all(result >= np.float32(low))
  assert np.all(result <= np.float32(high))
  delta = result - x
  if norm == 'linf':
    assert np.max(np.abs(delta)) <= epsilon * (1 + 1e-6) + 3e-7
  else:
    lengths = np.sqrt(np.sum(delta.reshape(len(x), -1) ** 2, axis=1))
    assert np.max(lengths) <= epsilon * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('scale', [0.0, 1e-30, 1e30])
def test_zero_tiny_and_huge_gradients_are_finite(norm, scale):
  x, _, _ = toy()
  attack = conadv.pgd(0.1, norm=norm, random_start=False)
  result = np.asarray(attack.craft(None, lambda x: jnp.full_like(x, scale), x))
  assert np.all(np.isfinite(result))
  moved = np.sqrt(np.sum((result - np.asarray(x)) ** 2, axis=(1, 2)))
  per_example = 0.1 if norm == 'l2' else 0.1 * np.sqrt(6)
  np.testing.assert_allclose(moved, per_example if scale else 0, atol=1e-5)


def test_float16_sign_survives_gradients_below_its_range():
  x = jnp.zeros((2, 3), jnp.float16)
  attack = conadv.fgsm(0.25)
  result = attack.craft(None, lambda x: jnp.full_like(x, 1e-20), x)
  chex.assert_trees_all_equal(result, jnp.full((2, 3), 0.25, jnp.float16))


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_random_start_is_uniform_in_the_ball(norm):
  x = jnp.zeros((20_000, 2))
  attack = conadv.pgd(2.0, step_size=0.0, norm=norm)
  start = np.asarray(attack.craft(KEY, jnp.zeros_like, x))
  np.testing.assert_allclose(np.mean(start, axis=0), 0, atol=0.05)
  if norm == 'linf':
    share = np.mean(np.max(np.abs(start), axis=1) < 1.0)
  else:
    share = np.mean(np.linalg.norm(start, axis=1) < 1.0)
  # Half the side, or half the radius, holds a quarter of the area.
  np.testing.assert_allclose(share, 0.25, atol=0.02)


@pytest.mark.parametrize('probability', [0.0, 0.2, 1.0])
def test_start_from_clean_is_one_coin_a_batch(probability):
  x = jnp.zeros((8, 2))
  attack = conadv.pgd(1.0, step_size=0.0, start_from_clean=probability)
  craft = jax.jit(lambda key: attack.craft(key, jnp.zeros_like, x))
  starts = np.asarray(jax.vmap(craft)(jax.random.split(KEY, 2000)))
  clean = np.all(starts == 0, axis=2)
  assert np.all(clean == clean[:, :1])
  np.testing.assert_allclose(np.mean(clean[:, 0]), probability, atol=0.03)


def test_fast_fgsm_steps_beyond_the_radius():
  x = jnp.zeros((1000,))
  result = np.asarray(conadv.fast_fgsm(0.4).craft(KEY, jnp.ones_like, x))
  # start ~ U(-0.4, 0.4), step 0.5, clipped at 0.4: from 0.1 up.
  np.testing.assert_allclose(np.min(result), 0.1, atol=0.01)
  np.testing.assert_allclose(np.max(result), 0.4, atol=1e-6)
  np.testing.assert_allclose(np.mean(result > 0.3999), 5 / 8, atol=0.05)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_normalized_is_the_same_attack_in_other_units(norm):
  rng = np.random.default_rng(0)
  mean = np.array([0.4, 0.5, 0.3], np.float32)
  std = np.array([0.2, 0.3, 0.1], np.float32)
  pixels = rng.uniform(size=(5, 4, 4, 3)).astype(np.float32)
  slope = rng.normal(size=pixels.shape).astype(np.float32)
  kwargs = {'norm': norm, 'steps': 3, 'random_start': False}
  in_pixels = conadv.pgd(0.3, bounds=(0.0, 1.0), **kwargs).craft(
    None, lambda x: jnp.asarray(slope), jnp.asarray(pixels)
  )
  epsilon, bounds = conadv.normalized(0.3, mean, std)
  in_units = conadv.pgd(epsilon, bounds=bounds, **kwargs).craft(
    # The chain rule: a pixel moves std times as much as its normalised value.
    None,
    lambda x: jnp.asarray(slope * std),
    jnp.asarray((pixels - mean) / std),
  )
  back = np.asarray(in_units) * std + mean
  np.testing.assert_allclose(back, in_pixels, atol=2e-6)


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.uint8, jnp.int8])
def test_random_targets_are_uniform_over_the_wrong_classes(dtype):
  labels = jnp.asarray(np.arange(40_000) % 5, dtype)
  batch = {'label': labels, 'image': jnp.zeros(1)}
  result = conadv.random_targets(5)(KEY, batch)
  assert result['label'].dtype == dtype
  assert result['image'] is batch['image']
  shift = (np.asarray(result['label'], int) - np.asarray(labels, int)) % 5
  counts = np.bincount(shift, minlength=5)
  assert counts[0] == 0
  np.testing.assert_allclose(counts[1:] / len(labels), 0.25, atol=0.01)
  assert np.max(np.asarray(result['label'])) < 5


def test_random_targets_do_not_overflow_a_short_dtype():
  labels = jnp.full(5000, 250, jnp.uint8)
  result = conadv.random_targets(256)(KEY, {'label': labels})['label']
  assert len(np.unique(np.asarray(result))) == 255
  assert 250 not in np.asarray(result)


def test_one_gradient_is_enough_only_for_one_step_from_the_clean_input():
  x, _, gradient_fn = toy()
  for norm in ('linf', 'l2'):
    attack = conadv.fgsm(0.1, norm=norm, bounds=(0.0, 1.0))
    chex.assert_trees_all_close(
      attack.reuse(gradient_fn(x), x),
      attack.craft(None, gradient_fn, x),
      atol=ULP,
    )
  targets = conadv.random_targets(3)
  assert conadv.pgd(0.1).reuse is None
  assert conadv.pgd(0.1, random_start=False, steps=2).reuse is None
  assert conadv.fgsm(0.1, targets=targets).reuse is None
  assert conadv.fast_fgsm(0.1).reuse is None


def test_who_draws():
  assert not conadv.fgsm(0.1).draws
  assert conadv.pgd(0.1).draws
  assert conadv.fast_fgsm(0.1).draws
  assert conadv.fgsm(0.1, targets=conadv.random_targets(3)).draws


@pytest.mark.parametrize('bounds', [(0.0, 1.0, 5.0), (0.0,), 1.0, jnp.ones(3)])
def test_bounds_that_are_no_pair(bounds):
  with pytest.raises(ValueError) as error:
    conadv.pgd(0.1, bounds=bounds)
  assert_says(error, 'pair, (low, high)', 'Given ', '`bounds=(0., 1.)`')
