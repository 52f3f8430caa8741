"""`lars` in each form against NumPy, and against `optax.lars`."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import conadv_optax as conadv

RATES = [0.5, 0.3, 0.0, 1.0, 0.2]
DECAY, MOMENTUM, TRUST = 0.01, 0.9, 0.1


def draw(seed, *shape, dtype):
  """Normal numbers, in two dimensions where the dtype has them."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=shape)
  if jnp.issubdtype(dtype, jnp.complexfloating):
    x = x + 1j * rng.normal(size=shape)
  return jnp.asarray(x, dtype)


def make_params(dtype=jnp.float32):
  return {
    'dense': {
      'kernel': draw(0, 4, 3, dtype=dtype),
      'bias': draw(1, 3, dtype=dtype),
    },
    'zero': jnp.zeros((2, 2), dtype),
  }


def make_grads(t, dtype=jnp.float32):
  return {
    'dense': {
      # One gradient of zero: the ratio is 1 there.
      'kernel': float(t != 2) * draw(10 + t, 4, 3, dtype=dtype),
      'bias': draw(20 + t, 3, dtype=dtype),
    },
    'zero': draw(30 + t, 2, 2, dtype=dtype),
  }


def rate(count):
  return jnp.asarray(RATES)[count]


def numpy_lars(w, gradients, is_weight, ratio_form, over, nesterov, most, eps):
  w = np.asarray(w, np.result_type(np.asarray(w), np.float64))
  v = np.zeros_like(w)
  for lr, g in zip(RATES, gradients, strict=True):
    g = np.asarray(g, w.dtype)
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


FORMS = list(
  itertools.product(
    ['separate', 'joint'], ['scaled', 'raw'], [False, True], [False, True]
  )
)


# Every third form has each pair of choices.
@pytest.mark.parametrize(
  ('ratio_form', 'over', 'nesterov', 'everywhere', 'dtype', 'most', 'eps'),
  [
    *((*form, jnp.float32, None, 0.0) for form in FORMS[::3]),
    *((*form, jnp.float32, 0.05, 1e-2) for form in FORMS),
    *((*form, jnp.complex64, 0.05, 1e-2) for form in FORMS[::3]),
  ],
)
def test_every_form_is_the_numpy_one(
  ratio_form, over, nesterov, everywhere, dtype, most, eps
):
  params = make_params(dtype)
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
    updates, state = tx.update(make_grads(t, dtype), state, params)
    chex.assert_trees_all_equal_dtypes(updates, state.momentum, params)
    params = optax.apply_updates(params, updates)
  grads = [make_grads(t, dtype) for t in range(len(RATES))]
  expected = jax.tree.map(
    lambda is_weight, w, *gs: numpy_lars(
      w, gs, is_weight, ratio_form, over, nesterov, most, eps
    ),
    {'dense': {'kernel': True, 'bias': everywhere}, 'zero': True},
    make_params(dtype),
    *grads,
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6),
    params,
    expected,
  )


@functools.partial(jax.jit, static_argnames='nesterov')
def ours_and_theirs(grads, params, decay, momentum, *, nesterov):
  """The parameters after so many steps."""
  common = {
    'learning_rate': rate,
    'weight_decay': decay,
    'trust_coefficient': TRUST,
    'momentum': momentum,
    'nesterov': nesterov,
  }
  results = []
  for tx in (
    conadv.lars(**common, mask=True, trust_ratio='joint'),
    optax.lars(**common),
  ):
    trained, state = params, tx.init(params)
    for g in grads:
      updates, state = tx.update(g, state, trained)
      trained = optax.apply_updates(trained, updates)
    results.append(trained)
  return results


@pytest.mark.slow
@given(
  nesterov=st.booleans(),
  decay=st.sampled_from([0.0, DECAY, 1.0]),
  momentum=st.floats(0, 0.99),
  size=st.sampled_from([1e-3, 1.0, 1e3]),
  seed=st.integers(0, 2**16),
)
@settings(max_examples=30, deadline=None)
@jax.numpy_dtype_promotion('standard')
def test_joint_with_nothing_excluded_is_optax(
  nesterov, decay, momentum, size, seed
):
  def tree(t, scale=1.0):
    return [
      scale * draw((seed, t, i), 3, 2, dtype=dtype)
      for i, dtype in enumerate((jnp.float32, jnp.complex64, jnp.float32))
    ]

  grads = [tree(1 + t, size) for t in range(len(RATES))]
  found, expected = ours_and_theirs(
    grads, tree(0), decay, momentum, nesterov=nesterov
  )
  chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_complex_norm_is_that_of_its_size():
  w, g = jnp.ones(1, jnp.complex64), jnp.array([1 + 1j])
  for form in ('separate', 'joint'):
    tx = conadv.lars(0.1, weight_decay=0.0, mask=True, trust_ratio=form)
    updates, _ = tx.update(g, tx.init(w), w)
    # |w| / |g| is 1 / sqrt(2).
    expected = [-1e-4 / np.sqrt(2) * (1 + 1j)]
    np.testing.assert_allclose(updates, expected, rtol=1e-6)


def test_the_decay_may_be_a_schedule():
  traces = []

  def decay(count):
    traces.append(0)
    return jnp.asarray([0.0, 0.5, 0.1, 0.0, 2.0])[count]

  def run(tx_of):
    params = make_params()
    state = tx_of(0).init(params)
    for t in range(len(RATES)):
      updates, state = tx_of(t).update(make_grads(t), state, params)
      params = optax.apply_updates(params, updates)
    return params

  tx = conadv.lars(rate, weight_decay=decay)
  tx = tx._replace(update=jax.jit(tx.update))
  scheduled = run(lambda t: tx)
  assert len(traces) == 1
  by_hand = run(lambda t: conadv.lars(rate, weight_decay=float(decay(t))))
  chex.assert_trees_all_close(scheduled, by_hand, rtol=1e-5)


