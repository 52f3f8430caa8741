"""Schedules against their formulas in plain Python."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from hypothesis import given, settings
from hypothesis import strategies as st

import conadv_optax as conadv


@given(
  peak=st.floats(1e-3, 50),
  warmup=st.integers(0, 20),
  decay=st.integers(1, 30),
  power=st.floats(0.5, 3),
  end=st.floats(0, 1e-3),
  step=st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_warmup_is_linear_and_decay_polynomial(
  peak, warmup, decay, power, end, step
):
  rate = conadv.polynomial_warmup(
    peak, warmup, warmup + decay, power=power, end=end
  )
  if step < warmup:
    expected = peak * step / warmup
  else:
    left = 1 - min(step - warmup, decay) / decay
    expected = (peak - end) * left**power + end
  np.testing.assert_allclose(
    rate(jnp.asarray(step)), expected, rtol=1e-4, atol=1e-5 * peak
  )


@given(
  peak=st.one_of(st.floats(1e-8, 1e-3), st.floats(1e-3, 50)),
  warmup=st.integers(0, 5),
  decay=st.integers(1, 30),
  power=st.floats(0.25, 3),
  share=st.one_of(st.none(), st.sampled_from([0.0, 0.01, 0.3, 1.0])),
)
@settings(max_examples=40, deadline=None)
def test_the_rate_never_rises_after_the_warmup(
  peak, warmup, decay, power, share
):
  rate = conadv.polynomial_warmup(
    jnp.float32(peak),
    warmup,
    warmup + decay,
    power=power,
    end=None if share is None else jnp.float32(share * peak),
  )
  # As many for any of them, so that nothing is compiled again.
  rates = np.asarray(jax.vmap(rate)(jnp.arange(40)))
  assert np.all(np.diff(rates[warmup:]) <= 1e-6 * peak)
  np.testing.assert_allclose(rates[warmup], peak, rtol=1e-5)
  last = min(1e-4, peak / 10) if share is None else share * peak
  np.testing.assert_allclose(rates[warmup + decay :], last, rtol=1e-5)


def test_peak_and_end_may_be_traced():
  steps = jnp.arange(20)

  @jax.jit
  def rates(peak, end):
    make = conadv.polynomial_warmup
    return [jax.vmap(make(peak, 3, 16, end=x))(steps) for x in (None, end)]

  for peak, end in ((1e-5, 3e-6), (7.0, 0.0), (0.5, 0.5)):
    expected = [
      jax.vmap(conadv.polynomial_warmup(peak, 3, 16, end=x))(steps)
      for x in (None, end)
    ]
    np.testing.assert_allclose(
      rates(jnp.float32(peak), jnp.float32(end)), expected, rtol=1e-5
    )


@pytest.mark.parametrize('peak', [1e-5, 1.0])
def test_legw_ends_below_its_peak(peak):
  rate = conadv.legw(
    peak, 1.0, base_batch=10, batch=40, num_examples=100, epochs=10.0
  )
  np.testing.assert_allclose(rate(10), 2 * peak, rtol=1e-6)
  np.testing.assert_allclose(rate(25), min(1e-4, 2 * peak / 10), rtol=1e-6)


@pytest.mark.parametrize('end', [1.5, jnp.float32(2.0)])
def test_an_end_above_the_peak_is_an_error(end):
  with pytest.raises(ValueError) as error:
    conadv.polynomial_warmup(1.0, 5, 20, end=end)
  assert_says(error, f'end={float(end)}', 'a peak of 1.0', 'Leave `end` out')
  with pytest.raises(ValueError, match='a peak of 2'):
    conadv.legw(
      1.0,
      1.0,
      base_batch=10,
      batch=40,
      num_examples=100,
      epochs=10.0,
      end=end + 1,
    )


@pytest.mark.parametrize('name', ['peak', 'end'])
def test_rates_are_numbers_and_not_negative(name):
  arguments = {'peak': 1.0, 'warmup_steps': 5, 'total_steps': 20}
  with pytest.raises(ValueError, match=f'{name}=-0.1'):
    conadv.polynomial_warmup(**arguments | {name: -0.1})
  with pytest.raises(TypeError, match=f'`{name}=schedule'):
    conadv.polynomial_warmup(**arguments | {name: lambda count: 0.1})


@pytest.mark.parametrize('length', [3, 767, 1000])
def test_the_last_rate_is_the_end_in_compiled_code_too(length):
  # 1 - n * (1 / n), as compiled, is below 0 for some n, and has no root.
  rate = jax.jit(conadv.polynomial_warmup(8.0, 2, 2 + length, power=1.6))
  rates = [rate(2 + length + extra) for extra in (-1, 0, 1, 99)]
  before = (8 - 1e-4) * (1 / length) ** 1.6 + 1e-4
  np.testing.assert_allclose(rates, [before, 1e-4, 1e-4, 1e-4], rtol=1e-4)


def test_the_largest_published_run():
  rate = conadv.polynomial_warmup(43.0, 534, 1301, power=1.6, end=1e-4)
  np.testing.assert_allclose(rate(0), 0.0)
  np.testing.assert_allclose(rate(267), 21.5, rtol=1e-6)
  np.testing.assert_allclose(rate(534), 43.0, rtol=1e-6)
  middle = (43.0 - 1e-4) * (1 - 400 / 767) ** 1.6 + 1e-4
  np.testing.assert_allclose(rate(934), middle, rtol=1e-5)
  np.testing.assert_allclose(rate(1301), 1e-4, rtol=1e-4)


def test_legw_keeps_the_warmup_steps():
  common = {
    'base_batch': 256,
    'num_examples': 25_600,
    'epochs': 90.0,
    'end': 0.0,
    'power': 1.6,
  }
  base = conadv.legw(0.1, 5.0, batch=256, **common)
  large = conadv.legw(0.1, 5.0, batch=4096, **common)
  # 5 epochs of 100 steps, and 80 epochs of 6.25 steps.
  for step in (0, 100, 250, 500):
    np.testing.assert_allclose(large(step), 4 * base(step), rtol=1e-6)
  np.testing.assert_allclose(base(500), 0.1, rtol=1e-6)
  # Both end after 90 epochs.
  np.testing.assert_allclose(base(9000), 0.0, atol=1e-7)
  # A tenth of the 8,500 steps after the warm-up is left.
  np.testing.assert_allclose(base(8150), 0.1 * 0.1**1.6, rtol=1e-4)
  np.testing.assert_allclose(large(round(90 * 6.25)), 0.0, atol=1e-7)
  assert large(540) > 0


def test_learning_rate_rules():
  assert conadv.scale_learning_rate(0.1, 256, 256) == 0.1
  np.testing.assert_allclose(conadv.scale_learning_rate(0.1, 256, 8192), 3.2)
  np.testing.assert_allclose(
    conadv.scale_learning_rate(0.1, 256, 64, rule='sqrt'), 0.05
  )


@pytest.mark.parametrize(
  ('warmup', 'total'), [(10, 10), (11, 10), (-1, 10), (0, 0)]
)
def test_warmup_must_end_before_the_run(warmup, total):
  with pytest.raises(ValueError, match=f'warmup_steps={warmup}'):
    conadv.polynomial_warmup(1.0, warmup, total)


def test_legw_warmup_longer_than_the_run_is_an_error():
  with pytest.raises(ValueError, match='warmup_steps=100'):
    conadv.legw(
      1.0, 10.0, base_batch=10, batch=1000, num_examples=100, epochs=90.0
    )


@pytest.mark.parametrize('batches', [(0, 8), (8, 0), (-8, 8)])
def test_batches_are_positive(batches):
  with pytest.raises(ValueError, match='positive number of examples'):
    conadv.scale_learning_rate(0.1, *batches)


def test_unknown_rule_is_an_error():
  with pytest.raises(ValueError, match="rule='cubic'"):
    conadv.scale_learning_rate(0.1, 8, 16, rule='cubic')
