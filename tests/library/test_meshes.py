"""Every wrapper on any mesh, and numbers that are traced on it."""

import collections
import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
  BATCH,
  CLOSE,
  FEATURES,
  KINDS,
  dealt,
  make_batches,
  make_mesh,
  on,
)

import conadv_optax as conadv


def grouped_loss(params, model_state, batch):
  """With batch statistics, which show what the groups were."""
  hidden = batch['image'] @ params['hidden']
  mean = jnp.mean(hidden, axis=0)
  output = jnp.tanh(hidden - mean[None]) @ params['head']
  loss = jnp.mean((output - batch['y']) ** 2)
  return loss, 0.9 * model_state + 0.1 * mean


def make_wrap(staleness=1, *, epsilon=0.1, **kwargs):
  attack = conadv.fgsm(epsilon)
  return conadv.wrap(
    grouped_loss, staleness, attack=attack, has_state=True, **kwargs
  )


def make_advprop():
  return conadv.fast_advprop(
    grouped_loss,
    attack=conadv.fgsm(0.1),
    has_state=True,
    adversarial_fraction=0.29,
  )


def same(fn):
  return fn


def devices(fn):
  return conadv.data_parallel(fn, make_mesh(8, kind=AxisType.Explicit))


def micro(number):
  return lambda fn: conadv.accumulate(fn, number)


def roles(fn):
  mesh = make_mesh(2, 4, kind=AxisType.Explicit)
  return conadv.concurrent(fn, mesh)


def sam(inner=same, **kwargs):
  return lambda fn: conadv.sam(inner(fn), 0.1, **kwargs)


def ahead(direction, inner=same):
  return lambda fn: conadv.extrapolate(inner(fn), 0.1, direction=direction)


def after(outer, inner):
  return lambda fn: outer(inner(fn))


# By name: what is wrapped, how on the devices, how on one, and the groups of
# devices and of micro-batches on each.
WRAPPERS = {
  'wrap, 0.29': (make_wrap(adversarial_fraction=0.29), same, same, 1, 1),
  'wrap, reuse, 0.29': (
    make_wrap(reuse_gradient=True, adversarial_fraction=0.29),
    same, same, 1, 1),
  'devices': (make_wrap(), devices, micro(8), 8, 1),
  'devices, fraction and reuse': (
    make_wrap(2, reuse_gradient=True, adversarial_fraction=0.5),
    devices, micro(8), 8, 1),
  'micro-batches on devices': (
    make_wrap(), after(devices, micro(2)), micro(16), 8, 2),
  'devices in micro-batches': (
    make_wrap(), after(micro(2), devices), micro(16), 8, 2),
  'roles': (make_wrap(2), roles, micro(6), 6, 1),
  'LookSAM': (make_wrap(), sam(every=2), sam(every=2), 1, 1),
  'sam over an axis': (
    make_wrap(), after(devices, sam(axis='data')), sam(micro(8)), 8, 1),
  'LookSAM over an axis': (
    make_wrap(), after(devices, sam(axis='data', every=2)),
    sam(micro(8), every=2), 8, 1),
  'sam around devices': (make_wrap(), sam(devices), sam(micro(8)), 8, 1),
  'ahead on devices': (
    make_wrap(), after(devices, ahead('current')),
    after(micro(8), ahead('current')), 8, 1),
  'ahead around devices': (
    make_wrap(), ahead('past', devices), ahead('past', micro(8)), 8, 1),
  'Fast AdvProp': (make_advprop(), same, same, 1, 1),
  'Fast AdvProp on devices': (make_advprop(), devices, micro(8), 8, 1),
}  # fmt: skip


def make_model():
  rng = np.random.default_rng(2)
  params = {
    'hidden': rng.normal(size=(FEATURES, 6)).astype(np.float32),
    'head': rng.normal(size=6).astype(np.float32),
  }
  return params, np.zeros(6, np.float32)


def three_steps(grad_fn):
  """Gradient descent in one program, on stacked batches."""

  def run(params, model_state, batches):
    tau, key = grad_fn.staleness, jax.random.key(0)
    first = [jax.tree.map(lambda x, t=t: x[t], batches) for t in range(tau)]
    state = grad_fn.init(params, first, model_state=model_state, key=key)

    def step(carry, number_and_batch):
      (params, model_state, state), (number, batch) = carry, number_and_batch
      (loss, aux), grads, state = grad_fn.value_and_grad(
        params,
        state,
        batch,
        model_state=model_state,
        key=jax.random.fold_in(key, number),
      )
      params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
      history = loss, aux.losses, params, aux.model_state
      return (params, aux.model_state, state), history

    rest = jax.tree.map(lambda x: x[tau : tau + 3], batches)
    carry = params, model_state, state
    return jax.lax.scan(step, carry, (jnp.arange(3), rest))[1]

  return jax.jit(run)


def stacked(batches):
  return jax.tree.map(lambda *x: np.stack(x), *batches)


