"""Which leaves are split, and that a branch is an ordinary tree again."""

import chex
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import init_model

import conadv_optax as conadv

KEY = jax.random.key(0)


def own_paths(params, branch='adversarial'):
  """The paths of the leaves that a branch has for itself."""
  return {
    '/'.join(str(getattr(k, 'key', getattr(k, 'name', k))) for k in path)
    for path, _ in jax.tree_util.tree_leaves_with_path(params.branches[branch])
  }


class LinenBlock(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Conv(4, (3, 3))(x)
    return nn.BatchNorm(use_running_average=False, name='my_statistics')(x)


class LinenNet(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = LinenBlock()(x)
    x = nn.BatchNorm(use_running_average=False)(x)
    x = nn.LayerNorm()(x)
    position = self.param('position', nn.initializers.zeros, (4,))
    return nn.Dense(3)(x + position[None, None, None])


LINEN_OWN = {
  'BatchNorm_0/scale',
  'BatchNorm_0/bias',
  'LinenBlock_0/my_statistics/scale',
  'LinenBlock_0/my_statistics/bias',
}


@pytest.mark.parametrize('whole_collections', [False, True])
def test_linen_norm_layers_are_found(whole_collections):
  variables = jax.jit(LinenNet().init)(KEY, jnp.zeros((2, 4, 4, 1)))
  state = variables['batch_stats']
  if whole_collections:
    state = {'batch_stats': state}
  params, state = conadv.dual_bn.split(variables['params'], state)
  assert own_paths(params) == LINEN_OWN
  chex.assert_trees_all_equal(
    state.branches['adversarial'], conadv.dual_bn.main(state)
  )


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
    self.blocks = nnx.List([nnx.BatchNorm(4, rngs=rngs)])
    self.norm = nnx.LayerNorm(4, rngs=rngs)


def test_nnx_norm_layers_are_found():
  _, params, state = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
  params, state = conadv.dual_bn.split(params, state)
  assert own_paths(params) == {'blocks/0/scale/value', 'blocks/0/bias/value'}
  chex.assert_trees_all_equal(
    conadv.dual_bn.select(params, 'adversarial'), params.main
  )


def test_haiku_norm_layers_are_found():
  def forward(x):
    x = hk.nets.MLP([4])(x)
    x = hk.BatchNorm(True, True, 0.9, name='inner')(x, is_training=True)
    return hk.LayerNorm(-1, True, True)(x)

  with jax.numpy_dtype_promotion('standard'):
    init = jax.jit(hk.transform_with_state(forward).init)
    params, state = init(KEY, jnp.zeros((2, 3)))
  params, state = conadv.dual_bn.split(params, state)
  assert own_paths(params) == {'inner/scale', 'inner/offset'}
  assert 'inner/~/mean_ema' in state.branches['adversarial']


def test_haiku_resnet_norm_layers_are_found():
  def forward(x):
    return hk.nets.ResNet18(3)(x, is_training=True)

  with jax.numpy_dtype_promotion('standard'):
    params, state = jax.eval_shape(
      hk.transform_with_state(forward).init, KEY, jnp.zeros((2, 32, 32, 3))
    )
  split, _ = jax.eval_shape(conadv.dual_bn.split, params, state)
  expected = {
    f'{module}/{name}'
    for module, leaves in params.items()
    for name in leaves
    if 'batchnorm' in module
  }
  assert len(expected) == 40
  assert own_paths(split) == expected


def test_a_predicate_finds_norm_layers_without_state():
  variables = jax.jit(LinenNet().init)(KEY, jnp.zeros((2, 4, 4, 1)))
  params, state = conadv.dual_bn.split(
    variables['params'],
    None,
    is_norm=lambda path, leaf: path[0] == 'LayerNorm_0' and leaf.ndim == 1,
  )
  assert state is None
  assert own_paths(params) == {'LayerNorm_0/scale', 'LayerNorm_0/bias'}


def test_without_affine_the_parameters_stay_as_they_are():
  params, model_state = init_model()
  same, state = conadv.dual_bn.split(params, model_state, affine=False)
  assert same is params
  assert isinstance(state, conadv.dual_bn.Branched)


def test_select_and_replace_are_counterparts():
  params, state = conadv.dual_bn.split(
    *init_model(), branches=('adversarial', 'augmented')
  )
  for tree in (params, state):
    for branch in ('main', 'adversarial', 'augmented'):
      new = jax.tree.map(lambda x: x + 1, conadv.dual_bn.select(tree, branch))
      changed = conadv.dual_bn.replace(tree, branch, new)
      chex.assert_trees_all_equal_structs(changed, tree)
      chex.assert_trees_all_equal(
        conadv.dual_bn.select(changed, branch)['norm'], new['norm']
      )
      for other in {'main', 'adversarial', 'augmented'} - {branch}:
        chex.assert_trees_all_equal(
          conadv.dual_bn.select(changed, other)['norm'],
          conadv.dual_bn.select(tree, other)['norm'],
        )


def test_a_branch_does_not_write_what_it_shares():
  params, _ = conadv.dual_bn.split(*init_model())
  new = jax.tree.map(
    jnp.zeros_like, conadv.dual_bn.select(params, 'adversarial')
  )
  changed = conadv.dual_bn.replace(params, 'adversarial', new)
  chex.assert_trees_all_equal(changed.main, params.main)


def test_ordinary_trees_are_shared_by_all_branches():
  params, _ = init_model()
  assert conadv.dual_bn.select(params, 'adversarial') is params
  assert conadv.dual_bn.main(params) is params


def test_split_trees_can_be_donated():
  params, state = conadv.dual_bn.split(*init_model())
  step = jax.jit(
    lambda *trees: jax.tree.map(lambda x: x + 1, trees), donate_argnums=(0, 1)
  )
  new_params, _ = step(params, state)
  chex.assert_tree_all_finite(new_params)


@pytest.mark.parametrize('branches', [('main',), ('a', 'a')])
def test_branch_names_are_new_and_different(branches):
  with pytest.raises(ValueError, match='different names'):
    conadv.dual_bn.split(*init_model(), branches=branches)


def test_splitting_twice_is_an_error():
  params, state = conadv.dual_bn.split(*init_model())
  with pytest.raises(ValueError, match='split` was called twice'):
    conadv.dual_bn.split(params, state)


def test_no_norm_layer_is_an_error_that_names_the_predicate():
  params, _ = init_model()
  with pytest.raises(ValueError, match='is_norm=lambda'):
    conadv.dual_bn.split(params, {'elsewhere': {'mean': jnp.zeros(8)}})


def test_unknown_branch_is_an_error_that_names_the_split():
  params, _ = conadv.dual_bn.split(*init_model())
  with pytest.raises(KeyError, match=r"branches=.*'adversarial', 'view'"):
    conadv.dual_bn.select(params, 'view')
  with pytest.raises(KeyError, match="no branch 'view'"):
    conadv.dual_bn.replace(params, 'view', params.main)


def test_replace_needs_a_branched_tree():
  params, _ = init_model()
  with pytest.raises(TypeError, match='Split it first'):
    conadv.dual_bn.replace(params, 'main', params)
