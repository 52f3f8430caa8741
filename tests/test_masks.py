"""Weights on one side, biases and norm layers on the other."""

import functools

import chex
import jax
import jax.numpy as jnp
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


def test_shapes_are_enough():
  params, _ = init_model()
  shapes = jax.eval_shape(lambda: params)
  chex.assert_trees_all_equal(conadv.exclude_norm_and_bias(shapes), PLAIN)
