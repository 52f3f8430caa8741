"""Eight devices against one, and against a loop over the shards."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_model, loss_fn, make_batch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import conadv_optax as conadv

DEVICES = 8
KINDS = {
  'advprop': {'staleness': 0},
  'stale': {'staleness': 3},
  'fraction': {'staleness': 1, 'adversarial_fraction': 0.5},
}
CLOSE = {'rtol': 2e-5, 'atol': 2e-6}


def make_grad_fn(kind, attack=None):
  return conadv.wrap(
    loss_fn,
    attack=attack or conadv.fgsm(0.1),
    has_state=True,
    **KINDS[kind],
  )


def make_batches(num=6, size=32):
  return [make_batch(t, size=size) for t in range(num)]


def run(grad_fn, batches, mesh=None):
  """Gradient descent; the last loss, gradients, statistics and states."""
  params, model_state = conadv.dual_bn.split(*init_model())
  if mesh is not None:
    batches = jax.device_put(batches, NamedSharding(mesh, P('data')))
    params, model_state = jax.device_put(
      (params, model_state), NamedSharding(mesh, P())
    )
  tau = grad_fn.staleness
  state = jax.jit(grad_fn.init)(params, batches[:tau], model_state=model_state)

  @jax.jit
  def step(params, state, batch, model_state):
    (loss, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, model_state=model_state
    )
    params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    return (loss, aux.losses, grads, aux.model_state, params), state

  states = [state]
  for batch in batches[tau:]:
    result, state = step(params, state, batch, model_state)
    *_, model_state, params = result
    states.append(state)
  return result, states


def shardings(state):
  return jax.tree.map(lambda x: x.sharding, state)


def assert_shardings_equal(first, second):
  jax.tree.map(
    lambda x, a, b: chex.assert_equal(a.is_equivalent_to(b, x.ndim), True),
    first,
    shardings(first),
    shardings(second),
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'axis_type'),
  [('stale', AxisType.Auto), ('fraction', AxisType.Explicit)],
)
def test_jit_over_a_sharded_batch_is_the_single_device_run(kind, axis_type):
  grad_fn, batches = make_grad_fn(kind), make_batches()
  single, _ = run(grad_fn, batches)
  sharded, states = run(grad_fn, batches, make_mesh(DEVICES, kind=axis_type))
  chex.assert_trees_all_close(sharded, single, **CLOSE)
  assert_shardings_equal(states[0], states[-1])
  if kind != 'fraction':
    image = states[-1].queue.batch['image']
    assert image.addressable_shards[0].data.shape[1] == 32 // DEVICES


def loop_over_shards(grad_fn, batches):
  """The same run, one shard after the other, averaged by hand."""
  params, model_state = conadv.dual_bn.split(*init_model())
  tau, shards = grad_fn.staleness, range(DEVICES)

  def shard(batch, k):
    size = len(batch['label']) // DEVICES
    return jax.tree.map(lambda x: x[k * size : (k + 1) * size], batch)

  batches = jax.tree.map(np.asarray, batches)
  init, step = jax.jit(grad_fn.init), jax.jit(grad_fn.value_and_grad)
  states = [
    init(params, [shard(b, k) for b in batches[:tau]], model_state=model_state)
    for k in shards
  ]
  for batch in batches[tau:]:
    rows = []
    for k in shards:
      (loss, aux), grads, states[k] = step(
        params, states[k], shard(batch, k), model_state=model_state
      )
      rows.append((loss, aux.losses, grads, aux.model_state))
    mean = jax.tree.map(lambda *xs: np.mean(np.stack(xs), axis=0), *rows)
    params = jax.tree.map(lambda w, g: w - np.float32(0.1) * g, params, mean[2])
    model_state = mean[3]
  return (*mean, params)


@pytest.mark.slow
@pytest.mark.parametrize('kind', ['advprop', 'stale'])
def test_data_parallel_is_a_loop_over_the_shards(kind):
  grad_fn = make_grad_fn(kind)
  expected = loop_over_shards(grad_fn, make_batches())
  # What an explicit mesh changes does not depend on the kind.
  axis_types = [AxisType.Auto, AxisType.Explicit][: 1 + (kind == 'stale')]
  for axis_type in axis_types:
    parallel = conadv.data_parallel(grad_fn, make_mesh(DEVICES, kind=axis_type))
    assert parallel.staleness == grad_fn.staleness
    result, states = run(parallel, make_batches())
    chex.assert_trees_all_close(result, expected, **CLOSE)
    assert_shardings_equal(states[0], states[-1])
    for leaf in jax.tree.leaves(states[-1].queue):
      assert leaf.sharding.spec[1] == 'data'
      assert (
        leaf.addressable_shards[0].data.shape[1] == leaf.shape[1] // DEVICES
      )


@pytest.mark.slow
def test_data_parallel_statistics_are_not_those_of_the_whole_batch():
  # Otherwise the test above could not tell the two apart.
  batches = make_batches(2)
  grad_fn = make_grad_fn('advprop')
  parallel, _ = run(conadv.data_parallel(grad_fn, make_mesh(DEVICES)), batches)
  whole, _ = run(grad_fn, batches)
  assert abs(float(parallel[0] - whole[0])) > 1e-3


def test_runs_without_jit_too():
  # Every operation is a program of its own here, so the model is one of few.
  grad_fn = conadv.data_parallel(
    conadv.wrap(
      lambda w, batch: jnp.mean((w * batch['x']) ** 2),
      attack=conadv.fgsm(0.1),
      inputs='x',
    ),
    make_mesh(DEVICES),
  )
  w, first, second = (
    jnp.float32(2),
    *({'x': jnp.arange(16.0) + t} for t in range(2)),
  )
  state = grad_fn.init(w, [first])
  eager = grad_fn.value_and_grad(w, state, second)
  jitted = jax.jit(grad_fn.value_and_grad)(w, state, second)
  chex.assert_trees_all_close(eager, jitted, **CLOSE)


def test_each_device_draws_its_own_key():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(w * batch['x']),
    1,
    attack=conadv.Attack(lambda key, grad, x: x + jax.random.uniform(key)),
    inputs='x',
  )
  parallel = conadv.data_parallel(grad_fn, make_mesh(DEVICES))
  state = parallel.init(
    jnp.ones([]), [{'x': jnp.zeros(16)}], key=jax.random.key(0)
  )
  draws = np.asarray(state.queue.adversarial).reshape(DEVICES, 2)
  assert len(np.unique(draws[:, 0])) == DEVICES


def test_users_aux_is_averaged_summed_or_put_together():
  def with_aux(w, batch):
    aux = {
      'mean': jnp.mean(batch['x']),
      'count': jnp.sum(batch['x'] > 3),
      'any': jnp.any(batch['x'] > 3),
      'rate': 0.1,
      'each': batch['x'] * 2,
    }
    return jnp.mean(w * batch['x']), aux

  grad_fn = conadv.data_parallel(
    conadv.wrap(with_aux, 0, attack=conadv.fgsm(0.0), inputs='x', has_aux=True),
    make_mesh(DEVICES),
  )
  x = jnp.arange(16.0)
  (_, aux), _, _ = jax.jit(grad_fn.value_and_grad)(
    jnp.ones([]), grad_fn.init(jnp.ones([]), []), {'x': x}
  )
  chex.assert_trees_all_close(
    aux.aux['main'],
    {
      'mean': jnp.mean(x),
      'count': jnp.sum(x > 3),
      # Of two numbers a device, none of the first two has one above 3.
      'any': jnp.int32(6),
      'rate': jnp.float32(0.1),
      'each': 2 * x,
    },
  )


def test_counters_in_the_model_state_keep_their_value_and_dtype():
  def counting(w, model_state, batch):
    return jnp.mean(w * batch['x']), {'calls': model_state['calls'] + 1}

  grad_fn = conadv.data_parallel(
    conadv.wrap(
      counting, 0, attack=conadv.fgsm(0.0), inputs='x', has_state=True
    ),
    make_mesh(DEVICES),
  )
  (_, aux), _, _ = grad_fn.value_and_grad(
    jnp.ones([]),
    grad_fn.init(jnp.ones([]), []),
    {'x': jnp.ones(8)},
    model_state={'calls': jnp.int32(3)},
  )
  chex.assert_trees_all_equal(aux.model_state, {'calls': jnp.int32(4)})


def test_the_mean_is_taken_in_float32():
  # The sum of the eight is beyond float16.
  def loss(w, model_state, x):
    return jnp.mean(w * x), {'mean': jnp.mean(x)}

  grad_fn = conadv.data_parallel(
    conadv.plain(loss, has_state=True), make_mesh(DEVICES)
  )
  w = jnp.ones([], jnp.float16)
  (_, aux), grads, _ = jax.jit(grad_fn.value_and_grad)(
    w,
    grad_fn.init(w, []),
    jnp.full(8, 1e4, jnp.float16),
    model_state={'mean': jnp.zeros([], jnp.float16)},
  )
  expected = jnp.float16(1e4)
  chex.assert_trees_all_equal_dtypes((grads, aux.model_state['mean']), (w, w))
  chex.assert_trees_all_close(
    (grads, aux.model_state), (expected, {'mean': expected}), rtol=1e-3
  )


@pytest.mark.parametrize('size', [4, 12, 0])
def test_a_batch_that_the_devices_do_not_divide_is_an_error(size):
  grad_fn = conadv.data_parallel(make_grad_fn('fraction'), make_mesh(DEVICES))
  params, model_state = init_model()
  with pytest.raises(ValueError, match='multiple of the 8 devices'):
    grad_fn.init(params, [make_batch(0, size=size)], model_state=model_state)


def test_an_axis_that_the_mesh_does_not_have_is_an_error():
  with pytest.raises(ValueError, match="axis='batch'"):
    conadv.data_parallel(
      make_grad_fn('stale'), make_mesh(DEVICES), axis='batch'
    )
