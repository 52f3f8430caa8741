"""Where a weight, a radius or a share reaches its end."""

import decimal
import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from meshes import make_mesh

import conadv_optax as conadv
from conadv_optax.core.numeric import share_of

ONE = np.ones([], np.float32)


def mean_is_the_state(w, model_state, batch):
  """The state is the mean of what a branch saw."""
  del model_state
  mean = jnp.mean(batch['image'])
  return mean * w, {'mean': mean, 'calls': jnp.int32(1)}


def seen_by(weights, traced, spread=lambda fn: fn):
  """The mean of the branch whose state is kept: 1, 2 (attacked) or 5."""
  batch = {'image': jnp.ones((4, 2)), 'view': jnp.full((4, 2), 5.0)}
  state = {'mean': jnp.zeros([]), 'calls': jnp.int32(0)}

  def step(values):
    grad_fn = conadv.wrap(
      mean_is_the_state,
      0,
      attack=conadv.fgsm(1.0),
      weights=dict(zip(weights, values, strict=True)),
      extra_branches={'extra': 'view'} if 'extra' in weights else None,
      has_state=True,
    )
    grad_fn = spread(grad_fn)
    (_, aux), _, _ = grad_fn.value_and_grad(
      ONE, grad_fn.init(ONE, []), batch, model_state=state
    )
    return aux.model_state

  values = list(weights.values())
  if traced:
    new = jax.jit(step)([np.float32(value) for value in values])
  else:
    new = jax.jit(lambda: step(values))()
  assert int(new['calls']) == 1
  return float(new['mean'])


@pytest.mark.parametrize('traced', [False, True])
@pytest.mark.parametrize(
  ('weights', 'kept'),
  [
    ({'main': 1.0, 'adversarial': 1.0}, 1),
    ({'main': 1e-9, 'adversarial': 1.0}, 1),
    ({'main': 1.0, 'adversarial': 0.0}, 1),
    ({'main': 0.0, 'adversarial': 1.0}, 2),
    ({'main': 0.0, 'adversarial': 0.0, 'extra': 1.0}, 5),
    ({'main': 0.0, 'adversarial': 1.0, 'extra': 0.0}, 2),
    ({'main': 0.0, 'adversarial': 1.0, 'extra': 1.0}, 2),
    ({'main': 1.0, 'adversarial': 0.0, 'extra': 1.0}, 1),
    # Nobody has weight: as ever, that of the main branch.
    ({'main': 0.0, 'adversarial': 0.0}, 1),
  ],
  ids=str,
)
def test_a_shared_state_follows_a_branch_that_has_weight(weights, kept, traced):
  assert seen_by(weights, traced) == kept


@pytest.mark.parametrize('traced', [False, True])
def test_a_shared_state_follows_on_devices_too(traced):
  weights = {'main': 0.0, 'adversarial': 1.0}
  for spread in (
    lambda fn: conadv.accumulate(fn, 2),
    lambda fn: conadv.data_parallel(fn, make_mesh(4)),
  ):
    assert seen_by(weights, traced, spread) == 2


def net_loss(params, batch):
  hidden = jnp.tanh(batch['x'].astype(params['b'].dtype) @ params['a'])
  return jnp.mean((hidden @ params['b'] - 1) ** 2)


