"""What goes in the wrong place is told, whatever wrapper it goes into."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_checks import assert_says
from flax import nnx
from meshes import make_mesh

import conadv_optax as conadv


def loss_fn(w, batch):
  return jnp.mean(jnp.tanh(batch['image'] @ w) ** 2)


FGSM = conadv.fgsm(0.1)
# Four weights, as there are devices to which a state of another kind is spread.
W = np.float32([1, -2, 0.5, 3])
BATCH = {'image': np.arange(48, dtype=np.float32).reshape(12, 4) / 30}
LOSSES = {
  'plain': conadv.plain,
  'wrap': functools.partial(conadv.wrap, attack=FGSM),
  'reuse': functools.partial(conadv.wrap, attack=FGSM, reuse_gradient=True),
  'fast_advprop': functools.partial(conadv.fast_advprop, attack=FGSM),
}
TAKERS = {
  'sam': lambda fn: conadv.sam(fn, 0.1),
  'extrapolate': lambda fn: conadv.extrapolate(fn, 0.1),
  'accumulate': lambda fn: conadv.accumulate(fn, 4),
  'data_parallel': lambda fn: conadv.data_parallel(fn, make_mesh(4)),
}
WRAPPERS = LOSSES | {
  **{
    name: lambda fn, take=take: take(LOSSES['wrap'](fn))
    for name, take in TAKERS.items()
  },
  'concurrent': lambda fn: conadv.concurrent(
    LOSSES['wrap'](fn), make_mesh(1, 4)
  ),
}
wrappers = pytest.mark.parametrize('name', list(WRAPPERS))


def init(grad_fn, params=W, batch=BATCH, **kwargs):
  return grad_fn.init(params, [batch] * grad_fn.staleness, **kwargs)


def call(grad_fn, params=W, batch=BATCH, **kwargs):
  return grad_fn.value_and_grad(
    params, init(grad_fn, params, batch), batch, **kwargs
  )


@functools.cache
def some_states():
  wrapped = LOSSES['wrap'](loss_fn)
  return {
    'ConAdvState': init(wrapped),
    'SamState': init(conadv.sam(loss_fn, 0.1, every=2)),
    'ExtrapolateState': init(conadv.extrapolate(loss_fn, 0.1)),
    'dict': {'params': W},
    'NoneType': None,
  }


OWN_STATE = {'sam': 'SamState', 'extrapolate': 'ExtrapolateState'}


@pytest.mark.parametrize(
  ('name', 'given'),
  [
    (name, given)
    for name in WRAPPERS
    for given in some_states()
    if given != OWN_STATE.get(name, 'ConAdvState')
  ],
)
def test_a_state_of_another_function(name, given):
  wanted = OWN_STATE.get(name, 'ConAdvState')
  grad_fn = WRAPPERS[name](loss_fn)
  with pytest.raises(TypeError) as error:
    grad_fn.value_and_grad(W, some_states()[given], BATCH)
  assert_says(error, f'`{wanted}`', f'Given a {given}', 'state = grad_fn.init(')


class Net(nnx.Module):
  def __init__(self):
    self.kernel = nnx.Param(jnp.ones(4))


@wrappers
def test_a_module_in_place_of_parameters(name):
  def of_module(net, batch):
    return loss_fn(net.kernel[...], batch)

  grad_fn = WRAPPERS[name](of_module)
  with pytest.raises(TypeError) as error:
    call(grad_fn, Net())
  assert_says(error, 'NNX module, Net', 'nnx.split(model, nnx.Param')


def test_a_module_in_place_of_a_model_state():
  grad_fn = conadv.plain(lambda w, s, b: (loss_fn(w, b), s), has_state=True)
  with pytest.raises(TypeError, match='NNX module, Net'):
    call(grad_fn, model_state=Net())


@pytest.mark.parametrize(
  ('name', 'when'),
  [
    (name, when)
    for name, make in WRAPPERS.items()
    for when in ('init', 'value_and_grad')
    if when != 'init' or make(loss_fn).staleness
  ],
)
def test_a_text_in_a_batch(name, when):
  grad_fn = WRAPPERS[name](loss_fn)
  batch = {**BATCH, 'name': 'cat'}
  with pytest.raises(TypeError) as error:
    if when == 'init':
      init(grad_fn, batch=batch)
    else:
      grad_fn.value_and_grad(W, init(grad_fn), batch)
  assert_says(error, "'name']", "str, 'cat'", 'keep it out of the batch')


def test_a_text_in_the_batch_of_perturb():
  with pytest.raises(TypeError, match='array of numbers'):
    conadv.perturb(loss_fn, W, {**BATCH, 'name': 'cat'}, attack=FGSM)


@pytest.mark.parametrize('name', list(TAKERS))
def test_a_loss_function_is_its_plain_gradient(name):
  take = TAKERS[name]
  given, plain = (
    jax.jit(call, static_argnums=0)(take(fn))
    for fn in (loss_fn, conadv.plain(loss_fn))
  )
  chex.assert_trees_all_equal(given, plain)
  chex.assert_trees_all_equal_structs(given, plain)


@pytest.mark.parametrize('name', list(TAKERS))
@pytest.mark.parametrize('given', [None, 0.1, {'image': 1}])
def test_what_is_no_function_at_all(name, given):
  with pytest.raises(TypeError) as error:
    TAKERS[name](given)
  assert_says(error, 'gradient function', 'conadv.plain', type(given).__name__)


# What an attack returns in place of the inputs, and how the error spells it.
WRONG = {
  'float32[1,4]': lambda x: x[:1],
  'float32[4]': lambda x: x.mean(0),
  'float32[12]': lambda x: x[:, 0],
  'float16[12,4]': lambda x: x.astype(jnp.float16),
  'int32[12,4]': lambda x: x.astype(jnp.int32),
  'float64[12,4]': lambda x: np.zeros(x.shape),
}


def careless(wrong):
  """An attack that returns something else, wherever it is asked."""
  return conadv.Attack(
    craft=lambda key, gradient_fn, x: wrong(x),
    reuse=lambda gradient, x: wrong(x),
    one_step=lambda key, x: (x, lambda gradient: wrong(x)),
    draws=False,
  )


USES = {
  'init': lambda attack: init(conadv.wrap(loss_fn, attack=attack)),
  'staleness 0': lambda attack: call(conadv.wrap(loss_fn, 0, attack=attack)),
  'staleness 1': lambda attack: conadv.wrap(
    loss_fn, attack=attack
  ).value_and_grad(W, some_states()['ConAdvState'], BATCH),
  'reuse': lambda attack: conadv.wrap(
    loss_fn, attack=attack, reuse_gradient=True
  ).value_and_grad(W, init(LOSSES['reuse'](loss_fn)), BATCH),
  'perturb': lambda attack: conadv.perturb(loss_fn, W, BATCH, attack=attack),
  'fast_advprop': lambda attack: call(
    conadv.fast_advprop(loss_fn, attack=attack, adversarial_fraction=0.99)
  ),
  'roles': lambda attack: call(
    conadv.concurrent(
      conadv.wrap(loss_fn, attack=attack),
      make_mesh(1, 2),
    )
  ),
}


@pytest.mark.parametrize('returned', list(WRONG))
@pytest.mark.parametrize('use', list(USES))
def test_what_an_attack_returns_is_held_to_the_inputs(use, returned):
  with pytest.raises(TypeError) as error:
    USES[use](careless(WRONG[returned]))
  assert_says(error, 'shape and dtype of the inputs', 'astype(inputs.dtype)')
  if use != 'fast_advprop':  # Where it is a part of them.
    assert_says(error, f'inputs, float32[12,4]. It returned {returned}')


@pytest.mark.parametrize('use', list(USES))
def test_an_attack_that_returns_inputs_is_right(use):
  USES[use](careless(lambda x: x))


def test_float32_for_short_inputs():
  batch = {'image': jnp.ones((4, 2), jnp.bfloat16)}
  with pytest.raises(TypeError) as error:
    conadv.perturb(
      lambda w, batch: jnp.mean(batch['image'].astype(jnp.float32)),
      W,
      batch,
      attack=careless(lambda x: x.astype(jnp.float32)),
    )
  assert_says(error, 'bfloat16[4,2]', 'float32[4,2]')


SCHEDULE = optax.linear_schedule(0.0, 1.0, 10)


@pytest.mark.parametrize(
  ('name', 'make'),
  [
    ('radius', lambda: conadv.sam(loss_fn, SCHEDULE)),
    ('reuse_weight', lambda: conadv.sam(loss_fn, 0.1, reuse_weight=SCHEDULE)),
    ('penalty', lambda: conadv.sam(loss_fn, 0.1, penalty=SCHEDULE)),
    (
      "weights['main']",
      lambda: conadv.wrap(
        loss_fn, attack=FGSM, weights={'main': SCHEDULE, 'adversarial': 1.0}
      ),
    ),
    (
      'attack_weight',
      lambda: conadv.fast_advprop(loss_fn, attack=FGSM, attack_weight=SCHEDULE),
    ),
  ],
)
def test_a_schedule_is_told_where_to_call_it(name, make):
  with pytest.raises(TypeError) as error:
    make()
  assert_says(error, f'`{name}`', 'Optax schedule', f'{name}=schedule(count)')


def test_schedules_called_inside_of_the_step_are_compiled_once():
  """As the error says; and each number has its effect."""
  traces = 0

  @jax.jit
  def step(count):
    nonlocal traces
    traces += 1
    share = SCHEDULE(count)
    wrapped = conadv.wrap(
      loss_fn,
      0,
      attack=FGSM,
      weights={'main': 1 - share, 'adversarial': share},
    )
    return (
      call(wrapped)[1],
      call(conadv.sam(loss_fn, share))[1],
      call(conadv.sam(loss_fn, 0.5, penalty=share))[1],
      call(conadv.fast_advprop(loss_fn, attack=FGSM, attack_weight=share))[1],
    )

  first, later = step(0), step(5)
  assert traces == 1
  plain = jax.grad(loss_fn)(W, BATCH)
  # Of weight 1 for 'main', of radius 0 and of penalty 0.
  for grads in first[:3]:
    np.testing.assert_allclose(grads, plain, rtol=1e-5)
  for before, after in zip(first, later, strict=True):
    assert np.max(np.abs(before - after)) > 1e-4


def test_a_text_in_the_batch_of_a_report():
  grad_fn = conadv.wrap(
    lambda w, b: jnp.mean(b['image'] * w), attack=conadv.fgsm(0.1)
  )
  w = jnp.ones([])
  with pytest.raises(TypeError, match='array of numbers'):
    conadv.staleness_report(
      grad_fn, w, w, {'image': jnp.ones((4, 2)), 'name': 'cat'}
    )


@pytest.mark.parametrize(
  'other',
  [
    lambda fn: conadv.sam(fn, 0.1, every=2),
    lambda fn: conadv.extrapolate(fn, 0.1),
  ],
)
def test_a_state_that_devices_cannot_even_divide(other):
  def loss_fn(w, batch):
    return jnp.mean(batch['image'] @ w)

  w, batch = jnp.ones(2), {'image': jnp.ones((8, 2))}
  grad_fn = conadv.data_parallel(
    conadv.wrap(loss_fn, attack=conadv.fgsm(0.1)), make_mesh(4)
  )
  with pytest.raises(TypeError, match='A state goes back'):
    grad_fn.value_and_grad(w, other(loss_fn).init(w, []), batch)


@pytest.mark.parametrize('returned', [None, [1.0, 2.0], {'x': 1.0}])
def test_an_attack_that_returns_no_array(returned):
  attack = conadv.Attack(lambda key, fn, x: returned, draws=False)
  with pytest.raises(TypeError, match='shape and dtype of the inputs'):
    conadv.perturb(
      lambda w, b: jnp.mean(b['image'] * w),
      jnp.ones([]),
      {'image': jnp.ones((4, 2))},
      attack=attack,
    )


def test_a_loss_that_talks_to_attackers():
  def loss_fn(w, batch):
    hidden = batch['image'] @ w
    mean = jax.lax.pmean(jnp.mean(hidden, axis=0), 'role')
    return jnp.mean(jnp.tanh(hidden - mean[None]) ** 2)

  grad_fn = conadv.concurrent(
    conadv.wrap(loss_fn, attack=conadv.fgsm(0.1)),
    make_mesh(2, 3),
  )
  w, batch = jnp.ones((4, 3)), {'image': jnp.ones((24, 4))}
  with pytest.raises(ValueError, match="over the axis 'role'"):
    grad_fn.value_and_grad(w, grad_fn.init(w, [batch]), batch)


@pytest.mark.parametrize('groups', ['micro-batches', 'devices'])
def test_a_state_of_another_number_of_groups(groups):
  def make(number):
    grad_fn = conadv.sam(lambda w, x: jnp.mean((x @ w) ** 2), 0.1, every=2)
    if groups == 'devices':
      return conadv.data_parallel(grad_fn, make_mesh(number))
    return conadv.accumulate(grad_fn, number)

  x, w = jnp.ones((8, 3)), jnp.ones(3)
  state = jax.device_get(make(4).init(w, []))
  with pytest.raises(ValueError) as error:
    make(2).value_and_grad(w, state, x)
  assert_says(error, 'Each of the 2 groups', 'of 4 groups', 'grad_fn.init(')
  # A scalar has no axis where groups could stand.
  alone = conadv.sam(lambda w, x: jnp.mean(w * x), 0.1, every=2)
  state = conadv.accumulate(alone, 2).init(jnp.ones([]), [])
  state = state._replace(direction=conadv.PerGroup(jnp.ones([])))
  with pytest.raises(ValueError, match='of no groups'):
    conadv.accumulate(alone, 2).value_and_grad(jnp.ones([]), state, x[:, 0])
