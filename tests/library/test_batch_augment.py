"""Batch augmentation against loops over copies and examples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_model, loss_fn, make_batch, plain_step
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import conadv_optax as conadv

CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
KEY = jax.random.key(0)


def jitter(key, example):
  noise = jax.random.normal(key, example['image'].shape)
  return {**example, 'image': example['image'] + noise}


def identity(key, example):
  del key
  return example


def call(grad_fn, batch):
  params, model_state = init_model()
  return jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )


def mean_over_groups(groups):
  """Loss, statistics and gradient, each group with statistics of its own."""
  rows = [plain_step(*init_model(), group) for group in groups]
  return jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *rows)


def assert_is_mean_over_groups(output, groups):
  (loss, aux), grads, _ = output
  chex.assert_trees_all_close(
    ((loss, aux.model_state), grads), mean_over_groups(groups), **CLOSE
  )


def copies_of(batch, copies):
  """The batch of each copy, the first of every example, the second, ..."""
  return [
    jax.tree.map(lambda x, i=i: x[i::copies], batch) for i in range(copies)
  ]


def test_copies_lie_side_by_side():
  batch = {'x': jnp.arange(5.0), 'label': jnp.arange(5)}
  augment = conadv.batch_augment(
    lambda key, example: {**example, 'draw': jax.random.uniform(key)}, 3
  )
  augmented = jax.jit(augment)(KEY, batch)
  expected = np.repeat(np.arange(5), 3)
  np.testing.assert_array_equal(augmented['x'], expected)
  np.testing.assert_array_equal(augmented['label'], expected)
  assert augmented['label'].dtype == batch['label'].dtype
  assert len(np.unique(augmented['draw'])) == 15, 'A key for each of each copy.'


@pytest.mark.parametrize(
  ('axes', 'axis_type'),
  [('a', AxisType.Auto), (('a', 'b'), AxisType.Explicit)],
)
def test_no_example_leaves_its_device(axes, axis_type):
  mesh = jax.make_mesh((4, 2), ('a', 'b'), (axis_type,) * 2)
  batch = {'image': jnp.arange(48.0).reshape(16, 3), 'label': jnp.arange(16)}
  spread = jax.device_put(batch, NamedSharding(mesh, P(axes)))
  augment = conadv.batch_augment(jitter, 3)
  compiled = jax.jit(augment).lower(KEY, spread).compile()
  for moved in ('all-gather', 'all-to-all', 'all-reduce', 'collective-permute'):
    assert moved not in compiled.as_text()
  expected = augment(KEY, batch)
  for augmented in (compiled(KEY, spread), augment(KEY, spread)):
    chex.assert_trees_all_close(augmented, expected, **CLOSE)
    assert augmented['image'].sharding.spec[0] == axes


def test_an_example_may_change_its_shape_and_dtype():
  augment = conadv.batch_augment(
    lambda key, x: jax.random.permutation(key, x)[:2].astype(jnp.float32), 2
  )
  augmented = augment(KEY, jnp.arange(12, dtype=jnp.uint8).reshape(3, 4))
  chex.assert_shape(augmented, (6, 2))
  chex.assert_type(augmented, jnp.float32)


def test_the_gradient_is_the_mean_over_copies_and_examples():
  # Without batch statistics, every example for itself.
  batch, w = jnp.array([1.0, 2.0, 3.0]), jnp.array(0.5)
  augment = conadv.batch_augment(lambda key, x: x + jax.random.normal(key), 4)
  augmented = augment(KEY, batch)
  grad_fn = conadv.plain(lambda w, x: jnp.mean(jnp.tanh(w * x)))
  _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), augmented)
  single = jax.grad(lambda w, x: jnp.tanh(w * x))
  expected = jnp.mean(jax.vmap(single, (None, 0))(w, augmented))
  np.testing.assert_allclose(grads, expected, rtol=1e-5)


def test_micro_batches_are_copies():
  copies = 3
  batch = conadv.batch_augment(jitter, copies)(KEY, make_batch(0))
  grad_fn = conadv.accumulate(conadv.plain(loss_fn, has_state=True), copies)
  groups = copies_of(batch, copies)
  assert_is_mean_over_groups(call(grad_fn, batch), groups)
  whole = mean_over_groups([batch])[0][0]
  assert abs(whole - mean_over_groups(groups)[0][0]) > 1e-4


@pytest.mark.slow
@pytest.mark.parametrize('axis_type', [AxisType.Auto, AxisType.Explicit])
def test_on_devices_a_group_holds_examples_of_one_copy(axis_type):
  mesh, copies = make_mesh(8, kind=axis_type), 2
  plain = conadv.plain(loss_fn, has_state=True)
  grad_fn = conadv.data_parallel(conadv.accumulate(plain, copies), mesh)
  augment = conadv.batch_augment(jitter, copies)
  batch = make_batch(0, size=32)
  # From a batch that is spread over the devices already.
  spread = jax.device_put(batch, NamedSharding(mesh, P('data')))
  params, model_state = init_model()

  @jax.jit
  def step(params, model_state, batch):
    batch = augment(KEY, batch)
    return grad_fn.value_and_grad(
      params, grad_fn.init(params, []), batch, model_state=model_state
    )

  augmented = augment(KEY, batch)
  groups = [
    jax.tree.map(lambda x, rows=rows: x[rows], augmented)
    for rows in np.arange(64)
    .reshape(8, 4, copies)
    .swapaxes(1, 2)
    .reshape(16, 4)
  ]
  assert_is_mean_over_groups(step(params, model_state, spread), groups)


def test_one_copy_as_it_is_makes_the_plain_step():
  grad_fn = conadv.plain(loss_fn, has_state=True)
  batch = make_batch(0)
  augmented = conadv.batch_augment(identity, 1)(KEY, batch)
  chex.assert_trees_all_equal(augmented, batch)
  chex.assert_trees_all_equal(call(grad_fn, augmented), call(grad_fn, batch))


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda f: conadv.data_parallel(f, make_mesh(8)), 'the 8 devices'),
    (lambda f: conadv.accumulate(f, 8), 'the 8 micro-batches'),
  ],
)
def test_copies_that_do_not_fill_the_groups_are_an_error(make, message):
  grad_fn = make(conadv.plain(loss_fn, has_state=True))

  def step(batch):
    return call(grad_fn, conadv.batch_augment(jitter, 3)(KEY, batch))

  jax.eval_shape(step, make_batch(0, size=8))
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(step, make_batch(0, size=4))


@pytest.mark.parametrize(
  ('error', 'copies'),
  [(ValueError, 0), (ValueError, -1), (TypeError, 2.0), (TypeError, True)],
)
def test_copies_that_are_no_number_of_copies(error, copies):
  with pytest.raises(error, match='`copies`'):
    conadv.batch_augment(jitter, copies)


@pytest.mark.parametrize(
  'batch',
  [
    {'image': jnp.ones((4, 2)), 'label': jnp.ones(3)},
    {'image': jnp.ones((4, 2)), 'mean': jnp.ones([])},
    {'image': jnp.ones((0, 2))},
    {},
  ],
)
def test_leaves_without_a_common_axis_are_an_error(batch):
  with pytest.raises(ValueError, match='same leading axis') as error:
    jax.jit(conadv.batch_augment(identity, 2))(KEY, batch)
  for name in batch:
    assert name in str(error.value)


def test_an_augmentation_that_is_no_function():
  with pytest.raises(TypeError, match='augment_fn'):
    conadv.batch_augment(3, 2)
