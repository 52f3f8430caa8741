"""Batch Kalman normalisation, against NumPy, draws, and Flax's BatchNorm."""

import itertools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec
from jax.test_util import check_grads
from meshes import make_mesh
from model_checks import (
  CLASSES,
  MOMENTUM,
  check_statistics,
  convolve,
  make_images,
  moments,
)
from scipy import stats

import conadv_optax as conadv
from conadv_optax.flax import (
  LinenKalmanNorm,
  NnxKalmanNorm,
  Statistics,
  fuse,
  predict,
)

P = 0.9
# Of the convolutions before the three norm layers: what the second is handed
# went through its convolution, what the third is handed did not.
WIDTHS = (1, 4, 6, 6)


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    statistics = None
    for i, width in enumerate(WIDTHS[1:]):
      conv = nn.Conv(width, (3, 3), use_bias=False, name=f'conv{i}')
      x = conv(x)
      if i == 1:
        statistics = predict(statistics, conv.variables['params']['kernel'])
      norm = LinenKalmanNorm(
        p=P, momentum=MOMENTUM, use_running_average=False, name=f'norm{i}'
      )
      x, statistics = norm(x, statistics)
      x = nn.relu(x)
    return nn.Dense(CLASSES)(jnp.mean(x, axis=(1, 2)))


class NnxNet(nnx.Module):
  def __init__(self, *, rngs):
    for i, (before, width) in enumerate(itertools.pairwise(WIDTHS)):
      conv = nnx.Conv(before, width, (3, 3), use_bias=False, rngs=rngs)
      setattr(self, f'conv{i}', conv)
      norm = NnxKalmanNorm(width, p=P, momentum=MOMENTUM, rngs=rngs)
      setattr(self, f'norm{i}', norm)
    self.head = nnx.Linear(WIDTHS[-1], CLASSES, rngs=rngs)

  def __call__(self, x):
    x, statistics = self.norm0(self.conv0(x), None)
    x = self.conv1(nnx.relu(x))
    statistics = predict(statistics, self.conv1.kernel[...])
    x, statistics = self.norm1(x, statistics)
    x, _ = self.norm2(self.conv2(nnx.relu(x)), statistics)
    return self.head(jnp.mean(nnx.relu(x), axis=(1, 2)))


def mean_loss(logits, label):
  chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)
  return -jnp.mean(chosen)


def linen_problem(image):
  def loss_fn(params, batch_stats, batch):
    logits, updates = LinenNet().apply(
      {'params': params, 'batch_stats': batch_stats},
      batch['image'],
      mutable=['batch_stats'],
    )
    return mean_loss(logits, batch['label']), updates['batch_stats']

  variables = jax.jit(LinenNet().init)(jax.random.key(0), image)
  return loss_fn, variables['params'], variables['batch_stats']


def nnx_problem(image):
  graphdef, params, batch_stats = nnx.split(
    NnxNet(rngs=nnx.Rngs(0)), nnx.Param, nnx.BatchStat
  )

  def loss_fn(params, batch_stats, batch):
    model = nnx.merge(graphdef, params, batch_stats, copy=True)
    loss = mean_loss(model(batch['image']), batch['label'])
    return loss, nnx.state(model, nnx.BatchStat)

  return loss_fn, params, batch_stats


def carry(mean, var, kernel):
  """Normals through a ReLU and a convolution, by numbers of Python."""
  first, spread = [], []
  for m, v in zip(mean, var, strict=True):
    z = m / math.sqrt(v)
    above = (1 + math.erf(z / math.sqrt(2))) / 2
    density = math.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)
    first.append(m * above + math.sqrt(v) * density)
    second = (m**2 + v) * above + m * math.sqrt(v) * density
    spread.append(second - first[-1] ** 2)
  taps = kernel.reshape(-1, *kernel.shape[-2:]).astype(np.float64)
  return (
    sum(tap.T @ np.array(first) for tap in taps),
    sum((tap**2).T @ np.array(spread) for tap in taps),
  )


def last_statistics(params, image):
  """Mean and variance that the third norm layer divides by."""
  x, before = image.astype(np.float64), None
  for i in range(3):
    conv, norm = params[f'conv{i}'], params[f'norm{i}']
    kernel, scale, bias = (
      np.asarray(leaf[...], np.float64)
      for leaf in (conv['kernel'], norm['scale'], norm['bias'])
    )
    x = convolve(x, kernel)
    mean, var = moments(x)
    if i == 1:
      before = carry(*before, kernel)
    if before is not None:
      assert np.mean(before[1] / var) < 100
      gap = mean - before[0]
      var = P * before[1] + (1 - P) * var + P * (1 - P) * gap**2
      mean = P * before[0] + (1 - P) * mean
    before = mean, var
    x = np.maximum((x - mean) / np.sqrt(var + 1e-5) * scale + bias, 0)
  return before


