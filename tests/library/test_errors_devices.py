"""Wrong meshes, and wrong batches for them, are told at trace time."""

import jax
import pytest
from error_checks import assert_says, call, wrap
from helpers import init_model, loss_fn, make_batch
from jax.sharding import AxisType
from meshes import make_mesh

import conadv_optax as conadv


@pytest.mark.parametrize('attackers', [0, -1, 3, 4, 1.5])
def test_rows_without_attackers_or_with_too_few_trainers(attackers):
  with pytest.raises(ValueError) as error:
    conadv.concurrent(wrap(), make_mesh(1, 4), attackers=attackers)
  assert_says(
    error, f'attackers={attackers}', 'rows of 4 devices', '`attackers=1`'
  )


@pytest.mark.parametrize(
  ('names', 'kwargs'),
  [
    (('data',), {}),
    (('data', 'roles'), {}),
    (('data', 'role'), {'role_axis': 'data'}),
    (('data', 'role'), {'data_axis': 'batch'}),
  ],
)
def test_a_mesh_without_roles(names, kwargs):
  with pytest.raises(ValueError) as error:
    conadv.concurrent(
      wrap(), make_mesh(*(2, 4)[: len(names)], names=names), **kwargs
    )
  assert_says(error, 'two axes', str(names), "('data', 'role'))`")


def test_a_third_axis_has_no_role():
  mesh = jax.make_mesh(
    (1, 2, 2),
    ('data', 'role', 'model'),
    (AxisType.Auto,) * 3,
    devices=jax.devices()[:4],
  )
  with pytest.raises(ValueError, match='two axes'):
    conadv.concurrent(wrap(), mesh)


def test_an_attack_that_cannot_be_moved():
  mesh = make_mesh(1, 4)
  with pytest.raises(ValueError) as error:
    conadv.concurrent(wrap(reuse_gradient=True), mesh)
  assert_says(error, 'attack pass', '`reuse_gradient=False`')
  joined = conadv.data_parallel(wrap(), mesh)
  with pytest.raises(ValueError, match='`data_parallel` has joined them'):
    conadv.concurrent(joined, mesh)
  with pytest.raises(ValueError) as error:
    conadv.concurrent(wrap(0), mesh)
  assert_says(error, 'staleness 0', 'staleness=1')
  with pytest.raises(TypeError) as error:
    conadv.concurrent(loss_fn, mesh)
  assert_says(error, 'function', 'conadv.concurrent(conadv.wrap(loss_fn')


@pytest.mark.parametrize('size', [0, 4, 16])
def test_a_batch_that_the_trainers_do_not_divide(size):
  grad_fn = conadv.concurrent(wrap(), make_mesh(2, 4))
  batch = make_batch(0, size=size)
  with pytest.raises(ValueError) as error:
    call(grad_fn, batch, [batch])
  assert_says(error, 'multiple of the 6 trainers', 'image', 'drop or pad')


@pytest.mark.parametrize(
  'spread',
  [
    lambda grad_fn: conadv.concurrent(grad_fn, make_mesh(1, 4)),
    lambda grad_fn: conadv.data_parallel(grad_fn, make_mesh(4)),
    lambda grad_fn: conadv.accumulate(grad_fn, 4),
  ],
  ids=['concurrent', 'data_parallel', 'accumulate'],
)
def test_what_is_no_list_of_batches_or_a_state_of_another_staleness(spread):
  params, model_state = init_model()
  batch, state = make_batch(0, size=12), conadv.ConAdvState((), ())
  grad_fn = spread(wrap())
  with pytest.raises(TypeError) as error:
    grad_fn.init(params, batch, model_state=model_state)
  assert_says(error, 'must be a list', 'dict', 'grad_fn.init(params, [batch])')
  with pytest.raises(ValueError) as error:
    grad_fn.value_and_grad(params, state, batch, model_state=model_state)
  assert_says(error, 'staleness=1', 'holds 0', 'restore all but the state')


def test_a_later_batch_of_another_size_for_the_trainers():
  grad_fn = conadv.concurrent(wrap(), make_mesh(1, 4))
  with pytest.raises(ValueError) as error:
    call(grad_fn, make_batch(1, size=12), [make_batch(0, size=6)])
  assert_says(error, 'takes its place in the queue', 'float32[4,5]')
