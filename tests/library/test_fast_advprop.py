"""Fast AdvProp against a step written by hand, and its reductions."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MOMENTUM, init_model, loss_fn, make_batch, plain_step
from jax.sharding import AxisType

import conadv_optax as conadv

EPSILON, NUM_ATTACKED, NUM = 0.1, 4, 16
fast = {'attack': conadv.fgsm(EPSILON), 'adversarial_fraction': 0.25}


def part(batch, begin, end):
  return jax.tree.map(lambda x: x[begin:end], batch)


def branched():
  """A model whose branches differ in norm layers and statistics."""
  params, model_state = conadv.dual_bn.split(*init_model())
  own = params.branches['adversarial']
  own['norm'] = jax.tree.map(lambda x: 1.5 * x + 0.1, own['norm'])
  other = jax.tree.map(lambda x: x + 0.5, model_state.main)
  return params, model_state._replace(branches={'adversarial': other})


@jax.jit
def gradient(shared, norm, batch):
  """Of parameters and inputs, in the norm layers of one branch."""

  def loss(shared, norm, image):
    value, _ = loss_fn(
      {**shared, 'norm': norm}, init_model()[1], {**batch, 'image': image}
    )
    return value

  return jax.value_and_grad(loss, argnums=(0, 1, 2))(
    shared, norm, batch['image']
  )


def by_hand(params, batch, *, start=0.0, weight=0.5):
  """Losses and gradients of a step, group of parameters by group."""
  shared = {name: params.main[name] for name in ('dense', 'head')}
  norm = params.main['norm']
  own_norm = params.branches['adversarial']['norm']
  clean, rest = part(batch, 0, NUM_ATTACKED), part(batch, NUM_ATTACKED, NUM)
  noisy = {**clean, 'image': clean['image'] + start}
  attack_loss, attack_grads = gradient(shared, own_norm, noisy)
  attack_shared, attack_norm, direction = attack_grads
  moved = np.asarray(noisy['image']) + EPSILON * np.sign(direction)
  image = np.clip(moved, clean['image'] - EPSILON, clean['image'] + EPSILON)
  adversarial = {**clean, 'image': jnp.asarray(image, jnp.float32)}
  adv_loss, (adv_shared, adv_norm, _) = gradient(shared, own_norm, adversarial)
  main_loss, (main_shared, main_norm, _) = gradient(shared, norm, rest)

  def mix(first, second):
    return jax.tree.map(
      lambda a, b: weight * a + (1 - weight) * b, first, second
    )

  of_attacked = mix(attack_shared, adv_shared)
  share = NUM_ATTACKED / NUM
  losses = {'attack': attack_loss, 'adversarial': adv_loss, 'main': main_loss}
  grads = {
    'shared': jax.tree.map(
      lambda a, c: share * a + (1 - share) * c, of_attacked, main_shared
    ),
    # Of each norm layer, over the examples that went through it alone.
    'main norm': main_norm,
    'adversarial norm': mix(attack_norm, adv_norm),
  }
  return losses, grads, (adversarial, rest)


def groups_of(grads):
  return {
    'shared': {name: grads.main[name] for name in ('dense', 'head')},
    'main norm': grads.main['norm'],
    'adversarial norm': grads.branches['adversarial']['norm'],
  }


def shifted(epsilon, shift):
  """An attack of one step that starts beside the clean input."""

  def one_step(key, inputs):
    del key
    start = inputs + shift
    return start, lambda g: jnp.clip(
      start + epsilon * jnp.sign(g), inputs - epsilon, inputs + epsilon
    )

  return conadv.Attack(craft=None, draws=False, one_step=one_step)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('start', 'weight'), [(0.0, 0.5), (0.0, 0.0), (0.05, 0.3)]
)
def test_the_step_is_the_one_by_hand(start, weight):
  params, model_state = branched()
  batch = make_batch(0, size=NUM)
  grad_fn = conadv.fast_advprop(
    loss_fn,
    attack=shifted(EPSILON, start) if start else conadv.fgsm(EPSILON),
    adversarial_fraction=NUM_ATTACKED / NUM,
    attack_weight=weight,
    has_state=True,
  )
  (loss, aux), grads, state = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  losses, expected, _ = by_hand(params, batch, start=start, weight=weight)
  close = {'rtol': 1e-4, 'atol': 1e-5}
  chex.assert_trees_all_close(aux.losses, losses, **close)
  chex.assert_trees_all_close(groups_of(grads), expected, **close)
  total = (
    NUM_ATTACKED
    * (weight * losses['attack'] + (1 - weight) * losses['adversarial'])
    + (NUM - NUM_ATTACKED) * losses['main']
  )
  np.testing.assert_allclose(loss, total / NUM, rtol=1e-5)
  assert state == ((), ())


@pytest.mark.slow
def test_each_branch_updates_its_statistics_once_from_its_last_pass():
  params, model_state = branched()
  batch = make_batch(0, size=NUM)
  grad_fn = conadv.fast_advprop(loss_fn, **fast, has_state=True)
  (_, aux), _, _ = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  _, _, (adversarial, rest) = by_hand(params, batch)
  for branch, examples in (('main', rest), ('adversarial', adversarial)):
    dense = params.main['dense']
    hidden = np.asarray(examples['image'] @ dense['kernel'])
    hidden = hidden + np.asarray(dense['bias'])[None]
    old = conadv.dual_bn.select(model_state, branch)['norm']
    new = conadv.dual_bn.select(aux.model_state, branch)['norm']
    for name, value in (('mean', hidden.mean(0)), ('var', hidden.var(0))):
      expected = MOMENTUM * np.asarray(old[name]) + (1 - MOMENTUM) * value
      np.testing.assert_allclose(new[name], expected, rtol=1e-4, atol=1e-5)


def test_a_shared_state_takes_the_clean_update_and_everything_is_shared():
  params, model_state = init_model()
  batch = make_batch(0, size=NUM)
  grad_fn = conadv.fast_advprop(loss_fn, **fast, has_state=True)
  (_, aux), grads, _ = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  (_, expected), _ = plain_step(
    params, model_state, part(batch, NUM_ATTACKED, NUM)
  )
  chex.assert_trees_all_close(aux.model_state, expected, rtol=1e-5)
  one, _ = conadv.dual_bn.split(params, model_state)
  _, by_group, _ = by_hand(one, batch)
  norm = jax.tree.map(
    lambda a, c: 0.25 * a + 0.75 * c,
    by_group['adversarial norm'],
    by_group['main norm'],
  )
  chex.assert_trees_all_close(
    grads, {**by_group['shared'], 'norm': norm}, rtol=1e-4, atol=1e-5
  )


def example_wise(params, batch):
  """A loss that treats each example by itself, as BatchNorm does not."""
  hidden = jnp.tanh(batch['image'] @ params['dense']['kernel'])
  return jnp.mean((hidden @ params['head']['kernel']) ** 2)


@pytest.mark.parametrize('size', [2, 16])
def test_without_perturbation_it_is_the_plain_step(size):
  params, _ = init_model()
  batch = make_batch(0, size=size)
  grad_fn = conadv.fast_advprop(example_wise, attack=conadv.fgsm(0.0))
  (loss, _), grads, _ = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch
  )
  expected = jax.jit(jax.value_and_grad(example_wise))(params, batch)
  chex.assert_trees_all_close((loss, grads), expected, rtol=1e-5, atol=1e-6)


def test_a_traced_weight_is_a_fixed_one():
  params, _ = init_model()
  batch = make_batch(0)

  def grads_at(weight):
    grad_fn = conadv.fast_advprop(example_wise, **fast, attack_weight=weight)
    return grad_fn.value_and_grad(params, grad_fn.init(params, []), batch)[1]

  traced, fixed = jax.jit(grads_at)(0.3), jax.jit(lambda: grads_at(0.3))()
  chex.assert_trees_all_close(traced, fixed, rtol=1e-5)


@pytest.mark.slow
def test_an_attack_without_weight_lets_no_nan_through():
  def loss(w, batch):
    # Defined but at the clean input of the attacked example.
    return jnp.mean(w * jnp.sqrt(batch['image'] ** 2 - 1))

  grad_fn = conadv.fast_advprop(
    loss,
    attack=conadv.Attack(
      craft=None, draws=False, one_step=lambda k, x: (0 * x, lambda g: x)
    ),
    attack_weight=0.0,
  )
  w, batch = jnp.ones([]), {'image': jnp.full((5, 1), 2.0)}
  (value, _), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  np.testing.assert_allclose((value, grads), np.sqrt(3), rtol=1e-5)


def test_aux_and_keys_of_each_pass():
  def loss(w, batch, *, key):
    noise = jax.random.normal(key)
    return w * jnp.mean(batch['image']), {'noise': noise}

  grad_fn = conadv.fast_advprop(
    loss, attack=conadv.pgd(0.1), has_aux=True, has_key=True
  )
  w, batch = jnp.ones([]), {'image': jnp.ones((5, 2))}
  (_, aux), _, _ = grad_fn.value_and_grad(
    w, grad_fn.init(w, []), batch, key=jax.random.key(0)
  )
  draws = {name: float(own['noise']) for name, own in aux.aux.items()}
  assert set(draws) == {'attack', 'adversarial', 'main'}
  assert len(set(draws.values())) == 3
  with pytest.raises(ValueError, match='needs `key=`'):
    grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)


@pytest.mark.slow
def test_devices_are_a_loop_over_their_shards():
  params, model_state = branched()
  batch = make_batch(0, size=40)
  grad_fn = conadv.fast_advprop(
    loss_fn, attack=conadv.fgsm(EPSILON), has_state=True
  )
  parallel = conadv.data_parallel(
    grad_fn, jax.make_mesh((8,), ('data',), (AxisType.Auto,))
  )
  (loss, aux), grads, _ = jax.jit(parallel.value_and_grad)(
    params, parallel.init(params, []), batch, model_state=model_state
  )
  step = jax.jit(grad_fn.value_and_grad)
  rows = []
  for k in range(8):
    (own_loss, own), own_grads, _ = step(
      params,
      grad_fn.init(params, []),
      part(batch, 5 * k, 5 * k + 5),
      model_state=model_state,
    )
    rows.append((own_loss, own.losses, own.model_state, own_grads))
  expected = jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *rows)
  chex.assert_trees_all_close(
    (loss, aux.losses, aux.model_state, grads), expected, rtol=2e-4, atol=2e-5
  )


def test_a_step_costs_one_and_a_fifth_plain_steps():
  def deep(params, batch):
    x = batch['image']
    for w in params:
      x = jnp.tanh(x @ w)
    return jnp.mean(x**2)

  params = [jnp.ones((64, 64)) for _ in range(8)]
  batch = {'image': jnp.ones((80, 64))}

  def flops(grad_fn):
    step = jax.jit(grad_fn.value_and_grad)
    compiled = step.lower(params, grad_fn.init(params, []), batch).compile()
    return compiled.cost_analysis()['flops']

  ratio = flops(conadv.fast_advprop(deep, attack=conadv.fgsm(0.1))) / flops(
    conadv.plain(deep)
  )
  assert 1.15 < ratio < 1.3


@pytest.mark.slow
@pytest.mark.parametrize(
  ('attack', 'dtype'),
  [
    (conadv.pgd(0.1), jnp.bfloat16),
    (
      conadv.pgd(0.1, norm='l2', start_from_clean=0.5, bounds=(-1.0, 1.0)),
      jnp.float32,
    ),
    (conadv.fast_fgsm(0.1), jnp.float32),
    (conadv.fgsm(0.1), jnp.bfloat16),
  ],
)
def test_one_step_is_the_attack_taken_apart(attack, dtype):
  x = make_batch(0)['image'].astype(dtype)
  climb = jax.grad(lambda x: jnp.sum(jnp.sin(3 * x)))
  key = jax.random.key(0) if attack.draws else None
  start, finish = attack.one_step(key, x)
  assert start.dtype == jnp.float32
  chex.assert_trees_all_equal(finish(climb(start)), attack.craft(key, climb, x))


@pytest.mark.parametrize(
  ('arguments', 'says'),
  [
    ({'attack': conadv.pgd(0.1, steps=2)}, 'an attack of one step'),
    (
      {'attack': conadv.pgd(0.1, targets=conadv.random_targets(3))},
      'towards no targets',
    ),
    ({'adversarial_fraction': 1.0}, 'adversarial_fraction=1.0'),
    ({'adversarial_fraction': 0.0}, 'adversarial_fraction=0.0'),
    ({'attack_weight': -0.1}, 'attack_weight=-0.1'),
    ({'attack_weight': 1.1}, 'attack_weight=1.1'),
  ],
)
def test_wrong_arguments_are_told(arguments, says):
  with pytest.raises(ValueError) as error:
    conadv.fast_advprop(example_wise, **{**fast, **arguments})
  assert says in str(error.value)


def test_wrong_calls_are_told():
  with pytest.raises(TypeError, match=r'`attack` must be a `conadv\.Attack`'):
    conadv.fast_advprop(example_wise, attack=conadv.fgsm)
  params, model_state = init_model()
  grad_fn = conadv.fast_advprop(example_wise, **fast)
  state = grad_fn.init(params, [])
  with pytest.raises(ValueError, match='needs two examples or more'):
    grad_fn.value_and_grad(params, state, make_batch(0, size=1))
  with pytest.raises(ValueError, match='`has_state=False` says'):
    grad_fn.value_and_grad(
      params, state, make_batch(0), model_state=model_state
    )
  with pytest.raises(TypeError, match='must be floating'):
    grad_fn.value_and_grad(
      params, state, {'image': jnp.ones((8, 5), jnp.uint8)}
    )
  only_augmented, state_augmented = conadv.dual_bn.split(
    params, model_state, branches=('augmented',)
  )
  with_state = conadv.fast_advprop(loss_fn, **fast, has_state=True)
  with pytest.raises(KeyError, match="no branch 'adversarial'"):
    with_state.value_and_grad(
      only_augmented, state, make_batch(0), model_state=state_augmented
    )
