"""Losses that talk to other devices, and parameters over a second axis."""

import functools

import chex
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import (
  CLOSE,
  FEATURES,
  KINDS,
  dealt,
  make_batches,
  make_mesh,
  on,
)

import conadv_optax as conadv


class Linen(nn.Module):
  axis: str | None = None
  groups: list[list[int]] | None = None

  @nn.compact
  def __call__(self, x):
    x = nn.BatchNorm(False, axis_name=self.axis, axis_index_groups=self.groups)(
      nn.Dense(8)(x)
    )
    return nn.Dense(1)(jnp.tanh(x))


@functools.cache
def variables_of_linen():
  [batch] = make_batches(1)
  return jax.jit(Linen().init)(jax.random.key(1), batch['image'])


def linen(axis=None, groups=None):
  """A loss, its parameters and statistics."""
  net, variables = Linen(axis, groups), variables_of_linen()

  def loss_fn(params, model_state, batch):
    output, new = net.apply(
      {'params': params, 'batch_stats': model_state},
      batch['image'],
      mutable=['batch_stats'],
    )
    return jnp.mean((output[:, 0] - batch['y']) ** 2), new['batch_stats']

  return loss_fn, variables['params'], variables['batch_stats']


def haiku(axis=None):
  def forward(x, axis):
    norm = hk.BatchNorm(True, True, 0.9, cross_replica_axis=axis)
    return hk.Linear(1)(jnp.tanh(norm(hk.Linear(8)(x), is_training=True)))

  net = hk.transform_with_state(forward)
  [batch] = make_batches(1)
  # Outside of devices there is no axis yet.
  params, model_state = jax.jit(net.init, static_argnums=2)(
    jax.random.key(1), batch['image'], None
  )

  def loss_fn(params, model_state, batch):
    output, model_state = net.apply(
      params, model_state, None, batch['image'], axis
    )
    return jnp.mean((output[:, 0] - batch['y']) ** 2), model_state

  return loss_fn, params, model_state


def on_libraries(test):
  # Haiku's averages mix a float with a counter.
  mark = pytest.mark.parametrize('library', [linen, haiku])
  return mark(jax.numpy_dtype_promotion('standard')(test))


def two_steps(grad_fn, params, model_state, batches):
  """What two steps in one program return."""

  def run(params, model_state, batches):
    first, *rest = batches
    state = grad_fn.init(params, [first], model_state=model_state)

    def step(carry, batch):
      model_state, state = carry
      (loss, aux), grads, state = grad_fn.value_and_grad(
        params, state, batch, model_state=model_state
      )
      history = loss, aux.losses, aux.model_state, grads
      return (aux.model_state, state), history

    rest = jax.tree.map(lambda *x: jnp.stack(x), *rest)
    return jax.lax.scan(step, (model_state, state), rest)[1]

  return jax.jit(run)(params, model_state, batches)


@pytest.mark.slow
@on_libraries
def test_synchronised_statistics_are_those_of_the_whole_batch(library):
  loss_fn, params, model_state = library()
  alone, with_axis = (
    conadv.wrap(fn, attack=conadv.fgsm(0.1), has_state=True)
    for fn in (loss_fn, library('data')[0])
  )
  params, model_state = conadv.dual_bn.split(params, model_state)
  expected = two_steps(alone, params, model_state, make_batches(3))
  for kind in KINDS[: 1 + (library is linen)]:
    mesh = make_mesh(8, kind=kind)
    synchronised = two_steps(
      conadv.data_parallel(with_axis, mesh),
      *on(mesh, (params, model_state)),
      on(mesh, make_batches(3), 'data'),
    )
    chex.assert_trees_all_close(synchronised, expected, **CLOSE)


