"""What `wrap` promises beside Algorithm 1: reductions, branches, keys."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from helpers import init_model, loss_fn, make_batch, naive_attack, plain_step
from jax.sharding import AxisType

import conadv_optax as conadv

EPSILON = 0.1


def parameters_as_perturbation():
  """An attack that adds the parameter of the moment to each input.

  For a loss mean(w * x) the gradient of example i is w / batch.
  """

  def craft(key, gradient_fn, inputs):
    del key
    return inputs + inputs.shape[0] * gradient_fn(inputs)

  return conadv.Attack(craft, draws=False)


@functools.cache
def compiled_copies(tau):
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(w * batch['x']),
    tau,
    attack=parameters_as_perturbation(),
    inputs='x',
  )
  return jax.jit(grad_fn.init), jax.jit(grad_fn.value_and_grad)


@pytest.mark.parametrize(
  ('tau', 'size'), [(0, 3), (1, 1), (2, 3), (3, 1), (5, 3)]
)
def test_the_copy_is_tau_steps_old_whatever_tau(tau, size):
  init, step = compiled_copies(tau)
  steps = 2 * tau + 3
  weight = [np.float32(2**t) for t in range(steps)]
  batches = [
    {'x': np.full(size, 100 * t, np.float32)} for t in range(steps + tau)
  ]
  state = init(weight[0], batches[:tau])
  for t in range(steps):
    (_, aux), _, state = step(weight[t], state, batches[t + tau])
    crafted_with = weight[max(t - tau, 0)]
    chex.assert_trees_all_close(
      aux.losses,
      {
        'main': weight[t] * 100 * t,
        'adversarial': weight[t] * (100 * t + crafted_with),
      },
      rtol=1e-6,
    )


def one_step(batch, **kwargs):
  params, model_state = init_model()
  grad_fn = conadv.wrap(loss_fn, 0, has_state=True, **kwargs)
  state = grad_fn.init(params, [])
  return jax.jit(grad_fn.value_and_grad)(
    params, state, batch, model_state=model_state
  )


def test_a_weakly_typed_batch_compiles_once():
  init, step = compiled_copies(1)
  batch = {'x': jnp.full(2, 3.0)}
  assert batch['x'].weak_type
  w, before = jnp.float32(1), step._cache_size()
  state = init(w, [batch])
  for _ in range(2):
    _, _, state = step(w, state, batch)
  assert step._cache_size() == before + 1


def test_weights_one_and_zero_are_the_plain_step():
  batch = make_batch(0)
  (loss, aux), grads, _ = one_step(
    batch,
    attack=conadv.fgsm(EPSILON),
    weights={'main': 1.0, 'adversarial': 0.0},
  )
  (plain, model_state), plain_grads = plain_step(*init_model(), batch)
  chex.assert_trees_all_equal(loss, plain)
  chex.assert_trees_all_close(grads, plain_grads, rtol=1e-6, atol=1e-7)
  chex.assert_trees_all_equal(aux.model_state, model_state)


def test_a_branch_of_weight_zero_adds_not_even_a_nan():
  attack = conadv.Attack(lambda key, grad, x: x * jnp.nan, draws=False)
  batch = make_batch(0)
  (loss, aux), grads, _ = one_step(
    batch, attack=attack, weights={'main': 1.0, 'adversarial': 0.0}
  )
  assert np.isnan(aux.losses['adversarial'])
  (plain, _), plain_grads = plain_step(*init_model(), batch)
  chex.assert_trees_all_equal(loss, plain)
  chex.assert_trees_all_close(grads, plain_grads, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_epsilon_zero_counts_every_example_twice(norm):
  batch = make_batch(0)
  (loss, _), grads, _ = one_step(
    batch, attack=conadv.pgd(0.0, norm=norm, random_start=False)
  )
  doubled = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
  (plain, _), plain_grads = plain_step(*init_model(), doubled)
  chex.assert_trees_all_close(loss, plain, rtol=1e-6)
  chex.assert_trees_all_close(grads, plain_grads, rtol=1e-5, atol=1e-6)


def test_staleness_zero_is_the_advprop_step():
  batch = make_batch(0)
  params, model_state = init_model()
  split, split_state = conadv.dual_bn.split(params, model_state)
  grad_fn = conadv.wrap(loss_fn, 0, attack=conadv.fgsm(EPSILON), has_state=True)
  _, grads, _ = jax.jit(grad_fn.value_and_grad)(
    split, grad_fn.init(split, []), batch, model_state=split_state
  )
  shared = {k: v for k, v in params.items() if k != 'norm'}
  adversarial = naive_attack(params['norm'], shared, batch, epsilon=EPSILON)
  clean_grads, adv_grads = (
    plain_step(params, model_state, b)[1] for b in (batch, adversarial)
  )
  half = jax.tree.map(lambda a, b: (a + b) / 2, clean_grads, adv_grads)
  norm = conadv.dual_bn.select(grads, 'adversarial')['norm']
  close = {'rtol': 1e-5, 'atol': 1e-6}
  chex.assert_trees_all_close(grads.main['head'], half['head'], **close)
  chex.assert_trees_all_close(grads.main['dense'], half['dense'], **close)
  chex.assert_trees_all_close(
    norm, jax.tree.map(lambda g: g / 2, adv_grads['norm']), **close
  )
  chex.assert_trees_all_close(
    grads.main['norm'],
    jax.tree.map(lambda g: g / 2, clean_grads['norm']),
    **close,
  )


@pytest.mark.parametrize(
  ('fraction', 'size', 'count', 'reuse'),
  [
    (0.2, 16, 3, False),
    (0.01, 5, 1, False),
    (0.999, 4, 3, False),
    (0.5, 7, 3, True),
  ],
)
def test_fraction_is_the_mean_over_the_first_part(fraction, size, count, reuse):
  batches = [make_batch(t, size=size) for t in range(3)]
  params, model_state = init_model()
  attack = conadv.fgsm(EPSILON)
  kwargs = {'attack': attack, 'has_state': True, 'reuse_gradient': reuse}
  part = conadv.wrap(loss_fn, 1, adversarial_fraction=fraction, **kwargs)
  init = jax.jit(part.init)
  state = init(params, batches[:1], model_state=model_state)
  step = jax.jit(part.value_and_grad)
  for batch in batches[1:]:
    queued = state.queue
    if reuse:
      expected = jax.tree.map(lambda x: x[0], queued.batch)
    else:
      expected = jax.tree.map(lambda x: x[0][:count], queued.batch)
      expected['image'] = queued.adversarial[0]
    chex.assert_tree_shape_prefix(expected, (count,))
    (_, aux), _, state = step(params, state, batch, model_state=model_state)
    chex.assert_trees_all_close(
      aux.losses['adversarial'],
      plain_step(params, model_state, expected)[0][0],
      rtol=1e-6,
    )
  # The attack saw the first part alone, in its own batch statistics; a reused
  # gradient is that of the whole clean batch.
  source = (
    batches[-1] if reuse else jax.tree.map(lambda x: x[:count], batches[-1])
  )
  shared = {k: v for k, v in params.items() if k != 'norm'}
  naive = naive_attack(params['norm'], shared, source, epsilon=EPSILON)
  made = state.queue.batch['image'] if reuse else state.queue.adversarial
  chex.assert_trees_all_close(made[0], naive['image'][:count], rtol=1e-6)


@pytest.mark.parametrize('kind', ['wrap', 'fast_advprop'])
def test_passes_run_one_at_a_time(kind):
  """A barrier before each pass: the compiler may not interleave them.

  One pass waits for the copy, the others for the loss, where there is one to
  wait for, and for all gradients of the pass before.
  """
  batch = make_batch(0)
  batch['view'] = batch['image']
  params, model_state = init_model()
  options = {'attack': conadv.fgsm(EPSILON), 'has_state': True}
  grad_fn = {
    'wrap': lambda: conadv.wrap(
      loss_fn, 1, extra_branches={'augmented': 'view'}, **options
    ),
    'fast_advprop': lambda: conadv.fast_advprop(loss_fn, **options),
  }[kind]()
  first = [batch] * grad_fn.staleness
  state = grad_fn.init(params, first, model_state=model_state)
  jaxpr = jax.make_jaxpr(grad_fn.value_and_grad)(
    params, state, batch, model_state=model_state
  )
  barriers = [
    eqn for eqn in jaxpr.eqns if eqn.primitive.name == 'optimization_barrier'
  ]
  count = len(jax.tree.leaves(params))
  waited_for = [len(eqn.invars) - count for eqn in barriers]
  assert (
    waited_for
    == {
      'wrap': [1, 1 + count, 1 + count],
      'fast_advprop': [count, count],
    }[kind]
  )


@pytest.mark.slow
@pytest.mark.parametrize(('tau', 'fraction'), [(0, 1.0), (1, 0.5)])
def test_the_passes_alone_are_the_step(tau, fraction):
  params, model_state = conadv.dual_bn.split(*init_model())
  grad_fn = conadv.wrap(
    loss_fn,
    tau,
    attack=conadv.pgd(EPSILON),
    adversarial_fraction=fraction,
    has_state=True,
  )
  key, batch = jax.random.key(0), make_batch(1)
  first = [make_batch(0)] * tau
  init = jax.jit(grad_fn.init)
  state = init(params, first, model_state=model_state, key=key)
  expected = jax.jit(grad_fn.value_and_grad)(
    params, state, batch, model_state=model_state, key=key
  )
  passes = grad_fn.passes
  chex.assert_trees_all_equal(
    passes.clean(batch), batch['image'][: int(16 * fraction)]
  )
  crafted = jax.jit(passes.craft)(params, model_state, batch, key)
  if tau:
    waiting = jax.tree.map(lambda x: x[0], state.queue)
    chex.assert_trees_all_close(
      crafted, expected[-1].queue.adversarial[0], rtol=1e-6
    )
  else:
    waiting = conadv.Queue(batch, crafted)
  alone = jax.jit(passes.train)(params, model_state, waiting, key)
  chex.assert_trees_all_close(alone, expected[:-1], rtol=1e-5, atol=1e-7)


def test_a_reused_gradient_has_no_passes_of_its_own():
  grad_fn = conadv.wrap(
    loss_fn, attack=conadv.fgsm(EPSILON), has_state=True, reuse_gradient=True
  )
  assert grad_fn.passes is None


def test_default_attack_is_the_published_radius():
  grad_fn = conadv.wrap(lambda w, b: jnp.mean(w * b['image']), staleness=1)
  params, batch = jnp.ones(64), {'image': jnp.zeros(64)}
  state = grad_fn.init(params, [batch], key=jax.random.key(0))
  adversarial = np.asarray(state.queue.adversarial)
  np.testing.assert_allclose(np.max(adversarial), 18 / 255, rtol=1e-6)
  reused = conadv.wrap(
    lambda w, b: jnp.mean(w * b['image']), staleness=1, reuse_gradient=True
  )
  state = reused.init(params, [batch])
  np.testing.assert_allclose(state.queue.batch['image'], 18 / 255, rtol=1e-6)


def test_ten_thousand_steps_neither_recompile_nor_grow():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean((batch['x'] - w) ** 2),
    3,
    attack=conadv.fgsm(0.1),
    inputs='x',
  )
  x = jnp.linspace(-1.0, 1.0, 8)
  params = jnp.zeros(8)
  state = grad_fn.init(params, [{'x': x}] * 3)

  @jax.jit
  @chex.assert_max_traces(n=1)
  def thousand(params, state):
    def body(carry, t):
      params, state = carry
      batch = {'x': x + t.astype(jnp.float32)}
      (loss, _), grads, state = grad_fn.value_and_grad(params, state, batch)
      return (params - 0.5 * grads, state), loss

    return jax.lax.scan(body, (params, state), jnp.arange(1000))

  for _ in range(10):
    (params, new), losses = thousand(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    state = new
    assert np.all(np.isfinite(losses))
  assert int(state.slot) == 10_000 % 3


@pytest.mark.parametrize('kind', ['wrap', 'accumulate', 'data_parallel'])
def test_the_queue_may_lie_in_the_memory_of_the_host(kind):
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(jnp.tanh(batch['image'] @ w) ** 2),
    2,
    attack=conadv.fgsm(0.1),
  )
  if kind == 'accumulate':
    grad_fn = conadv.accumulate(grad_fn, 2)
  if kind == 'data_parallel':
    mesh = jax.make_mesh((8,), ('data',), (AxisType.Auto,))
    grad_fn = conadv.data_parallel(grad_fn, mesh)
  w = np.arange(5, dtype=np.float32)
  batches = [make_batch(t) for t in range(5)]
  init = jax.jit(grad_fn.init)

  def run(memory_kind):
    def move(x, kind=memory_kind):
      return jax.device_put(x, x.sharding.with_memory_kind(kind))

    state = init(w, batches[:2])
    state = state._replace(queue=jax.tree.map(move, state.queue))
    shardings = jax.tree.map(lambda x: x.sharding, state)
    step = jax.jit(
      grad_fn.value_and_grad,
      donate_argnums=1,
      out_shardings=(None, None, shardings),
    )
    results = []
    for batch in batches[2:]:
      (loss, _), grads, state = step(w, state, batch)
      results.append((loss, grads))
    for leaf in jax.tree.leaves(state.queue):
      assert leaf.sharding.memory_kind == memory_kind
    return results, jax.tree.map(lambda x: move(x, 'device'), state)

  chex.assert_trees_all_close(run('pinned_host'), run('device'), rtol=1e-6)


@pytest.mark.parametrize(('staleness', 'held'), [(1, 3), (0, 3), (1, 0)])
def test_a_state_of_another_staleness(staleness, held):
  params, model_state = init_model()

  def make(tau):
    return conadv.wrap(loss_fn, tau, attack=conadv.fgsm(0.1), has_state=True)

  def both():
    state = make(held).init(
      params, [make_batch(t) for t in range(held)], model_state=model_state
    )
    return make(staleness).value_and_grad(
      params, state, make_batch(9), model_state=model_state
    )

  with pytest.raises(ValueError) as error:
    jax.eval_shape(both)
  assert_says(
    error,
    f'staleness={staleness}',
    f'holds {held}',
    'restore all but the state',
    '`state = grad_fn.init(params, ',
  )