COEFFICIENTS = ('momentum', 'trust_coefficient', 'eps', 'max_trust_ratio')


@pytest.mark.parametrize('name', COEFFICIENTS)
def test_other_coefficients_may_be_traced_and_are_no_schedules(name):
  with pytest.raises(TypeError, match=f'`{name}=schedule'):
    conadv.lars(0.1, weight_decay=0.0, **{name: optax.constant_schedule(0.5)})
  params, grads, traces = make_params(), make_grads(0), []

  def update(value):
    traces.append(0)
    tx = conadv.lars(0.1, weight_decay=0.1, **{name: value})
    return tx.update(grads, tx.init(params), params)

  compiled = jax.jit(update)
  for value in (0.25, 0.5):
    chex.assert_trees_all_close(
      compiled(jnp.float32(value)), update(value), rtol=1e-5
    )
  assert len(traces) == 3


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
  expected = np.array([[-0.5, 0], [0, 0]], np.float32), np.zeros((2, 2))
  chex.assert_trees_all_equal(
    jax.jit(jax.grad(first_element, argnums=(0, 1)))(g, w), expected
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


@jax.tree_util.register_pytree_node_class
class Module:
  """A tree that can be called, as the modules of Equinox are."""

  def __init__(self, kernel, shift):
    self.kernel, self.shift = kernel, shift

  def __call__(self, x):
    return x @ self.kernel + self.shift

  def tree_flatten(self):
    return (self.kernel, self.shift), None

  @classmethod
  def tree_unflatten(cls, _, leaves):
    return cls(*leaves)


def test_a_module_of_bools_is_a_tree():
  params = Module(jnp.full((2, 2), 3.0), jnp.full((2, 2), 3.0))
  grads = Module(jnp.full((2, 2), 6.0), jnp.full((2, 2), 6.0))
  common = {'weight_decay': 0.0, 'trust_coefficient': TRUST}
  tx = conadv.lars(1.0, mask=Module(True, False), **common)
  updates, _ = tx.update(grads, tx.init(params), params)
  theirs = optax.lars(1.0, trust_ratio_mask=Module(True, False), **common)
  expected, _ = theirs.update(grads, theirs.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  np.testing.assert_allclose(updates.kernel, -TRUST / 2 * grads.kernel)
  np.testing.assert_allclose(updates.shift, -grads.shift)


@pytest.mark.parametrize(
  ('mask', 'kind', 'says'),
  [
    (False, ValueError, 'mask=False'),
    (lambda params: params, TypeError, 'made of bools'),
    ({'dense': 1, 'zero': True}, TypeError, 'leaf of type int'),
  ],
)
def test_a_mask_that_is_none(mask, kind, says):
  tx = conadv.lars(1.0, weight_decay=0.0, mask=mask)
  params = make_params()
  with pytest.raises(kind, match=says):
    tx.update(make_grads(0), tx.init(params), params)


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


# Optax looks for the dtype that all parameters have in common.
@jax.numpy_dtype_promotion('standard')
@pytest.mark.parametrize('first', [jnp.complex64, jnp.float32])
def test_injected_coefficients_beside_complex_parameters(first):
  params = {
    'a': jnp.full((2, 2), 2.0, first),
    'b': jnp.full((2, 2), 2.0, jnp.float32),
    'c': jnp.full((2, 2), 2j),
  }
  arguments = {'trust_coefficient': TRUST, 'eps': 1e-3, 'max_trust_ratio': 0.05}
  arguments |= {'weight_decay': 0.5, 'learning_rate': 0.5, 'momentum': 0.9}
  plain = conadv.lars(**arguments)
  tx = optax.inject_hyperparams(conadv.lars)(**arguments)
  updates, _ = tx.update(params, tx.init(params), params)
  expected, _ = plain.update(params, plain.init(params), params)
  chex.assert_trees_all_close(updates, expected, rtol=1e-6)
  chex.assert_trees_all_equal_dtypes(updates, params)


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


@pytest.mark.parametrize('peak', [1e-4, 0.02, 5.0])
def test_trust_clip_is_larc(peak):
  """Against NumPy, and as a coefficient over the rate that is limited to 1."""
  params, grads = make_params(), make_grads(0)
  tx = conadv.lars(
    optax.linear_schedule(0.0, 2 * peak, 2),
    weight_decay=DECAY,
    trust_coefficient=TRUST,
    mask=True,
    trust_clip=True,
  )
  state = tx.init(params)
  # At a rate of 0 nothing moves, and nothing is divided.
  first, state = tx.update(grads, state, params)
  chex.assert_trees_all_equal(first, jax.tree.map(jnp.zeros_like, params))
  got, _ = tx.update(grads, state, params)

  def step(w, g):
    w, g = np.float64(w), np.float64(g)
    norms = np.linalg.norm(w), np.linalg.norm(g)
    ratio = 1.0
    if min(norms) > 0:
      ratio = TRUST * norms[0] / (norms[1] + DECAY * norms[0])
    return -peak * min(ratio / peak, 1.0) * (g + DECAY * w)

  chex.assert_trees_all_close(
    got, jax.tree.map(step, params, grads), rtol=1e-5, atol=1e-9
  )
  injected = conadv.lars(
    peak,
    weight_decay=DECAY,
    trust_coefficient=TRUST / peak,
    mask=True,
    max_trust_ratio=1.0,
  )
  dense = {'kernel': params['dense']['kernel']}
  other, _ = injected.update(
    {'kernel': grads['dense']['kernel']}, injected.init(dense), dense
  )
  np.testing.assert_allclose(got['dense']['kernel'], other['kernel'], rtol=1e-5)
