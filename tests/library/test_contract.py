"""One contract for every public name, found by walking `__all__`.

Here are the names themselves, the attacks and the rest; the optimizers are in
`test_contract_optimizers.py`, the gradient wrappers in
`test_contract_gradients.py`.
"""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from public_names import (
  EXAMPLES,
  cases,
  kind,
  make_batch,
  public_functions,
  public_names,
)

import conadv_optax as conadv

attacks = pytest.mark.parametrize('case', cases('attack'))


def test_every_public_function_has_examples():
  missing = sorted(set(public_functions()) - set(EXAMPLES))
  assert not missing, (
    f'The contract suite has no example arguments for {missing}. Add them to '
    'EXAMPLES in tests/public_names.py; the checks follow from the return '
    'annotation.'
  )
  assert not set(EXAMPLES) - set(public_functions())
  assert all(EXAMPLES.values())


def test_every_public_function_is_of_the_kind_its_annotation_says():
  kinds = {}
  for name, function in public_functions().items():
    assert 'return' in function.__annotations__, (
      f'{name} has no return annotation, by which its contract is chosen.'
    )
    kinds[name] = kind(function)
  assert {
    'concurrent': 'gradient',
    'data_parallel': 'gradient',
    'exclude_norm_and_bias': 'helper',
    'lars': 'optimizer',
    'legw': 'schedule',
    'noise_scale': 'monitor',
    'pgd': 'attack',
    'random_targets': 'targets',
    'scale_by_gsnr': 'scaling',
    'scale_learning_rate': 'schedule',
    'wrap': 'gradient',
  }.items() <= kinds.items()


def test_nothing_public_is_missing_from_all():
  for module in (conadv, conadv.dual_bn, conadv.hessian):
    for name, value in vars(module).items():
      own = getattr(value, '__module__', '').startswith('conadv_optax')
      if own and not name.startswith('_'):
        is_imported = module is conadv.dual_bn and (
          value.__module__ != module.__name__
        )
        assert is_imported or name in module.__all__, name


def test_types_are_pytrees():
  for name, value in public_names().items():
    if inspect.isclass(value):
      made = value(*range(len(value._fields)))
      leaves, treedef = jax.tree.flatten(made)
      assert leaves == list(range(len(value._fields))), name
      assert jax.tree.unflatten(treedef, leaves) == made, name


def sine(x):
  return jnp.sum(jnp.sin(3 * x) * jnp.cos(jnp.arange(x.size).reshape(x.shape)))


climb = jax.jit(jax.grad(sine))


@attacks
def test_attack_keeps_shape_and_dtype(case):
  attack = case.make()
  key = jax.random.key(1) if attack.draws else None
  inputs = [
    make_batch(0, dtype)['x']
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16)
  ]

  @jax.jit
  def craft(inputs):
    perturbed = [attack.craft(key, climb, x) for x in inputs]
    if attack.reuse is None:
      return perturbed, inputs
    reused = [attack.reuse(climb(x.astype(jnp.float32)), x) for x in inputs]
    return perturbed, reused

  perturbed, reused = craft(inputs)
  chex.assert_trees_all_equal_shapes_and_dtypes(perturbed, inputs)
  chex.assert_trees_all_equal_shapes_and_dtypes(reused, inputs)
  chex.assert_tree_all_finite(perturbed)
  for new, x in zip(perturbed, inputs, strict=True):
    assert np.any(np.asarray(new) != np.asarray(x))


@attacks
def test_attack_in_a_scan_with_fixed_epsilons_is_a_loop_with_traced_ones(case):
  inputs = np.stack([make_batch(seed)['x'] for seed in range(3)])
  keys, traces = jax.random.split(jax.random.key(1), 3), []
  epsilons = (0.0, 0.1, 0.4)

  def craft(epsilon, key, x):
    return case.make(epsilon=epsilon).craft(key, climb, x)

  @jax.jit
  def scan():
    return jax.lax.scan(
      lambda _, args: (None, [craft(epsilon, *args) for epsilon in epsilons]),
      None,
      (keys, inputs),
    )[1]

  @jax.jit
  def traced(*args):
    traces.append(0)
    return craft(*args)

  for epsilon, scanned in zip(epsilons, scan(), strict=True):
    looped = [
      traced(np.float32(epsilon), key, x)
      for key, x in zip(keys, inputs, strict=True)
    ]
    chex.assert_trees_all_close(
      np.asarray(scanned), np.stack(looped), atol=1e-5
    )
  assert len(traces) == 1, 'It compiles once while `epsilon` changes.'


