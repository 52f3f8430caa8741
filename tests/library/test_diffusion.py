"""Diffusion over a graph, against NumPy and what it reduces to."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_checks import assert_says
from meshes import CLOSE, KINDS, make_mesh

import conadv_optax as conadv

AGENTS, SIZE, RATE, EPSILON = 8, 32, 0.1, 0.2
rng = np.random.default_rng(0)
W = rng.normal(size=3).astype(np.float32)
BATCHES = [
  {
    'image': rng.normal(size=(SIZE, 3)).astype(np.float32),
    'y': rng.normal(size=SIZE).astype(np.float32),
  }
  for _ in range(4)
]


def loss_fn(w, batch):
  return jnp.mean((batch['image'] @ w - batch['y']) ** 2)


def attacked(staleness=0):
  return conadv.wrap(
    loss_fn,
    staleness,
    attack=conadv.fgsm(EPSILON),
    weights={'main': 0.0, 'adversarial': 1.0},
  )


def ring():
  return np.roll(np.eye(AGENTS), 1, 0) + np.roll(np.eye(AGENTS), -1, 0)


def torus():
  rows, columns = np.divmod(np.arange(AGENTS), 4)
  apart_in_rows = np.abs(rows[:, None] - rows)
  apart = np.abs(columns[:, None] - columns)
  return (apart_in_rows == 0) & np.isin(apart, (1, 3)) | (
    (apart_in_rows == 1) & (apart == 0)
  )


def erdos_renyi():
  edges = np.triu(np.random.default_rng(1).random((AGENTS, AGENTS)) < 0.4, 1)
  return edges + edges.T


GRAPHS = {
  'ring': ring(),
  'torus': torus(),
  'erdos-renyi': erdos_renyi(),
  'complete': np.ones((AGENTS, AGENTS)),
  'none': np.zeros((AGENTS, AGENTS)),
}


def by_hand(weights):
  """Adapt then combine, each agent on the attack of its own share."""
  w = np.tile(W.astype(np.float64), (AGENTS, 1))
  for batch in BATCHES:
    adapted = []
    for k in range(AGENTS):
      rows = slice(k * SIZE // AGENTS, (k + 1) * SIZE // AGENTS)
      x, y = batch['image'][rows].astype(np.float64), batch['y'][rows]
      error = x @ w[k] - y
      x = x + EPSILON * np.sign(error[:, None] * w[k])
      gradient = 2 * x.T @ (x @ w[k] - y) / len(y)
      adapted.append(w[k] - RATE * gradient)
    w = weights.T @ np.stack(adapted)
  return w


def descend(agents, tx=None):
  tx = tx or optax.sgd(RATE)
  params = agents.spread(W)
  opt_state = jax.vmap(tx.init)(params)
  state = agents.init(params, BATCHES[: agents.staleness])
  for batch in BATCHES[agents.staleness :]:
    (loss, aux), grads, state = agents.value_and_grad(params, state, batch)
    updates, opt_state = jax.vmap(tx.update)(grads, opt_state, params)
    params = agents.combine(optax.apply_updates(params, updates))
  assert loss.shape == aux.losses['adversarial'].shape == (AGENTS,)
  return params


@pytest.mark.parametrize('name', GRAPHS)
def test_adapt_then_combine(name):
  weights = conadv.metropolis_weights(GRAPHS[name])
  params = descend(conadv.diffusion(attacked(), make_mesh(AGENTS), weights))
  np.testing.assert_allclose(params, by_hand(weights), rtol=1e-4, atol=1e-5)


def test_agents_lie_along_the_axis_that_is_named():
  mesh = make_mesh(2, AGENTS // 2, names=('other', 'agent'))
  agents = conadv.diffusion(
    loss_fn, mesh, np.roll(np.eye(AGENTS // 2), 1, 1), axis='agent'
  )
  found = agents.combine(agents.spread(jnp.float32(0)) + jnp.arange(4.0))
  np.testing.assert_array_equal(found, [3, 0, 1, 2])


@pytest.mark.parametrize('kind', KINDS)
def test_everyone_with_equal_weights_is_data_parallel(kind):
  mesh = make_mesh(AGENTS, kind=kind)
  weights = np.full((AGENTS, AGENTS), 1 / AGENTS)
  agents = descend(conadv.diffusion(attacked(1), mesh, weights))
  parallel = conadv.data_parallel(attacked(1), mesh)
  w, state = jnp.asarray(W), parallel.init(W, BATCHES[:1])
  for batch in BATCHES[1:]:
    _, grads, state = parallel.value_and_grad(w, state, batch)
    w = jax.device_get(w) - RATE * jax.device_get(grads)
  chex.assert_trees_all_close(agents, np.tile(w, (AGENTS, 1)), **CLOSE)


def test_edges_of_one_direction_go_that_way():
  # Each hears itself and the one before it.
  weights = 0.75 * np.eye(AGENTS) + 0.25 * np.roll(np.eye(AGENTS), 1, 1)
  agents = conadv.diffusion(loss_fn, make_mesh(AGENTS), weights)
  found = agents.combine(jnp.arange(float(AGENTS)))
  own = np.arange(AGENTS)
  np.testing.assert_allclose(found, 0.75 * own + 0.25 * np.roll(own, 1))


@pytest.mark.slow
def test_lars_sees_one_agent_at_a_time():
  tx = conadv.lars(RATE, weight_decay=0.1, trust_coefficient=1.0, mask=True)
  identity = np.eye(AGENTS)
  together = descend(
    conadv.diffusion(attacked(), make_mesh(AGENTS), identity), tx
  )
  alone = attacked()
  rows = slice(SIZE // AGENTS, 2 * SIZE // AGENTS)
  w, opt_state = jnp.asarray(W), tx.init(W)

  @jax.jit
  def step(w, opt_state, own):
    _, grads, _ = alone.value_and_grad(w, alone.init(w, []), own)
    updates, opt_state = tx.update(grads, opt_state, w)
    return optax.apply_updates(w, updates), opt_state

  for batch in BATCHES:
    w, opt_state = step(w, opt_state, jax.tree.map(lambda x: x[rows], batch))
  chex.assert_trees_all_close(together[1], w, **CLOSE)


def test_along_each_edge_the_parameters_travel_once_and_nothing_else():
  edges = int(GRAPHS['erdos-renyi'].sum())
  agents = conadv.diffusion(
    attacked(), make_mesh(AGENTS), conadv.metropolis_weights(erdos_renyi())
  )
  params = agents.spread(W)
  text = agents.combine.lower(params).compile().as_text()
  sent = re.findall(
    r'f32\[1,3\]\S* collective-permute(?:-start)?\(.*source_target_pairs='
    r'\{(.*?)\}\}',
    text,
  )
  assert sum(pairs.count('{') for pairs in sent) == edges
  state = agents.init(params, [])
  step = jax.jit(agents.value_and_grad).lower(params, state, BATCHES[0])
  for program in (text, step.compile().as_text()):
    assert not re.search('all-reduce|all-gather|all-to-all', program)


def test_statistics_keys_and_counts_are_each_agents_own():
  def noisy(w, state, batch, *, key):
    new = {'mean': batch['image'].mean(0), 'calls': state['calls'] + 1}
    return w.sum() + jax.random.normal(key), new

  grad_fn = conadv.plain(noisy, has_state=True, has_key=True)
  agents = conadv.diffusion(grad_fn, make_mesh(AGENTS), np.eye(AGENTS))
  params, model_state = agents.spread(
    (jnp.asarray(W), {'mean': jnp.zeros(3), 'calls': jnp.zeros([], jnp.int32)})
  )
  key = jax.random.key(0)
  state = agents.init(params, [], model_state=model_state, key=key)
  (loss, aux), _, _ = agents.value_and_grad(
    params, state, BATCHES[0], model_state=model_state, key=key
  )
  by_agent = BATCHES[0]['image'].reshape(AGENTS, -1, 3).mean(1)
  np.testing.assert_allclose(aux.model_state['mean'], by_agent, rtol=1e-5)
  np.testing.assert_array_equal(aux.model_state['calls'], np.ones(AGENTS))
  assert len(set(np.round(np.asarray(loss), 4).tolist())) == AGENTS


def test_short_dtypes_are_combined_in_float32():
  weights = conadv.metropolis_weights(ring())
  agents = conadv.diffusion(loss_fn, make_mesh(AGENTS), weights)
  values = jnp.asarray(rng.normal(size=(AGENTS, 5)), jnp.bfloat16)
  counts = jnp.arange(AGENTS, dtype=jnp.int32)
  found, numbers = agents.combine((values, counts))
  wanted = weights.T @ np.asarray(values, np.float64)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_array_equal(
    found.astype(jnp.float32),
    jnp.asarray(wanted, jnp.bfloat16).astype(jnp.float32),
  )
  np.testing.assert_array_equal(
    numbers, np.round(weights.T @ np.arange(AGENTS))
  )


@pytest.mark.parametrize('kind', KINDS)
def test_no_step_compiles_again(kind):
  agents = conadv.diffusion(
    attacked(1), make_mesh(AGENTS, kind=kind), conadv.metropolis_weights(ring())
  )
  params = agents.spread(W)
  state = agents.init(params, BATCHES[:1])
  step = jax.jit(agents.value_and_grad)
  for batch in BATCHES[1:]:
    _, grads, state = step(params, state, batch)
    params = agents.combine(params - RATE * grads)
  assert (step._cache_size(), agents.combine._cache_size()) == (1, 1)


def test_trees_without_the_axis_of_agents_are_refused():
  agents = conadv.diffusion(loss_fn, make_mesh(4), np.eye(4))
  of_more = jnp.ones((8, 3))
  for params in (jnp.asarray(W), of_more, jnp.array(1.0)):
    with pytest.raises(ValueError, match=r'agents\.spread'):
      agents.value_and_grad(params, agents.init(of_more[:4], []), BATCHES[0])
    with pytest.raises(ValueError, match=r'agents\.spread'):
      agents.combine(params)


@pytest.mark.parametrize(
  ('kind', 'weights', 'words'),
  [
    (ValueError, np.eye(3), ['8', '(3, 3)']),
    (ValueError, ring(), ['doubly stochastic', 'metropolis_weights']),
    (ValueError, 2 * np.eye(AGENTS) - 1 / AGENTS, ['least entry of -0.125']),
  ],
)
def test_weights_that_do_not_fit(kind, weights, words):
  with pytest.raises(kind) as error:
    conadv.diffusion(loss_fn, make_mesh(AGENTS), weights)
  assert_says(error, *words)


def test_traced_weights_another_axis_and_one_way_edges():
  mesh = make_mesh(AGENTS)
  with pytest.raises(TypeError, match='cannot be traced'):
    jax.jit(lambda a: conadv.diffusion(loss_fn, mesh, a).staleness)(ring())
  with pytest.raises(ValueError, match="axis='agent'"):
    conadv.diffusion(loss_fn, mesh, np.eye(AGENTS), axis='agent')
  with pytest.raises(ValueError, match=r'neighbours \+ neighbours.T'):
    conadv.metropolis_weights(np.triu(np.ones((3, 3))))


def test_an_agent_of_padding_alone_adds_nothing():
  mask = np.repeat([1, 1, 1, 0], 3).astype(np.float32)
  x = np.arange(12, dtype=np.float32)
  grad_fn = conadv.plain(
    lambda w, batch: (
      jnp.sum(batch['mask'] * (w - batch['x']) ** 2) / jnp.sum(batch['mask'])
    ),
    denominator=lambda batch: jnp.sum(batch['mask']),
  )
  ring = conadv.metropolis_weights(
    np.roll(np.eye(4), 1, 0) + np.roll(np.eye(4), -1, 0)
  )
  agents = conadv.diffusion(grad_fn, make_mesh(4), ring)
  w = agents.spread(jnp.float32(0.0))
  _, grads, _ = agents.value_and_grad(
    w, agents.init(w, []), {'x': x, 'mask': mask}
  )
  np.testing.assert_allclose(grads, [-2, -8, -14, 0], rtol=1e-6)
  assert np.isfinite(agents.combine(w - grads)).all()


def test_large_integers_stay_where_agents_have_the_same():
  everyone = conadv.metropolis_weights(np.ones((4, 4)))
  agents = conadv.diffusion(lambda w, x: w, make_mesh(4), everyone)
  tree = {
    'counter': jnp.full(4, 2**24 + 1, jnp.int32),
    'unsigned': jnp.full(4, 2**32 - 1, jnp.uint32),
    'apart': jnp.array([2**24 + 1, 2**24 + 3, 2**24 + 5, 2**24 + 7]),
    'small': jnp.array([0, 10, 250, 255], jnp.uint8),
    'flag': jnp.array([True, True, True, False]),
  }
  found = agents.combine(tree)
  means = {'apart': 2**24 + 4, 'small': 129, 'flag': True}
  chex.assert_trees_all_equal(
    found,
    {
      name: jnp.full(4, means[name], x.dtype) if name in means else x
      for name, x in tree.items()
    },
  )
