"""AGVM against NumPy, and against the halves that the paper compares."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_checks import assert_says

import conadv_optax as conadv

GROUPS = 4
rng = np.random.default_rng(0)
PARAMS = {
  'backbone': {'a': np.zeros((3, 2), np.float32), 'b': np.zeros(4, np.float32)},
  'head': {'box': np.zeros(5, np.float32), 'mask': np.zeros(2, np.float32)},
}
NOISE = {'backbone': 0.5, 'head': 2.0}


def groups_of_gradients():
  """Each group's gradients, by path."""
  return {
    (module, name): rng.normal(size=(GROUPS, *x.shape)) * NOISE[module]
    + rng.normal(size=x.shape)
    for module, part in PARAMS.items()
    for name, x in part.items()
  }


def as_tree(flat, fn):
  return {
    module: {name: fn(flat[module, name]).astype(np.float32) for name in part}
    for module, part in PARAMS.items()
  }


def moments(flat):
  grads = as_tree(flat, lambda g: g.mean(0))
  return grads, as_tree(flat, lambda g: (g**2).mean(0))


def phi(flat, wanted):
  """By the definition of the docstring, over all even splits."""
  g = np.concatenate(
    [
      x.reshape(GROUPS, -1)
      for path, x in flat.items()
      if '/'.join(path).startswith(wanted)
    ],
    axis=1,
  )
  apart = []
  for half in itertools.combinations(range(GROUPS), GROUPS // 2):
    rest = [k for k in range(GROUPS) if k not in half]
    first, second = g[list(half)].mean(0), g[rest].mean(0)
    apart.append((np.sum(first**2) + np.sum(second**2), first @ second))
  squares, products = np.mean(apart, 0)
  return 1 - 2 * products / squares


@pytest.mark.parametrize(
  ('anchor', 'modules'),
  [
    ('backbone', None),
    ('head', None),
    ('backbone/a', ('backbone/a', 'head/box')),
  ],
)
def test_factors_over_steps_are_those_of_the_halves(anchor, modules):
  names = modules or ('backbone', 'head')
  tx = conadv.agvm(
    optax.sgd(0.1, momentum=0.9),
    groups=GROUPS,
    anchor=anchor,
    modules=modules,
    every=2,
    start=2,
    decay=0.6,
  )
  state = tx.init(PARAMS)
  update = jax.jit(tx.update)
  wanted, velocity = dict.fromkeys(names, 1.0), {}
  for count in range(1, 7):
    flat = groups_of_gradients()
    grads, second_moment = moments(flat)
    updates, state = update(grads, state, second_moment=second_moment)
    if count % 2 == 0 and count > 2:
      for name in names:
        ratio = (phi(flat, anchor) + 1e-6) / (phi(flat, name) + 1e-6)
        new = np.sqrt(np.clip(ratio, 0.5, 10))
        wanted[name] = 0.6 * wanted[name] + 0.4 * new
    chex.assert_trees_all_close(state.factors, wanted, rtol=1e-4)
    for path, g in flat.items():
      factor = next(
        (wanted[n] for n in names if '/'.join(path).startswith(n)), 1.0
      )
      # Outside of the momentum.
      velocity[path] = 0.9 * velocity.get(path, 0.0) + g.mean(0)
      np.testing.assert_allclose(
        updates[path[0]][path[1]],
        -0.1 * factor * velocity[path],
        rtol=1e-4,
        atol=1e-6,
      )
  assert update._cache_size() == 1
  assert max(abs(np.array(list(wanted.values())) - 1)) > 0.1


def test_a_key_at_the_top_may_have_slashes():
  """As Haiku's have."""
  tx = conadv.agvm(optax.sgd(0.1), groups=2, anchor='net/~/body')
  params = {f'net/~/{name}': {'w': np.zeros(2)} for name in ('body', 'head')}
  assert set(tx.init(params).factors) == set(params)


def test_with_two_groups_it_is_the_cosine_of_equal_halves():
  halves = rng.normal(size=(2, 8))
  halves /= np.linalg.norm(halves, axis=1, keepdims=True)
  anchor = np.array([[1.0, 0.2], [1.0, -0.2]])
  anchor_cos = (1 - 0.04) / 1.04
  grads = {'a': anchor.mean(0), 'b': halves.mean(0)}
  moment = {'a': (anchor**2).mean(0), 'b': (halves**2).mean(0)}
  tx = conadv.agvm(optax.sgd(1.0), groups=2, anchor='a', every=1, decay=0.0)
  grads, moment = (
    jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), x)
    for x in (grads, moment)
  )
  _, state = tx.update(grads, tx.init(grads), second_moment=moment)
  ratio = (1 - anchor_cos + 1e-6) / (1 - halves[0] @ halves[1] + 1e-6)
  np.testing.assert_allclose(
    state.factors['b'], np.sqrt(np.clip(ratio, 0.5, 10)), rtol=1e-4
  )