def split(params, batch_stats):
  """For two branches, each with the three layers for itself."""
  params, batch_stats = conadv.dual_bn.split(params, batch_stats)
  own = params.branches['adversarial']
  assert sorted(name for name in own if jax.tree.leaves(own[name])) == [
    'norm0',
    'norm1',
    'norm2',
  ]
  return params, batch_stats


def running(batch_stats):
  """Of the third layer."""
  norm = batch_stats['norm2']
  return norm['mean'][...], norm['var'][...]


@pytest.mark.slow
def test_a_chain_of_three_layers_in_each_branch_over_steps():
  batches = [make_images(seed) for seed in range(4)]
  loss_fn, *variables = linen_problem(batches[0]['image'])
  check_statistics(
    conadv.wrap(loss_fn, attack=conadv.pgd(0.5), has_state=True),
    *split(*variables),
    batches,
    last_statistics,
    running,
  )


@pytest.mark.slow
def test_a_chain_of_three_layers_in_nnx():
  batch = make_images(0)
  loss_fn, params, batch_stats = nnx_problem(batch['image'])
  split(params, batch_stats)
  step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
  (_, new), grads = step(params, batch_stats, batch)
  for old, found, seen in zip(
    running(batch_stats),
    running(new),
    last_statistics(params, batch['image']),
    strict=True,
  ):
    expected = MOMENTUM * np.asarray(old) + (1 - MOMENTUM) * seen
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-5)
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads))


def make_inputs(channels=5):
  rng = np.random.default_rng(0)
  x = 2 + rng.normal(size=(4, 3, 3, channels)).astype(np.float32)
  mean, var, scale, bias = rng.uniform(0.5, 2, size=(4, channels)).astype(
    np.float32
  )
  return jnp.asarray(x), Statistics(*map(jnp.asarray, (mean, var))), scale, bias


@pytest.mark.parametrize('is_evaluation', [False, True])
@pytest.mark.parametrize('dtype', [None, jnp.bfloat16])
# Flax subtracts float32 from bfloat16.
@jax.numpy_dtype_promotion('standard')
def test_linen_without_the_layer_before_is_batch_norm(dtype, is_evaluation):
  x, previous, scale, bias = make_inputs()
  x = x.astype(dtype or x.dtype)
  settings = {'dtype': dtype, 'use_running_average': is_evaluation}
  variables = {
    'params': {'scale': scale, 'bias': bias},
    'batch_stats': {'mean': 3 * scale, 'var': bias},
  }
  expected = nn.BatchNorm(**settings).apply(
    variables, x, mutable=['batch_stats']
  )
  for p, before in ((0.0, previous), (0.5, None)):
    norm = LinenKalmanNorm(p=p, **settings)
    (y, statistics), updates = norm.apply(
      variables, x, before, mutable=['batch_stats']
    )
    chex.assert_trees_all_equal((y, updates), expected)
    assert y.dtype == (dtype or jnp.float32)
    assert statistics.var.dtype == jnp.float32
  made = norm.init(jax.random.key(0), x, None)
  chex.assert_trees_all_equal(
    made, nn.BatchNorm(**settings).init(jax.random.key(0), x)
  )
  if is_evaluation:
    chex.assert_trees_all_equal(statistics, Statistics(3 * scale, bias))


@pytest.mark.parametrize('has_affine', [False, True])
def test_nnx_without_the_layer_before_is_batch_norm(has_affine):
  x, previous, scale, bias = make_inputs()
  settings = {'rngs': nnx.Rngs(0), 'momentum': 0.7}
  settings |= {'use_scale': has_affine, 'use_bias': has_affine}
  plain = nnx.BatchNorm(5, **settings)
  norm = NnxKalmanNorm(5, p=0.0, **settings)
  if has_affine:
    for layer in (plain, norm):
      layer.scale[...], layer.bias[...] = jnp.asarray(scale), jnp.asarray(bias)
  for _ in range(2):
    chex.assert_trees_all_equal(norm(x, previous)[0], plain(x))
  for name in ('mean', 'var'):
    chex.assert_trees_all_equal(
      getattr(norm, name)[...], getattr(plain, name)[...]
    )
  running = Statistics(norm.mean[...], norm.var[...])
  expected = plain(x, use_running_average=True)
  in_view = nnx.view(norm, use_running_average=True)
  in_training = norm(x, previous)[0]
  norm.mean[...], norm.var[...] = running
  assert jnp.any(in_training != expected)
  chex.assert_trees_all_equal(in_view(x, None), (expected, running))
  in_call = norm(x, None, use_running_average=True)
  norm.eval()
  for found in (in_call, norm(x, None)):
    chex.assert_trees_all_equal(found, (expected, running))
  norm.train()
  chex.assert_trees_all_equal(norm(x, previous)[0], in_training)


