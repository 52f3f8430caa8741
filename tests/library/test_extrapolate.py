"""Extrapolated SGD against traces in NumPy, games, and another library."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import in_parts, init_model, loss_fn, make_batch, plain_step
from meshes import make_mesh
from optax._src.transform import ScaleByOptimisticGradientState
from public_names import make_batch as make_regression
from public_names import make_params, plain_loss

import conadv_optax as conadv

CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
MATRIX = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
START = np.array([1.0, -2.0, 0.5])
RATE, AHEAD, MOMENTUM = 0.1, 0.25, 0.8


def quadratic(w, center):
  return 0.5 * (w - center) @ jnp.asarray(MATRIX, w.dtype) @ (w - center)


def centers(steps=6):
  return np.random.default_rng(0).normal(size=(steps, 3))


def gradient(w, center):
  return MATRIX @ (w - center)


def run(grad_fn, tx, look_ahead=lambda w, opt_state: w):
  """Steps on the quadratic, whose batch is its center."""
  w = jnp.asarray(START, jnp.float32)
  state, opt_state = grad_fn.init(w, []), tx.init(w)
  step = jax.jit(grad_fn.value_and_grad)
  for center in centers():
    at = look_ahead(w, opt_state)
    _, grads, state = step(at, state, jnp.asarray(center, jnp.float32))
    updates, opt_state = tx.update(grads, opt_state, w)
    w = optax.apply_updates(w, updates)
  return w


@pytest.mark.parametrize('direction', ['past', 'current'])
def test_with_a_rate_is_the_method_in_numpy(direction):
  w, past = START, np.zeros(3)
  for center in centers():
    towards = past if direction == 'past' else gradient(w, center)
    past = gradient(w - AHEAD * towards, center)
    w = w - RATE * past
  grad_fn = conadv.extrapolate(quadratic, AHEAD, direction=direction)
  np.testing.assert_allclose(run(grad_fn, optax.sgd(RATE)), w, **CLOSE)


def test_a_schedule_moves_once_a_step():
  schedule = optax.linear_schedule(0.1, 0.3, 4)
  w, past = START, np.zeros(3)
  for t, center in enumerate(centers()):
    past = gradient(w - float(schedule(t)) * past, center)
    w = w - RATE * past
  got = run(conadv.extrapolate(quadratic, schedule), optax.sgd(RATE))
  np.testing.assert_allclose(got, w, **CLOSE)


@pytest.mark.parametrize('direction', ['past', 'current'])
def test_with_momentum_is_the_method_in_numpy(direction):
  # With one group, its momentum is that of the optimizer.
  w, past, v = START, np.zeros(3), np.zeros(3)
  for center in centers():
    towards = past if direction == 'past' else gradient(w, center)
    past = gradient(w - RATE * towards + MOMENTUM * v, center)
    v = MOMENTUM * v - RATE * past
    w = w + v
  tx = optax.sgd(RATE, momentum=MOMENTUM)
  grad_fn = conadv.extrapolate(quadratic, tx, direction=direction)
  np.testing.assert_allclose(run(grad_fn, tx), w, **CLOSE)


def test_with_the_momentum_of_the_optimizer_is_the_method_in_numpy():
  w, past, v = START, np.zeros(3), np.zeros(3)
  for center in centers():
    past = gradient(w + MOMENTUM * v - AHEAD * past, center)
    v = MOMENTUM * v - RATE * past
    w = w + v

  def look_ahead(w, opt_state):
    return w - MOMENTUM * RATE * opt_state[0].trace

  got = run(
    conadv.extrapolate(quadratic, AHEAD),
    optax.sgd(RATE, momentum=MOMENTUM),
    look_ahead,
  )
  np.testing.assert_allclose(got, w, **CLOSE)


# Adam's bias correction raises to an integer power.
@jax.numpy_dtype_promotion('standard')
@pytest.mark.parametrize('direction', ['past', 'current'])
def test_with_adam_is_the_method_in_numpy(direction):
  b1, b2, eps = 0.9, 0.99, 1e-3

  def moments(m, s, g):
    return b1 * m + (1 - b1) * g, b2 * s + (1 - b2) * g**2

  def update(m, s, t, rate):
    m, s = m / (1 - b1**t), s / (1 - b2**t)
    return -rate * m / (np.sqrt(s) + eps)

  w, past, m, s = START, np.zeros(3), np.zeros(3), np.zeros(3)
  for t, center in enumerate(centers(), start=1):
    towards = past if direction == 'past' else gradient(w, center)
    ahead = w + update(*moments(m, s, towards), t, AHEAD)
    past = gradient(ahead, center)
    m, s = moments(m, s, past)
    w = w + update(m, s, t, RATE)
  grad_fn = conadv.extrapolate(
    quadratic, optax.adam(AHEAD, b1, b2, eps), direction=direction
  )
  got = run(grad_fn, optax.adam(RATE, b1, b2, eps))
  np.testing.assert_allclose(got, w, rtol=1e-4, atol=1e-5)


def test_past_gradients_are_optimistic_gradient_descent():
  # The parameters of the latter are the points where this takes its gradient.
  points = []

  def seen(w, center):
    jax.debug.callback(lambda x: points.append(np.asarray(x)), w)
    return quadratic(w, center)

  run(conadv.extrapolate(seen, AHEAD), optax.sgd(RATE))
  jax.effects_barrier()
  tx = optax.optimistic_gradient_descent(RATE, alpha=1.0, beta=AHEAD / RATE)
  w = jnp.asarray(START, jnp.float32)
  opt_state = tx.init(w)
  # Here the gradient before the first is 0.
  opt_state = (
    ScaleByOptimisticGradientState(jnp.array(False), jnp.zeros(3)),
    *opt_state[1:],
  )
  expected = []
  for center in centers():
    expected.append(w)
    grads = jax.grad(quadratic)(w, jnp.asarray(center, jnp.float32))
    updates, opt_state = tx.update(grads, opt_state, w)
    w = optax.apply_updates(w, updates)
  np.testing.assert_allclose(points, expected, **CLOSE)


@pytest.mark.parametrize('direction', ['past', 'current'])
def test_a_bilinear_game_converges_that_diverges_otherwise(direction):
  stop = jax.lax.stop_gradient

  def game(players, batch):
    x, y = players
    return jnp.mean(batch) * (x * stop(y) - stop(x) * y)

  def distance(grad_fn, steps=300):
    players = (jnp.array(1.0), jnp.array(1.0))

    def step(carry, _):
      players, state = carry
      _, grads, state = grad_fn.value_and_grad(players, state, jnp.ones(1))
      return (optax.tree.add_scale(players, -0.3, grads), state), None

    carry = players, grad_fn.init(players, [])
    (players, _), _ = jax.lax.scan(step, carry, length=steps)
    return optax.tree.norm(players)

  assert distance(conadv.plain(game)) > 1e3
  assert distance(conadv.extrapolate(game, 0.3, direction=direction)) < 1e-3


def test_a_rate_of_zero_is_the_gradient_itself():
  def exact_loss(w, model_state, batch):
    """Of small integers: nothing is rounded in float32."""
    error = batch['x'] @ w - batch['y']
    mean = jnp.mean(batch['x'], axis=0)
    return jnp.mean(error**2), 0.5 * model_state + 0.5 * mean

  plain = conadv.plain(exact_loss, has_state=True)
  rng = np.random.default_rng(0)
  w, statistics, x, y = (
    rng.integers(-3, 4, shape).astype(np.float32)
    for shape in (3, 3, (2, 4, 3), (2, 4))
  )

  @jax.jit
  def two_steps(w, model_state, batches):
    outputs = []
    for grad_fn in (
      plain,
      *(
        conadv.extrapolate(plain, 0.0, direction=direction)
        for direction in ('past', 'current', 'noise')
      ),
    ):
      state = grad_fn.init(w, [])
      own = []
      for batch in batches:
        output, grads, state = grad_fn.value_and_grad(
          w, state, batch, model_state=model_state, key=jax.random.key(0)
        )
        own.append((output, grads))
      outputs.append(own)
    return outputs

  batches = [{'x': x[t], 'y': y[t]} for t in range(2)]
  expected, *found = two_steps(w, statistics, batches)
  for got in found:
    chex.assert_trees_all_equal(got, expected)


def test_noise_is_standard_normal_times_the_rate():
  w = jnp.zeros(10_000)
  # Its gradient is the point where it is taken.
  grad_fn = conadv.extrapolate(
    lambda w, batch: 0.5 * jnp.sum(w**2) + 0 * batch[0],
    AHEAD,
    direction='noise',
  )
  step = jax.jit(grad_fn.value_and_grad)
  state = grad_fn.init(w, [])

  def noise(seed):
    key = jax.random.key(seed)
    return np.asarray(step(w, state, jnp.ones(1), key=key)[1])

  first, again, second = noise(0), noise(0), noise(1)
  np.testing.assert_array_equal(first, again)
  assert abs(np.corrcoef(first, second)[0, 1]) < 0.05
  assert abs(first.mean()) < 0.02 * AHEAD * 2
  np.testing.assert_allclose(first.std(), AHEAD, rtol=0.05)
  np.testing.assert_allclose(np.mean(np.abs(first) < AHEAD), 0.6827, atol=0.02)


@pytest.mark.parametrize('direction', ['past', 'current', 'noise'])
def test_loss_and_statistics_are_those_ahead_and_move_once(direction):
  params, model_state = init_model()
  points = []

  def seen(params, model_state, batch):
    jax.debug.callback(lambda x: points.append(x), params['head']['bias'])
    return loss_fn(params, model_state, batch)

  grad_fn = conadv.extrapolate(
    conadv.plain(seen, has_state=True), 2.0, direction=direction
  )
  key, state = jax.random.key(0), grad_fn.init(params, [])
  step = jax.jit(grad_fn.value_and_grad)
  for t in range(2):
    (loss, aux), _, state = step(
      params, state, make_batch(t), model_state=model_state, key=key
    )
  jax.effects_barrier()
  assert len(points) == (4 if direction == 'current' else 2)
  # The statistics of the first layer tell where they were taken, and how often.
  (at_start, expected), _ = plain_step(params, model_state, make_batch(1))
  mean = (aux.model_state['norm']['mean'], expected['norm']['mean'])
  assert np.max(np.abs(np.subtract(*mean))) > 1e-3
  assert abs(loss - at_start) > 1e-3
  assert not np.array_equal(points[-1], params['head']['bias'])


def run_regression(grad_fn, steps=3, size=16, parts=1):
  batches = [
    in_parts(make_regression(t, size=size), parts) for t in range(steps)
  ]

  @jax.jit
  def descend(params, batches):
    def step(carry, key_and_batch):
      (params, state), (key, batch) = carry, key_and_batch
      _, grads, state = grad_fn.value_and_grad(params, state, batch, key=key)
      return (optax.tree.add_scale(params, -RATE, grads), state), None

    keys = jax.random.split(jax.random.key(0), steps)
    carry = params, grad_fn.init(params, [])
    return jax.lax.scan(step, carry, (keys, batches))[0]

  return descend(make_params(), jax.tree.map(lambda *x: np.stack(x), *batches))


EXTRAPOLATIONS = {
  'rate': 0.2,
  'momentum': optax.sgd(0.2, momentum=MOMENTUM),
}


@pytest.mark.slow
@pytest.mark.parametrize('extrapolation', list(EXTRAPOLATIONS))
def test_on_devices_each_goes_ahead_by_itself(extrapolation):
  grad_fn = conadv.extrapolate(plain_loss, EXTRAPOLATIONS[extrapolation])
  got, state = run_regression(conadv.data_parallel(grad_fn, make_mesh(8)))

  gradient = jax.jit(jax.grad(plain_loss))
  params = make_params()
  zeros = jax.tree.map(np.zeros_like, params)
  past, trace = [zeros] * 8, [zeros] * 8
  momentum = MOMENTUM if extrapolation == 'momentum' else 0.0
  for t in range(3):
    batch = make_regression(t, size=16)
    for k in range(8):
      part = jax.tree.map(lambda x, k=k: x[2 * k : 2 * k + 2], batch)
      ahead = jax.tree.map(
        lambda w, d, v: w - 0.2 * (d + momentum * v), params, past[k], trace[k]
      )
      past[k] = gradient(ahead, part)
      trace[k] = jax.tree.map(lambda g, v: g + momentum * v, past[k], trace[k])
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *past)
    params = jax.tree.map(lambda w, g: w - RATE * g, params, mean)
  chex.assert_trees_all_close(got, params, rtol=1e-4, atol=1e-5)
  stacked = jax.tree.map(lambda *g: np.stack(g), *past)
  chex.assert_trees_all_close(state.past.value, stacked, rtol=1e-3, atol=1e-4)
  together, _ = run_regression(grad_fn)
  difference = optax.tree.norm(optax.tree.sub(together, got))
  assert difference > 1e-3, 'Otherwise this could not tell the two apart.'


@pytest.mark.slow
def test_micro_batches_are_devices():
  grad_fn = conadv.extrapolate(
    plain_loss, EXTRAPOLATIONS['momentum'], direction='noise'
  )
  chex.assert_trees_all_close(
    run_regression(conadv.accumulate(grad_fn, 4)),
    run_regression(conadv.data_parallel(grad_fn, make_mesh(4)), parts=4),
    **CLOSE,
  )


def test_the_direction_is_float32_in_a_model_of_bfloat16():
  grad_fn = conadv.extrapolate(plain_loss, jnp.float32(0.1))
  params = make_params(jnp.bfloat16)
  state = grad_fn.init(params, [])
  step = jax.jit(grad_fn.value_and_grad)
  for t in range(2):
    _, grads, state = step(params, state, make_regression(t))
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state.past.value, params)


@pytest.mark.parametrize(
  ('extrapolation', 'direction'),
  [
    (AHEAD, 'past'),
    (optax.sgd(AHEAD, momentum=MOMENTUM), 'past'),
    (optax.sgd(AHEAD, momentum=MOMENTUM), 'current'),
  ],
)
def test_a_bad_batch_is_forgotten(extrapolation, direction):
  grad_fn = conadv.extrapolate(
    lambda w, x: jnp.mean(x * w**2), extrapolation, direction=direction
  )
  step = jax.jit(grad_fn.value_and_grad)
  w, good = jnp.float32(1.0), jnp.ones(1)
  _, _, before = step(w, grad_fn.init(w, []), good)
  (loss, _), _, after = step(w, before, jnp.array([jnp.inf]))
  assert not np.isfinite(loss)
  chex.assert_trees_all_equal(after, before)
  chex.assert_tree_all_finite(step(w, after, good))


def test_parameters_may_be_python_floats():
  grad_fn = conadv.extrapolate(conadv.sam(lambda w, x: x * w**2, 0.5), 0.1)
  _, grads, _ = grad_fn.value_and_grad(2.0, grad_fn.init(2.0, []), jnp.ones([]))
  np.testing.assert_allclose(grads, 2 * 2.5)


def test_an_unknown_direction():
  with pytest.raises(ValueError, match="direction='future'"):
    conadv.extrapolate(plain_loss, 0.1, direction='future')


def test_a_negative_rate():
  with pytest.raises(ValueError, match='`extrapolation`'):
    conadv.extrapolate(plain_loss, -0.1)


def test_noise_without_a_key():
  grad_fn = conadv.extrapolate(plain_loss, 0.1, direction='noise')
  params = make_params()
  with pytest.raises(ValueError, match='noise'):
    grad_fn.value_and_grad(params, grad_fn.init(params, []), make_regression(0))


@pytest.mark.parametrize('direction', ['past', 'current'])
def test_gradient_and_state_can_both_be_given_back(direction):
  grad_fn = conadv.extrapolate(quadratic, AHEAD, direction=direction)
  w = jnp.asarray(START, jnp.float32)
  center = jnp.asarray(centers()[0], jnp.float32)
  # Not compiled: a compiled program has a buffer for each of its outputs.
  _, grads, state = grad_fn.value_and_grad(w, grad_fn.init(w, []), center)
  buffers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves((grads, state))]
  assert len(set(buffers)) == len(buffers)
  if direction == 'past':
    chex.assert_trees_all_equal(state.past.value, grads)
