"""Weights on one side, biases and norm layers on the other."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import init_model

import conadv_optax as conadv

PLAIN = {
  'dense': {'kernel': True, 'bias': False},
  'norm': {'scale': False, 'bias': False},
  'head': {'kernel': True, 'bias': False},
}


def haiku_like():
  params = {
    'net/~/norm': {'scale': jnp.ones((1, 1, 1, 4))},
    'net/~/conv': {'w': jnp.ones((3, 3, 1, 4))},
  }
  state = {'net/~/norm/~/mean_ema': {'average': jnp.zeros((1, 1, 1, 4))}}
  return params, state


def test_rank_decides_without_structure():
  params, _ = init_model()
  chex.assert_trees_all_equal(conadv.exclude_norm_and_bias(params), PLAIN)
  assert conadv.exclude_norm_and_bias({'scalar': jnp.ones([])}) == {
    'scalar': False
  }
  haiku_params, _ = haiku_like()
  assert conadv.exclude_norm_and_bias(haiku_params)['net/~/norm']['scale']


def test_structure_decides_where_the_state_is_known():
  params, state = haiku_like()
  expected = {'net/~/norm': {'scale': False}, 'net/~/conv': {'w': True}}
  mask = functools.partial(conadv.exclude_norm_and_bias, model_state=state)
  assert mask(params) == expected
  _, split_state = conadv.dual_bn.split(params, state)
  assert (
    conadv.exclude_norm_and_bias(params, model_state=split_state) == expected
  )


def test_branched_parameters_show_their_norm_layers():
  params, _ = conadv.dual_bn.split(*haiku_like())
  mask = conadv.exclude_norm_and_bias(params)
  assert jax.tree.structure(mask) == jax.tree.structure(params)
  assert mask.main == {
    'net/~/norm': {'scale': False},
    'net/~/conv': {'w': True},
  }
  assert mask.branches['adversarial']['net/~/norm'] == {'scale': False}


def branch_labels(params):
  """Labels that give the branch to another optimizer, as users write them."""
  adversarial = params.branches['adversarial']
  main = jax.tree.map(lambda _: 'main', params.main)
  return {
    'branch': ('main', 'adv'),
    'leaves': (main, jax.tree.map(lambda _: 'adv', adversarial)),
    'all-leaves': (main, jax.tree.map(lambda _: 'adv', main)),
    'modules': (main, dict.fromkeys(adversarial, 'adv')),
  }


@pytest.mark.parametrize('form', ['branch', 'leaves', 'all-leaves', 'modules'])
@pytest.mark.parametrize('rank', [1, 4])
def test_a_branch_of_another_optimizer_may_be_masked_out(form, rank):
  params, state = haiku_like()
  scale = jnp.ones((1, 1, 1, 4)[-rank:])
  params['net/~/norm'] = {'scale': scale}
  params, _ = conadv.dual_bn.split(params, state)
  main, adversarial = branch_labels(params)[form]
  labels = conadv.dual_bn.Branched(main, {'adversarial': adversarial})
  tx = optax.multi_transform(
    {'main': conadv.lars(1.0, weight_decay=0.0), 'adv': optax.sgd(0.5)}, labels
  )
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  own = updates.branches['adversarial']['net/~/norm']['scale']
  chex.assert_trees_all_equal(own, jnp.full(scale.shape, -0.5))
  # |w| = |g|: the ratio is the trust coefficient.
  chex.assert_trees_all_close(
    updates.main['net/~/conv']['w'], jnp.full((3, 3, 1, 4), -1e-3)
  )
  # Known by structure where the branch still shows it, else by rank.
  is_known = form == 'leaves' or rank == 1
  chex.assert_trees_all_close(
    updates.main['net/~/norm']['scale'],
    jnp.full(scale.shape, -1.0 if is_known else -1e-3),
  )


def test_a_mask_fits_where_a_part_is_masked_out():
  params, _ = conadv.dual_bn.split(*haiku_like())
  kept = conadv.dual_bn.Branched(
    {'net/~/norm': {'scale': False}, 'net/~/conv': {'w': True}},
    jax.tree.map(lambda _: False, params.branches),
  )
  tx = optax.masked(
    optax.add_decayed_weights(0.5, mask=conadv.exclude_norm_and_bias), kept
  )
  grads = jax.tree.map(jnp.zeros_like, params)
  updates, _ = tx.update(grads, tx.init(params), params)
  expected = jax.tree.map(
    lambda is_kept, x: (0.5 if is_kept else 0.0) * x, kept, params
  )
  chex.assert_trees_all_equal(updates, expected)


def test_shapes_are_enough():
  params, _ = init_model()
  shapes = jax.eval_shape(lambda: params)
  chex.assert_trees_all_equal(conadv.exclude_norm_and_bias(shapes), PLAIN)