@pytest.mark.parametrize(
  ('batch_var', 'previous_var', 'is_near'),
  [
    ([1.0, 1.0], [1.0, 198.0], True),
    ([1.0, 1.0], [1.0, 200.0], False),
    # By the mean of the ratios, not the ratio of the means, which is 20.
    ([0.01, 10.0], [100.0, 100.0], False),
    ([0.0, 1.0], [1.0, 1.0], False),
    ([0.0, 1.0], [0.0, 1.0], False),
    ([1e-3, 1e3], [1e-9, 1e3], True),
  ],
)
def test_the_layer_before_counts_where_its_variance_is_near(
  batch_var, previous_var, is_near
):
  batch, previous = (
    Statistics(jnp.array([mean, mean]), jnp.array(var))
    for mean, var in ((1.0, batch_var), (3.0, previous_var))
  )
  found = fuse(batch, previous, 0.25)
  if is_near:
    var = 0.25 * np.array(previous_var) + 0.75 * np.array(batch_var) + 0.75
    expected = Statistics(np.full(2, 1.5), var)
  else:
    expected = batch
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  grads = jax.grad(lambda *pair: jnp.sum(jnp.stack(fuse(*pair, 0.25))), (0, 1))
  chex.assert_tree_all_finite(grads(batch, previous))


def test_a_prediction_is_the_limit_of_draws():
  rng = np.random.default_rng(0)
  mean = np.array([-0.5, 0.0, 3.0], np.float32)
  var = np.array([1.0, 4.0, 0.25], np.float32)
  kernel = rng.normal(size=(3, 3, 3, 2)).astype(np.float32)
  drawn = mean + np.sqrt(var) * rng.normal(size=(2, 300, 300, 3))
  inside = convolve(np.maximum(drawn, 0), kernel)[:, 1:-1, 1:-1]
  predicted = jax.jit(predict)
  found = predicted(Statistics(mean, var), kernel)
  np.testing.assert_allclose(found, moments(inside), rtol=0.02, atol=0.02)
  # A dense layer is a convolution of one pixel; no variance is a constant.
  constant = Statistics(jnp.array([2.0, -3.0]), jnp.zeros(2))
  found = predicted(constant, jnp.array([[1.0], [5.0]]))
  np.testing.assert_allclose(found, [[2.0], [0.0]], atol=1e-6)


def test_a_variance_far_from_zero_is_not_lost():
  """By the textbook's formula in float64."""
  mean = np.array([1000.0, 5.0, 30.0, 1.0, 0.0, -1.0, -5.0, -1000.0])
  var = np.array([1e-2, 1e-4, 1.0, 4.0, 1.0, 0.1, 9.0, 1e-2])
  std = np.sqrt(var)
  above, density = stats.norm.cdf(mean / std), stats.norm.pdf(mean / std)
  first = mean * above + std * density
  second = (mean**2 + var) * above + mean * std * density
  previous = Statistics(*np.float32([mean, var]))
  found = predict(previous, jnp.eye(len(mean)))
  np.testing.assert_allclose(found.mean, first, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found.var, second - first**2, rtol=1e-4, atol=1e-7)


def test_gradients_go_to_the_layer_before_and_its_kernel():
  _, previous, *_ = make_inputs(3)
  kernel = jnp.asarray(np.random.default_rng(1).normal(size=(2, 2, 3, 4)))

  @jax.jit
  def fused(mean, var, kernel):
    batch = Statistics(jnp.ones(4), jnp.full(4, 3.0))
    return fuse(batch, predict(Statistics(mean, var), kernel), 0.3)

  arguments = (*previous, kernel.astype(jnp.float32))
  check_grads(fused, arguments, order=1, modes=['rev'], rtol=0.02, atol=0.02)
  constant = jax.jit(
    jax.grad(lambda var: jnp.sum(fused(previous.mean, var, kernel).var))
  )
  chex.assert_tree_all_finite(constant(jnp.zeros(3)))


