"""Batch augmentation against loops over copies and examples."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_model, loss_fn, make_batch
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import conadv_optax as conadv

CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
KEY = jax.random.key(0)


def make_mesh():
  return jax.make_mesh((8,), ('data',), (AxisType.Auto,))


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


def parts_of(batch, parts):
  split = jax.tree.map(lambda x: np.split(np.asarray(x), parts), batch)
  return [
    {name: jnp.asarray(split[name][k]) for name in batch} for k in range(parts)
  ]


def mean_over_parts(batch, parts):
  """Loss, statistics and gradient, each part with statistics of its own."""
  params, model_state = init_model()
  step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  rows = [step(params, model_state, part) for part in parts_of(batch, parts)]
  return jax.tree.map(lambda *x: np.mean(np.stack(x), axis=0), *rows)


def assert_is_mean_over_parts(output, batch, parts):
  (loss, aux), grads, _ = output
  chex.assert_trees_all_close(
    ((loss, aux.model_state), grads), mean_over_parts(batch, parts), **CLOSE
  )


def test_copies_lie_one_after_another():
  batch = {'x': jnp.arange(5.0), 'label': jnp.arange(5)}
  augment = conadv.batch_augment(
    lambda key, example: {**example, 'draw': jax.random.uniform(key)}, 3
  )
  augmented = jax.jit(augment)(KEY, batch)
  expected = {name: np.tile(np.arange(5), 3) for name in batch}
  np.testing.assert_array_equal(augmented['x'], expected['x'])
  np.testing.assert_array_equal(augmented['label'], expected['label'])
  assert augmented['label'].dtype == batch['label'].dtype
  assert len(np.unique(augmented['draw'])) == 15, 'A key for each of each copy.'


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
  expected = np.mean([single(w, x) for x in augmented])
  np.testing.assert_allclose(grads, expected, rtol=1e-5)


@pytest.mark.parametrize('copies', [1, 3])
def test_micro_batches_are_copies(copies):
  batch = conadv.batch_augment(jitter, copies)(KEY, make_batch(0))
  grad_fn = conadv.accumulate(conadv.plain(loss_fn, has_state=True), copies)
  assert_is_mean_over_parts(call(grad_fn, batch), batch, copies)
  if copies > 1:
    whole = mean_over_parts(batch, 1)[0][0]
    assert abs(whole - mean_over_parts(batch, copies)[0][0]) > 1e-4


def test_on_devices_a_group_holds_examples_of_one_copy():
  mesh, copies = make_mesh(), 2
  plain = conadv.plain(loss_fn, has_state=True)
  grad_fn = conadv.data_parallel(conadv.accumulate(plain, copies), mesh)
  augment = conadv.batch_augment(jitter, copies)
  batch = make_batch(0, size=32)
  # From a batch that is spread over the devices already.
  spread = jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))
  params, model_state = init_model()

  @jax.jit
  def step(params, model_state, batch):
    batch = augment(KEY, batch)
    output = grad_fn.value_and_grad(
      params, grad_fn.init(params, []), batch, model_state=model_state
    )
    return output, batch

  output, augmented = step(params, model_state, spread)
  chex.assert_trees_all_close(augmented, augment(KEY, batch), **CLOSE)
  # Eight devices of two groups of four: 32 examples hold eight whole groups.
  assert_is_mean_over_parts(output, augmented, 16)


def test_one_copy_as_it_is_makes_the_plain_step():
  grad_fn = conadv.plain(loss_fn, has_state=True)
  batch = make_batch(0)
  augmented = conadv.batch_augment(identity, 1)(KEY, batch)
  chex.assert_trees_all_equal(augmented, batch)
  chex.assert_trees_all_equal(call(grad_fn, augmented), call(grad_fn, batch))


@pytest.mark.parametrize(
  ('make', 'message'),
  [
    (lambda f: conadv.data_parallel(f, make_mesh()), 'the 8 devices'),
    (lambda f: conadv.accumulate(f, 8), 'the 8 micro-batches'),
  ],
)
def test_copies_that_do_not_fill_the_groups_are_an_error(make, message):
  grad_fn = make(conadv.plain(loss_fn, has_state=True))
  augment = conadv.batch_augment(jitter, 3)
  call(grad_fn, augment(KEY, make_batch(0, size=8)))
  with pytest.raises(ValueError, match=message):
    call(grad_fn, augment(KEY, make_batch(0, size=4)))


@pytest.mark.parametrize('copies', [0, -1, 2.0, True])
def test_copies_that_are_no_number_of_copies(copies):
  with pytest.raises(ValueError, match='`copies`'):
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