@pytest.mark.parametrize('case', cases('targets'))
def test_targets_are_drawn_by_key_alone(case):
  targets = case.make()
  leaf = case.arguments.get('label', 'label')
  batch = {leaf: jnp.arange(64) % 2, 'other': jnp.ones(3)}
  compiled, keys = jax.jit(targets), jax.random.split(jax.random.key(0), 2)
  _, scanned = jax.lax.scan(
    lambda _, key: (None, targets(key, batch)), None, keys
  )
  for i, key in enumerate(keys):
    drawn = targets(key, batch)
    chex.assert_trees_all_equal(compiled(key, batch), drawn)
    chex.assert_trees_all_equal(scanned[leaf][i], drawn[leaf])
    chex.assert_trees_all_equal_shapes_and_dtypes(drawn, batch)
    assert jnp.all(drawn[leaf] != batch[leaf])
    chex.assert_trees_all_equal(drawn['other'], batch['other'])


@pytest.mark.parametrize('case', cases('controller'))
def test_controller_in_a_scan_is_a_loop(case):
  controller, values = case.make(), jnp.array([8.0, 4.0, -1.0, 1.0])
  state = first = controller.init()
  for value in values:
    state = controller.update(value, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
  scanned, _ = jax.lax.scan(
    lambda state, value: (controller.update(value, state), None), first, values
  )
  chex.assert_trees_all_equal(scanned, state)


@pytest.mark.parametrize('case', cases('controller'))
def test_controller_gives_its_buffers_back(case):
  controller, value = case.make(), jnp.float32(8.0)
  update = jax.jit(controller.update, donate_argnums=1)
  state = update(value, controller.init())
  chex.assert_trees_all_equal(
    state, controller.update(value, controller.init())
  )
  # And those of an update that was not compiled.
  update(value, controller.update(value, state))


@pytest.mark.parametrize('case', cases('operator'))
def test_operator_is_linear_and_symmetric(case):
  def vector(seed):
    keys = jax.random.split(jax.random.key(seed), 2)
    if 'inputs' in case.arguments:
      return jax.random.normal(keys[0], case.arguments['batch']['x'].shape)
    return optax.tree.random_like(keys[0], case.arguments['params'])

  matvec, (u, v) = jax.jit(case.make()), (vector(0), vector(1))
  chex.assert_trees_all_equal_shapes_and_dtypes(matvec(u), u)
  chex.assert_trees_all_close(
    matvec(optax.tree.add_scale(u, 2.0, v)),
    optax.tree.add_scale(matvec(u), 2.0, matvec(v)),
    rtol=1e-3,
    atol=1e-4,
  )
  products = optax.tree.vdot(u, matvec(v)), optax.tree.vdot(v, matvec(u))
  chex.assert_trees_all_close(*products, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('case', cases('augmentation'))
def test_augmentation_is_drawn_by_key_alone(case):
  augment, batch = case.make(), make_batch(0)
  keys = jax.random.split(jax.random.key(0), 2)
  _, scanned = jax.lax.scan(
    lambda _, key: (None, augment(key, batch)), None, keys
  )
  for i, key in enumerate(keys):
    drawn = augment(key, batch)
    chex.assert_trees_all_close(jax.jit(augment)(key, batch), drawn, atol=1e-6)
    chex.assert_trees_all_close(
      jax.tree.map(lambda x, i=i: x[i], scanned), drawn, atol=1e-6
    )
  first, second = (augment(key, batch)['x'] for key in keys)
  assert not np.any(np.asarray(first) == np.asarray(second))


@pytest.mark.parametrize('case', cases('leaf'))
def test_leaf_reads_what_it_wrote(case):
  (get, write), batch = case.make(), make_batch(0)
  value = get(batch) + 1
  written = jax.jit(write)(batch, value)
  chex.assert_trees_all_equal(get(written), value)
  chex.assert_trees_all_equal({k: written[k] for k in batch}, batch)


@pytest.mark.parametrize('case', cases('helper'))
def test_helper_is_pure_and_can_be_traced(case):
  leaves, treedef = jax.tree.flatten(case.arguments)
  before = [jnp.copy(x) if isinstance(x, jax.Array) else x for x in leaves]
  arrays = [x for x in leaves if isinstance(x, jax.Array)]

  def call(*arrays):
    fed = iter(arrays)
    given = [next(fed) if isinstance(x, jax.Array) else x for x in leaves]
    return case.function(**jax.tree.unflatten(treedef, given))

  # With arrays that are fixed in the program, and with traced ones.
  chex.assert_trees_all_close(
    jax.jit(call)(*arrays), jax.jit(case.make)(), rtol=1e-5, atol=1e-6
  )
  after, same_treedef = jax.tree.flatten(case.arguments)
  assert same_treedef == treedef
  for new, old in zip(after, before, strict=True):
    assert np.all(new == old), 'The arguments are left as they were.'
