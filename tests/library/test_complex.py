"""Complex parameters: the methods of pairs of reals, in NumPy."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from meshes import CLOSE, make_mesh, on

import conadv_optax as conadv

BATCH, FEATURES, EPSILON = 16, 3, 0.1
STATE = conadv.ConAdvState((), ())


def loss_fn(w, batch):
  """Of floats and complex weights; a mean over a mask where there is one."""
  error = batch['image'].astype(w.dtype) @ w - batch['y']
  mask = batch.get('mask', jnp.ones(error.shape))
  size = jnp.real(error) ** 2 + jnp.imag(error) ** 2
  return jnp.sum(mask * size) / jnp.sum(mask)


def naive_gradient(w, batch, part=slice(None)):
  """As JAX has it, the conjugate of the direction in which the loss rises."""
  x, y = batch['image'][part], batch['y'][part]
  error = np.float64(x) @ w - y
  return 2 * np.mean(np.conj(error)[:, None] * x, axis=0)


def make_problem(seed):
  rng = np.random.default_rng(seed)

  def complex_normal(*shape):
    parts = rng.normal(size=(2, *shape))
    return (parts[0] + 1j * parts[1]).astype(np.complex64)

  x = rng.normal(size=(BATCH, FEATURES)).astype(np.float32)
  return complex_normal(FEATURES), {'image': x, 'y': complex_normal(BATCH)}


seeds = given(st.integers(0, 2**31))
few = settings(max_examples=20, deadline=None)


@functools.cache
def stepper(make, steps=1):
  """The gradients of some steps of descent, in one program."""
  grad_fn = make()

  @jax.jit
  def run(w, batch):
    state, history = grad_fn.init(w, [batch] * grad_fn.staleness), []
    for _ in range(steps):
      _, grads, state = grad_fn.value_and_grad(w, state, batch)
      w = w - 0.1 * jnp.conj(grads)
      history.append(grads)
    return history

  return run


def assert_gradients(got, expected):
  for one, wanted in zip(got, expected, strict=True):
    assert one.dtype == jnp.complex64
    scale = np.abs(wanted).max()
    np.testing.assert_allclose(one, wanted, rtol=2e-4, atol=2e-5 * scale)


def sam():
  return conadv.sam(loss_fn, 0.3)


def look_sam():
  return conadv.sam(loss_fn, 0.3, every=2, reuse_weight=0.6)


@few
@seeds
def test_sam_goes_to_the_worst_point(seed):
  w, batch = make_problem(seed)
  up = np.conj(naive_gradient(w, batch))
  worst = w + 0.3 * up / np.linalg.norm(up)
  assert_gradients(stepper(sam)(w, batch), [naive_gradient(worst, batch)])


@few
@seeds
def test_look_sam_keeps_what_is_orthogonal_of_the_pairs(seed):
  w, batch = make_problem(seed)

  def pairs(z):
    return np.concatenate([z.real, z.imag])

  first = naive_gradient(w, batch)
  up = np.conj(first)
  sharp = naive_gradient(w + 0.3 * up / np.linalg.norm(up), batch)
  along = pairs(first) @ pairs(sharp) / np.sum(pairs(first) ** 2)
  beside = sharp - along * first
  later = naive_gradient(w - 0.1 * np.conj(sharp), batch)
  size = 0.6 * np.linalg.norm(later) / np.linalg.norm(beside)
  assert_gradients(
    stepper(look_sam, 2)(w, batch), [sharp, later + size * beside]
  )


@pytest.mark.parametrize('direction', ['past', 'current'])
@pytest.mark.parametrize(
  'extrapolation', [0.2, optax.sgd(0.2)], ids=['rate', 'transformation']
)
def test_extrapolation_goes_downhill(direction, extrapolation):
  def make():
    return conadv.extrapolate(loss_fn, extrapolation, direction=direction)

  @few
  @seeds
  def holds(seed):
    w, batch = make_problem(seed)
    expected, past = [], np.zeros(FEATURES)
    for _ in range(2):
      towards = past if direction == 'past' else naive_gradient(w, batch)
      past = naive_gradient(w - 0.2 * np.conj(towards), batch)
      expected.append(past)
      w = w - 0.1 * np.conj(past)
    w, batch = make_problem(seed)
    assert_gradients(stepper(make, 2)(w, batch), expected)

  # One function, so that its program is compiled once.
  holds()


def test_noise_has_the_deviation_of_its_rate():
  """Of an entry as a whole, as JAX draws complex numbers."""
  grad_fn = conadv.extrapolate(
    lambda w, batch: jnp.mean(jnp.abs(w) ** 2), 0.5, direction='noise'
  )
  w = jnp.zeros(4000, jnp.complex64)
  key = jax.random.key(0)
  state = grad_fn.init(w, [], key=key)
  step = jax.jit(grad_fn.value_and_grad)
  _, grads, _ = step(w, state, jnp.ones(1), key=key)
  noise = np.asarray(grads) * 4000 / 2
  np.testing.assert_allclose(np.mean(np.abs(noise) ** 2), 0.25, rtol=0.05)
  np.testing.assert_allclose(np.std(noise.real), np.std(noise.imag), rtol=0.1)


explicit = make_mesh(4, kind=AxisType.Explicit)
GROUPS = {
  'micro-batches': lambda fn, **kw: conadv.accumulate(fn, 4, **kw),
  'devices': lambda fn, **kw: conadv.data_parallel(fn, make_mesh(4), **kw),
  'explicit': lambda fn, **kw: conadv.data_parallel(fn, explicit, **kw),
}


def parts_of(groups):
  """The examples of each of the four groups."""
  if groups == 'micro-batches':
    return [slice(k, None, 4) for k in range(4)]
  return [slice(4 * k, 4 * k + 4) for k in range(4)]


@pytest.mark.parametrize('groups', list(GROUPS))
def test_a_second_moment_is_of_the_size_and_real(groups):
  step = jax.jit(GROUPS[groups](loss_fn, second_moment=True).value_and_grad)

  @few
  @seeds
  def holds(seed):
    w, batch = make_problem(seed)
    (_, aux), grads, _ = step(w, STATE, batch)
    each = [naive_gradient(w, batch, part) for part in parts_of(groups)]
    assert aux.second_moment.dtype == jnp.float32
    assert_gradients([grads], [np.mean(each, axis=0)])
    np.testing.assert_allclose(
      aux.second_moment, np.mean(np.abs(each) ** 2, axis=0), rtol=2e-4
    )

  holds()


def with_state(w, mean, batch):
  """A running mean of complex outputs, over real examples."""
  outputs = batch['image'].astype(w.dtype) @ w
  mask = batch['mask'].astype(w.dtype)
  new = jnp.sum(mask * outputs) / jnp.sum(mask)
  return loss_fn(w, batch), 0.5 * mean + 0.5 * new


@pytest.mark.parametrize('groups', list(GROUPS))
def test_complex_statistics_and_gradients_are_means_over_a_mask(groups):
  grad_fn = GROUPS[groups](
    conadv.plain(
      with_state,
      has_state=True,
      denominator=lambda batch: batch['mask'].sum(),
    )
  )
  w, batch = make_problem(0)
  mask = np.ones(BATCH, np.float32)
  mask[[0, 1, 2, 3, 5, 8, 12, 13]] = 0
  mean = np.complex64(1 - 2j)
  (loss, aux), grads, _ = jax.jit(grad_fn.value_and_grad)(
    w, STATE, {**batch, 'mask': mask}, model_state=mean
  )
  real = mask > 0
  outputs = np.float64(batch['image'][real]) @ w
  assert aux.model_state.dtype == jnp.complex64
  np.testing.assert_allclose(
    aux.model_state, 0.5 * mean + 0.5 * outputs.mean(), rtol=1e-5
  )
  error = np.abs(outputs - batch['y'][real]) ** 2
  np.testing.assert_allclose(loss, error.mean(), rtol=1e-5)
  assert_gradients([grads], [naive_gradient(w, batch, real)])


def attacked(w, batch, part=slice(None)):
  error = np.float64(batch['image']) @ w - batch['y']
  uphill = np.real(np.conj(error)[:, None] * w)
  x = batch['image'].copy()
  x[part] += EPSILON * np.sign(uphill)[part]
  return {**batch, 'image': x}


def test_complex_weights_attack_floats():
  grad_fn = conadv.wrap(
    loss_fn,
    attack=conadv.fgsm(EPSILON),
    weights={'main': 0.25, 'adversarial': 0.75},
  )
  w, batch = make_problem(1)

  @jax.jit
  def run(w, later, batch):
    state = grad_fn.init(w, [batch])
    return grad_fn.value_and_grad(later, state, batch)

  later = w * np.complex64(1j)
  (_, aux), grads, state = run(w, later, batch)
  stale = attacked(w, batch)
  expected = 0.25 * naive_gradient(later, batch)
  expected += 0.75 * naive_gradient(later, stale)
  assert_gradients([grads], [expected])
  assert aux.losses['main'].dtype == jnp.float32
  chex.assert_trees_all_close(
    state.queue.adversarial[0], attacked(later, batch)['image'], rtol=1e-5
  )


def test_fast_advprop_of_complex_weights():
  grad_fn = conadv.fast_advprop(
    loss_fn,
    attack=conadv.fgsm(EPSILON),
    adversarial_fraction=0.25,
    attack_weight=0.4,
  )
  w, batch = make_problem(2)
  _, grads, _ = jax.jit(grad_fn.value_and_grad)(w, STATE, batch)
  first, rest = slice(0, 4), slice(4, None)
  expected = 0.75 * naive_gradient(w, batch, rest)
  expected += 0.25 * 0.4 * naive_gradient(w, batch, first)
  hit = naive_gradient(w, attacked(w, batch), first)
  assert_gradients([grads], [expected + 0.25 * 0.6 * hit])


# Of complex weights against the same weights as a pair of reals.
METHODS = {
  'wrap': lambda fn: conadv.wrap(fn, attack=conadv.fgsm(EPSILON)),
  'reuse': lambda fn: conadv.wrap(
    fn, attack=conadv.fgsm(EPSILON), reuse_gradient=True
  ),
  'fast advprop': lambda fn: conadv.fast_advprop(
    fn, attack=conadv.fgsm(EPSILON)
  ),
  'sam with a penalty': lambda fn: conadv.sam(fn, 0.3, penalty=0.4),
  'LookSAM': lambda fn: conadv.sam(fn, 0.3, every=3),
  'momentum ahead': lambda fn: conadv.extrapolate(
    fn, optax.sgd(0.1, momentum=0.5)
  ),
}


def spread_methods():
  """Every method alone, over micro-batches and on one kind of devices."""
  kinds = itertools.cycle(['devices', 'explicit'])
  return [
    (method, spread)
    for method, kind in zip(METHODS, kinds, strict=False)
    for spread in ('alone', 'micro-batches', kind)
  ]


@pytest.mark.parametrize(('method', 'spread'), spread_methods())
def test_a_complex_weight_is_a_pair_of_reals(method, spread):
  def of_pair(pair, batch):
    return loss_fn(jax.lax.complex(*pair), batch)

  w, batch = make_problem(3)
  begin = w, (w.real, w.imag)
  if spread == 'explicit':
    begin = on(explicit, begin)
  whole, (real, imaginary) = (
    _trajectory(
      GROUPS.get(spread, lambda fn: fn)(METHODS[method](fn)), params, batch
    )
    for fn, params in zip((loss_fn, of_pair), begin, strict=True)
  )
  np.testing.assert_allclose(whole.real, real, **CLOSE)
  np.testing.assert_allclose(whole.imag, imaginary, **CLOSE)


def _trajectory(grad_fn, params, batch):
  def step(carry, _):
    params, state = carry
    _, grads, state = grad_fn.value_and_grad(params, state, batch)
    params = jax.tree.map(lambda w, g: w - 0.1 * jnp.conj(g), params, grads)
    return (params, state), params

  @jax.jit
  def run(params):
    state = grad_fn.init(params, [batch] * grad_fn.staleness)
    return jax.lax.scan(step, (params, state), length=4)[1]

  return jax.tree.map(np.asarray, run(params))
