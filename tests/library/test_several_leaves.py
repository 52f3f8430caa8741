"""Several perturbed leaves, held against one leaf that holds all of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from jax.sharding import AxisType
from meshes import CLOSE, make_mesh

import conadv_optax as conadv

SIZE, LEFT, RIGHT = 48, (2, 2), 3
rng = np.random.default_rng(0)
W = rng.normal(size=7).astype(np.float32)


def make_batch():
  return {
    'left': rng.normal(size=(SIZE, *LEFT)).astype(np.float32),
    'right': rng.normal(size=(SIZE, RIGHT)).astype(np.float32),
    'y': rng.normal(size=SIZE).astype(np.float32),
  }


BATCHES = [make_batch() for _ in range(4)]


def loss_of(w, x, y):
  return jnp.mean(jnp.tanh(x @ w - y) ** 2)


def apart(w, batch):
  left = batch['left'].reshape(-1, 4)
  x = jnp.concatenate([left, batch['right']], axis=1)
  return loss_of(w, x, batch['y'])


def together(w, batch):
  return loss_of(w, batch['x'], batch['y'])


def joined(batch):
  left = batch['left'].reshape(-1, 4)
  return {'x': np.concatenate([left, batch['right']], 1), 'y': batch['y']}


ATTACKS = {
  'linf': (conadv.fgsm(0.3), conadv.fgsm(0.3)),
  'l2': (conadv.fgsm(0.3, norm='l2'), conadv.fgsm(0.3, norm='l2')),
  # A radius for each leaf is one for each feature; three steps.
  'radii': tuple(
    conadv.pgd(
      epsilon,
      norm='l2',
      steps=3,
      random_start=False,
      bounds=(-1.0, {'left': 2.0, 'right': 1.5} if by_leaf else high),
    )
    for by_leaf, epsilon, high in (
      (True, {'left': 0.2, 'right': jnp.array([0.1, 0.4, 0.0])}, None),
      (
        False,
        jnp.array([0.2] * 4 + [0.1, 0.4, 0.0]),
        jnp.array([2.0] * 4 + [1.5] * 3),
      ),
    )
  ),
}


@pytest.mark.parametrize('name', ATTACKS)
def test_an_example_is_what_it_has_in_all_leaves(name):
  inputs = {'left': 'left', 'right': 'right'}
  by_leaf, whole = ATTACKS[name]
  batch = BATCHES[0]
  half = functools.partial(conadv.perturb, adversarial_fraction=0.5)

  @jax.jit
  def both(batch, of_one_leaf):
    return (
      half(apart, W, batch, attack=by_leaf, inputs=inputs),
      half(together, W, of_one_leaf, attack=whole, inputs='x'),
    )

  found, wanted = both(batch, joined(batch))
  chex.assert_trees_all_close(joined(found), wanted, **CLOSE)
  moved = np.abs(wanted['x'] - joined(batch)['x']).max(1)
  assert (moved[: SIZE // 2] > 0.02).all()
  assert (moved[SIZE // 2 :] == 0).all()


def wrapped(loss_fn, inputs, form):
  attack = ATTACKS['l2'][0]
  if form == 'fast_advprop':
    return conadv.fast_advprop(loss_fn, attack=attack, inputs=inputs)
  return conadv.wrap(
    loss_fn,
    0 if form == 'advprop' else 2,
    attack=attack,
    inputs=inputs,
    reuse_gradient=form == 'reuse',
    adversarial_fraction=0.5,
  )


def on_devices(grad_fn, how, kind):
  if how == 'accumulate':
    return conadv.accumulate(grad_fn, 4)
  if how == 'data_parallel':
    return conadv.data_parallel(grad_fn, make_mesh(4, kind=kind))
  if how == 'concurrent':
    mesh = make_mesh(2, 4, kind=kind)
    return conadv.concurrent(grad_fn, mesh)
  return grad_fn


@functools.partial(jax.jit, static_argnums=0)
def two_steps(grad_fn, batches):
  first, rest = batches[: grad_fn.staleness], batches[grad_fn.staleness :]

  def step(state, batch):
    (loss, aux), grads, state = grad_fn.value_and_grad(W, state, batch)
    return state, (loss, aux.losses, grads)

  rest = jax.tree.map(lambda *x: jnp.stack(x), *rest[:2])
  return jax.lax.scan(step, grad_fn.init(W, first), rest)[1]


@pytest.mark.slow
@pytest.mark.parametrize(
  ('form', 'how', 'kind'),
  [
    ('advprop', 'alone', None),
    ('reuse', 'alone', None),
    ('fast_advprop', 'alone', None),
    ('conadv', 'accumulate', None),
    ('conadv', 'data_parallel', AxisType.Explicit),
    ('conadv', 'concurrent', AxisType.Auto),
  ],
)
def test_every_wrapper_takes_several_leaves(form, how, kind):
  results = [
    two_steps(on_devices(wrapped(*args, form), how, kind), batches)
    for *args, batches in (
      (apart, ['left', 'right'], BATCHES),
      (together, 'x', list(map(joined, BATCHES))),
    )
  ]
  chex.assert_trees_all_close(*results, **CLOSE)


def test_the_start_is_uniform_in_the_ball_of_all_leaves():
  inputs = {'a': np.zeros((4096, 2)), 'b': np.zeros((4096, 2, 1))}
  attack = conadv.pgd(2.0, norm='l2', step_size=0.0)
  craft = jax.jit(lambda key, x: attack.craft(key, lambda x: x, x))
  start = craft(jax.random.key(0), jax.tree.map(np.float32, inputs))
  flat = np.concatenate(
    [np.asarray(x).reshape(4096, -1) for x in start.values()], 1
  )
  share = (np.linalg.norm(flat, axis=1) / 2.0) ** 4
  # Of a uniform point of the ball of four axes it is uniform from 0 to 1.
  np.testing.assert_allclose(
    np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03
  )
  correlations = np.corrcoef(flat.T) - np.eye(4)
  assert np.abs(correlations).max() < 0.06


def test_leaves_of_other_dtypes_keep_them():
  inputs = [jnp.ones((2, 3), jnp.float16), jnp.ones((2, 5))]
  attack = conadv.fgsm(0.5, norm='l2')

  def gradient_fn(x):
    assert all(leaf.dtype == jnp.float32 for leaf in x)
    return [jnp.ones((2, 3)), jnp.ones((2, 5))]

  low, full = jax.jit(lambda x: attack.craft(None, gradient_fn, x))(inputs)
  assert low.dtype == jnp.float16
  step = 0.5 / 8**0.5
  chex.assert_trees_all_close(full - 1, jnp.full((2, 5), step), rtol=1e-5)
  chex.assert_trees_all_close(
    low.astype(jnp.float32) - 1, jnp.full((2, 3), step), rtol=1e-2
  )


def test_a_nan_in_one_leaf_stops_the_example_in_all():
  inputs = [jnp.zeros((2, 1)), jnp.zeros((2, 1))]
  attack = conadv.fgsm(0.5)
  gradient = [jnp.array([[1.0], [jnp.nan]]), jnp.ones((2, 1))]
  crafted = attack.craft(None, lambda _: gradient, inputs)
  chex.assert_trees_all_close(crafted, [jnp.array([[0.5], [0.0]])] * 2)


def test_the_report_of_staleness_counts_all_leaves():
  def report(loss_fn, inputs, batch):
    grad_fn = conadv.wrap(loss_fn, attack=conadv.fgsm(0.1), inputs=inputs)
    return conadv.staleness_report(grad_fn, W, W * W - 0.5, batch)

  chex.assert_trees_all_close(
    report(apart, ['left', 'right'], BATCHES[0]),
    report(together, 'x', joined(BATCHES[0])),
    **CLOSE,
  )


def test_an_input_hessian_of_several_leaves():
  whole = conadv.hessian.input_operator(
    together, W, joined(BATCHES[0]), inputs='x', micro_batches=2
  )(joined(BATCHES[1])['x'])
  vector = [BATCHES[1]['left'], BATCHES[1]['right']]
  left, right = conadv.hessian.input_operator(
    apart, W, BATCHES[0], inputs=['left', 'right'], micro_batches=2
  )(vector)
  found = jnp.concatenate([left.reshape(-1, 4), right], 1)
  chex.assert_trees_all_close(found, whole, **CLOSE)


def test_tokens_have_balls_of_their_own():
  x, gradient = rng.normal(size=(2, 6, 5, 3)).astype(np.float32)
  of_tokens = conadv.pgd(0.4, norm='l2', batch_axes=2, random_start=False)
  found = jax.jit(lambda x: of_tokens.craft(None, lambda _: gradient, x))(x)
  wanted = x + 0.4 * gradient / np.linalg.norm(gradient, axis=2, keepdims=True)
  np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
  still = conadv.pgd(0.4, norm='l2', batch_axes=2, step_size=0.0)
  start = jax.jit(lambda key, x: still.craft(key, jnp.ones_like, x))(
    jax.random.key(0), np.zeros((512, 9, 3), np.float32)
  )
  share = (np.linalg.norm(start, axis=2).ravel() / 0.4) ** 3
  np.testing.assert_allclose(
    np.quantile(share, [0.1, 0.5, 0.9]), [0.1, 0.5, 0.9], atol=0.03
  )


@pytest.mark.parametrize(
  ('kind', 'arguments', 'words'),
  [
    (ValueError, {'inputs': []}, ['name a leaf', "['left', 'right']"]),
    (ValueError, {'inputs': ['y', 'left', 'y']}, ['each once', "'y', 'left'"]),
    (TypeError, {'inputs': (lambda b: None, lambda b, x: b)}, ['an array']),
    (
      TypeError,
      {'inputs': ['left', (lambda b: b.get('rihgt'), lambda b, x: b)]},
      ['an array', 'NoneType'],
    ),
    (
      TypeError,
      {
        'inputs': (
          lambda b: b['left'],
          lambda b, x: {**b, 'left': (255 * x).astype(np.uint8)},
        )
      },
      ['uint8[48,2,2]', 'leave the floats'],
    ),
    (
      ValueError,
      {'attack': conadv.pgd(0.1, bounds=(0.0, {'left': 1.0, 'right': -1.0}))},
      ['bounds=(0.0, -1.0)', 'swapped'],
    ),
    (
      KeyError,
      {'inputs': ['left', 'rihgt']},
      ["'rihgt'", "Did you mean 'right'?"],
    ),
    (
      ValueError,
      {'inputs': ['left', 'right'], 'attack': conadv.fgsm([0.1])},
      ['epsilon', 'an entry is missing'],
    ),
    (
      ValueError,
      {'attack': conadv.pgd(0.1, norm='l2', batch_axes=3, random_start=False)},
      ['batch_axes=3', 'float32[48,2,2]', 'float32[48,3]', 'batch_axes=1'],
    ),
    (
      TypeError,
      {'attack': conadv.Attack(lambda key, fn, x: x['left'], draws=False)},
      ['shape and dtype', "{'left': 'float32[48,2,2]'"],
    ),
  ],
)
def test_wrong_leaves_are_told_where_they_enter(kind, arguments, words):
  arguments = {
    'inputs': {'left': 'left', 'right': 'right'},
    'attack': conadv.fgsm(0.1),
    **arguments,
  }
  key = jax.random.key(0)
  with pytest.raises(kind) as error:
    conadv.perturb(apart, W, BATCHES[0], key=key, **arguments)
  assert_says(error, *words)


def test_a_view_has_the_leaves_of_the_inputs():
  for view in ('y', ['left'], {'left': 'left', 'right': 'right'}):
    with pytest.raises(ValueError) as error:
      conadv.wrap(
        apart, inputs=['left', 'right'], extra_branches={'view': view}
      )
    assert_says(error, f"{{'view': {view!r}}}", "['left_2', 'right_2']")


def test_bounds_of_each_leaf_and_channel():
  inputs = {'a': [jnp.zeros((2, 3)), jnp.zeros((2, 2))], 'b': jnp.zeros((2, 1))}
  low = {'a': [[-0.5, -0.1, 0.0], -0.2], 'b': -3.0}
  low['a'][0] = np.array(low['a'][0])
  attack = conadv.fgsm({'a': 1.0, 'b': 2.0}, bounds=(low, 5.0))
  found = attack.craft(
    None, lambda x: jax.tree.map(lambda x: -jnp.ones_like(x), x), inputs
  )
  wanted = {
    'a': [jnp.array([[-0.5, -0.1, 0.0]] * 2), jnp.full((2, 2), -0.2)],
    'b': jnp.full((2, 1), -2.0),
  }
  chex.assert_trees_all_close(found, wanted)
  # One leaf may be fixed.
  fixed = conadv.fgsm(1.0, bounds=({'a': 0.0, 'b': 2.0}, {'a': 5.0, 'b': 2.0}))
  x = {'a': jnp.ones((2, 1)), 'b': jnp.full((2, 1), 2.0)}
  moved = fixed.craft(None, lambda x: x, x)
  chex.assert_trees_all_equal(moved, {'a': x['a'] + 1, 'b': x['b']})
  # For one leaf a list is an array.
  one = conadv.pgd(0.1, bounds=([0.0, 0.0, 0.9], np.array([1.0, 0.5, 1.0])))
  x = one.craft(jax.random.key(0), jnp.ones_like, jnp.full((2, 3), 0.95))
  chex.assert_trees_all_close(x[:, 1], jnp.full(2, 0.5))
  for bounds in ([[0.0, 1.0], [0.0, 1.0]], {'a': (0, 1), 'b': (0, 2)}):
    with pytest.raises((TypeError, ValueError), match='bounds'):
      conadv.pgd(0.1, bounds=bounds, random_start=False).craft(
        None, lambda x: x, [jnp.ones((2, 1))] * 2
      )


def test_fast_fgsm_takes_a_radius_for_each_leaf():
  inputs = {'a': jnp.zeros((4, 2)), 'b': jnp.zeros((4, 2))}
  attack = conadv.fast_fgsm({'a': 0.1, 'b': 10.0})
  found = attack.craft(
    jax.random.key(0), lambda x: jax.tree.map(jnp.ones_like, x), inputs
  )
  assert 0.0 < float(jnp.max(found['a'])) < 0.11
  assert float(jnp.min(found['b'])) >= 2.5


def test_leaves_of_two_batches_are_refused():
  batch = {**BATCHES[0], 'right': BATCHES[0]['right'][:7]}
  with pytest.raises(ValueError) as error:
    conadv.perturb(
      apart, W, batch, attack=conadv.fgsm(0.1), inputs=['left', 'right']
    )
  assert_says(error, 'one leading batch axis', '48', '7')
