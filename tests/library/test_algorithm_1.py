"""`wrap` against Algorithm 1 written out with plain lists of the past."""

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import init_model, loss_fn, make_batch, naive_attack

import conadv_optax as conadv

EPSILON = 0.1
STEPS = 10
RATE = 0.2


def plain_sum(theta, stats, clean, adversarial):
  """Both losses of Algorithm 1, added."""
  main, new_main = loss_fn(
    {**theta['shared'], 'norm': theta['main']}, stats['main'], clean
  )
  other, new_other = loss_fn(
    {**theta['shared'], 'norm': theta['adversarial']},
    stats['adversarial'],
    adversarial,
  )
  return main + other, (main, other, new_main, new_other)


summed = jax.jit(jax.value_and_grad(plain_sum, has_aux=True))


def naive_conadv(tau, batches, steps_of_attack=1, reuse=False):
  """Algorithm 1: lists of past parameters and batches, no queue.

  Norm layers are kept apart by hand, and the gradient is one gradient of the
  plain sum of both losses.
  """
  params, statistics = init_model()
  norm = params.pop('norm')
  theta = {
    'shared': params,
    'main': norm,
    'adversarial': jax.tree.map(jnp.copy, norm),
  }
  stats = {'main': statistics, 'adversarial': statistics}
  past, rows = [], []
  for t in range(STEPS):
    past.append(theta)
    clean = batches[t + tau] if reuse else batches[t]
    crafted_at = max(t - tau, 0)
    if reuse and t >= tau:
      # Made by the clean pass of call t - tau, in the main norm.
      source, branch = batches[t], 'main'
    else:
      source, branch = batches[t], 'adversarial'
    then = past[crafted_at]
    adversarial = naive_attack(
      then[branch],
      then['shared'],
      source,
      epsilon=EPSILON,
      steps=steps_of_attack,
    )

    (_, (main, other, *new_stats)), grads = summed(
      theta, stats, clean, adversarial
    )
    theta = jax.tree.map(lambda w, g: w - RATE * g, theta, grads)
    stats = dict(zip(('main', 'adversarial'), new_stats, strict=True))
    rows.append((main, other, grads, stats, theta))
  return rows


def to_naive(branched):
  shared = dict(branched.main)
  return {
    'main': shared.pop('norm'),
    'shared': shared,
    'adversarial': branched.branches['adversarial']['norm'],
  }


def run_wrap(tau, batches, **kwargs):
  params, model_state = conadv.dual_bn.split(*init_model())
  grad_fn = conadv.wrap(
    loss_fn,
    tau,
    weights={'main': 1.0, 'adversarial': 1.0},
    has_state=True,
    **kwargs,
  )
  state = grad_fn.init(params, batches[:tau], model_state=model_state)
  step = jax.jit(grad_fn.value_and_grad)
  rows = []
  for batch in batches[tau : tau + STEPS]:
    (loss, aux), grads, state = step(
      params, state, batch, model_state=model_state
    )
    params = jax.tree.map(lambda w, g: w - RATE * g, params, grads)
    model_state = aux.model_state
    rows.append((loss, aux, grads, model_state, params))
  return rows


def assert_same_run(rows, naive_rows):
  assert len(rows) == len(naive_rows) == STEPS
  for row, naive in zip(rows, naive_rows, strict=True):
    loss, aux, grads, model_state, params = row
    main, adversarial, naive_grads, stats, theta = naive
    close = {'rtol': 2e-4, 'atol': 2e-5}
    chex.assert_trees_all_close(loss, main + adversarial, **close)
    chex.assert_trees_all_close(
      aux.losses, {'main': main, 'adversarial': adversarial}, **close
    )
    chex.assert_trees_all_close(to_naive(grads), naive_grads, **close)
    for branch in ('main', 'adversarial'):
      chex.assert_trees_all_close(
        conadv.dual_bn.select(model_state, branch), stats[branch], **close
      )
    chex.assert_trees_all_close(to_naive(params), theta, **close)


@pytest.mark.parametrize(
  ('tau', 'steps_of_attack'), [(0, 1), (0, 3), (1, 1), (2, 3), (3, 1)]
)
def test_is_algorithm_1_to_the_letter(tau, steps_of_attack):
  batches = [make_batch(t) for t in range(STEPS + tau)]
  attack = conadv.pgd(EPSILON, steps=steps_of_attack, random_start=False)
  rows = run_wrap(tau, batches, attack=attack)
  assert_same_run(rows, naive_conadv(tau, batches, steps_of_attack))


@pytest.mark.parametrize('tau', [1, 3])
def test_reused_gradient_trains_on_the_newest_clean_batch(tau):
  batches = [make_batch(t) for t in range(STEPS + tau)]
  rows = run_wrap(
    tau, batches, attack=conadv.fgsm(EPSILON), reuse_gradient=True
  )
  assert_same_run(rows, naive_conadv(tau, batches, reuse=True))
