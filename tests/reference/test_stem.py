"""The first layer of a ResNet is Flax's convolution, with its gradients."""

import functools

import chex
import flax.linen as nn
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference.run import models

_INIT = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def _flax(filters: int, dtype=jnp.float32) -> nn.Conv:
  return nn.Conv(
    filters,
    (7, 7),
    (2, 2),
    padding=3,
    use_bias=False,
    dtype=dtype,
    kernel_init=_INIT,
    name='stem',
  )


@hypothesis.given(
  height=st.integers(1, 13),
  width=st.integers(1, 13),
  channels=st.integers(1, 3),
)
@hypothesis.settings(deadline=None, max_examples=12)
def test_values_and_gradients_are_those_of_flax(height, width, channels):
  key = jax.random.split(jax.random.key(height), 3)
  x = jax.random.normal(key[0], (2, height, width, channels))
  conv, own = _flax(4), models.Stem(4, jnp.float32, _INIT)
  variables = conv.init(key[1], x)
  chex.assert_trees_all_equal(own.init(key[1], x), variables)
  chex.assert_trees_all_equal(own.apply(variables, x), conv.apply(variables, x))
  like = jax.random.normal(key[2], conv.apply(variables, x).shape)
  given, wanted = (
    jax.grad(lambda v, x, m=m: jnp.sum(like * m.apply(v, x) ** 2), (0, 1))(
      variables, x
    )
    for m in (own, conv)
  )
  chex.assert_trees_all_close(given, wanted, rtol=1e-4, atol=1e-4)


def test_second_derivatives_are_those_of_flax():
  key = jax.random.split(jax.random.key(0), 4)
  x, dx = (jax.random.normal(k, (2, 8, 8, 3)) for k in key[:2])
  conv, own = _flax(4), models.Stem(4, jnp.float32, _INIT)
  variables = conv.init(key[2], x)
  dv = jax.tree.map(lambda v: jax.random.normal(key[3], v.shape), variables)

  def product(module):
    def gradient(variables, x):
      return jax.grad(lambda *at: jnp.sum(jnp.sin(module.apply(*at))), (0, 1))(
        variables, x
      )

    return jax.jvp(gradient, (variables, x), (dv, dx))[1]

  chex.assert_trees_all_close(product(own), product(conv), rtol=1e-4, atol=1e-4)


def test_bfloat16_rounds_as_flax_does():
  x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
  conv, own = _flax(8, jnp.bfloat16), models.Stem(8, jnp.bfloat16, _INIT)
  variables = conv.init(jax.random.key(1), x)
  given, wanted = (
    jax.grad(lambda x, m=m: jnp.sum(m.apply(variables, x).astype(jnp.float32)))(
      x
    )
    for m in (own, conv)
  )
  assert given.dtype == jnp.float32
  # A sum of 16 products each of 3 significant digits.
  np.testing.assert_allclose(given, wanted, rtol=0.02, atol=0.02)


@pytest.mark.parametrize('argument', [0, 1])
def test_no_gradient_is_computed_that_is_not_asked_for(argument):
  gradient = jax.grad(lambda *at: jnp.sum(models.convolve(*at)), argument)
  at = jnp.ones((2, 16, 16, 3)), jnp.ones((7, 7, 3, 4))
  # Of one argument alone: the forward pass, and its gradient.
  assert str(jax.make_jaxpr(gradient)(*at)).count('= conv_general_dilated') == 2


def test_an_attack_on_a_resnet_goes_through_it():
  net = models.ResNet(10, (1,), 4, 'basic', 'imagenet', jnp.float32)
  x = jnp.ones((1, 32, 32, 3))
  init = functools.partial(net.init, train=False)
  variables = jax.eval_shape(init, jax.random.key(0), x)
  assert variables['params']['stem']['kernel'].shape == (7, 7, 3, 4)

  def loss_fn(x, variables):
    return jnp.sum(net.apply(variables, x, train=False))

  text = str(jax.make_jaxpr(jax.grad(loss_fn))(x, variables))
  assert 'f32[4,4,12,4]' in text