def test_half_precision_is_not_squared():
  x = jnp.array([[500.0], [700.0]], jnp.float16)
  norm = LinenKalmanNorm(
    p=0.5, use_running_average=False, dtype=jnp.float16, momentum=0.0
  )
  previous = Statistics(jnp.array([400.0]), jnp.array([1e4]))
  variables = norm.init(jax.random.key(0), x, previous)
  (y, statistics), updates = norm.apply(
    variables, x, previous, mutable=['batch_stats']
  )
  # Means 600 and 400, variances 1e4.
  np.testing.assert_allclose(statistics, [[500.0], [2e4]], rtol=1e-5)
  chex.assert_trees_all_equal(
    updates['batch_stats'], dict(statistics._asdict())
  )
  assert y.dtype == jnp.float16
  np.testing.assert_allclose(y, [[0.0], [2**0.5]], atol=1e-3)


def test_devices_share_their_statistics_by_name():
  x, previous, *_ = make_inputs()

  def apply(norm):
    return jax.jit(
      lambda x: norm.apply(variables, x, previous, mutable=['batch_stats'])
    )

  norm = LinenKalmanNorm(p=0.5, use_running_average=False)
  variables = jax.jit(norm.init)(jax.random.key(0), x, previous)
  expected = apply(norm)(x)
  spread, all_over = PartitionSpec('data'), PartitionSpec()
  # At the start there is no axis.
  norm = norm.copy(axis_name='data')
  jax.eval_shape(norm.init, jax.random.key(0), x, previous)
  found = jax.shard_map(
    apply(norm),
    mesh=make_mesh(2),
    in_specs=spread,
    out_specs=((spread, all_over), all_over),
  )(x)
  chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-6)


def test_one_compilation_whether_the_layer_before_counts_or_not():
  x, previous, *_ = make_inputs()
  norm = LinenKalmanNorm(p=0.5, use_running_average=False)
  variables = norm.init(jax.random.key(0), x, previous)
  traces = []

  @jax.jit
  def step(variables, x, previous):
    traces.append(0)
    (_, statistics), updates = norm.apply(
      variables, x, previous, mutable=['batch_stats']
    )
    return {**variables, **updates}, statistics

  for factor in (1.0, 1e4, 1.0):
    far = previous._replace(var=factor * previous.var)
    variables, statistics = step(variables, x, far)
    counts = bool(jnp.any(jnp.abs(statistics.mean - x.mean((0, 1, 2))) > 0.1))
    assert counts == (factor == 1.0)
  assert len(traces) == 1


@pytest.mark.parametrize(
  ('change', 'error', 'message'),
  [
    ({'p': 1.5}, ValueError, 'in \\[0, 1\\]'),
    ({'p': jnp.sin}, TypeError, 'schedule'),
    ({'x': jnp.ones((2, 5), jnp.uint8)}, TypeError, 'x.astype'),
    ({'x': jnp.ones(5)}, ValueError, 'jax.vmap'),
    ({'previous': (jnp.ones((2, 5)), None)}, TypeError, 'x, statistics ='),
    (
      {'previous': Statistics(jnp.ones(4), jnp.ones(4))},
      ValueError,
      'predict\\(previous, kernel\\)',
    ),
    (
      {'previous': Statistics(jnp.ones(5), jnp.ones((1, 5)))},
      ValueError,
      '`var` of float32\\[1,5\\]',
    ),
  ],
)
def test_bad_input_is_named(change, error, message):
  x, previous, *_ = make_inputs()
  given = {'x': x, 'previous': previous, 'p': 0.5} | change
  call = given['x'], given['previous']
  linen = LinenKalmanNorm(p=given['p'], use_running_average=False)
  with pytest.raises(error, match=message):
    linen.init(jax.random.key(0), *call)
  with pytest.raises(error, match=message):
    NnxKalmanNorm(5, p=given['p'], rngs=nnx.Rngs(0))(*call)


def test_channels_of_another_layer_are_named():
  norm = NnxKalmanNorm(1, p=0.5, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match='of 1 channels takes'):
    norm(jnp.ones((2, 5)), None)
  with pytest.raises(ValueError, match='each channel here, 3'):
    predict(Statistics(jnp.ones(5), jnp.ones(5)), jnp.ones((3, 2)))


@pytest.mark.parametrize('running', [False, True])
def test_p_is_checked_where_it_is_not_used_too(running):
  x, rngs = jnp.ones((2, 3)), nnx.Rngs(0)
  linen = LinenKalmanNorm(p=2.0, use_running_average=running)
  norm = NnxKalmanNorm(3, p=2.0, use_running_average=running, rngs=rngs)
  for call in (
    lambda: linen.init(jax.random.key(0), x, None),
    lambda: norm(x, None),
  ):
    with pytest.raises(ValueError, match=r'`p` is .*p=2\.0'):
      call()
