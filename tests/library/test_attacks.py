"""Attacks against NumPy, and the promise that nothing leaves its ball."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_checks import assert_says
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

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


def inwards(low, high, dtype):
  """The outermost values of `dtype` within the bounds, out of all of them."""
  low, high = np.float32(low), np.float32(high)
  if dtype == 'float32':
    return low, high
  values = np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))
  values = values.astype(np.float32)
  values = values[(values >= low) & (values <= high)]
  return np.min(values), np.max(values)


@functools.cache
def compiled_pgd(norm, steps, random_start):
  """On a loss whose gradient is steeper farther out."""

  @jax.jit
  def craft(key, x, slope, epsilon, bounds):
    attack = conadv.pgd(
      epsilon, steps=steps, norm=norm, random_start=random_start, bounds=bounds
    )
    return attack.craft(key, lambda x: slope * (1 + jnp.abs(x)), x)

  return craft


# Every pair of values of any two: a program for each.
PROGRAMS = [
  ('float32', 'linf', 1, True, (3,)),
  ('float32', 'linf', 3, False, (3, 1, 2, 1)),
  ('float32', 'l2', 3, True, (3, 1, 2, 1)),
  ('float32', 'l2', 1, False, (3,)),
  ('bfloat16', 'linf', 3, True, (3,)),
  ('bfloat16', 'l2', 1, False, (3, 1, 2, 1)),
  ('float16', 'linf', 1, False, (3, 1, 2, 1)),
  ('float16', 'l2', 3, True, (3,)),
]


@pytest.mark.slow
@given(
  data=st.data(),
  program=st.sampled_from(PROGRAMS),
  epsilon=st.one_of(st.just(0.0), st.floats(1e-4, 3)),
  # XLA flushes subnormal numbers to 0.
  low=st.floats(-3, 2, width=32, allow_subnormal=False),
  width=st.floats(0.05, 4),
  seed=st.integers(0, 2**31 - 1),
)
@settings(max_examples=120, deadline=None)
def test_result_stays_in_bounds_and_ball(
  data, program, epsilon, low, width, seed
):
  dtype, norm, steps, random_start, shape = program
  # The clean input may be outside of the bounds.
  x, slope = (
    data.draw(hnp.arrays(np.float32, shape, elements=floats)) for _ in range(2)
  )
  x = x.astype(jnp.dtype(dtype))
  result = compiled_pgd(norm, steps, random_start)(
    jax.random.key(seed), x, slope, epsilon, (low, low + width)
  )
  assert (result.shape, result.dtype) == (x.shape, x.dtype)
  low, high = inwards(low, low + width, dtype)
  x, result = np.asarray(x, np.float64), np.asarray(result, np.float64)
  assert np.all((result >= low) & (result <= high))
  # What a projection to the bounds does to a ball is within one.
  delta = result - np.clip(x, low, high)
  if norm == 'linf':
    assert np.max(np.abs(delta)) <= epsilon * (1 + 1e-6) + 3e-7
  else:
    lengths = np.sqrt(np.sum(delta.reshape(len(x), -1) ** 2, axis=1))
    assert np.max(lengths) <= epsilon * (1 + 1e-5) + 1e-6


@pytest.mark.parametrize(
  ('dtype', 'expected'), [('bfloat16', 2.234375), ('float16', 2.248046875)]
)
def test_a_bound_that_the_dtype_lacks_is_rounded_inwards(dtype, expected):
  # The clean input is the nearest value of the dtype, above the bound.
  x = jnp.full((1, 1), 2.25, dtype)
  for bounds in ((0.0, 2.2489), (-jnp.inf, 2.2489)):
    up = conadv.fgsm(0.5, bounds=bounds).craft(None, jnp.ones_like, x)
    assert up.tolist() == [[expected]]
  down = conadv.fgsm(0.5, bounds=(-2.2489, jnp.inf))
  assert down.reuse(jnp.full((1, 1), -1.0), -x).tolist() == [[-expected]]


def nan_below(x, threshold, slope):
  """NaN in the second entry of an example that is below the threshold."""
  return jnp.where((x < threshold) & (jnp.arange(2) == 1)[None], jnp.nan, slope)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('steps', [1, 4])
def test_an_example_whose_gradient_holds_a_nan_takes_no_step(norm, steps):
  slope = np.array([[3.0, -4.0]] * 3, np.float32)
  x = np.array([[0.0, 0.0], [0.0, 10.0], [0.0, -10.0]], np.float32)
  attack = conadv.pgd(
    5.0, step_size=1.0, steps=steps, norm=norm, random_start=False
  )
  # Of the second example it turns to NaN on the way, after two steps.
  result = attack.craft(None, lambda x: nan_below(x, 8.5, slope), x)
  expected, move = x.copy(), np.sign(slope[0])
  move = move if norm == 'linf' else slope[0] / 5
  expected[1] += min(steps, 2) * move
  np.testing.assert_allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_nan_leaves_the_random_start_alone(norm):
  x = jnp.zeros((3, 2))
  attack = conadv.pgd(0.3, norm=norm, bounds=(-0.1, 0.1))
  chex.assert_trees_all_equal(
    attack.craft(KEY, lambda x: jnp.full_like(x, jnp.nan), x),
    attack.craft(KEY, jnp.zeros_like, x),
  )


def test_infinite_entries_take_the_whole_step():
  gradient = jnp.array([[jnp.inf, 5.0, -jnp.inf], [jnp.inf, 0.0, -1e30]])
  x = jnp.zeros((2, 3))
  linf = conadv.fgsm(0.5).craft(None, lambda x: gradient, x)
  chex.assert_trees_all_equal(linf, 0.5 * jnp.sign(gradient))
  l2 = conadv.fgsm(0.5, norm='l2').craft(None, lambda x: gradient, x)
  diagonal = np.sqrt(0.125)
  np.testing.assert_allclose(
    l2, [[diagonal, 0, -diagonal], [0.5, 0, 0]], rtol=1e-6
  )


@pytest.mark.parametrize('size', [1e-37, 4e37, 1e38])
def test_a_gradient_whose_norm_overflows_has_a_direction(size):
  attack = conadv.fgsm(2.0, norm='l2')
  result = jax.jit(attack.reuse)(
    *jnp.array([[[size]], [[0.0]]]).repeat(10_000, 2)
  )
  np.testing.assert_allclose(result, np.full((1, 10_000), 0.02), rtol=1e-5)


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


@pytest.mark.parametrize('probability', [0.0, 0.2, 1.0, 1])
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


def test_fast_fgsm_takes_the_step_bounds_and_targets_that_it_is_given():
  def targets(key, batch):
    return {**batch, 'label': 1 - batch['label']}

  attack = conadv.fast_fgsm(
    0.4, step_size=0.3, bounds=(-0.2, 1.0), targets=targets
  )
  x = jnp.zeros(1000)
  found = np.asarray(attack.craft(KEY, jnp.ones_like, x))
  # Down, towards the target, by 0.3: from U(-0.4, 0.4) and the bound of -0.2.
  assert found.min() == np.float32(-0.2)
  np.testing.assert_allclose(found.max(), 0.1, atol=0.01)
  np.testing.assert_allclose(np.mean(found == found.min()), 5 / 8, atol=0.05)
  prepared = attack.prepare(KEY, {'label': np.array([0, 1])})
  np.testing.assert_array_equal(prepared['label'], [1, 0])


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


@pytest.mark.parametrize('dtype', [jnp.int32, jnp.int8, jnp.uint8, jnp.uint32])
def test_random_targets_leave_labels_that_are_no_class(dtype):
  labels = np.array([[0, -1, 9, 10], [5, -100, 255, 8]]).astype(dtype)
  result = conadv.random_targets(10)(KEY, {'label': jnp.asarray(labels)})
  is_class = np.isin(labels, np.arange(10))
  drawn = np.asarray(result['label'])
  np.testing.assert_array_equal(drawn[~is_class], labels[~is_class])
  assert np.all(drawn[is_class] != labels[is_class])
  assert set(drawn[is_class]) <= set(range(10))


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


@pytest.mark.parametrize(
  ('bounds', 'kind'),
  [
    ((0.0, 1.0, 5.0), ValueError),
    ((0.0,), ValueError),
    (jnp.ones(3), ValueError),
    (1.0, TypeError),
  ],
)
def test_bounds_that_are_no_pair(bounds, kind):
  with pytest.raises(kind) as error:
    conadv.pgd(0.1, bounds=bounds)
  assert_says(error, 'pair, (low, high)', 'Given ', '`bounds=(0., 1.)`')


SCHEDULE = optax.linear_schedule(0.0, 0.4, 4)


@pytest.mark.parametrize(
  ('name', 'arguments'),
  [
    ('epsilon', {'epsilon': SCHEDULE, 'steps': 2}),
    ('step_size', {'epsilon': 0.1, 'step_size': SCHEDULE}),
    ('start_from_clean', {'epsilon': 0.1, 'start_from_clean': SCHEDULE}),
    ('bounds', {'epsilon': 0.1, 'bounds': SCHEDULE}),
    ('bounds', {'epsilon': 0.1, 'bounds': (0.0, SCHEDULE)}),
  ],
)
def test_a_schedule_is_told_where_to_call_it(name, arguments):
  with pytest.raises(TypeError) as error:
    conadv.pgd(**arguments)
  assert_says(error, f'`{name}` is a number', f'`{name}=schedule(count)`')


@pytest.mark.parametrize('name', ['epsilon', 'mean', 'std'])
def test_a_schedule_is_not_normalized(name):
  with pytest.raises(TypeError, match=f'`{name}=schedule'):
    conadv.normalized(
      **{'epsilon': 0.1, 'mean': 0.5, 'std': 0.5, name: SCHEDULE}
    )
  with pytest.raises(TypeError, match='`epsilon=schedule'):
    conadv.fast_fgsm(SCHEDULE)


def test_a_schedule_called_inside_of_the_step_is_compiled_once():
  traces = []

  @jax.jit
  def step(params, batch, count):
    traces.append(0)
    grad_fn = conadv.wrap(
      lambda w, batch: jnp.mean(w * batch['x']),
      0,
      attack=conadv.pgd(SCHEDULE(count), random_start=False),
      inputs='x',
    )
    state = grad_fn.init(params, [])
    (_, aux), _, _ = grad_fn.value_and_grad(params, state, batch)
    return aux.losses['adversarial']

  batch = {'x': jnp.array([[1.0, 2.0]])}
  losses = [step(jnp.float32(3.0), batch, count) for count in range(6)]
  # 3 * (1.5 + epsilon), and epsilon is 0, 0.1, ... 0.4 and 0.4.
  np.testing.assert_allclose(
    losses, 3 * (1.5 + 0.1 * np.array([0, 1, 2, 3, 4, 4])), rtol=1e-6
  )
  assert len(traces) == 1


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_arrays_of_an_attack_enter_devices(norm, axis_type):
  mesh = jax.make_mesh((2,), ('data',), (axis_type,), devices=jax.devices()[:2])
  params = jnp.array([1.0, -2.0, 0.5])
  batch = {'x': jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)))}

  def gradient(devices, params, batch, epsilon):
    epsilon, bounds = conadv.normalized(epsilon, 0.5, jnp.array([0.5, 1, 2]))
    attack = conadv.pgd(
      epsilon, steps=2, norm=norm, bounds=bounds, random_start=False
    )
    grad_fn = conadv.wrap(
      lambda w, batch: jnp.mean((batch['x'] @ w) ** 2),
      0,
      attack=attack,
      inputs='x',
    )
    grad_fn = conadv.data_parallel(grad_fn, mesh) if devices else grad_fn
    return grad_fn.value_and_grad(params, grad_fn.init(params, []), batch)[1]

  step = jax.jit(gradient, static_argnums=0)
  expected = step(False, params, batch, jnp.float32(0.1))
  with jax.set_mesh(mesh):
    batch = jax.device_put(batch, jax.NamedSharding(mesh, P('data')))
    grads = step(True, params, batch, jnp.float32(0.1))
  np.testing.assert_allclose(grads, expected, rtol=1e-5)


@pytest.mark.parametrize(
  ('steps', 'kind'), [(0, ValueError), (1.5, TypeError), (True, TypeError)]
)
def test_steps_are_counted(steps, kind):
  with pytest.raises(kind) as error:
    conadv.pgd(0.1, steps=steps)
  assert_says(error, '`steps` is a number of things', f'steps={steps}')
