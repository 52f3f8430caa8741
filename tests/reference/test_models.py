"""The ResNets: their sizes, shapes, strides and dtypes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference.run import models


def make(**fields):
  return models.ResNet(
    **{
      'num_classes': 10,
      'stage_sizes': (1, 1),
      'filters': 4,
      'block': 'basic',
      'stem': 'small',
      'dtype': jnp.float32,
      **fields,
    }
  )


def shapes(model, size, *, train=False):
  """Shapes and dtypes of the variables, and of all that a call computes."""

  def call():
    image = jnp.ones((2, size, size, 3))
    variables = model.init(jax.random.key(0), image, train=False)
    logits, computed = model.apply(
      variables, image, train=train, capture_intermediates=True, mutable=True
    )
    return variables, logits, computed

  return jax.eval_shape(call)


@pytest.mark.slow
def test_resnet50_has_its_25_557_032_parameters():
  model = make(
    num_classes=1000,
    stage_sizes=(3, 4, 6, 3),
    filters=64,
    block='bottleneck',
    stem='imagenet',
  )
  variables, logits, _ = shapes(model, 224)
  leaves = jax.tree.leaves(variables['params'])
  assert sum(leaf.size for leaf in leaves) == 25_557_032
  # One mean and one variance for each of the 53 norm layers.
  assert len(jax.tree.leaves(variables['batch_stats'])) == 2 * 53
  assert logits.shape == (2, 1000)


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
@pytest.mark.parametrize('stem', ['small', 'imagenet'])
def test_stages_halve_the_image_and_double_the_channels(block, stem):
  model = make(block=block, stem=stem, stage_sizes=(1, 2, 1))
  _, _, computed = shapes(model, 32)
  outputs = [
    values['__call__'][0].shape
    for name, values in computed['intermediates'].items()
    if 'Block' in name
  ]
  first = 32 if stem == 'small' else 8
  width = 4 if block == 'basic' else 16
  assert sorted(outputs) == sorted(
    [
      (2, first, first, width),
      (2, first // 2, first // 2, 2 * width),
      (2, first // 2, first // 2, 2 * width),
      (2, first // 4, first // 4, 4 * width),
    ]
  )


def test_the_bottleneck_strides_on_its_3x3():
  _, _, computed = shapes(make(block='bottleneck'), 16)
  block = computed['intermediates']['BottleneckBlock_1']
  assert block['Conv_0']['__call__'][0].shape == (2, 16, 16, 8)
  assert block['Conv_1']['__call__'][0].shape == (2, 8, 8, 8)


@pytest.mark.parametrize('block', ['basic', 'bottleneck'])
def test_a_block_starts_as_its_shortcut(block):
  model = make(block=block, stage_sizes=(1,))
  init = jax.jit(functools.partial(model.init, train=False))
  variables = init(jax.random.key(0), jnp.ones((2, 8, 8, 3)))
  for name, params in variables['params'].items():
    if 'Block' in name:
      norms = [key for key in params if key.startswith('BatchNorm')]
      assert norms
      for norm in norms:
        last = norm == max(norms)
        np.testing.assert_array_equal(params[norm]['scale'], float(not last))


def test_bfloat16_computes_and_float32_stays():
  # Flax's BatchNorm mixes the two dtypes itself.
  with jax.numpy_dtype_promotion('standard'):
    variables, logits, computed = shapes(
      make(dtype=jnp.bfloat16), 8, train=True
    )
  assert logits.dtype == jnp.float32
  for leaf in jax.tree.leaves((variables, computed['batch_stats'])):
    assert leaf.dtype == jnp.float32
  hidden = computed['intermediates']['BasicBlock_1']['__call__'][0]
  assert hidden.dtype == jnp.bfloat16


def test_plain_blocks_on_a_strided_stem_are_a_chain_of_convolutions():
  model = make(block='plain', stem='strided', stage_sizes=(0, 1, 1))
  variables, _, computed = shapes(model, 28)
  outputs = {
    name: values['__call__'][0].shape
    for name, values in computed['intermediates'].items()
    if name != '__call__'
  }
  assert outputs['stem'] == (2, 14, 14, 4)
  assert outputs['PlainBlock_0'] == (2, 7, 7, 8)
  assert outputs['PlainBlock_1'] == (2, 4, 4, 16)
  kernels = 9 * (3 * 4 + 4 * 8 + 8 * 16)
  norms, head = 2 * (4 + 8 + 16), 16 * 10 + 10
  leaves = jax.tree.leaves(variables['params'])
  assert sum(leaf.size for leaf in leaves) == kernels + norms + head


def test_statistics_move_a_tenth_of_the_way():
  model = make(stage_sizes=(), filters=2)
  images = np.random.default_rng(0).normal(size=(8, 4, 4, 3))
  images = images.astype(np.float32)
  variables = model.init(jax.random.key(0), images, train=False)
  _, kept = model.apply(
    variables, images, train=True, mutable=True, capture_intermediates=True
  )
  [before] = kept['intermediates']['stem']['__call__']
  mean, var = (f(np.asarray(before), (0, 1, 2)) for f in (np.mean, np.var))
  moved = kept['batch_stats']['stem_norm']
  np.testing.assert_allclose(moved['mean'], 0.1 * mean, atol=1e-6)
  np.testing.assert_allclose(moved['var'], 0.9 + 0.1 * var, rtol=1e-5)
