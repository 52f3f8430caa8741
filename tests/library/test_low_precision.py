"""Short dtypes: attacks that move as in float32, and steps of any wrapper."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from meshes import make_mesh, on

import conadv_optax as conadv

SIZES = [256, 32768]
SHORT = [jnp.float16, jnp.bfloat16]
FEATURES = 8
STATE = conadv.ConAdvState((), ())


def margin_loss(w, batch):
  """Logistic, of small weights: an example moves it by about 0.001."""
  margin = batch['image'] @ w.astype(batch['image'].dtype)
  losses = jax.nn.softplus(-margin * batch['y'].astype(margin.dtype))
  if 'mask' not in batch:
    return jnp.mean(losses)
  mask = batch['mask'].astype(losses.dtype)
  # Not in float16, which ends at 65,504.
  return jnp.sum(mask * losses, dtype=jnp.float32) / jnp.sum(batch['mask'])


def make_problem(size, dtype):
  rng = np.random.default_rng(size)
  w = rng.uniform(1e-3, 3e-3, FEATURES) * rng.choice([-1, 1], FEATURES)
  batch = {
    'image': jnp.asarray(rng.normal(size=(size, FEATURES)), dtype),
    'y': jnp.asarray(rng.choice([-1, 1], size), jnp.float32),
  }
  return jnp.asarray(w, jnp.float32), batch


def uphill(w, batch):
  """Where every example has to go: its margin falls."""
  return -np.sign(np.asarray(batch['y'])[:, None] * np.asarray(w))


def crafted_by_perturb(attack, w, batch):
  return jax.jit(
    lambda w, batch: conadv.perturb(margin_loss, w, batch, attack=attack)
  )(w, batch)['image']


def crafted_by_wrap(attack, w, batch, **kwargs):
  init = conadv.wrap(margin_loss, attack=attack, **kwargs).init
  return jax.jit(init)(w, [batch]).queue.adversarial[0]


def crafted_over_a_mask(attack, w, batch):
  """Whose sum is what the loss is divided by."""
  mask = jnp.ones(len(batch['y']), jnp.float32)
  return crafted_by_wrap(
    attack,
    w,
    {**batch, 'mask': mask},
    denominator=lambda batch: batch['mask'].sum(),
  )


WAYS = {
  'perturb': crafted_by_perturb,
  'wrap': crafted_by_wrap,
  'mask': crafted_over_a_mask,
}


@pytest.mark.parametrize('dtype', [*SHORT, jnp.float32])
@pytest.mark.parametrize('size', SIZES)
@pytest.mark.parametrize('way', list(WAYS))
def test_every_input_moves_uphill_whatever_the_size(way, size, dtype):
  w, batch = make_problem(size, dtype)
  clean = np.float64(batch['image'])
  moved = WAYS[way](conadv.fgsm(0.25), w, batch)
  assert moved.dtype == dtype
  np.testing.assert_array_equal(
    np.sign(np.float64(moved) - clean), uphill(w, batch)
  )


@pytest.mark.parametrize('dtype', SHORT)
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_several_steps_go_as_far_as_in_float32(norm, dtype):
  attack = conadv.pgd(0.5, steps=3, norm=norm, random_start=False)
  w, batch = make_problem(4096, dtype)
  long = {**batch, 'image': batch['image'].astype(jnp.float32)}
  short, expected = (
    np.float64(crafted_by_perturb(attack, w, one)) for one in (batch, long)
  )
  # To the resolution of the inputs, some of which are above 2.
  atol = 8 * float(jnp.finfo(dtype).eps)
  np.testing.assert_allclose(short, expected, rtol=0, atol=atol)


def test_a_reused_gradient_moves_in_bfloat16():
  """It is that of training, which nothing scales: float16 underflows."""
  w, batch = make_problem(4096, jnp.bfloat16)
  grad_fn = conadv.wrap(
    margin_loss, attack=conadv.fgsm(0.25), reuse_gradient=True
  )
  state = grad_fn.init(w, [batch])
  _, _, state = jax.jit(grad_fn.value_and_grad)(w, state, batch)
  moved = np.float64(state.queue.batch['image'][0] - batch['image'])
  np.testing.assert_array_equal(np.sign(moved), uphill(w, batch))


def climb(key, gradient_fn, inputs):
  """An attack that uses the size of the gradient."""
  del key
  start = inputs.astype(jnp.float32)
  return (start + gradient_fn(start)).astype(inputs.dtype)


@jax.jit
def gradient_of_inputs(w, batch):
  return jax.grad(lambda x: margin_loss(w, {**batch, 'image': x}))(
    batch['image']
  )


@pytest.mark.parametrize('size', [1, 12, 256])
@pytest.mark.parametrize('way', list(WAYS))
def test_an_attack_sees_the_gradient_of_the_mean(way, size):
  w, batch = make_problem(size, jnp.float32)
  batch['image'] = jnp.zeros_like(batch['image'])
  seen = WAYS[way](conadv.Attack(climb, draws=False), w, batch)
  expected = gradient_of_inputs(w, batch)
  # A power of two rounds nothing.
  np.testing.assert_array_equal(seen, expected)


@pytest.mark.parametrize('size', [64, 4096])
def test_an_attack_on_one_example_among_padding(size):
  """The gradient is that of one example, and float16 holds no multiple."""

  def loss(w, batch):
    real = batch['mask'].astype(batch['image'].dtype)
    return jnp.sum(real * batch['image'] * w) / jnp.sum(real)

  batch = {
    'image': jnp.zeros(size, jnp.float16),
    'mask': jnp.zeros(size).at[0].set(1),
  }
  grad_fn = conadv.wrap(
    loss,
    attack=conadv.Attack(climb, draws=False),
    denominator=lambda batch: batch['mask'].sum(),
  )
  state = grad_fn.init(jnp.float16(500), [batch])
  expected = np.zeros(size)
  expected[0] = 500
  np.testing.assert_array_equal(state.queue.adversarial[0], expected)


@pytest.mark.parametrize('size', [12, 1024])
def test_an_attack_on_float16_sees_the_gradient_of_float32(size):
  """In float16 that of 1,024 examples is below the normal numbers."""
  w, batch = make_problem(size, jnp.float16)
  long = {**batch, 'image': batch['image'].astype(jnp.float32)}

  @jax.jit
  def gradient_that_is_seen(w, batch):
    seen = []

    def record(key, gradient_fn, inputs):
      del key
      seen.append(gradient_fn(inputs.astype(jnp.float32)))
      return inputs

    attack = conadv.Attack(record, draws=False)
    conadv.perturb(margin_loss, w, batch, attack=attack)
    return seen[0]

  seen = gradient_that_is_seen(w, batch)
  assert seen.dtype == jnp.float32
  np.testing.assert_allclose(seen, gradient_of_inputs(w, long), rtol=1e-2)


@pytest.mark.parametrize(
  'spread',
  [
    lambda fn: conadv.accumulate(fn, 4),
    lambda fn: conadv.data_parallel(fn, make_mesh(4)),
    lambda fn: conadv.data_parallel(conadv.accumulate(fn, 2), make_mesh(2)),
  ],
  ids=['micro-batches', 'devices', 'both'],
)
def test_a_group_that_is_all_of_a_mean_does_not_overflow(spread):
  """It counts four times in each branch, and float16 does not hold both."""

  def loss(w, model_state, batch):
    mean = jnp.sum(batch['image'] * batch['mask']) / jnp.sum(batch['mask'])
    mean = mean.astype(w.dtype)
    new_state = mean.astype(model_state.dtype)
    return mean * w, (new_state, {'each': batch['image']})

  size = np.float32(1.2e4)
  # The first example is in the first group, however they are dealt.
  batch = {'image': np.full(8, size), 'mask': np.float32([1] + [0] * 7)}
  grad_fn = spread(
    conadv.wrap(
      loss,
      0,
      attack=conadv.fgsm(0.0),
      weights={'main': 1.0, 'adversarial': 1.0},
      denominator=lambda batch: batch['mask'].sum(),
      has_state=True,
      has_aux=True,
    )
  )
  w = jnp.ones([], jnp.float16)
  (value, aux), grads, _ = grad_fn.value_and_grad(
    w, grad_fn.init(w, []), batch, model_state=jnp.zeros([], jnp.float16)
  )
  chex.assert_trees_all_equal_dtypes((grads, aux.model_state), (w, w))
  for got, wanted in ((value, 2), (grads, 2), (aux.model_state, 1)):
    np.testing.assert_allclose(np.float32(got), wanted * size, rtol=1e-3)
  # What is one value an example is of no mean.
  np.testing.assert_array_equal(aux.aux['main']['each'], batch['image'])


def regression(params, model_state, batch):
  """In the dtype of the parameters, as a model of short floats is."""
  dtype = params['head'].dtype
  hidden = batch['image'].astype(dtype) @ params['hidden']
  mean = jnp.mean(hidden, axis=0)
  output = jnp.tanh(hidden - mean[None]) @ params['head']
  error = output - batch['y'].astype(dtype)
  model_state = (0.5 * model_state + 0.5 * mean).astype(dtype)
  return jnp.mean(error**2), model_state


def make_model(dtype):
  rng = np.random.default_rng(4)
  params = {
    'hidden': jnp.asarray(rng.normal(size=(FEATURES, 6)), dtype),
    'head': jnp.asarray(rng.normal(size=6), dtype),
  }
  return params, jnp.zeros(6, dtype)


wrap = functools.partial(
  conadv.wrap, regression, attack=conadv.fgsm(0.1), has_state=True
)
explicit = make_mesh(4, kind=AxisType.Explicit)
roles = make_mesh(1, 5, kind=AxisType.Explicit)
MESHES = {'devices': explicit, 'LookSAM': explicit, 'roles': roles}
WRAPPERS = {
  'plain': lambda: conadv.plain(regression, has_state=True),
  'wrap': wrap,
  'reuse': lambda: wrap(reuse_gradient=True),
  'micro-batches': lambda: conadv.accumulate(wrap(), 8, second_moment=True),
  'devices': lambda: conadv.data_parallel(wrap(), explicit, second_moment=True),
  'roles': lambda: conadv.concurrent(wrap(), roles),
  'sam': lambda: conadv.sam(wrap(), 0.1, penalty=0.7),
  'LookSAM': lambda: conadv.data_parallel(
    conadv.sam(wrap(), 0.1, every=2), explicit
  ),
  'ahead, past': lambda: conadv.extrapolate(wrap(), 0.1),
  'ahead, current': lambda: conadv.extrapolate(
    wrap(), optax.sgd(0.1, momentum=0.5), direction='current'
  ),
  'fast advprop': lambda: conadv.fast_advprop(
    regression, attack=conadv.fgsm(0.1), has_state=True
  ),
}


@functools.cache
def trained(wrapper, dtype):
  grad_fn = WRAPPERS[wrapper]()
  rng = np.random.default_rng(5)
  shape = (grad_fn.staleness + 3, 32)
  batches = {
    'image': jnp.asarray(rng.normal(size=(*shape, FEATURES)), dtype),
    'y': jnp.asarray(rng.normal(size=shape), jnp.float32),
  }
  model = make_model(dtype)
  if wrapper in MESHES:
    model = on(MESHES[wrapper], model)

  def step(carry, batch):
    params, model_state, state = carry
    (loss, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, model_state=model_state
    )
    params = jax.tree.map(
      lambda w, g: (w - 0.1 * g).astype(w.dtype), params, grads
    )
    return (params, aux.model_state, state), (loss, aux, grads)

  @jax.jit
  def run(params, model_state, batches):
    first = [
      jax.tree.map(lambda x, i=i: x[i], batches)
      for i in range(grad_fn.staleness)
    ]
    state = grad_fn.init(params, first, model_state=model_state)
    rest = jax.tree.map(lambda x: x[grad_fn.staleness :], batches)
    carry, outputs = jax.lax.scan(step, (params, model_state, state), rest)
    return carry[0], *jax.tree.map(lambda x: x[-1], outputs)

  return run(*model, batches)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', SHORT)
@pytest.mark.parametrize('wrapper', list(WRAPPERS))
def test_every_wrapper_trains_in_a_short_dtype_as_in_float32(wrapper, dtype):
  params, loss, aux, grads = trained(wrapper, dtype)
  long, long_loss, _, long_grads = trained(wrapper, jnp.float32)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    (grads, aux.model_state), make_model(dtype)
  )
  for x in (loss, *aux.losses.values(), *jax.tree.leaves(aux.second_moment)):
    assert x.dtype == jnp.float32
  chex.assert_tree_all_finite((params, loss, aux, grads))
  # Of rounding in three steps; a sign that turns moves an input by 0.2.
  close = {'rtol': 0, 'atol': 60 * float(jnp.finfo(dtype).eps)}
  np.testing.assert_allclose(loss, long_loss, **close)
  for short, wanted in ((params, long), (grads, long_grads)):
    chex.assert_trees_all_close(
      jax.tree.map(np.float64, short), jax.tree.map(np.float64, wanted), **close
    )


def test_a_large_gradient_of_the_one_real_group():
  """Its share of four groups is not in the way back, where it overflows."""

  def loss_fn(w, batch):
    mean = jnp.sum(batch['x'] * batch['mask']) / jnp.sum(batch['mask'])
    return mean.astype(w.dtype) * w

  grad_fn = conadv.accumulate(
    conadv.plain(loss_fn, denominator=lambda b: b['mask'].sum()), 4
  )
  batch = {'x': jnp.full(8, 3e4), 'mask': jnp.zeros(8).at[0].set(1)}
  w = jnp.ones([], jnp.float16)
  _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  np.testing.assert_allclose(np.float32(grads), 3e4, rtol=1e-3)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_large_gradients_of_examples_point_as_in_float32(norm):
  """Up to 13,700 each: four times that is all that float16 holds."""
  rng = np.random.default_rng(1)
  x = jnp.asarray(3 * rng.normal(size=(256, 8)), jnp.float16)
  w = jnp.asarray(10 * rng.normal(size=(8, 16)), jnp.float16)

  @jax.jit(static_argnums=0)
  def moves(dtype):
    def loss_fn(w, batch):
      raised = jnp.abs(batch['image'] @ w) ** jnp.asarray(1.5, dtype)
      return 64 * jnp.mean(raised.astype(jnp.float32))

    batch = {'image': x.astype(dtype)}
    attack = conadv.fgsm(0.5, norm=norm)
    return conadv.perturb(loss_fn, w.astype(dtype), batch, attack=attack)

  short, full = (
    np.float64(moves(dtype)['image']) - np.float64(x)
    for dtype in (jnp.float16, jnp.float32)
  )
  lengths = np.linalg.norm(short, axis=1) * np.linalg.norm(full, axis=1)
  assert np.mean(np.sum(short * full, axis=1) / lengths) > 0.995
