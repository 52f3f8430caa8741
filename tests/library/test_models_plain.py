"""A bare function of arrays, as a complete program."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax

import conadv_optax as conadv

TRUE = np.array([1.0, -2.0, 0.5], np.float32)


def loss_fn(w, batch):
  x, y = batch
  return jnp.mean((x @ w - y) ** 2)


def make_batch(seed):
  x = np.random.default_rng(seed).normal(size=(32, 3)).astype(np.float32)
  return x, x @ TRUE


def train(steps, *, epsilon):
  """The batch is a tuple, and the inputs are its first part."""
  grad_fn = conadv.wrap(
    loss_fn, staleness=1, attack=conadv.fgsm(epsilon), inputs=0
  )
  tx = optax.sgd(0.1)
  w = jnp.zeros(3)
  state = grad_fn.init(w, [make_batch(0)])

  @jax.jit
  def train_step(w, opt_state, state, batch):
    (loss, _), grads, state = grad_fn.value_and_grad(w, state, batch)
    updates, opt_state = tx.update(grads, opt_state, w)
    return optax.apply_updates(w, updates), opt_state, state, loss

  opt_state, losses = tx.init(w), []
  for step in range(1, steps + 1):
    w, opt_state, state, loss = train_step(
      w, opt_state, state, make_batch(step)
    )
    losses.append(float(loss))
  return w, losses


def test_function_of_arrays_trains():
  w, losses = train(60, epsilon=0.05)
  assert losses[-1] < 0.05 * losses[0]
  np.testing.assert_allclose(w, TRUE, atol=0.2)
  w, losses = train(60, epsilon=0.0)
  assert losses[-1] < 1e-4
  chex.assert_trees_all_close(w, TRUE, atol=1e-2)


def test_robust_solution_is_smaller():
  # Adversarial least squares adds epsilon * |w|_1 to each residual.
  plain, _ = train(60, epsilon=0.0)
  robust, _ = train(60, epsilon=0.5)
  assert np.all(np.abs(robust) < 0.99 * np.abs(plain))