def test_a_synchronised_gradient_is_that_of_jax_on_the_whole_batch():
  """Without this library on one of the sides."""
  [batch] = make_batches(1)
  loss_fn, params, model_state = linen()
  (loss, new_state), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
    params, model_state, batch
  )
  grad_fn = conadv.data_parallel(
    conadv.plain(linen('data')[0], has_state=True), make_mesh(8)
  )
  (got_loss, aux), got_grads, _ = grad_fn.value_and_grad(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  chex.assert_trees_all_close(
    (got_loss, aux.model_state, got_grads), (loss, new_state, grads), **CLOSE
  )


@pytest.mark.slow
def test_groups_of_devices_are_as_many_devices():
  _, params, model_state = linen()
  params, model_state = conadv.dual_bn.split(params, model_state)
  in_groups, alone = (
    conadv.data_parallel(
      conadv.wrap(
        linen(axis, groups)[0], attack=conadv.fgsm(0.1), has_state=True
      ),
      make_mesh(devices),
    )
    for axis, groups, devices in (
      ('data', [[0, 1, 2, 3], [4, 5, 6, 7]], 8),
      (None, None, 2),
    )
  )
  chex.assert_trees_all_close(
    two_steps(in_groups, params, model_state, make_batches(3)),
    two_steps(alone, params, model_state, make_batches(3)),
    **CLOSE,
  )


def masked_norm(axis):
  """A loss over a mask whose BatchNorm is over the real examples of all."""

  def total(x):
    x = jnp.sum(x, axis=0)
    return x if axis is None else jax.lax.psum(x, axis)

  def loss_fn(w, batch):
    h, mask = batch['image'] @ w, batch['mask']
    mean = total(mask[:, None] * h) / total(mask)
    h -= mean[None]
    variance = total(mask[:, None] * h**2) / total(mask)
    h = jnp.tanh(h / jnp.sqrt(variance + 1e-5)[None])
    error = mask * (jnp.sum(h, axis=1) - batch['y'])
    return jnp.sum(error**2) / jnp.sum(mask)

  return loss_fn


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_synchronised_statistics_with_unequal_masks(kind):
  [batch] = make_batches(1, 16)
  batch['mask'] = np.ones(16, np.float32)
  batch['mask'][[1, 4, 5, 6, 9, 12, 13, 15]] = 0
  w = np.random.default_rng(1).normal(size=(FEATURES, 3)).astype(np.float32)
  loss, grads = jax.jit(jax.value_and_grad(masked_norm(None)))(w, batch)
  grad_fn = conadv.data_parallel(
    conadv.plain(
      masked_norm('data'), denominator=lambda batch: batch['mask'].sum()
    ),
    make_mesh(4, kind=kind),
  )
  (got, _), got_grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  chex.assert_trees_all_close((got, got_grads), (loss, grads), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('axis', 'kinds'), [('data', KINDS), (('data', 'fsdp'), KINDS[1:])], ids=str
)
def test_parameters_spread_over_a_second_axis(axis, kinds):
  """Over 'fsdp' lie the parameters, and in one case the batch too."""
  loss_fn, params, model_state = linen()
  params, model_state = conadv.dual_bn.split(params, model_state)
  grad_fn = conadv.wrap(loss_fn, attack=conadv.fgsm(0.1), has_state=True)
  groups = 4 if axis == 'data' else 8
  expected = two_steps(
    conadv.accumulate(grad_fn, groups),
    params,
    model_state,
    [dealt(batch, groups) for batch in make_batches(3)],
  )

  for kind in kinds:
    mesh = make_mesh(4, 2, names=('data', 'fsdp'), kind=kind)

    def spread(x, mesh=mesh):
      return on(
        mesh, x, *[None] * (x.ndim - 1), *['fsdp'][: x.shape[-1] % 2 == 0]
      )

    got = two_steps(
      conadv.data_parallel(grad_fn, mesh, axis=axis),
      jax.tree.map(spread, params),
      # A statistic lies as the columns that it is of.
      on(mesh, model_state, *['fsdp'][: axis == 'data']),
      on(mesh, make_batches(3), axis),
    )
    chex.assert_trees_all_close(got, expected, **CLOSE)


METHODS = {
  'LookSAM': lambda fn: conadv.sam(fn, 0.1, every=2),
  'ahead': lambda fn: conadv.extrapolate(fn, 0.1),
  'ahead by noise': lambda fn: conadv.extrapolate(fn, 0.1, direction='noise'),
}


@functools.cache
def four_groups(method, mesh=None):
  """Three steps on as many devices, or of as many micro-batches."""

  def loss_fn(w, batch):
    return jnp.mean(jnp.tanh(batch['image'] @ w) ** 2)

  grad_fn = METHODS[method](conadv.wrap(loss_fn, attack=conadv.fgsm(0.1)))
  if mesh is None:
    grad_fn = conadv.accumulate(grad_fn, 4, second_moment=True)
  else:
    grad_fn = conadv.data_parallel(grad_fn, mesh, second_moment=True)

  @jax.jit
  def run(w, batches):
    keys = jax.random.split(jax.random.key(0))
    state = grad_fn.init(w, batches[:1], key=keys[0])

    def step(carry, batch):
      w, state = carry
      (_, aux), grads, state = grad_fn.value_and_grad(
        w, state, batch, key=keys[1]
      )
      w -= grads
      return (w, state), (w, grads, aux.second_moment)

    rest = jax.tree.map(lambda *x: jnp.stack(x), *batches[1:])
    return jax.lax.scan(step, (w, state), rest)[1]

  return run


# What the kind changes outside of `sam` does not depend on the method.
@pytest.mark.slow
@pytest.mark.parametrize('spread', ['devices', 'micro-batches'])
@pytest.mark.parametrize(
  ('method', 'kind'),
  [*((method, KINDS[1]) for method in METHODS), ('LookSAM', KINDS[0])],
  ids=str,
)
def test_a_weight_whose_columns_lie_on_a_model_axis(method, kind, spread):
  """What a method keeps of it lies as it does, and so does its square."""
  mesh = make_mesh(4, 2, names=('data', 'model'), kind=kind)
  on_devices = spread == 'devices'
  run = four_groups(method, mesh if on_devices else None)
  batches = make_batches(4)
  w = np.random.default_rng(3).normal(size=(FEATURES, 8)).astype(np.float32)
  got = run(on(mesh, w, None, 'model'), on(mesh, batches, 'data'))
  expected = four_groups(method)(
    w, [dealt(batch, 4 if on_devices else 1) for batch in batches]
  )
  chex.assert_trees_all_close(got, expected, **CLOSE)
  of_weight = NamedSharding(mesh, P(None, None, 'model'))
  assert got[1].sharding.is_equivalent_to(of_weight, 3)


@pytest.mark.parametrize('kind', KINDS, ids=str)
def test_trainers_of_different_rows_may_talk(kind):
  """The same place in each row; attackers have turns of their own."""

  def loss_fn(groups, w, batch):
    hidden = batch['image'] @ w
    mean = jax.lax.pmean(
      jnp.mean(hidden, axis=0), 'data', axis_index_groups=groups
    )
    return jnp.mean(jnp.tanh(hidden - mean[None]) ** 2)

  def two(spread, w, groups=None):
    grad_fn = spread(
      conadv.wrap(functools.partial(loss_fn, groups), attack=conadv.fgsm(0.1))
    )
    first, second = make_batches(2)
    state = grad_fn.init(w, [first])
    history = []
    for batch in (second, first):
      (loss, _), grads, state = grad_fn.value_and_grad(w, state, batch)
      history.append((loss, grads))
    return history

  mesh = make_mesh(2, 3, kind=kind)
  w = np.random.default_rng(3).normal(size=(FEATURES, 3)).astype(np.float32)
  got = two(functools.partial(conadv.concurrent, mesh=mesh), on(mesh, w))
  four = functools.partial(conadv.data_parallel, mesh=make_mesh(4))
  expected = two(four, w, [[0, 2], [1, 3]])
  chex.assert_trees_all_close(got, expected, **CLOSE)


def test_synchronised_statistics_with_a_device_of_padding():
  """Where the loss divides by nothing, other devices get no NaN of it."""

  def make(axis):
    def total(x):
      x = jnp.sum(x, axis=0)
      return x if axis is None else jax.lax.psum(x, axis)

    def loss_fn(w, batch):
      h, mask = batch['image'] @ w, batch['mask']
      h -= (total(mask[:, None] * h) / total(mask))[None]
      error = mask * (jnp.sum(jnp.tanh(h), axis=1) - batch['y'])
      return jnp.sum(error**2) / jnp.maximum(jnp.sum(mask), 1.0)

    return loss_fn

  rng = np.random.default_rng(0)
  batch = {
    'image': rng.normal(size=(16, 4)).astype(np.float32),
    'y': rng.normal(size=16).astype(np.float32),
    'mask': (np.arange(16) < 9).astype(np.float32),
  }
  w = rng.normal(size=(4, 3)).astype(np.float32)
  grad_fn = conadv.data_parallel(
    conadv.plain(make('data'), denominator=lambda b: b['mask'].sum()),
    make_mesh(4),
  )
  _, got, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  np.testing.assert_allclose(
    got, jax.jit(jax.grad(make(None)))(w, batch), rtol=1e-4, atol=1e-5
  )


def test_micro_batches_on_devices_with_a_weight_over_a_model_axis():
  kind = jax.sharding.AxisType.Explicit
  both = jax.make_mesh((4, 2), ('data', 'model'), (kind, kind))
  spread = jax.sharding.NamedSharding(both, jax.P(None, 'model'))
  rng = np.random.default_rng(0)
  x = rng.normal(size=(16, 5)).astype(np.float32)
  w = rng.normal(size=(5, 4)).astype(np.float32)
  grad_fn = conadv.data_parallel(
    conadv.accumulate(lambda w, x: jnp.mean((x @ w) ** 2), 2), both
  )
  there = jax.device_put(w, spread)
  _, grads, _ = grad_fn.value_and_grad(there, grad_fn.init(there, []), x)
  expected = 2 * x.T @ (x @ w) / (16 * 4)
  np.testing.assert_allclose(jax.device_get(grads), expected, rtol=1e-4)
