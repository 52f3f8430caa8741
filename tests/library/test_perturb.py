"""Part of a batch attacked in place, against a naive attack in NumPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import cross_entropy, make_batch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv

ATTACK = conadv.fgsm(0.1)
KERNEL = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)


def loss_fn(kernel, batch):
  image = batch['image'].astype(kernel.dtype)
  return cross_entropy(image @ kernel, batch['label'])


def naive_fgsm(batch, epsilon, count):
  """The gradient of softmax regression by hand, and its sign."""
  x, w = np.float64(batch['image']), np.float64(KERNEL)
  p = np.exp(x @ w)
  p /= p.sum(axis=1, keepdims=True)
  slope = (p - np.eye(3)[np.asarray(batch['label'])]) @ w.T
  return np.concatenate(
    [x[:count] + epsilon * np.sign(slope[:count]), x[count:]]
  )


@pytest.mark.parametrize(
  ('fraction', 'count'), [(1.0, 16), (0.2, 3), (0.01, 1)]
)
def test_the_first_part_is_replaced_and_nothing_else(fraction, count):
  batch = make_batch(0)
  mixed = jax.jit(
    lambda kernel, batch: conadv.perturb(
      loss_fn,
      kernel,
      batch,
      attack=ATTACK,
      adversarial_fraction=fraction,
    )
  )(KERNEL, batch)
  np.testing.assert_allclose(
    mixed['image'], naive_fgsm(batch, 0.1, count), atol=1e-6
  )
  chex.assert_trees_all_equal(mixed['label'], batch['label'])


def test_a_batch_on_eight_devices_gives_the_same():
  mesh = jax.make_mesh((8,), ('data',), axis_types=(AxisType.Auto,))
  batch = make_batch(0)
  sharded = jax.device_put(batch, NamedSharding(mesh, P('data')))
  kernel = jax.device_put(KERNEL, NamedSharding(mesh, P()))
  mixed = jax.jit(
    lambda kernel, batch: conadv.perturb(
      loss_fn,
      kernel,
      batch,
      attack=ATTACK,
      adversarial_fraction=0.3,
    )
  )(kernel, sharded)
  np.testing.assert_allclose(
    mixed['image'], naive_fgsm(batch, 0.1, 4), atol=1e-6
  )
  assert mixed['image'].sharding.spec == P('data')


@pytest.mark.slow
def test_targets_are_for_the_attack_alone():
  batch = make_batch(0)
  attack = conadv.pgd(0.2, targets=conadv.random_targets(3), random_start=False)
  mixed = conadv.perturb(
    loss_fn, KERNEL, batch, attack=attack, key=jax.random.key(0)
  )
  chex.assert_trees_all_equal(mixed['label'], batch['label'])
  # Towards a wrong class is away from the right one, for this model.
  assert loss_fn(KERNEL, mixed) > loss_fn(KERNEL, batch)
  untargeted = naive_fgsm(batch, 0.2, 16)
  assert np.max(np.abs(mixed['image'] - untargeted)) > 0.1


@pytest.mark.slow
def test_dtypes_are_kept():
  batch = make_batch(0)
  batch['image'] = batch['image'].astype(jnp.bfloat16)
  mixed = conadv.perturb(
    loss_fn, KERNEL, batch, attack=ATTACK, adversarial_fraction=0.5
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(mixed, batch)
  changed = np.any(np.asarray(mixed['image'] != batch['image']), axis=1)
  np.testing.assert_array_equal(changed, np.arange(16) < 8)


def test_a_pair_that_converts_leaves_floats():
  pixels = jnp.asarray(np.arange(80).reshape(16, 5), jnp.uint8)
  batch = {**make_batch(0), 'image': pixels}
  mixed = conadv.perturb(
    loss_fn,
    KERNEL,
    batch,
    attack=ATTACK,
    adversarial_fraction=0.5,
    inputs=(
      lambda batch: batch['image'].astype(jnp.float32) / 255,
      lambda batch, image: {**batch, 'image': image},
    ),
  )
  floats = {**batch, 'image': pixels.astype(jnp.float32) / 255}
  chex.assert_trees_all_equal_shapes_and_dtypes(mixed, floats)
  np.testing.assert_allclose(
    mixed['image'], naive_fgsm(floats, 0.1, 8), atol=1e-6
  )


def test_errors_say_what_is_wrong():
  batch = make_batch(0)

  def call(batch=batch, attack=ATTACK, **arguments):
    return conadv.perturb(loss_fn, KERNEL, batch, attack=attack, **arguments)

  with pytest.raises(ValueError, match='adversarial_fraction=0'):
    call(adversarial_fraction=0.0)
  with pytest.raises(TypeError, match='Likely the call is missing'):
    call(attack=conadv.fgsm)
  with pytest.raises(ValueError, match='needs `key=`'):
    call(attack=conadv.pgd(0.1))
  with pytest.raises(TypeError, match='must be floating'):
    call({**batch, 'image': jnp.ones((16, 5), jnp.uint8)})
  with pytest.raises(KeyError, match="Did you mean `inputs='image'`"):
    call(inputs='images')
