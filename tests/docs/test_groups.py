"""Each row of the table of groups, by the variance within the groups."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conadv_optax as conadv

PAGE = (Path(__file__).parents[2] / 'docs' / 'scaling.md').read_text()
TABLE = PAGE.split('## Which examples share a BatchNorm')[1].split('\n\n')[2]
X = np.random.default_rng(0).normal(size=48).astype(np.float32)
NUMBERS = np.arange(48)


def devices(grad_fn):
  return conadv.data_parallel(grad_fn, jax.make_mesh((8,), ('data',)))


def micro_batches(grad_fn):
  return conadv.accumulate(grad_fn, 3)


def both(grad_fn):
  return devices(micro_batches(grad_fn))


def roles(grad_fn):
  return conadv.concurrent(grad_fn, jax.make_mesh((2, 4), ('data', 'role')))


# By row: the wrapper, what the mean is taken over, and the groups, each a row
# of numbers of examples.
ROWS = [
  (lambda grad_fn: grad_fn, {}, NUMBERS[None]),
  (devices, {}, NUMBERS.reshape(8, 6)),
  (devices, {'axis_name': 'data'}, NUMBERS[None]),
  (
    devices,
    {
      'axis_name': 'data',
      'axis_index_groups': [[0, 1], [2, 3], [4, 5], [6, 7]],
    },
    NUMBERS.reshape(4, 12),
  ),
  (micro_batches, {}, NUMBERS.reshape(16, 3).T),
  (both, {}, NUMBERS.reshape(8, 2, 3).swapaxes(1, 2).reshape(24, 2)),
  (
    both,
    {'axis_name': 'data'},
    NUMBERS.reshape(8, 2, 3).transpose(2, 0, 1).reshape(3, 16),
  ),
  (roles, {}, NUMBERS.reshape(6, 8)),
  (
    roles,
    {'axis_name': 'data'},
    NUMBERS.reshape(2, 3, 8).swapaxes(0, 1).reshape(3, 16),
  ),
]


def test_every_row_is_here():
  assert len(re.findall(r'^\| .*$', TABLE, re.M)) == len(ROWS) + 1


@pytest.mark.parametrize(('wrapper', 'over', 'groups'), ROWS)
def test_the_group_of_a_row(wrapper, over, groups):
  def loss_fn(w, x):
    mean = jnp.mean(x)
    if over:
      mean = jax.lax.pmean(mean, **over)
    return w * jnp.mean((x - mean) ** 2)

  grad_fn = wrapper(conadv.wrap(loss_fn, attack=conadv.fgsm(0.0), inputs=()))
  w = jnp.array(1.0)
  state = grad_fn.init(w, [X])
  (_, aux), grads, _ = jax.jit(grad_fn.value_and_grad)(w, state, X)
  expected = np.mean(np.var(X[groups], axis=1))
  np.testing.assert_allclose([aux.losses['main'], grads], expected, rtol=1e-5)
