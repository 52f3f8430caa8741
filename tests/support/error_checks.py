"""A call with a small model, and what an error must say."""

import functools

import jax
from helpers import init_model, loss_fn, make_batch

import conadv_optax as conadv

FGSM = conadv.fgsm(0.1)
wrap = functools.partial(conadv.wrap, loss_fn, attack=FGSM, has_state=True)


def call(grad_fn, batch=None, first_batches=None, **kwargs):
  """`init` and one call, under jit as users do."""
  params, model_state = init_model()
  kwargs = {'model_state': model_state, **kwargs}
  if first_batches is None:
    first_batches = [make_batch(t) for t in range(grad_fn.staleness)]
  batch = make_batch(9) if batch is None else batch

  def both(params, first_batches, batch, kwargs):
    state = grad_fn.init(params, first_batches, **kwargs)
    return grad_fn.value_and_grad(params, state, batch, **kwargs)

  return jax.jit(both)(params, first_batches, batch, kwargs)


def assert_says(error, *parts):
  """Every part of a message: the rule, what was given, the fix."""
  message = str(error.value)
  for part in parts:
    assert part in message, f'{part!r} is not in: {message}'
