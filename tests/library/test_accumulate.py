"""Micro-batches on one device against as many devices, and a loop by hand."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import in_parts, init_model, loss_fn, make_batch
from meshes import make_mesh

import conadv_optax as conadv

COUNT = 8
KINDS = {
  'stale': {'staleness': 2, 'adversarial_fraction': 0.5},
  'reuse': {'staleness': 1, 'reuse_gradient': True},
}
CLOSE = {'rtol': 2e-5, 'atol': 2e-6}


def make_grad_fn(kind):
  # The random start shows whether each group draws what its device would.
  return conadv.wrap(
    loss_fn,
    attack=conadv.pgd(0.1, random_start=kind != 'reuse'),
    has_state=True,
    **KINDS[kind],
  )


def run(grad_fn, *, steps=4, size=32, branched=True, parts=1):
  """Losses, gradients, statistics, parameters and state after some steps."""
  params, model_state = init_model()
  if branched:
    params, model_state = conadv.dual_bn.split(params, model_state)
  batches = [
    in_parts(make_batch(t, size=size), parts) for t in range(steps + 2)
  ]
  tau = grad_fn.staleness
  state = jax.jit(grad_fn.init)(
    params, batches[:tau], model_state=model_state, key=jax.random.key(0)
  )

  @jax.jit
  def step(params, state, batch, model_state):
    (loss, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, model_state=model_state, key=jax.random.key(1)
    )
    params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    return (loss, aux.losses, grads, aux.model_state, params), state

  for batch in batches[tau:]:
    result, state = step(params, state, batch, model_state)
    *_, model_state, params = result
  return result, state


@pytest.mark.slow
@pytest.mark.parametrize('kind', list(KINDS))
def test_micro_batches_are_devices(kind):
  grad_fn = make_grad_fn(kind)
  one, state = run(conadv.accumulate(grad_fn, COUNT))
  many, on_devices = run(
    conadv.data_parallel(grad_fn, make_mesh(COUNT)), parts=COUNT
  )
  chex.assert_trees_all_close(one, many, **CLOSE)
  rings = jax.tree.map(
    lambda x: jnp.stack([in_parts(entry, COUNT) for entry in x]), state.queue
  )
  chex.assert_trees_all_close(rings, on_devices.queue, **CLOSE)
  chex.assert_trees_all_equal(state.slot, on_devices.slot)


@pytest.mark.slow
def test_unrolled_micro_batches_are_those_of_the_loop():
  grad_fn = make_grad_fn('stale')
  loop, state = run(conadv.accumulate(grad_fn, 4))
  unrolled, other = run(conadv.accumulate(grad_fn, 4, unroll=True))
  chex.assert_trees_all_close(loop, unrolled, **CLOSE)
  chex.assert_trees_all_close(state, other, **CLOSE)

  params, model_state = init_model()
  plain = conadv.plain(loss_fn, has_state=True)
  for unroll in (False, True):
    of_four = conadv.accumulate(plain, 4, unroll=unroll)
    state = of_four.init(params, [], model_state=model_state)
    lowered = jax.jit(of_four.value_and_grad).lower(
      params, state, make_batch(0, size=32), model_state=model_state
    )
    assert ('stablehlo.while' in lowered.as_text()) != unroll


@pytest.mark.slow
def test_micro_batches_on_devices_are_as_many_groups():
  loss = conadv.plain(loss_fn, has_state=True)
  both, _ = run(
    conadv.data_parallel(conadv.accumulate(loss, 4), make_mesh(2)),
    branched=False,
    parts=2,
  )
  one, _ = run(conadv.accumulate(loss, 8), branched=False)
  chex.assert_trees_all_close(both, one, **CLOSE)
  # Otherwise this could not tell groups from the whole.
  whole, _ = run(loss, branched=False)
  assert abs(float(one[0] - whole[0])) > 1e-3


def gradients_of_groups(batch, groups):
  params, model_state = init_model()
  gradient = jax.jit(jax.grad(lambda *args: loss_fn(*args)[0]))
  parts = [
    jax.tree.map(lambda x, k=k: np.split(np.asarray(x), groups)[k], batch)
    for k in range(groups)
  ]
  return [gradient(params, model_state, part) for part in parts]


@pytest.mark.parametrize('where', ['micro-batches', 'devices', 'both'])
def test_the_second_moment_is_that_of_the_groups(where):
  loss = conadv.plain(loss_fn, has_state=True)
  grad_fn = {
    'micro-batches': lambda: conadv.accumulate(loss, 8, second_moment=True),
    'devices': lambda: conadv.data_parallel(
      loss, make_mesh(COUNT), second_moment=True
    ),
    'both': lambda: conadv.data_parallel(
      conadv.accumulate(loss, 4, second_moment=True), make_mesh(2)
    ),
  }[where]()
  params, model_state = init_model()
  # Micro-batches of a whole, or of each half, are every so many examples of it.
  batch = make_batch(0, size=32)
  dealt = {
    'micro-batches': in_parts(batch, 8),
    'devices': batch,
    'both': jax.tree.map(
      lambda *halves: jnp.concatenate(halves),
      *(
        in_parts(jax.tree.map(lambda x, i=i: x[i : i + 16], batch), 4)
        for i in (0, 16)
      ),
    ),
  }[where]
  (_, aux), _, _ = jax.jit(grad_fn.value_and_grad)(
    params, grad_fn.init(params, []), batch, model_state=model_state
  )
  expected = jax.tree.map(
    lambda *g: np.mean(np.square(np.stack(g)), axis=0),
    *gradients_of_groups(dealt, 8),
  )
  chex.assert_trees_all_close(aux.second_moment, expected, **CLOSE)


def test_the_mean_is_taken_in_float32():
  # In bfloat16 the sum of 1 and of 255 times 2 ** -8 would stay 1.
  grad_fn = conadv.accumulate(conadv.plain(lambda w, x: jnp.mean(w * x)), 256)
  w = jnp.ones([], jnp.bfloat16)
  x = jnp.full(256, 2.0**-8, jnp.bfloat16).at[0].set(1.0)
  _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), x)
  chex.assert_type(grads, jnp.bfloat16)
  expected = (1 + 255 * 2**-8) / 256
  np.testing.assert_allclose(float(grads), expected, rtol=2**-8)


def test_users_aux_is_averaged_summed_or_put_together():
  def with_aux(w, model_state, x):
    aux = {
      'mean': jnp.mean(x),
      'count': jnp.sum(x > 3, dtype=jnp.int32),
      'any': jnp.any(x > 3),
      'rate': 0.1,
      'each': x * 2,
    }
    calls = {'calls': model_state['calls'] + 1}
    return jnp.mean(w * x), (calls, aux)

  grad_fn = conadv.accumulate(
    conadv.plain(with_aux, has_state=True, has_aux=True), 4
  )
  w, x = jnp.ones([]), jnp.arange(16.0)
  (_, aux), _, _ = grad_fn.value_and_grad(
    w, grad_fn.init(w, []), x, model_state={'calls': jnp.int32(3)}
  )
  chex.assert_trees_all_close(
    aux.aux['main'],
    {
      'mean': jnp.mean(x),
      'count': jnp.int32(12),
      # Each of the four micro-batches has a number above 3.
      'any': jnp.int32(4),
      'rate': jnp.float32(0.1),
      'each': 2 * x,
    },
  )
  # As on devices, each group counts one call.
  chex.assert_trees_all_equal(aux.model_state, {'calls': jnp.int32(4)})


@pytest.mark.parametrize('kind', ['devices', 'micro-batches'])
def test_each_group_keeps_its_own_part_of_a_state(kind):
  """A gradient function that adds up its inputs, group by group."""

  def init(params, first_batches, *, model_state=None, key=None):
    return {'sum': conadv.PerGroup(jnp.zeros([])), 'steps': jnp.int32(0)}

  def value_and_grad(params, state, batch, *, model_state=None, key=None):
    own = conadv.PerGroup(state['sum'].value + jnp.sum(batch))
    aux = conadv.ConAdvAux({'main': own.value}, None, None)
    new = {'sum': own, 'steps': state['steps'] + 1}
    return (own.value, aux), params, new

  grad_fn = conadv.GradientFunction(init, value_and_grad, 0)
  if kind == 'devices':
    grad_fn = conadv.data_parallel(grad_fn, make_mesh(4))
  else:
    grad_fn = conadv.accumulate(grad_fn, 4)
  x = jnp.arange(8.0)
  state = grad_fn.init(jnp.ones([]), [])
  for _ in range(3):
    (loss, _), _, state = jax.jit(grad_fn.value_and_grad)(
      jnp.ones([]), state, x
    )
  shares = np.arange(8.0).reshape(4, 2)
  if kind == 'micro-batches':
    shares = np.arange(8.0).reshape(2, 4).T
  expected = 3 * shares.sum(axis=1)
  np.testing.assert_array_equal(state['sum'].value, expected)
  assert int(state['steps']) == 3
  np.testing.assert_allclose(loss, expected.mean())


def test_memory_does_not_grow_with_the_count():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(jnp.tanh(jnp.tanh(batch['x'] @ w) @ w) ** 2),
    1,
    attack=conadv.fgsm(0.1),
    inputs='x',
  )
  w = jnp.ones((64, 64))

  def temporary_bytes(count):
    accumulated = conadv.accumulate(grad_fn, count)
    batch = {'x': jax.ShapeDtypeStruct((128 * count, 64), jnp.float32)}
    state = jax.eval_shape(accumulated.init, w, [batch])
    compiled = (
      jax.jit(accumulated.value_and_grad, donate_argnums=1)
      .lower(w, state, batch)
      .compile()
    )
    return compiled.memory_analysis().temp_size_in_bytes

  assert temporary_bytes(32) <= 1.05 * temporary_bytes(2)


@pytest.mark.parametrize('size', [4, 12, 0])
def test_a_batch_that_the_count_does_not_divide_is_an_error(size):
  grad_fn = conadv.accumulate(make_grad_fn('reuse'), 8)
  params, model_state = init_model()
  with pytest.raises(ValueError, match='multiple of the 8 micro-batches'):
    grad_fn.init(
      params,
      [make_batch(0, size=size)],
      model_state=model_state,
      key=jax.random.key(0),
    )


@pytest.mark.parametrize('count', [0, -1])
def test_a_count_below_one_is_an_error(count):
  with pytest.raises(ValueError, match='at least 1'):
    conadv.accumulate(make_grad_fn('stale'), count)


@pytest.mark.parametrize('count', [2.0, True, '2'])
def test_a_count_that_is_no_int_is_an_error(count):
  with pytest.raises(TypeError, match='Python int'):
    conadv.accumulate(make_grad_fn('stale'), count)


def test_a_second_moment_of_both_groups_is_an_error():
  inner = conadv.accumulate(
    conadv.plain(lambda w, x: jnp.mean(w * x)), 2, second_moment=True
  )
  grad_fn = conadv.data_parallel(inner, make_mesh(2), second_moment=True)
  w = jnp.ones([])
  with pytest.raises(ValueError, match='one kind of group'):
    grad_fn.value_and_grad(w, grad_fn.init(w, []), jnp.ones(8))
