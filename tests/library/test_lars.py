"""`lars` in each form against NumPy, and against `optax.lars`."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conadv_optax as conadv

RATES = [0.5, 0.3, 0.0, 1.0, 0.2]
DECAY, MOMENTUM, TRUST = 0.01, 0.9, 0.1


def make_params(dtype=jnp.float32):
  rng = np.random.default_rng(0)
  return {
    'dense': {
      'kernel': jnp.asarray(rng.normal(size=(4, 3)), dtype),
      'bias': jnp.asarray(rng.normal(size=3), dtype),
    },
    'zero': jnp.zeros((2, 2), dtype),
  }


def make_grads(t, dtype=jnp.float32):
  rng = np.random.default_rng(10 + t)
  return {
    'dense': {
      # One gradient of zero: the ratio is 1 there.
      'kernel': jnp.asarray((t != 2) * rng.normal(size=(4, 3)), dtype),
      'bias': jnp.asarray(rng.normal(size=3), dtype),
    },
    'zero': jnp.asarray(rng.normal(size=(2, 2)), dtype),
  }


def rate(count):
  return jnp.asarray(RATES)[count]


def numpy_lars(w, gradients, is_weight, ratio_form, over, nesterov, most, eps):
  w = np.asarray(w, np.float64)
  v = np.zeros_like(w)
  for lr, g in zip(RATES, gradients, strict=True):
    g = np.asarray(g, np.float64)
    r, d = 1.0, g
    if is_weight:
      d = g + DECAY * w
      w_norm = np.linalg.norm(w)
      if ratio_form == 'separate':
        second = np.linalg.norm(g)
        below = second + DECAY * w_norm + eps
      else:
        second = np.linalg.norm(d)
        below = second + eps
      if w_norm != 0 and second != 0:
        r = TRUST * w_norm / below
      if most is not None:
        r = min(r, most)
    s = lr if over == 'scaled' else 1.0
    v = MOMENTUM * v + s * r * d
    step = MOMENTUM * v + s * r * d if nesterov else v
    w = w - (1.0 if over == 'scaled' else lr) * step
  return w


@pytest.mark.parametrize(
  ('ratio_form', 'over', 'nesterov', 'everywhere'),
  list(
    itertools.product(
      ['separate', 'joint'], ['scaled', 'raw'], [False, True], [False, True]
    )
  ),
)
@pytest.mark.parametrize(('most', 'eps'), [(None, 0.0), (0.05, 1e-2)])
def test_every_form_is_the_numpy_one(
  ratio_form, over, nesterov, everywhere, most, eps
):
  params = make_params()
  tx = conadv.lars(
    rate,
    weight_decay=DECAY,
    momentum=MOMENTUM,
    trust_coefficient=TRUST,
    eps=eps,
    nesterov=nesterov,
    mask=True if everywhere else None,
    trust_ratio=ratio_form,
    momentum_over=over,
    max_trust_ratio=most,
  )
  state = tx.init(params)
  for t in range(len(RATES)):
    updates, state = tx.update(make_grads(t), state, params)
    params = optax.apply_updates(params, updates)
  grads = [make_grads(t) for t in range(len(RATES))]
  expected = jax.tree.map(
    lambda is_weight, w, *gs: numpy_lars(
      w, gs, is_weight, ratio_form, over, nesterov, most, eps
    ),
    {'dense': {'kernel': True, 'bias': everywhere}, 'zero': True},
    make_params(),
    *grads,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    params,
    expected,
  )


@pytest.mark.parametrize('nesterov', [False, True])
def test_joint_with_nothing_excluded_is_optax(nesterov):
  ours = conadv.lars(
    rate,
    weight_decay=DECAY,
    trust_coefficient=TRUST,
    nesterov=nesterov,
    mask=True,
    trust_ratio='joint',
  )
  theirs = optax.lars(
    rate,
    weight_decay=DECAY,
    trust_coefficient=TRUST,
    momentum=0.9,
    nesterov=nesterov,
  )
  params = {0: make_params(), 1: make_params()}
  states = {0: ours.init(params[0]), 1: theirs.init(params[1])}
  for t in range(len(RATES)):
    for i, tx in enumerate((ours, theirs)):
      updates, states[i] = tx.update(make_grads(t), states[i], params[i])
      params[i] = optax.apply_updates(params[i], updates)
  chex.assert_trees_all_close(params[0], params[1], rtol=1e-5, atol=1e-7)


def test_an_empty_group_stays_empty():
  tx = conadv.lars(0.1, weight_decay=DECAY)
  updates, state = tx.update({}, tx.init({}), {})
  assert (updates, state.momentum) == ({}, {})
  groups = optax.multi_transform(
    {'used': tx, 'unused': tx}, jax.tree.map(lambda _: 'used', make_params())
  )
  params, grads = make_params(), make_grads(0)
  updates, _ = groups.update(grads, groups.init(params), params)
  expected, _ = tx.update(grads, tx.init(params), params)
  chex.assert_trees_all_equal(updates, expected)


@pytest.mark.parametrize('zero', ['weights', 'gradient', 'both'])
@pytest.mark.parametrize('ratio_form', ['separate', 'joint'])
def test_a_zero_norm_has_the_gradient_of_plain_momentum(zero, ratio_form):
  tx = conadv.lars(
    0.5, weight_decay=0.0, mask=True, trust_ratio=ratio_form, eps=1e-3
  )
  w = jnp.full((2, 2), float(zero == 'gradient'))
  g = jnp.full((2, 2), float(zero == 'weights'))

  def first_element(g, w):
    return tx.update(g, tx.init(w), w)[0][0, 0]

  # The ratio is 1 there: the update is -0.5 * g.
  expected = jnp.zeros((2, 2)).at[0, 0].set(-0.5), jnp.zeros((2, 2))
  chex.assert_trees_all_equal(
    jax.grad(first_element, argnums=(0, 1))(g, w), expected
  )


def test_norms_are_float32_whatever_the_dtype():
  # 300 squared is more than float16 holds, and the ratio would be NaN.
  params = {'kernel': jnp.full((10, 10), 300.0, jnp.float16)}
  grads = {'kernel': jnp.full((10, 10), 600.0, jnp.float16)}
  tx = conadv.lars(1.0, weight_decay=0.0, trust_coefficient=0.25)
  updates, _ = tx.update(grads, tx.init(params), params)
  # |w| / |g| = 1/2, and 1/4 of it, times 600.
  chex.assert_trees_all_equal(
    updates, {'kernel': jnp.full((10, 10), -75.0, jnp.float16)}
  )


def test_bfloat16_updates_are_rounded_once():
  params, grads = make_params(jnp.bfloat16), make_grads(0, jnp.bfloat16)
  tx = conadv.lars(0.5, weight_decay=DECAY, trust_coefficient=TRUST)
  updates, _ = tx.update(grads, tx.init(params), params)
  wide = jax.tree.map(lambda x: x.astype(jnp.float32), (params, grads))
  expected, _ = tx.update(wide[1], tx.init(wide[0]), wide[0])
  chex.assert_trees_all_equal(
    updates, jax.tree.map(lambda x: x.astype(jnp.bfloat16), expected)
  )


def test_mask_may_be_a_function_a_tree_or_a_prefix():
  params, grads = make_params(), make_grads(0)

  def updates(mask):
    tx = conadv.lars(1.0, weight_decay=DECAY, mask=mask)
    return tx.update(grads, tx.init(params), params)[0]

  tree = {'dense': {'kernel': True, 'bias': True}, 'zero': False}
  chex.assert_trees_all_equal(updates(tree), updates(lambda params: tree))
  chex.assert_trees_all_equal(
    updates(tree), updates({'dense': True, 'zero': False})
  )
  np.testing.assert_array_equal(
    updates({'dense': False, 'zero': True})['dense']['kernel'],
    -grads['dense']['kernel'],
  )


def test_an_injected_mask_function_is_the_mask():
  params, grads = make_params(), make_grads(0)
  arguments = {'learning_rate': 8.0, 'weight_decay': DECAY}
  mask = functools.partial(conadv.exclude_norm_and_bias, model_state={})
  plain = conadv.lars(**arguments)
  expected, _ = plain.update(grads, plain.init(params), params)
  for static in ('mask', ('mask',)):
    tx = optax.inject_hyperparams(conadv.lars, static_args=static)(
      **arguments, mask=mask
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


def test_default_mask_leaves_branches_of_norm_layers_plain():
  params = {'conv': jnp.ones((2, 2)), 'norm': {'scale': jnp.ones((1, 1, 2))}}
  state = {'norm': {'mean': jnp.zeros(2)}}
  params, _ = conadv.dual_bn.split(params, state)
  grads = jax.tree.map(jnp.ones_like, params)
  tx = conadv.lars(1.0, weight_decay=0.5, trust_coefficient=0.01)
  updates, _ = tx.update(grads, tx.init(params), params)
  plain = {'scale': -jnp.ones((1, 1, 2))}
  chex.assert_trees_all_equal(updates.main['norm'], plain)
  chex.assert_trees_all_equal(updates.branches['adversarial']['norm'], plain)
  # |w| = |g| = 2: 0.01 * 2 / (2 + 0.5 * 2) * (1 + 0.5 * 1)
  chex.assert_trees_all_close(updates.main['conv'], jnp.full((2, 2), -0.01))
