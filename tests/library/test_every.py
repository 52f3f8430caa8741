"""One batch in k has an adversarial copy: `wrap(every=k)`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from helpers import init_model, loss_fn, make_batch
from jax.sharding import AxisType

import conadv_optax as conadv

EPSILON = 0.1
WEIGHTS = {'main': 0.75, 'adversarial': 0.5}


def squares(w, batch):
  return jnp.sum(batch['m'] * (batch['x'] @ w) ** 2) / batch['m'].sum()


def make_batches(count):
  rng = np.random.default_rng(0)
  return [
    {
      'x': rng.normal(size=(8, 3)).astype(np.float32),
      'm': np.array([1, 1, 1, 0, 1, 0, 0, 0], np.float32),
    }
    for _ in range(count)
  ]


def loss_and_gradient(w, batch, x):
  """Those of `squares` in NumPy."""
  m = batch['m']
  ahead = x @ w
  both = np.sum(m * ahead**2), *(2 * (m * ahead) @ x)
  return np.array(both) / m.sum()


def expected(staleness, every, steps):
  """Losses and gradients of descent, one batch in `every` with a copy."""
  w, outputs, copies = np.ones(3), [], {}
  batches = make_batches(steps + staleness)
  for t in range(steps):
    for new in range(0 if t == 0 else t + staleness, t + staleness + 1):
      if new % every == 0:
        x = batches[new]['x']
        moves = np.sign(np.outer(x @ w, w)) * (batches[new]['m'] > 0)[:, None]
        copies[new] = x + EPSILON * moves
    clean = loss_and_gradient(w, batches[t], batches[t]['x'])
    if t in copies:
      adversarial = loss_and_gradient(w, batches[t], copies[t])
      output = WEIGHTS['main'] * clean + WEIGHTS['adversarial'] * adversarial
    else:
      output = sum(WEIGHTS.values()) * clean
    outputs.append(output)
    w = w - 0.05 * output[1:]
  return np.array(outputs)


@functools.cache
def compiled(staleness, every):
  grad_fn = conadv.wrap(
    squares,
    staleness,
    attack=conadv.fgsm(EPSILON),
    inputs='x',
    weights=WEIGHTS,
    every=every,
    denominator=lambda batch: batch['m'].sum(),
  )
  return grad_fn, jax.jit(grad_fn.value_and_grad)


def descend(grad_fn, step, steps):
  batches = make_batches(steps + grad_fn.staleness)
  w, outputs, losses = jnp.ones(3), [], []
  state = grad_fn.init(w, batches[: grad_fn.staleness])
  for batch in batches[grad_fn.staleness :]:
    (loss, aux), g, state = step(w, state, batch)
    outputs.append([loss, *g])
    losses.append(aux.losses['adversarial'])
    w = w - 0.05 * g
  return np.array(outputs), losses


@pytest.mark.parametrize(
  ('staleness', 'every'), [(0, 3), (1, 1), (1, 2), (2, 3), (3, 2)]
)
def test_it_is_a_plain_loop(staleness, every):
  steps = 3 * every + staleness
  outputs, losses = descend(*compiled(staleness, every), steps)
  chex.assert_trees_all_close(
    outputs, expected(staleness, every, steps), rtol=1e-4, atol=1e-5
  )
  # What was not computed is not told as a number.
  assert np.isfinite(losses).tolist() == [t % every == 0 for t in range(steps)]


@pytest.mark.slow
@pytest.mark.parametrize('kind', [AxisType.Auto, AxisType.Explicit])
def test_groups_take_turns_together(kind):
  devices = jax.devices()[:2]
  mesh = jax.make_mesh((2,), ('data',), (kind,), devices=devices)
  for staleness, every in [(0, 3), (2, 3)]:
    grad_fn, _ = compiled(staleness, every)
    for groups in (
      conadv.data_parallel(grad_fn, mesh),
      conadv.accumulate(grad_fn, 4),
    ):
      outputs, _ = descend(groups, jax.jit(groups.value_and_grad), 7)
      chex.assert_trees_all_close(
        outputs, expected(staleness, every, 7), rtol=1e-4, atol=1e-5
      )


@pytest.mark.parametrize('staleness', [0, 2])
def test_passes_that_have_no_turn_are_not_run(staleness):
  run = []

  def loss(w, batch, branch):
    jax.debug.callback(lambda: run.append(branch))
    return squares(w, batch)

  grad_fn = conadv.wrap(
    loss,
    staleness,
    attack=conadv.fgsm(EPSILON),
    inputs='x',
    every=4,
    has_branch=True,
  )
  batches = make_batches(8 + staleness)
  state = grad_fn.init(jnp.ones(3), batches[:staleness])
  step = jax.jit(grad_fn.value_and_grad)
  for t, batch in enumerate(batches[staleness:]):
    jax.effects_barrier()
    run.clear()
    _, _, state = jax.block_until_ready(step(jnp.ones(3), state, batch))
    jax.effects_barrier()
    wanted = ['main']
    wanted += ['adversarial'] * (t % 4 == 0)
    wanted += ['attack'] * ((t + staleness) % 4 == 0)
    assert sorted(run) == sorted(wanted), t
  assert step._cache_size() == 1


def test_statistics_move_only_when_they_are_used():
  params, model_state = conadv.dual_bn.split(*init_model())
  grad_fn = conadv.wrap(loss_fn, 0, has_state=True, every=2)
  state = grad_fn.init(params, [])
  step = jax.jit(grad_fn.value_and_grad)
  for t in range(4):
    (_, aux), _, state = step(
      params,
      state,
      make_batch(t),
      model_state=model_state,
      key=jax.random.key(t),
    )
    for branch, moves in {'main': True, 'adversarial': t % 2 == 0}.items():
      before, after = (
        conadv.dual_bn.select(x, branch) for x in (model_state, aux.model_state)
      )
      same = jax.tree.map(lambda x, y: bool((x == y).all()), before, after)
      assert any(jax.tree.leaves(same)) is not moves, (t, branch)
    model_state = aux.model_state


def test_what_does_not_go_with_it_says_so():
  every = functools.partial(conadv.wrap, squares, inputs='x', every=4)
  with pytest.raises(ValueError) as error:
    every(attack=conadv.fgsm(0.1), reuse_gradient=True)
  assert_says(error, '`reuse_gradient=True`', 'every=4', '=0.25')
  with pytest.raises(ValueError) as error:
    conadv.concurrent(every(), jax.make_mesh((2, 4), ('data', 'role')))
  assert_says(error, '`concurrent`', '`every=1`')
  with pytest.raises(ValueError) as error:
    conadv.wrap(squares, every=0)
  assert_says(error, '`every`', 'at least 1', 'every=0')