@pytest.mark.slow
@pytest.mark.parametrize('name', list(WRAPPERS))
def test_on_an_explicit_mesh_every_wrapper_is_that_on_one_device(name):
  grad_fn, spread, alone, of_devices, micro_batches = WRAPPERS[name]
  batches = make_batches(5, 48 if 'roles' in name else BATCH)
  shape = (2, 4) if 'roles' in name else (8,)
  mesh = make_mesh(
    *shape, names=('data', 'role')[: len(shape)], kind=AxisType.Explicit
  )
  got = three_steps(spread(grad_fn))(
    *on(mesh, make_model()), on(mesh, stacked(batches), None, 'data')
  )
  expected = three_steps(alone(grad_fn))(
    *make_model(),
    stacked([dealt(b, of_devices, micro_batches) for b in batches]),
  )
  chex.assert_trees_all_close(got, expected, **CLOSE)


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize(('fraction', 'count'), [(0.5, 16), (0.29, 9), (1, 32)])
def test_a_part_of_a_batch_on_any_mesh(fraction, count, kind):
  mesh, w = make_mesh(8, kind=kind), np.float32([1, -2, 3, 0])
  [batch] = make_batches(1)

  @jax.jit
  def mixed(w, batch):
    return conadv.perturb(
      lambda w, batch: jnp.mean(batch['image'] @ w),
      w,
      batch,
      attack=conadv.fgsm(0.1),
      adversarial_fraction=fraction,
    )

  got = mixed(on(mesh, w), on(mesh, batch, 'data'))
  image = batch['image'].copy()
  image[:count] += 0.1 * np.sign(w)
  np.testing.assert_allclose(got['image'], image, rtol=1e-6)
  assert got['image'].sharding.is_equivalent_to(
    NamedSharding(mesh, P('data')), 2
  )


@pytest.mark.parametrize('fraction', [0.25, 0.29])
@pytest.mark.parametrize('kind', ['reuse', 'Fast AdvProp'])
def test_a_part_of_a_batch_outside_of_jit(kind, fraction):
  grad_fn = (
    conadv.fast_advprop(
      grouped_loss,
      attack=conadv.fgsm(0.1),
      has_state=True,
      adversarial_fraction=fraction,
    )
    if kind == 'Fast AdvProp'
    else make_wrap(reuse_gradient=True, adversarial_fraction=fraction)
  )

  def step(model, batch):
    params, model_state = model
    state = grad_fn.init(
      params, [batch] * grad_fn.staleness, model_state=model_state
    )
    return grad_fn.value_and_grad(
      params, state, batch, model_state=model_state
    )[:2]

  mesh, [batch] = make_mesh(8, kind=AxisType.Explicit), make_batches(1)
  with jax.set_mesh(mesh):
    got = step(on(mesh, make_model()), on(mesh, batch, 'data'))
  chex.assert_trees_all_close(got, step(make_model(), batch), **CLOSE)


TRACED = {
  'sam on devices': lambda fn, **kw: devices(conadv.sam(fn, **kw)),
  'sam around roles': lambda fn, **kw: conadv.sam(roles(fn), **kw),
  'ahead on devices': lambda fn, **kw: devices(conadv.extrapolate(fn, **kw)),
}
ON_ONE = {
  'sam on devices': lambda fn, **kw: micro(8)(conadv.sam(fn, **kw)),
  'sam around roles': lambda fn, **kw: conadv.sam(micro(6)(fn), **kw),
  'ahead on devices': lambda fn, **kw: micro(8)(conadv.extrapolate(fn, **kw)),
}


@pytest.mark.parametrize('name', list(TRACED))
def test_traced_numbers_enter_explicit_meshes(name):
  """Schedules: the numbers change from call to call, compiled once."""
  has_roles, traces = 'roles' in name, 0
  batches = make_batches(2, 48 if has_roles else BATCH)
  shape = (2, 4) if has_roles else (8,)
  mesh = make_mesh(
    *shape, names=('data', 'role')[: len(shape)], kind=AxisType.Explicit
  )

  def step(spread, numbers, params, model_state, batches):
    nonlocal traces
    traces += 1
    epsilon, main, *rest = numbers
    inner = make_wrap(
      epsilon=epsilon, weights={'main': main, 'adversarial': 1 - main}
    )
    names = ('radius', 'penalty') if 'sam' in name else ('extrapolation',)
    grad_fn = spread(inner, **dict(zip(names, rest, strict=True)))
    state = grad_fn.init(params, batches[:1], model_state=model_state)
    (loss, _), grads, _ = grad_fn.value_and_grad(
      params, state, batches[1], model_state=model_state
    )
    return loss, grads

  used = 4 if 'sam' in name else 3
  got, expected = (
    jax.jit(functools.partial(step, table[name])) for table in (TRACED, ON_ONE)
  )
  for numbers in ((0.1, 0.5, 0.2, 0.9), (0.0, 0.8, 0.0, 0.3)):
    numbers = list(map(jnp.float32, numbers[:used]))
    chex.assert_trees_all_close(
      got(
        on(mesh, numbers), *on(mesh, make_model()), on(mesh, batches, 'data')
      ),
      expected(
        numbers,
        *make_model(),
        [dealt(b, 6 if has_roles else 8) for b in batches],
      ),
      **CLOSE,
    )
  assert traces == 2  # Once on the devices, once on one.