def test_a_module_without_a_gradient_keeps_its_factor():
  grads = {'a': jnp.array([1.0, 2.0]), 'b': jnp.zeros(2), 'c': jnp.ones(2)}
  moment = jax.tree.map(lambda g: 1.5 * g**2, grads)
  for anchor in ('a', 'b'):
    tx = conadv.agvm(optax.sgd(1.0), groups=2, anchor=anchor, every=1)
    _, state = tx.update(grads, tx.init(grads), second_moment=moment)
    chex.assert_trees_all_close(
      state.factors, dict.fromkeys('abc', jnp.float32(1)), atol=1e-6
    )


def test_groups_that_agree_and_a_nan_leave_finite_factors():
  grads = {'a': jnp.ones(3), 'b': jnp.zeros(2)}
  tx = conadv.agvm(optax.sgd(1.0), groups=8, anchor='a', every=1)
  state = tx.init(grads)
  square = jax.tree.map(jnp.square, grads)
  _, state = tx.update(grads, state, second_moment=square)
  chex.assert_trees_all_close(state.factors, {'a': 1.0, 'b': 1.0})
  wrong = {'a': jnp.full(3, jnp.nan), 'b': jnp.ones(2)}
  _, state = tx.update(wrong, state, second_moment=wrong)
  chex.assert_trees_all_close(state.factors, {'a': 1.0, 'b': 1.0})


def test_where_a_module_agrees_the_small_number_decides():
  grads = {'a': jnp.array([1.0, 0.0]), 'b': jnp.array([1.0, 1.0])}
  # That of 'b' is below the square of the mean, by rounding.
  moment = {'a': jnp.array([1.0, 1e-6]), 'b': jnp.array([1.0, 1.0 - 6e-8])}
  tx = conadv.agvm(optax.sgd(1.0), groups=2, anchor='a', every=1, decay=0.0)
  _, state = tx.update(grads, tx.init(grads), second_moment=moment)
  # (2e-6 + 1e-6) / (0 + 1e-6).
  np.testing.assert_allclose(state.factors['b'], 3**0.5, rtol=1e-3)


def test_branches_share_the_factor_of_their_module():
  params = {
    'body': {'w': jnp.ones(2), 'scale': jnp.ones(2)},
    'head': jnp.ones(3),
  }
  state = {'body': {'mean': jnp.zeros(2)}}
  branched, _ = conadv.dual_bn.split(
    params, state, is_norm=lambda path, _: path[-1] == 'scale'
  )
  tx = conadv.agvm(optax.sgd(1.0), groups=2, anchor='head', every=1, decay=0.0)
  opt_state = tx.init(branched)
  assert set(opt_state.factors) == {'body', 'head'}
  moment = jax.tree.map(lambda x: 1.5 * x**2, branched)
  moment = moment._replace(main={**moment.main, 'head': jnp.full(3, 3.0)})
  updates, opt_state = tx.update(branched, opt_state, second_moment=moment)
  factor = opt_state.factors['body']
  # 1 - cos is 2 * 0.5 / 1.5 and 2 * 2 / 3.
  np.testing.assert_allclose(factor, 2**0.5, rtol=1e-5)
  adversarial = updates.branches['adversarial']['body']['scale']
  np.testing.assert_allclose(adversarial, -factor * np.ones(2), rtol=1e-6)
  np.testing.assert_allclose(updates.main['head'], -np.ones(3), rtol=1e-6)


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'groups': 1}, ['groups', 'at least 2']),
    ({'decay': 1.5}, ['decay', '[0, 1]']),
    ({'anchor': 'bakbone'}, ["'bakbone'", "Did you mean 'backbone'?"]),
    ({'modules': ('backbone', 'hed')}, ["'hed'", "Did you mean 'head'?"]),
    ({'modules': ('head',)}, ["'backbone'", 'one of the modules']),
  ],
)
def test_what_cannot_be_is_refused(arguments, words):
  arguments = {'groups': 2, 'anchor': 'backbone', **arguments}
  with pytest.raises(ValueError) as error:
    conadv.agvm(optax.sgd(1.0), **arguments).init(PARAMS)
  assert_says(error, *words)


def test_modules_are_a_list():
  with pytest.raises(TypeError, match=r"modules=\['head'\]"):
    conadv.agvm(optax.sgd(1.0), groups=2, anchor='head', modules='head').init(
      PARAMS
    )


def test_no_second_moment_is_an_error():
  tx = conadv.agvm(optax.sgd(1.0), groups=2, anchor='head')
  with pytest.raises(ValueError) as error:
    tx.update(PARAMS, tx.init(PARAMS), PARAMS)
  assert_says(error, 'second_moment=True')


def test_its_state_says_what_is_like_the_parameters():
  tx = conadv.agvm(optax.adam(1.0), groups=2, anchor='head')
  state = tx.init(PARAMS)
  marked = optax.tree_map_params(tx, lambda x: 'like', state)
  assert marked.factors == state.factors
  assert set(jax.tree.leaves((marked.inner[0].mu, marked.inner[0].nu))) == {
    'like'
  }
  with pytest.raises(ValueError, match="Given 'head'; the parameters"):
    tx.update({}, tx.init({}), {}, second_moment={})
