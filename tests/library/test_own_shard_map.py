"""Gradient functions and attacks inside of a `shard_map` of the user's own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from meshes import make_batches, make_mesh

import conadv_optax as conadv


def two_parts(fn):
  return conadv.accumulate(fn, 2)


def every_second(fn):
  return conadv.wrap(fn, attack=conadv.fgsm(0.1), inputs=(), every=2)


def hessian_times_ones(fn):
  def product(w, batch):
    matvec = conadv.hessian.operator(fn, w, batch, micro_batches=2)
    return matvec(jnp.ones_like(w))

  return product


@pytest.mark.parametrize('made', [two_parts, every_second, hessian_times_ones])
def test_loops_and_turns_in_a_shard_map_of_the_users_own(made):
  found = made(lambda w, x: jnp.mean(jnp.tanh(x @ w) ** 2))

  def value(w, x):
    w = w[0]  # One for each device, so that no gradient is a sum over them.
    if made is hessian_times_ones:
      return found(w, x)
    state = found.init(w, [x] * found.staleness)
    return found.value_and_grad(w, state, x)[0][0][None]

  w, x = np.float32([[1, -2, 3, 0]] * 2), make_batches(1)[0]['image']
  each = jax.shard_map(
    value,
    mesh=make_mesh(2),
    in_specs=P('data'),
    out_specs=P('data'),
  )
  expected = [jax.jit(value)(w[:1], half) for half in np.split(x, 2)]
  np.testing.assert_allclose(
    jax.jit(each)(w, x), np.concatenate(expected), rtol=1e-5
  )


def linear(w, batch):
  return jnp.mean(batch['image'] @ w)


def linear_of_all(w, batch):
  return jax.lax.pmean(linear(w, batch), 'data')


MAKERS = {
  'plain': conadv.plain,
  'wrap': functools.partial(conadv.wrap, attack=conadv.fgsm(0.0)),
  'every': functools.partial(conadv.wrap, attack=conadv.fgsm(0.0), every=2),
  'reuse': functools.partial(
    conadv.wrap, attack=conadv.fgsm(0.0), reuse_gradient=True
  ),
  'fast_advprop': functools.partial(
    conadv.fast_advprop, attack=conadv.fgsm(0.0)
  ),
}


@pytest.mark.parametrize('kind', list(MAKERS))
def test_gradients_in_a_shard_map_of_the_users_own(kind):
  """A device's loss has its own gradient, and a loss of all that of all."""
  batch = {'image': jnp.asarray(make_batches(1)[0]['image'])}
  of_halves = np.mean(np.split(batch['image'], 2), axis=1)

  def found(loss, out_specs):
    made = MAKERS[kind](loss)

    def gradient(w, batch):
      state = made.init(w, [batch] * made.staleness)
      grads = made.value_and_grad(w, state, batch)[1]
      return grads[None] if out_specs else grads

    each = jax.shard_map(
      gradient,
      mesh=make_mesh(2),
      in_specs=(P(), P('data')),
      out_specs=out_specs,
    )
    return jax.jit(each)(jnp.ones(4), batch)

  close = {'rtol': 1e-5, 'atol': 1e-6}
  np.testing.assert_allclose(found(linear, P('data')), of_halves, **close)
  np.testing.assert_allclose(
    found(linear_of_all, P()), np.mean(of_halves, axis=0), **close
  )


def test_an_added_leaf_in_a_shard_map_is_of_the_own_examples():
  embedded = jnp.array([[1.0, 1.0], [-1.0, -1.0]])
  noise = conadv.added_leaf('noise', lambda batch: embedded[batch['token']])

  def loss(w, batch):
    return jnp.mean((w[batch['token']] + batch.get('noise', 0.0)) ** 2)

  def crafted(w, batch):
    attack = conadv.fgsm(0.5)
    return conadv.perturb(loss, w, batch, attack=attack, inputs=noise)['noise']

  each = jax.shard_map(
    crafted, mesh=make_mesh(2), in_specs=(P(), P('data')), out_specs=P('data')
  )
  # Away from zero on either device; their sum would not move.
  np.testing.assert_array_equal(
    jax.jit(each)(embedded, {'token': jnp.array([0, 1])}), 0.5 * embedded
  )
