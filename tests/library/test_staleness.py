"""The staleness report against closed forms and attacks written out."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from helpers import init_model, loss_fn, make_batch, naive_attack, plain_step
from hypothesis import given, settings
from hypothesis import strategies as st

import conadv_optax as conadv

EPSILON = 0.1
SIZE, FEATURES = 6, 4


def linear_loss(w, batch):
  return jnp.mean(batch['x'] @ w)


def linear_report(attack, old, new, key=None):
  grad_fn = conadv.wrap(linear_loss, attack=attack, inputs='x')
  batch = {'x': jnp.zeros((SIZE, FEATURES))}
  old, new = (jnp.asarray(w, jnp.float32) for w in (old, new))
  return conadv.staleness_report(grad_fn, old, new, batch, key=key)


weights = st.lists(
  st.floats(0.1, 2.0).flatmap(lambda x: st.sampled_from([x, -x])),
  min_size=FEATURES,
  max_size=FEATURES,
)


@jax.jit
def fgsm_report(old, new):
  return linear_report(conadv.fgsm(EPSILON), old, new)


@given(old=weights, new=weights)
@settings(max_examples=20, deadline=None)
def test_is_the_closed_form_of_a_linear_model(old, new):
  old, new = np.float32(old), np.float32(new)
  report = fgsm_report(old, new)
  chex.assert_trees_all_close(
    report,
    conadv.StalenessReport(
      sign_agreement=np.mean(np.sign(old) == np.sign(new)),
      stale_gain=EPSILON * np.sum(np.sign(old) * new),
      fresh_gain=EPSILON * np.sum(np.abs(new)),
    ),
    rtol=1e-5,
    atol=1e-6,
  )


def test_is_the_closed_form_in_an_l2_ball():
  old, new = np.array([1.0, 2.0, 2.0, 0.0]), np.array([0.0, -3.0, 0.0, 4.0])
  report = linear_report(conadv.fgsm(EPSILON, norm='l2'), old, new)
  expected = conadv.StalenessReport(
    0.0, EPSILON * np.dot(old / 3, new), EPSILON * 5
  )
  chex.assert_trees_all_close(report, expected, rtol=1e-5)


def test_both_attacks_start_at_the_same_point():
  # A step of nothing leaves the start alone.
  attack = conadv.pgd(EPSILON, step_size=0.0)
  report = linear_report(attack, [1.0] * 4, [-1.0] * 4, key=jax.random.key(0))
  assert report.sign_agreement == 1
  assert report.stale_gain == report.fresh_gain != 0


@pytest.mark.parametrize('fraction', [1.0, 0.5])
def test_is_the_attack_and_the_loss_of_the_adversarial_branch(fraction):
  batch = make_batch(0)
  count = int(16 * fraction)
  part = jax.tree.map(lambda x: x[:count], batch)
  (old, statistics), (new, _) = init_model(0), init_model(1)
  own_norm = jax.tree.map(lambda x: 1 - x, new['norm'])
  own = {
    'norm': own_norm,
    **jax.tree.map(
      lambda _: None, {name: new[name] for name in ('dense', 'head')}
    ),
  }
  branched, model_state = conadv.dual_bn.split(new, statistics)
  branched = conadv.dual_bn.Branched(new, {'adversarial': own})
  old_branched, _ = conadv.dual_bn.split(old, statistics)
  grad_fn = conadv.wrap(
    loss_fn,
    3,
    attack=conadv.fgsm(EPSILON),
    adversarial_fraction=fraction,
    has_state=True,
  )
  report = jax.jit(
    lambda *args: conadv.staleness_report(
      grad_fn, *args, model_state=model_state
    )
  )(old_branched, branched, batch)

  adversarial = {**new, 'norm': own_norm}
  stale = naive_attack(old['norm'], old, part, epsilon=EPSILON)
  fresh = naive_attack(own_norm, new, part, epsilon=EPSILON)
  clean_loss, stale_loss, fresh_loss = (
    plain_step(adversarial, statistics, examples)[0][0]
    for examples in (part, stale, fresh)
  )
  signs = [
    np.sign(np.asarray(x['image']) - np.asarray(part['image']))
    for x in (stale, fresh)
  ]
  expected = conadv.StalenessReport(
    np.mean(signs[0] == signs[1]),
    stale_loss - clean_loss,
    fresh_loss - clean_loss,
  )
  chex.assert_trees_all_close(report, expected, rtol=1e-3, atol=1e-5)
  chex.assert_type(list(report), jnp.float32)


def test_the_same_parameters_are_not_stale():
  w = [1.0, -2.0, 0.5, 0.1]
  report = linear_report(conadv.fgsm(EPSILON), w, w)
  assert report.sign_agreement == 1
  assert report.stale_gain == report.fresh_gain > 0


def test_a_second_report_is_not_compiled_again():
  traces = []

  def loss(w, batch):
    traces.append(0)
    return jnp.mean(batch['x'] @ w)

  grad_fn = conadv.wrap(loss, attack=conadv.fgsm(EPSILON), inputs='x')
  w, batch = jnp.ones(FEATURES), {'x': jnp.zeros((SIZE, FEATURES))}
  first = conadv.staleness_report(grad_fn, w, w, batch)
  assert traces
  traces.clear()
  second = conadv.staleness_report(grad_fn, -w, w, batch)
  assert not traces
  assert (first.sign_agreement, second.sign_agreement) == (1, 0)
  # Another gradient function is another program.
  third = conadv.wrap(loss, attack=conadv.fgsm(2 * EPSILON), inputs='x')
  doubled = conadv.staleness_report(third, w, w, batch)
  chex.assert_trees_all_close(doubled.fresh_gain, 2 * first.fresh_gain)


def test_half_precision_inputs_give_float32():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(batch['x'] @ w),
    attack=conadv.fgsm(0.5),
    inputs='x',
  )
  w = jnp.ones(2, jnp.bfloat16)
  report = conadv.staleness_report(
    grad_fn, -w, w, {'x': jnp.zeros((2, 2), jnp.bfloat16)}
  )
  chex.assert_type(list(report), jnp.float32)
  chex.assert_trees_all_equal(
    report,
    conadv.StalenessReport(jnp.float32(0), jnp.float32(-1.0), jnp.float32(1.0)),
  )


def test_a_gradient_function_without_an_attack_pass_is_an_error():
  grad_fn = conadv.wrap(
    linear_loss, attack=conadv.fgsm(0.1), inputs='x', reuse_gradient=True
  )
  w, batch = jnp.ones(4), {'x': jnp.zeros((2, 4))}
  with pytest.raises(ValueError, match='`reuse_gradient=False`'):
    conadv.staleness_report(grad_fn, w, w, batch)
  with pytest.raises(TypeError, match='staleness_report'):
    conadv.staleness_report(linear_loss, w, w, batch)


def test_what_is_missing_is_told():
  with pytest.raises(ValueError) as error:
    linear_report(conadv.pgd(EPSILON), np.ones(FEATURES), np.ones(FEATURES))
  assert_says(error, 'needs `key=`', 'Add to this call')
  grad_fn = conadv.wrap(loss_fn, attack=conadv.fgsm(EPSILON), has_state=True)
  params, _ = init_model()
  with pytest.raises(ValueError) as error:
    conadv.staleness_report(grad_fn, params, params, make_batch(0))
  assert_says(error, 'Given none', 'Add to this call `model_state=model_state`')