@pytest.mark.parametrize('kind', KINDS, ids=str)
@pytest.mark.parametrize('staleness', [None, 0, 1])
def test_micro_batches_of_a_spread_batch_stay_where_they_are(staleness, kind):
  """No device gets the examples of another, batch or queue."""
  mesh = make_mesh(8, kind=kind)

  def loss(w, batch):
    return jnp.mean(jnp.tanh(batch['image'] @ w) ** 2)

  grad_fn = conadv.plain(loss)
  if staleness is not None:
    grad_fn = conadv.wrap(loss, staleness, attack=conadv.fgsm(0.1))
  grad_fn = conadv.accumulate(grad_fn, 4)
  w, batch = (
    on(mesh, np.ones((16, 16), np.float32)),
    on(mesh, {'image': np.ones((64, 16), np.float32)}, 'data'),
  )
  first = [batch] * grad_fn.staleness
  state = jax.jit(grad_fn.init)(w, first)
  step = jax.jit(grad_fn.value_and_grad).lower(w, state, batch).compile()
  found = collections.Counter(
    re.findall(
      r'(all-gather|all-to-all|collective-permute|all-reduce)(?:-start)?\(',
      step.as_text(),
    )
  )
  assert found['all-reduce'] > 0, found
  assert set(found) == {'all-reduce'}, found
  for leaf in jax.tree.leaves(state.queue):
    assert leaf.addressable_shards[0].data.shape == (1, 8, 16)


@functools.cache
def mean_of_squares(groups, dtype):
  """Of the mean of each group, so that the groups decide the result."""
  return jax.jit(
    conadv.accumulate(
      lambda w, x: jnp.mean((x @ w).astype(jnp.float32)) ** 2,
      groups,
      second_moment=True,
    ).value_and_grad
  )


@settings(max_examples=30, deadline=None)
@given(
  st.sampled_from(
    [
      (1, jnp.bfloat16),
      (2, jnp.float32),
      (3, jnp.float16),
      (64, jnp.float32),
      (255, jnp.float16),
      (1024, jnp.bfloat16),
    ]
  ),
  st.integers(0, 2**31),
)
def test_any_number_of_groups_is_the_mean_over_them(number_and_dtype, seed):
  groups, dtype = number_and_dtype
  x, w = (
    jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)
    for shape in ((2 * groups, 3), (3,))
  )
  (loss, aux), grads, _ = mean_of_squares(groups, dtype)(
    w, conadv.ConAdvState((), ()), x
  )
  means = np.float64(x).reshape(2, groups, 3).mean(axis=0)
  outputs = means @ np.float64(w)
  each = 2 * outputs[:, None] * means
  eps = float(jnp.finfo(dtype).eps)
  close = {'rtol': 16 * eps, 'atol': 16 * eps}
  assert grads.dtype == dtype
  np.testing.assert_allclose(loss, (outputs**2).mean(), **close)
  np.testing.assert_allclose(np.float64(grads), each.mean(axis=0), **close)
  np.testing.assert_allclose(
    aux.second_moment, (each**2).mean(axis=0), rtol=64 * eps, atol=64 * eps
  )


@pytest.mark.parametrize(
  ('shape', 'axis', 'kind'),
  [
    ((1,), 'data', AxisType.Explicit),
    ((5,), 'data', AxisType.Auto),
    ((8,), 'data', AxisType.Auto),
    ((8,), 'data', AxisType.Explicit),
    ((2, 4), 'data', AxisType.Explicit),
    ((4, 2), 'other', AxisType.Auto),
    ((2, 4), ('other', 'data'), AxisType.Explicit),
    ((2, 2, 2), ('data', 'third'), AxisType.Auto),
    ((2, 2, 2), ('data', 'third'), AxisType.Explicit),
  ],
  ids=str,
)
def test_any_mesh_is_the_mean_over_its_groups(shape, axis, kind):
  mesh = make_mesh(
    *shape, names=('data', 'other', 'third')[: len(shape)], kind=kind
  )
  axes = (axis,) if isinstance(axis, str) else axis
  groups = math.prod(mesh.shape[name] for name in axes)
  x = np.random.default_rng(3).normal(size=(2 * groups, 3)).astype(np.float32)
  w = np.float32([1, -2, 0.5])
  grad_fn = conadv.data_parallel(
    lambda w, x: jnp.mean(x @ w) ** 2, mesh, axis=axis, second_moment=True
  )
  (_, aux), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), x)
  means = np.float64(x).reshape(groups, 2, 3).mean(axis=1)
  each = 2 * (means @ w)[:, None] * means
  np.testing.assert_allclose(grads, each.mean(axis=0), rtol=1e-5)
  np.testing.assert_allclose(
    aux.second_moment, (each**2).mean(axis=0), rtol=1e-5
  )
