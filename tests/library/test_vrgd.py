"""The ratio of VRGD against NumPy, and the methods that it makes of others."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import init_model, loss_fn, make_batch, plain_step
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

import conadv_optax as conadv
from conadv_optax.core.numeric import at_least_float32


def apply(groups, dtype=jnp.float32, **arguments):
  """The scaled mean gradient of groups along the first axis."""
  groups = jax.tree.map(lambda g: jnp.asarray(g, dtype), groups)
  mean = jax.tree.map(lambda g: jnp.mean(g, axis=0), groups)
  second_moment = jax.tree.map(
    lambda g: jnp.mean(jnp.abs(at_least_float32(g)) ** 2, axis=0), groups
  )
  tx = conadv.scale_by_gsnr(**arguments)
  updates, _ = tx.update(mean, tx.init(mean), second_moment=second_moment)
  return updates, mean


def naive(groups, low=0.1, high=1.0):
  """One layer, from the variance itself."""
  mean, variance = np.mean(groups, axis=0), np.var(groups, axis=0)
  ratio = mean**2 / variance
  return np.clip(ratio / np.mean(ratio), low, high) * mean


compiled_apply = jax.jit(apply)


@settings(max_examples=40, deadline=None)
@given(
  groups=st.sampled_from([3, 12]),
  signal=st.floats(0.0, 3.0),
  low=st.sampled_from([0.0, 0.1, 0.5]),
  high=st.sampled_from([0.5, 1.0, 10.0]),
  seed=st.integers(0, 2**16),
)
def test_the_ratio_is_that_of_the_paper(groups, signal, low, high, seed):
  rng = np.random.default_rng(seed)
  drawn = [
    (signal + rng.normal(size=(groups, *shape))).astype(np.float32)
    for shape in ((), (1,), (5,), (3, 4))
  ]
  # A difference of moments in float32 keeps three digits of such a variance.
  for layer in drawn:
    assume(np.all(np.var(layer, 0) > 1e-3 * np.mean(layer**2, 0)))
  got, _ = compiled_apply(drawn, min_ratio=low, max_ratio=high)
  for updates, layer in zip(got, drawn, strict=True):
    expected = naive(layer.astype(np.float64), low, high)
    np.testing.assert_allclose(updates, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.slow
def test_the_bias_of_the_variance_cancels():
  groups = np.random.default_rng(0).normal(size=(8, 20)) + 1
  mean, variance = groups.mean(axis=0), groups.var(axis=0, ddof=1)
  ratio = mean**2 / variance
  expected = np.clip(ratio / ratio.mean(), 0.1, 1) * mean
  np.testing.assert_allclose(apply(groups)[0], expected, rtol=1e-3)


@pytest.mark.parametrize(
  ('groups', 'dtype'),
  [(1, jnp.float32), (6, jnp.float32), (6, jnp.bfloat16), (8, jnp.float16)],
)
def test_groups_that_agree_change_nothing(groups, dtype):
  one = np.random.default_rng(0).normal(size=(1, 50)) * np.logspace(-3, 3, 50)
  updates, mean = apply(np.repeat(one, groups, axis=0), dtype)
  assert updates.dtype == dtype
  chex.assert_trees_all_equal(updates, mean)


@given(
  dtype=st.sampled_from(['float32', 'bfloat16', 'float16', 'complex64']),
  most=st.floats(0.125, 10, width=16),
  gradient=st.floats(2**-20, 1000, width=32),
  sign=st.sampled_from([-1.0, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_a_moment_of_the_mean_itself_is_no_noise(dtype, most, gradient, sign):
  # The mean over groups is rounded to the parameter's dtype, its square is not.
  mean = jnp.full(3, sign * gradient)
  short = mean.astype(dtype)
  tx = conadv.scale_by_gsnr(max_ratio=most)
  updates, _ = tx.update(short, tx.init(short), second_moment=mean**2)
  wide = at_least_float32(short)
  expected = (jnp.asarray(most, wide.dtype) * wide).astype(dtype)
  chex.assert_trees_all_equal(updates, expected)


def test_a_complex_gradient_is_scaled_by_a_real_ratio():
  rng = np.random.default_rng(0)
  groups = rng.normal(size=(8, 50)) + 1j * rng.normal(size=(8, 50)) + 0.5
  updates, mean = apply(groups, jnp.complex64)
  assert updates.dtype == jnp.complex64
  # NumPy's variance of complex numbers is that of their distance.
  ratio = np.abs(np.mean(groups, axis=0)) ** 2 / np.var(groups, axis=0)
  expected = np.clip(ratio / np.mean(ratio), 0.1, 1.0) * np.asarray(mean)
  np.testing.assert_allclose(updates, expected, rtol=1e-3)


def test_injected_ratios_beside_complex_gradients():
  gradient = jnp.array([1 + 1j, 2j, -3.0], jnp.complex64)
  moment = jnp.array([3.0, 8.0, 10.0])
  tx = optax.inject_hyperparams(conadv.scale_by_gsnr)(
    min_ratio=0.1, max_ratio=0.5
  )
  updates, _ = tx.update(gradient, tx.init(gradient), second_moment=moment)
  # Ratios 2 / 1, 4 / 4 and 9 / 1 over their mean, 4.
  expected = np.array([0.5, 0.25, 0.5]) * np.asarray(gradient)
  np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_ratios_of_one_change_nothing():
  groups = np.random.default_rng(0).normal(size=(8, 50))
  updates, mean = apply(groups, min_ratio=1.0, max_ratio=1.0)
  chex.assert_trees_all_equal(updates, mean)


def test_an_element_without_variance_does_not_count_in_the_mean():
  rng = np.random.default_rng(0)
  noisy = rng.normal(size=(8, 20)) + 1
  sure = np.repeat(rng.normal(size=(1, 5)), 8, axis=0)
  # A weight of a unit that is dead has no gradient either.
  dead = np.zeros((8, 5))
  updates, mean = apply(np.concatenate([noisy, sure, dead], axis=1))
  np.testing.assert_allclose(updates[:20], naive(noisy), rtol=1e-3)
  chex.assert_trees_all_equal(updates[20:], mean[20:])


@pytest.mark.slow
def test_extreme_gradients_give_finite_updates():
  for scale in (0.0, 1e-30, 1e-20, 1e15):
    groups = scale * np.random.default_rng(0).normal(size=(8, 20))
    updates, mean = apply(groups)
    chex.assert_tree_all_finite(updates)
    assert np.all(np.abs(updates) <= np.abs(mean))
  # A mean of exactly zero in every element, with variance.
  updates, _ = apply(np.array([[1.0, 2.0], [-1.0, -2.0]]))
  chex.assert_trees_all_equal(updates, jnp.zeros(2))


def test_the_ratio_is_computed_in_float32():
  groups = np.random.default_rng(0).normal(size=(8, 400)) + 1
  groups = jnp.asarray(groups, jnp.bfloat16)
  short, _ = apply(groups, jnp.bfloat16)
  assert short.dtype == jnp.bfloat16
  # The mean gradient is rounded, to 8 bits, before it is squared, and so is
  # what comes out. Nothing else is.
  wide = np.asarray(groups, np.float64)
  mean = np.asarray(jnp.asarray(wide.mean(0), jnp.bfloat16), np.float64)
  ratio = mean**2 / ((wide**2).mean(0) - mean**2)
  expected = mean * np.clip(ratio / ratio.mean(), 0.1, 1)
  np.testing.assert_allclose(
    np.asarray(short, np.float64), expected, rtol=2**-8 + 1e-4
  )


# optax.lamb multiplies by a Python float of its own.
@pytest.mark.slow
@jax.numpy_dtype_promotion('standard')
def test_on_devices_it_sees_the_gradient_of_each():
  params, model_state = init_model()
  batch = make_batch(0, size=32)
  grad_fn = conadv.data_parallel(
    conadv.plain(loss_fn, has_state=True),
    jax.make_mesh((8,), ('data',), (AxisType.Auto,)),
    second_moment=True,
  )
  methods = [conadv.lars(1.0, weight_decay=1e-4), optax.lamb(0.1)]

  def updates_of(tx, grads, **kwargs):
    return tx.update(grads, tx.init(params), params, **kwargs)[0]

  @jax.jit
  def found(params, model_state, batch):
    (_, aux), grads, _ = grad_fn.value_and_grad(
      params, grad_fn.init(params, []), batch, model_state=model_state
    )
    return [
      updates_of(
        optax.chain(conadv.scale_by_gsnr(), after),
        grads,
        second_moment=aux.second_moment,
      )
      for after in methods
    ]

  shards = [
    plain_step(params, model_state, shard)[1]
    for shard in (
      jax.tree.map(lambda x, k=k: x[4 * k : 4 * k + 4], batch) for k in range(8)
    )
  ]
  scaled = jax.tree.map(
    lambda *gs: np.float32(naive(np.stack(gs).astype(np.float64))), *shards
  )
  expected = jax.jit(
    lambda grads: [updates_of(after, grads) for after in methods]
  )(scaled)
  results = found(params, model_state, batch), expected
  for result in results:
    for updates in result:
      # The gradient of a bias before BatchNorm is rounding.
      updates['dense'].pop('bias')
  chex.assert_trees_all_close(*results, rtol=1e-2, atol=1e-4)


def test_a_mask_lets_the_second_moment_through():
  groups = {
    'a': np.random.default_rng(0).normal(size=(8, 20)),
    'b': np.random.default_rng(1).normal(size=(8, 20)),
  }
  mean = jax.tree.map(lambda g: jnp.float32(g.mean(axis=0)), groups)
  moment = jax.tree.map(lambda g: jnp.float32((g**2).mean(axis=0)), groups)
  mask = {'a': True, 'b': False}
  tx = optax.masked(
    conadv.scale_by_gsnr(), mask, mask_compatible_extra_args=True
  )
  updates, _ = tx.update(mean, tx.init(mean), second_moment=moment)
  np.testing.assert_allclose(updates['a'], naive(groups['a']), rtol=1e-3)
  chex.assert_trees_all_equal(updates['b'], mean['b'])

  tx = optax.masked(conadv.scale_by_gsnr(), mask)
  with pytest.raises(ValueError, match='mask_compatible_extra_args=True'):
    tx.update(mean, tx.init(mean), second_moment=moment)


def test_a_missing_second_moment_is_told():
  tx = optax.chain(conadv.scale_by_gsnr(), optax.sgd(0.1))
  grads = jnp.ones(3)
  with pytest.raises(ValueError) as error:
    tx.update(grads, tx.init(grads), grads)
  for part in (
    'conadv.data_parallel(grad_fn, mesh, second_moment=True)',
    'tx.update(grads, opt_state, params, second_moment=aux.second_moment)',
  ):
    assert part in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    ({'min_ratio': -0.1}, 'min_ratio=-0.1'),
    ({'max_ratio': float('nan')}, 'max_ratio=nan'),
    ({'min_ratio': 2.0}, 'min_ratio=2.0, max_ratio=1.0'),
  ],
)
def test_wrong_arguments_are_told(arguments, says):
  with pytest.raises(ValueError) as error:
    conadv.scale_by_gsnr(**arguments)
  assert says in str(error.value)


@pytest.mark.parametrize('name', ['min_ratio', 'max_ratio'])
def test_a_schedule_is_told_where_to_call_it(name):
  with pytest.raises(TypeError, match=f'`{name}=schedule'):
    conadv.scale_by_gsnr(**{name: optax.constant_schedule(0.5)})
