"""No two draws share a key: of `init`, of steps, of branches, of devices.

Every key is spelled as four floats, 16 bits in each, and read where it was
used: in the adversarial inputs and in the aux of the loss.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from meshes import make_mesh

import conadv_optax as conadv

STEPS = 100
BITS = 4


def spell(key):
  data = jax.random.key_data(key)
  halves = jnp.stack([data >> 16, data & 0xFFFF], axis=1)
  return halves.reshape(-1).astype(jnp.float32)


def loss_fn(w, batch, *, key):
  """Its input gradient holds its own key, and the one of `prepare`."""
  del w
  codes = jnp.concatenate([jnp.zeros(BITS), batch['code'][0], spell(key)])
  return jnp.sum(batch['image'] * codes[None]), spell(key)[None]


def prepare(key, batch):
  return {**batch, 'code': jnp.broadcast_to(spell(key), batch['code'].shape)}


def craft(key, gradient_fn, inputs):
  own = jnp.concatenate([spell(key), jnp.zeros(2 * BITS)])
  return inputs * 0 + own[None] + gradient_fn(inputs)


ATTACK = conadv.Attack(craft, prepare)


def wrap(staleness):
  return conadv.wrap(
    loss_fn, staleness, attack=ATTACK, has_aux=True, has_key=True
  )


def make_batch(size):
  return {'image': jnp.zeros((size, 3 * BITS)), 'code': jnp.zeros((size, BITS))}


def keys_of(grad_fn, size):
  """Those of `init` and those of a hundred steps, four floats each."""
  key, batch, w = jax.random.key(7), make_batch(size), jnp.zeros([])
  tau = grad_fn.staleness

  @jax.jit
  def run():
    state = grad_fn.init(w, [batch] * tau, key=key)

    def step(t):
      (_, aux), _, later = grad_fn.value_and_grad(
        w, state, batch, key=jax.random.fold_in(key, t)
      )
      # The slot of the oldest, the first, has the newest.
      return later.queue.adversarial[0], aux.aux

    return state.queue.adversarial, jax.lax.map(step, jnp.arange(STEPS + 1))

  initial, steps = run()

  def rows(x):
    return np.asarray(x).reshape(-1, BITS)

  return rows(initial), [rows(x) for x in jax.tree.leaves(steps)]


def own_keys():
  """What a user passes, and the keys that `split` makes first."""
  steps = [jax.random.fold_in(jax.random.key(7), t) for t in range(STEPS + 1)]
  passed = jnp.stack([jax.random.key(7), *steps])
  split = jax.vmap(functools.partial(jax.random.split, num=3))(passed)
  return np.asarray(jax.vmap(spell)(jnp.append(passed, split)))


def children(rows):
  """The keys that `split` makes of spelled ones."""
  halves = rows.astype(np.uint32).reshape(-1, 2, 2)
  keys = jax.random.wrap_key_data((halves[..., 0] << 16) | halves[..., 1])
  split = jax.vmap(functools.partial(jax.random.split, num=3))(keys)
  return np.asarray(jax.vmap(spell)(split.reshape(-1)))


def distinct(rows):
  return {tuple(row) for row in rows}


@pytest.mark.slow
@pytest.mark.parametrize('staleness', [1, 3])
def test_init_and_steps_share_no_key(staleness):
  initial, of_steps = keys_of(wrap(staleness), 1)
  # Attack, targets and the loss within it for each of the first batches.
  assert len(initial) == 3 * staleness
  together = np.concatenate([initial, *of_steps])
  # The same at each step, and two branches.
  assert len(together) == 3 * staleness + (STEPS + 1) * 5
  assert len(distinct(together)) == len(together)
  assert not distinct(initial) & distinct(own_keys())
  # Of the keys that a loss gets it makes its own.
  for of_branch in of_steps[1:]:
    assert not distinct(together) & distinct(children(of_branch))


GROUPS = {
  'devices': (lambda fn: conadv.data_parallel(fn, make_mesh(8)), 8),
  'micro-batches': (lambda fn: conadv.accumulate(fn, 8), 8),
  'both': (
    lambda fn: conadv.data_parallel(conadv.accumulate(fn, 2), make_mesh(4)),
    8,
  ),
  'two axes': (
    lambda fn: conadv.data_parallel(
      fn, make_mesh(2, 4, names=('a', 'b')), axis=('a', 'b')
    ),
    8,
  ),
  'roles': (
    lambda fn: conadv.concurrent(fn, make_mesh(2, 3)),
    4,
  ),
}


@pytest.mark.parametrize('name', list(GROUPS))
def test_no_two_groups_share_a_key(name):
  spread, groups = GROUPS[name]
  initial, of_steps = keys_of(spread(wrap(1)), groups)
  # An attacker's place in the queue is padding.
  drawn = [initial[initial.any(axis=1)], *of_steps]
  drawn[1:] = [x[x.any(axis=1)] for x in of_steps]
  seen = [distinct(rows) for rows in drawn]
  expected = groups * (3 + 5 * (STEPS + 1))
  assert len(set().union(*seen)) == expected
  assert not seen[0] & distinct(own_keys())
