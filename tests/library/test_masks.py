"""Weights on one side, biases and norm layers on the other."""

import functools

import chex
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from helpers import init_model

import conadv_optax as conadv

PLAIN = {
  'dense': {'kernel': True, 'bias': False},
  'norm': {'scale': False, 'bias': False},
  'head': {'kernel': True, 'bias': False},
}


def haiku_like():
  """A norm layer that neither rank nor name gives away."""
  params = {
    'net/~/norm': {'gain': jnp.ones((1, 1, 1, 4))},
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
  assert conadv.exclude_norm_and_bias(haiku_params)['net/~/norm']['gain']


def by_ends(params, *ends):
  """True where the name of a leaf ends in none of `ends`."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: not jax.tree_util.keystr(path).endswith(ends), params
  )


class LinenBlock(nn.Module):
  """Every kind of bias and norm parameter."""

  @nn.compact
  def __call__(self, x, _):
    x += nn.MultiHeadDotProductAttention(2)(nn.LayerNorm()(x))
    x += nn.Dense(4, name='value')(nn.RMSNorm()(x))
    x += nn.Conv(4, (3,))(nn.GroupNorm(2)(x))
    return x + nn.Embed(5, 4)(jnp.zeros(3, int))[None], None


@pytest.mark.parametrize('layers', [0, 3])
def test_biases_of_linen_are_excluded_whatever_their_rank(layers):
  axes, rngs = {'params': 0}, {'params': True}
  stack = nn.scan(LinenBlock, axes, split_rngs=rngs, length=layers)
  module = stack() if layers else LinenBlock()
  shapes = jax.eval_shape(
    module.init, jax.random.key(0), jnp.ones((2, 3, 4)), None
  )
  expected = by_ends(shapes, "['bias']", "['scale']")
  mask = conadv.exclude_norm_and_bias(shapes)
  assert mask == expected
  assert conadv.exclude_norm_and_bias(shapes['params']) == expected['params']
  # Four of attention, Dense, Conv and Embed are weights.
  assert sum(jax.tree.leaves(mask)) == 7
  attention = shapes['params']['MultiHeadDotProductAttention_0']
  assert attention['query']['bias'].ndim > 1


class NnxBlock(nnx.Module):
  def __init__(self, rngs):
    self.attention = nnx.MultiHeadAttention(2, 4, decode=False, rngs=rngs)
    self.norm = nnx.LayerNorm(4, rngs=rngs)
    self.value = nnx.Linear(4, 4, rngs=rngs)


@pytest.mark.parametrize('layers', [0, 3])
def test_biases_of_nnx_are_excluded_whatever_their_rank(layers):
  def params(key):
    return nnx.state(NnxBlock(nnx.Rngs(key)), nnx.Param)

  keys = jax.random.key(0)
  if layers:
    params, keys = jax.vmap(params), jax.random.split(keys, layers)
  shapes = jax.eval_shape(params, keys)
  mask = conadv.exclude_norm_and_bias(shapes)
  assert jax.tree.structure(mask) == jax.tree.structure(shapes)
  assert nnx.to_pure_dict(mask) == by_ends(
    nnx.to_pure_dict(shapes), "['bias']", "['scale']"
  )
  assert sum(jax.tree.leaves(mask)) == 5
  # The predicate sees the path of `jax.tree_util`, 'value' included.
  paths = []
  conadv.exclude_norm_and_bias(
    shapes, is_norm_or_bias=lambda path, _: paths.append(path)
  )
  assert ('norm', 'scale', 'value') in paths


def haiku_net(x):
  x = hk.LayerNorm(-1, create_scale=True, create_offset=True)(x)
  x = hk.BatchNorm(True, True, 0.9)(hk.Conv1D(4, 3)(x), is_training=True)
  return hk.MultiHeadAttention(2, 2, w_init=jnp.zeros)(x, x, x)


def haiku_stack(x):
  block = hk.experimental.layer_stack(3)(
    lambda x: hk.LayerNorm(-1, True, True)(hk.Linear(4)(x))
  )
  return block(x)


# Haiku's averages mix dtypes.
@jax.numpy_dtype_promotion('standard')
@pytest.mark.parametrize(('net', 'weights'), [(haiku_net, 5), (haiku_stack, 1)])
def test_biases_of_haiku_are_excluded_whatever_their_rank(net, weights):
  init = hk.transform_with_state(net).init
  shapes, _ = jax.eval_shape(init, jax.random.key(0), jnp.ones((2, 3, 4)))
  mask = conadv.exclude_norm_and_bias(shapes)
  assert mask == by_ends(shapes, "['b']", "['scale']", "['offset']")
  assert sum(jax.tree.leaves(mask)) == weights
  # Some of those that are excluded have a rank above 1.
  excluded = jax.tree.map(
    lambda leaf, is_weight: not is_weight and leaf.ndim > 1, shapes, mask
  )
  assert any(jax.tree.leaves(excluded))


def test_a_predicate_decides_alone():
  params = {
    'lora': {'a': jnp.ones((2, 4)), 'b': jnp.ones((4, 2))},
    'dense': {'kernel': jnp.ones((2, 2)), 'bias': jnp.ones(2)},
    'norm': {'gain': jnp.ones((2, 2))},
  }
  seen = {}

  def is_norm_or_bias(path, leaf):
    seen[path] = leaf.shape
    return path[0] == 'norm' or path[-1] == 'kernel'

  mask = functools.partial(
    conadv.exclude_norm_and_bias,
    is_norm_or_bias=is_norm_or_bias,
    model_state={'dense': {'mean': jnp.ones(2)}},
  )
  expected = {
    'lora': {'a': True, 'b': True},
    'dense': {'kernel': False, 'bias': True},
    'norm': {'gain': False},
  }
  assert mask(params) == expected
  assert seen[('lora', 'b')] == (4, 2)
  branched, _ = conadv.dual_bn.split(
    params, {}, is_norm=lambda path, leaf: path[0] == 'dense'
  )
  assert mask(branched) == conadv.dual_bn.Branched(
    expected,
    {
      'adversarial': {
        'lora': {'a': None, 'b': None},
        'dense': {'kernel': False, 'bias': True},
        'norm': {'gain': None},
      }
    },
  )
  # Without it the names decide, and what was split is a norm's.
  plain = conadv.exclude_norm_and_bias(branched)
  assert plain.main == {
    'lora': {'a': True, 'b': False},
    'dense': {'kernel': False, 'bias': False},
    'norm': {'gain': True},
  }
  assert plain.branches['adversarial']['dense'] == plain.main['dense']


def test_structure_decides_where_the_state_is_known():
  params, state = haiku_like()
  expected = {'net/~/norm': {'gain': False}, 'net/~/conv': {'w': True}}
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
    'net/~/norm': {'gain': False},
    'net/~/conv': {'w': True},
  }
  assert mask.branches['adversarial']['net/~/norm'] == {'gain': False}


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
  params['net/~/norm'] = {'gain': scale}
  params, _ = conadv.dual_bn.split(params, state)
  main, adversarial = branch_labels(params)[form]
  labels = conadv.dual_bn.Branched(main, {'adversarial': adversarial})
  tx = optax.multi_transform(
    {'main': conadv.lars(1.0, weight_decay=0.0), 'adv': optax.sgd(0.5)}, labels
  )
  updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
  own = updates.branches['adversarial']['net/~/norm']['gain']
  chex.assert_trees_all_equal(own, jnp.full(scale.shape, -0.5))
  # |w| = |g|: the ratio is the trust coefficient.
  chex.assert_trees_all_close(
    updates.main['net/~/conv']['w'], jnp.full((3, 3, 1, 4), -1e-3)
  )
  # Known by structure where the branch still shows it, else by rank.
  is_known = form == 'leaves' or rank == 1
  chex.assert_trees_all_close(
    updates.main['net/~/norm']['gain'],
    jnp.full(scale.shape, -1.0 if is_known else -1e-3),
  )


def test_a_mask_fits_where_a_part_is_masked_out():
  params, _ = conadv.dual_bn.split(*haiku_like())
  kept = conadv.dual_bn.Branched(
    {'net/~/norm': {'gain': False}, 'net/~/conv': {'w': True}},
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