def make_net(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  params = {
    'a': jnp.asarray(rng.normal(size=(20, 16)), dtype),
    'b': jnp.ones(16, dtype),
  }
  return params, {'x': jnp.asarray(rng.normal(size=(64, 20)), jnp.float32)}


def distance(x, y):
  """Between two trees, over the size of the second."""
  x, y = (
    jax.tree.map(lambda leaf: leaf.astype(jnp.float32), t) for t in (x, y)
  )
  return optax.tree.norm(optax.tree.sub(x, y)) / optax.tree.norm(y)


def apart(fn, batch, params, *, steps=6, radius=lambda t: t * 0.0):
  """How far each step's gradient is from the plain one of JAX."""

  def step(carry, t):
    params, state = carry
    _, grads, state = fn(radius(t)).value_and_grad(params, state, batch)
    plain = jax.grad(net_loss)(params, batch)
    params = jax.tree.map(
      lambda w, g: w - jnp.asarray(0.01, w.dtype) * g, params, plain
    )
    return (params, state), distance(grads, plain)

  @jax.jit
  def run(params):
    carry = params, fn(0.0).init(params, [])
    return jax.lax.scan(step, carry, jnp.arange(steps, dtype=jnp.float32))[1]

  return np.asarray(run(params))


@pytest.mark.parametrize(
  ('every', 'dtype'),
  [
    (2, jnp.float32),
    (2, jnp.bfloat16),
    (2, jnp.float16),
    (3, jnp.float16),
  ],
)
def test_look_sam_of_radius_zero_is_the_gradient(every, dtype):
  params, batch = make_net(dtype)
  for fn in (
    lambda radius: conadv.sam(net_loss, radius, every=every),
    lambda radius: conadv.data_parallel(
      conadv.sam(net_loss, radius, every=every, axis='data'), make_mesh(1)
    ),
  ):
    far = max(apart(fn, batch, params))
    assert far <= 4 * float(jnp.finfo(dtype).eps)


def test_look_sam_of_a_radius_that_warms_up_from_zero():
  params, batch = make_net()
  distances = apart(
    lambda radius: conadv.sam(net_loss, radius, every=2),
    batch,
    params,
    radius=lambda t: 0.05 * jnp.maximum(t - 3, 0),
  )
  # Step 4 is the first of these to take a second gradient, with 0.05; what it
  # keeps is used at step 5, in the size of the gradient.
  assert max(distances[:4]) < 1e-6
  assert distances[4] > 1e-2
  assert distances[5] > 0.1


def bowl(w, batch):
  """Whose gradient points to the middle: the sharp one is parallel."""
  return 0.5 * jnp.sum(w**2) * jnp.mean(batch).astype(w.dtype)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16, jnp.float16])
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from([1e-3, 0.05, 2.0]))
def test_look_sam_keeps_nothing_of_parallel_gradients(dtype, seed, radius):
  rng = np.random.default_rng(seed)
  w = jnp.asarray(rng.normal(size=500), dtype)
  step = bowl_step(dtype)
  state = conadv.sam(bowl, 0.1, every=2).init(w, [])
  for _ in range(2):
    grads, state = step(w, state, jnp.float32(radius))
    unit = np.float64(w) / np.linalg.norm(np.float64(w))
    grads = np.float64(grads)
    beside = grads - (grads @ unit) * unit
    eps = float(jnp.finfo(dtype).eps)
    assert np.linalg.norm(beside) < 8 * eps * np.linalg.norm(grads)


@functools.cache
def bowl_step(dtype):
  del dtype  # Each has a program.

  @jax.jit
  def step(w, state, radius):
    grad_fn = conadv.sam(bowl, radius, every=2)
    return grad_fn.value_and_grad(w, state, jnp.ones(3))[1:]

  return step


@pytest.mark.parametrize('slope', [1e-3, 1e-4])
def test_look_sam_keeps_little_that_is_no_rounding(slope):
  """A sharp gradient that is turned by `slope`, with curvature in one entry."""

  def loss(w, batch):
    return w[0] + w[1] + 0.5 * slope * w[0] ** 2 * jnp.mean(batch)

  grad_fn = conadv.sam(loss, 2.0, every=2, reuse_weight=0.5)
  w, batch = jnp.zeros(2), jnp.ones(2)
  state, step = grad_fn.init(w, []), jax.jit(grad_fn.value_and_grad)
  _, _, state = step(w, state, batch)
  _, grads, _ = step(w, state, batch)
  # Half of the gradient's length, at a right angle to it.
  np.testing.assert_allclose(grads, [1.5, 0.5], rtol=1e-2)


@pytest.mark.parametrize('every', [1, 2])
def test_sam_keeps_float64(every):
  """A weight in float32 would be wrong in the eighth digit."""
  with jax.enable_x64(True):
    hessian = np.array([[2.0, 0.3], [0.3, 1.0]])
    w, batch = np.array([1.0, -3.0]), jnp.ones(2, jnp.float64)

    def loss(w, batch):
      return 0.5 * w @ jnp.asarray(hessian) @ w * jnp.mean(batch)

    grad_fn = conadv.sam(loss, 0.1, every=every, reuse_weight=0.7, penalty=0.9)
    w_jax = jnp.asarray(w)
    state, step = grad_fn.init(w_jax, []), jax.jit(grad_fn.value_and_grad)
    returned = []
    for _ in range(2):
      _, grads, state = step(w_jax, state, batch)
      returned.append(grads)
  g = hessian @ w
  sharp = hessian @ (w + 0.1 * g / np.linalg.norm(g))
  beside = sharp - (sharp @ g) / (g @ g) * g
  later = g + 0.7 * np.linalg.norm(g) / np.linalg.norm(beside) * beside
  wanted = [sharp, sharp if every == 1 else later]
  for grads, second in zip(returned, wanted, strict=True):
    assert grads.dtype == np.float64
    np.testing.assert_allclose(grads, 0.1 * g + 0.9 * second, rtol=1e-12)


# Sizes of which the share is a whole number, too, where a last digit decides.
@given(
  st.integers(1, 1000),
  st.integers(1, 500),
  st.sampled_from([1, 10, 100, 1000]),
)
@example(290, 1, 100)
@example(200, 1, 10)
def test_a_share_is_that_of_the_decimal(thousandths, count, unit):
  size = count * unit
  expected = max(1, math.floor(decimal.Decimal(thousandths) / 1000 * size))
  for written in (
    thousandths / 1000,
    1 - (1000 - thousandths) / 1000,
    thousandths * 0.001,
  ):
    assert share_of(written, size) == expected


