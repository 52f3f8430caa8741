"""What `wrap` gives each branch: its batch, its statistics, its key."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from helpers import forward, init_model, loss_fn, make_batch, plain_step

import conadv_optax as conadv

EPSILON = 0.1


def test_extra_branches_are_further_clean_views_with_their_own_norm():
  batch = make_batch(0)
  batch['view'] = make_batch(1)['image']
  params, model_state = conadv.dual_bn.split(
    *init_model(), branches=('adversarial', 'augmented')
  )
  grad_fn = conadv.wrap(
    loss_fn,
    0,
    attack=conadv.fgsm(EPSILON),
    extra_branches={'augmented': 'view'},
    has_state=True,
  )
  (loss, aux), grads, _ = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  plain, statistics = init_model()
  (view_loss, view_state), view_grads = plain_step(
    plain, statistics, {**batch, 'image': batch['view']}
  )
  chex.assert_trees_all_close(aux.losses['augmented'], view_loss, rtol=1e-6)
  chex.assert_trees_all_close(loss, sum(aux.losses.values()) / 3, rtol=1e-6)
  chex.assert_trees_all_close(
    conadv.dual_bn.select(aux.model_state, 'augmented'), view_state, rtol=1e-6
  )
  chex.assert_trees_all_close(
    conadv.dual_bn.select(grads, 'augmented')['norm'],
    jax.tree.map(lambda g: g / 3, view_grads['norm']),
    rtol=1e-5,
    atol=1e-7,
  )


def counting_loss(params, model_state, batch):
  return jnp.mean(params * batch['x']), {'calls': model_state['calls'] + 1}


@pytest.mark.parametrize('tau', [0, 1, 3])
def test_each_branch_updates_its_state_once_and_the_attack_none(tau):
  _, model_state = conadv.dual_bn.split(
    {}, {'calls': jnp.zeros([], jnp.int32)}, affine=False
  )
  grad_fn = conadv.wrap(
    counting_loss,
    tau,
    attack=conadv.pgd(0.1, steps=4),
    inputs='x',
    has_state=True,
  )
  params, key = jnp.ones(4), jax.random.key(0)
  batch = {'x': jnp.ones(4)}
  state = grad_fn.init(params, [batch] * tau, model_state=model_state, key=key)
  step = jax.jit(grad_fn.value_and_grad)
  for call in range(1, 4):
    (_, aux), _, state = step(
      params, state, batch, model_state=model_state, key=key
    )
    model_state = aux.model_state
    calls = {
      branch: conadv.dual_bn.select(model_state, branch)['calls']
      for branch in ('main', 'adversarial')
    }
    chex.assert_trees_all_equal(
      calls, {'main': jnp.int32(call), 'adversarial': jnp.int32(call)}
    )


def test_a_shared_state_keeps_the_main_update_alone():
  batch = make_batch(0)
  batch['view'] = make_batch(1)['image']
  _, expected = forward(*init_model(), batch['image'])
  params, model_state = init_model()
  grad_fn = conadv.wrap(
    loss_fn,
    0,
    attack=conadv.fgsm(EPSILON),
    # By its name it would be the last.
    extra_branches={'other': 'view'},
    has_state=True,
  )
  (_, aux), _, _ = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  chex.assert_trees_all_close(aux.model_state, expected, rtol=1e-6)


def test_every_branch_draws_its_own_key():
  def noisy(params, batch, *, key):
    draw = jax.random.uniform(key)
    return jnp.mean(params * batch['x']), draw

  grad_fn = conadv.wrap(
    noisy, 1, attack=conadv.pgd(0.1), inputs='x', has_aux=True, has_key=True
  )
  params, batch = jnp.ones(4), {'x': jnp.ones(4)}
  keys = jax.random.split(jax.random.key(0), 3)
  state = grad_fn.init(params, [batch], key=keys[0])

  step = jax.jit(grad_fn.value_and_grad)

  def draws(key):
    (_, aux), _, new = step(params, state, batch, key=key)
    return aux.aux['main'], aux.aux['adversarial'], new.queue.adversarial

  first, again, other = draws(keys[1]), draws(keys[1]), draws(keys[2])
  chex.assert_trees_all_equal(first, again)
  assert first[0] != first[1]
  assert first[0] != other[0]
  assert np.any(np.asarray(first[2]) != np.asarray(other[2]))


def test_first_batches_draw_different_starts():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(w * batch['x']),
    2,
    attack=conadv.Attack(lambda key, grad, x: x + jax.random.uniform(key)),
    inputs='x',
  )
  state = grad_fn.init(
    jnp.ones(4), [{'x': jnp.zeros(4)}] * 2, key=jax.random.key(0)
  )
  first, second = np.asarray(state.queue.adversarial)
  assert np.all(first != second)


def test_targets_are_for_the_attack_and_true_labels_for_training():
  batch = make_batch(0)
  seen = []

  def spying(params, model_state, batch):
    jax.debug.callback(lambda x: seen.append(np.asarray(x)), batch['label'])
    return loss_fn(params, model_state, batch)

  params, model_state = init_model()
  grad_fn = conadv.wrap(
    spying,
    0,
    attack=conadv.pgd(0.1, targets=conadv.random_targets(3)),
    has_state=True,
  )
  jax.jit(grad_fn.value_and_grad)(
    params,
    grad_fn.init(params, []),
    batch,
    model_state=model_state,
    key=jax.random.key(0),
  )
  jax.effects_barrier()
  true = np.asarray(batch['label'])
  wrong = [labels for labels in seen if np.all(labels != true)]
  right = [labels for labels in seen if np.all(labels == true)]
  assert len(seen) == len(wrong) + len(right)
  assert len(wrong) >= 1
  assert len(right) >= 2


@pytest.mark.parametrize(
  ('weight', 'given'),
  [
    (jnp.ones(3), '[1.0, 1.0, 1.0]'),
    (-1.0, '-1.0'),
    (float('nan'), 'nan'),
    (np.float32('inf'), 'inf'),
  ],
)
def test_a_weight_that_is_no_finite_number_of_zero_or_more(weight, given):
  with pytest.raises(ValueError) as error:
    conadv.wrap(loss_fn, weights={'main': weight, 'adversarial': 1})
  assert_says(
    error,
    'one finite number',
    f"weights['main']={given}",
    "`weights={'main': 0.5, 'adversarial': 0.5}`",
  )


def test_a_traced_weight_is_a_scalar_of_any_value():
  def weigh(weight):
    conadv.wrap(loss_fn, weights={'main': weight, 'adversarial': 1 - weight})
    return weight

  jax.eval_shape(weigh, -1.0)
  with pytest.raises(ValueError, match=r"weights\['main'\]=float32\[3\]"):
    jax.eval_shape(weigh, jnp.ones(3))
