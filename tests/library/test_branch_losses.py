"""A loss of its own for the attack and for a branch, and added leaves."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from meshes import make_mesh

import conadv_optax as conadv

EPSILON = 0.25
rng = np.random.default_rng(0)
X = rng.normal(size=(12, 3)).astype(np.float32)
Y = rng.normal(size=12).astype(np.float32)
W = rng.normal(size=3).astype(np.float32)


def test_the_loss_is_told_what_it_is_for():
  told = []

  def loss_fn(w, batch, *, branch):
    told.append(branch)
    return jnp.mean((batch['x'] @ w) ** 2)

  grad_fn = conadv.wrap(
    loss_fn,
    0,
    attack=conadv.fgsm(EPSILON),
    inputs='x',
    extra_branches={'augmented': 'x'},
    has_branch=True,
  )
  jax.eval_shape(grad_fn.value_and_grad, W, grad_fn.init(W, []), {'x': X})
  assert told == ['attack', 'adversarial', 'main', 'augmented']


def test_what_fast_advprop_and_plain_tell():
  told = []

  def loss_fn(w, batch, *, branch):
    told.append(branch)
    return jnp.mean((batch['x'] @ w) ** 2)

  for grad_fn in (
    conadv.fast_advprop(
      loss_fn, attack=conadv.fgsm(EPSILON), inputs='x', has_branch=True
    ),
    conadv.plain(loss_fn, has_branch=True),
  ):
    jax.eval_shape(grad_fn.value_and_grad, W, grad_fn.init(W, []), {'x': X})
  assert told == ['attack', 'adversarial', 'main', 'main']


def test_the_attack_climbs_its_own_loss_and_nothing_else_changes():
  def loss_fn(w, batch, *, branch):
    error = (batch['x'] @ w - batch['y']) ** 2
    # Down in place of up: the copies move the other way.
    return jnp.mean(-error if branch == 'attack' else error)

  grad_fn = conadv.wrap(
    loss_fn, 0, attack=conadv.fgsm(EPSILON), inputs='x', has_branch=True
  )
  batch = {'x': X, 'y': Y}
  (_, aux), grads, _ = grad_fn.value_and_grad(W, grad_fn.init(W, []), batch)
  residue = X @ W - Y
  moved = X - EPSILON * np.sign(residue[:, None] * W)
  hit = moved @ W - Y
  np.testing.assert_allclose(aux.losses['main'], np.mean(residue**2), rtol=1e-5)
  np.testing.assert_allclose(
    aux.losses['adversarial'], np.mean(hit**2), rtol=1e-5
  )
  expected = (residue @ X + hit @ moved) / len(X)
  np.testing.assert_allclose(grads, expected, rtol=1e-4)


def softmax(x):
  e = np.exp(x - x.max(axis=1, keepdims=True))
  return e / e.sum(axis=1, keepdims=True)


def divergence(p, q):
  return np.mean(np.sum(p * np.log(p / q), axis=1))


@pytest.mark.slow
def test_trades():
  """Clean cross entropy, and Kullback-Leibler against the clean prediction."""
  beta, w = 6.0, rng.normal(size=(3, 4)).astype(np.float32)
  label = rng.integers(4, size=12)

  def loss_fn(w, batch, *, branch):
    clean = jax.nn.log_softmax(batch['x'] @ w)
    if branch == 'main':
      picked = jnp.take_along_axis(clean, batch['label'][:, None], axis=1)
      return -jnp.mean(picked)
    if branch == 'attack':
      clean = jax.lax.stop_gradient(clean)
    hit = jax.nn.log_softmax(batch['x_adv'] @ w)
    return jnp.mean(jnp.sum(jnp.exp(clean) * (clean - hit), axis=1))

  grad_fn = conadv.wrap(
    loss_fn,
    0,
    attack=conadv.pgd(0.1),
    # The clean input stays, and the copy goes beside it.
    inputs=(lambda batch: batch['x'], lambda batch, x: {**batch, 'x_adv': x}),
    weights={'main': 1.0, 'adversarial': beta},
    has_branch=True,
  )
  batch, key = {'x': X, 'label': label}, jax.random.key(0)
  (loss, aux), grads, _ = grad_fn.value_and_grad(
    w, grad_fn.init(w, []), batch, key=key
  )

  # The attack is one step from a random start; take its copy as it is, and
  # hold against it what TRADES makes of it.
  craft = grad_fn.passes.craft
  x_adv = np.asarray(craft(w, None, jax.tree.map(jnp.asarray, batch), key))
  assert np.max(np.abs(x_adv - X)) <= 0.1 + 1e-6
  p, q = softmax(np.float64(X) @ w), softmax(np.float64(x_adv) @ w)
  apart = divergence(p, q)
  entropy = -np.mean(np.log(p[np.arange(12), label]))
  np.testing.assert_allclose(aux.losses['adversarial'], apart, rtol=1e-3)
  np.testing.assert_allclose(loss, entropy + beta * apart, rtol=1e-4)
  # d/dz of KL(p || q): of the clean logits p (log(p / q) - KL), of the others
  # q - p; of the cross entropy p - onehot.
  each = np.sum(p * np.log(p / q), axis=1, keepdims=True)
  clean = (p - np.eye(4)[label]) + beta * p * (np.log(p / q) - each)
  expected = (X.T @ clean + beta * x_adv.T @ (q - p)) / 12
  np.testing.assert_allclose(grads, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_vat():
  """One power iteration from a random direction, in NumPy."""
  alpha, epsilon, xi, drawn = 2.0, 0.5, 0.02, []
  w, label = rng.normal(size=(3, 4)), rng.integers(4, size=12)

  def loss_fn(w, batch, *, branch, key):
    clean = jax.nn.log_softmax(batch['x'] @ w)
    if branch == 'main':
      picked = jnp.take_along_axis(clean, batch['label'][:, None], axis=1)
      return -jnp.mean(picked)
    clean, moved = jax.lax.stop_gradient(clean), batch['moved']
    if branch == 'attack':
      d = jax.random.normal(key, moved.shape)
      drawn.append(d / jnp.linalg.norm(d, axis=1, keepdims=True))
      moved = moved + xi * drawn[-1]
    hit = jax.nn.log_softmax(moved @ w)
    return jnp.mean(jnp.sum(jnp.exp(clean) * (clean - hit), axis=1))

  grad_fn = conadv.wrap(
    loss_fn,
    0,
    attack=conadv.fgsm(epsilon, norm='l2'),
    inputs=(lambda batch: batch['x'], lambda batch, x: {**batch, 'moved': x}),
    weights={'main': 1.0, 'adversarial': alpha},
    has_branch=True,
    has_key=True,
  )
  params = np.float32(w)
  (loss, aux), grads, _ = grad_fn.value_and_grad(
    params,
    grad_fn.init(params, []),
    {'x': X, 'label': label},
    key=jax.random.key(0),
  )
  [d] = drawn
  x = np.float64(X)
  p = softmax(x @ w)
  g = (softmax((x + xi * np.asarray(d)) @ w) - p) @ w.T
  moved = x + epsilon * g / np.linalg.norm(g, axis=1, keepdims=True)
  q = softmax(moved @ w)
  np.testing.assert_allclose(
    aux.losses['adversarial'], divergence(p, q), rtol=1e-3
  )
  entropy = -np.mean(np.log(p[np.arange(12), label]))
  np.testing.assert_allclose(
    loss, entropy + alpha * divergence(p, q), rtol=1e-3
  )
  # The clean prediction is a constant in the divergence.
  expected = (x.T @ (p - np.eye(4)[label]) + alpha * moved.T @ (q - p)) / 12
  np.testing.assert_allclose(grads, expected, rtol=2e-3, atol=1e-4)


TABLE = rng.normal(size=(10, 3)).astype(np.float32)
TOKENS = rng.integers(10, size=(12, 4))
NOISE = conadv.added_leaf(
  'noise', lambda batch: jax.ShapeDtypeStruct((*batch['t'].shape, 3), 'float32')
)


def embedding_loss(params, batch):
  embedded = params['table'][batch['t']] + batch.get('noise', 0.0)
  return jnp.mean((embedded @ params['w'] - batch['y'][:, None]) ** 2)


def embedding_step():
  """Losses and gradient in NumPy: the noise is `EPSILON` up the loss."""
  embedded = TABLE[TOKENS]
  losses, total = {}, 0
  noise = EPSILON * np.sign((embedded @ W - Y[:, None])[..., None] * W)
  for name, x in (('main', embedded), ('adversarial', embedded + noise)):
    error = x @ W - Y[:, None]
    losses[name] = np.mean(error**2)
    total = total + np.einsum('bt,btf->f', error, x) / error.size
  return losses, total


@pytest.mark.parametrize(
  ('wrapper', 'reuse'),
  [
    ('none', False),
    ('none', True),
    ('accumulate', False),
    ('accumulate', True),
    ('devices', False),
    ('devices', True),
    ('roles', False),
  ],
)
def test_an_added_leaf_is_perturbed_at_the_embedding(wrapper, reuse):
  grad_fn = conadv.wrap(
    embedding_loss,
    attack=conadv.fgsm(EPSILON),
    inputs=NOISE,
    reuse_gradient=reuse,
  )
  grad_fn = {
    'none': lambda fn: fn,
    'accumulate': lambda fn: conadv.accumulate(fn, 3),
    'devices': lambda fn: conadv.data_parallel(fn, make_mesh(4)),
    'roles': lambda fn: conadv.concurrent(fn, make_mesh(2, 3)),
  }[wrapper](grad_fn)
  params = {'table': TABLE, 'w': W}
  batch = {'t': TOKENS, 'y': Y}

  @jax.jit
  def run(params, batch):
    state = grad_fn.init(params, [batch])
    for _ in range(2):
      (_, aux), grads, state = grad_fn.value_and_grad(params, state, batch)
    return aux.losses, grads['w']

  losses, expected = embedding_step()
  got_losses, got = run(params, batch)
  chex.assert_trees_all_close(got_losses, losses, rtol=1e-4)
  np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-5)


def test_an_added_leaf_wants_a_dict():
  grad_fn = conadv.wrap(
    lambda w, batch: jnp.mean(batch * w),
    0,
    attack=conadv.fgsm(0.1),
    inputs=conadv.added_leaf('noise', lambda batch: batch),
  )
  with pytest.raises(TypeError) as error:
    grad_fn.value_and_grad(1.0, grad_fn.init(1.0, []), jnp.ones(3))
  assert_says(error, '`added_leaf`', 'dict', 'float32[3]', 'inputs=(get, set)')