@pytest.mark.parametrize(
  ('fraction', 'size', 'count'),
  [
    (0.29, 100, 29),
    (1 - 0.8, 10, 2),
    (0.1, 5, 1),
    (1 / 3, 9, 3),
    (0.999, 9, 8),
  ],
)
def test_as_many_are_attacked(fraction, size, count):
  def loss(w, batch):
    return jnp.mean(w * batch['image'])

  how = {'attack': conadv.fgsm(0.5), 'adversarial_fraction': fraction}

  @jax.jit
  def run(batch):
    mixed = conadv.perturb(loss, ONE, batch, **how)
    waiting = conadv.wrap(loss, **how).init(ONE, [batch])
    fast = conadv.fast_advprop(loss, attack_weight=0.0, **how)
    output, _, _ = fast.value_and_grad(ONE, fast.init(ONE, []), batch)
    return mixed['image'], waiting.queue.adversarial, output

  mixed, waiting, (value, _) = run({'image': np.ones((size, 1), np.float32)})
  assert np.sum(np.asarray(mixed) > 1) == count
  assert waiting.shape == (1, count, 1)
  chex.assert_trees_all_close(value, 1 + 0.5 * count / size, rtol=1e-6)


@pytest.mark.parametrize('reuse', [False, True])
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_a_nan_in_an_input_gradient_stays_out_of_the_queue(norm, reuse):
  """The square root has no slope at the 0 of one example, and a value."""

  def loss(w, batch):
    return jnp.mean(w * jnp.sqrt(jnp.sum(batch['image'] ** 2, axis=1)))

  grad_fn = conadv.wrap(
    loss, attack=conadv.fgsm(0.5, norm=norm), reuse_gradient=reuse
  )
  batch = {'image': jnp.array([[0.0, 0.0], [3.0, 0.0], [0.0, -4.0]])}
  state, step = grad_fn.init(ONE, [batch]), jax.jit(grad_fn.value_and_grad)
  for _ in range(2):
    (value, _), grads, state = step(ONE, state, batch)
    queue = state.queue
    waiting = queue.batch['image'] if reuse else queue.adversarial
    np.testing.assert_allclose(
      waiting[0], [[0, 0], [3.5, 0], [0, -4.5]], rtol=1e-6
    )
    # Lengths of 0, 3 and 4, and 0, 3.5 and 4.5.
    chex.assert_trees_all_close((value, grads), (2.5, 2.5), rtol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(
    st.tuples(*[st.sampled_from([-1.0, 0.0, 1.0])] * 2), min_size=6, max_size=6
  )
)
def test_a_report_counts_what_is_moved(pairs):
  old, new = np.float32(pairs).T
  report = conadv.staleness_report(
    LINEAR, jnp.asarray(old), jnp.asarray(new), {'image': jnp.ones((4, 6))}
  )
  moved = (old != 0) | (new != 0)
  expected = np.mean((old == new)[moved]) if moved.any() else np.nan
  np.testing.assert_allclose(report.sign_agreement, expected, rtol=1e-6)
  np.testing.assert_allclose(
    report.stale_gain, 0.1 * np.sign(old) @ new, atol=1e-5
  )


LINEAR = conadv.wrap(
  lambda w, batch: jnp.mean(batch['image'] @ w), attack=conadv.fgsm(0.1)
)


def test_a_leaf_without_elements_is_cut_and_joined_as_any():
  batch = {'x': np.arange(8, dtype=np.float32), 'none': np.zeros((8, 0))}
  batch['none'] = batch['none'].astype(np.float32)
  grad_fn = conadv.accumulate(
    conadv.wrap(
      lambda w, batch: (jnp.mean(w * batch['x']), batch['none']),
      1,
      inputs='x',
      attack=conadv.fgsm(0.0),
      has_aux=True,
    ),
    4,
  )
  w = jnp.float32(1.0)
  state = grad_fn.init(w, [batch])
  (_, aux), grads, state = grad_fn.value_and_grad(w, state, batch)
  np.testing.assert_allclose(grads, 3.5)
  assert aux.aux['main'].shape == (8, 0)
  assert state.queue.batch['none'].shape == (1, 8, 0)
  augment = conadv.batch_augment(lambda key, example: example, 2)
  copies = augment(jax.random.key(0), batch)
  assert copies['none'].shape == (16, 0)
  np.testing.assert_array_equal(copies['x'], np.repeat(batch['x'], 2))


def test_an_attack_of_nothing_is_nothing():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(w * batch['y']) + jnp.sum(batch['x']),
    0,
    inputs='x',
    attack=conadv.pgd(0.1, norm='l2'),
  )
  w, key = jnp.float32(1.0), jax.random.key(0)
  batch = {'x': jnp.zeros((4, 0)), 'y': jnp.ones(4)}
  _, grads, _ = grad_fn.value_and_grad(
    w, grad_fn.init(w, [], key=key), batch, key=key
  )
  np.testing.assert_allclose(grads, 1.0)
