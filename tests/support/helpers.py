"""A small model with BatchNorm in plain JAX, and batches for it."""

import jax
import jax.numpy as jnp
import numpy as np

MOMENTUM = 0.9
CLASSES = 3


def init_model(seed=0, features=5, hidden=8):
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)

  params = {
    'dense': {'kernel': normal(features, hidden), 'bias': normal(hidden)},
    'norm': {'scale': 1 + 0.1 * normal(hidden), 'bias': 0.1 * normal(hidden)},
    'head': {'kernel': normal(hidden, CLASSES), 'bias': normal(CLASSES)},
  }
  model_state = {'norm': {'mean': jnp.zeros(hidden), 'var': jnp.ones(hidden)}}
  return params, model_state


def forward(params, model_state, x):
  """Logits in training mode, and the statistics after it."""
  dense, norm, head = params['dense'], params['norm'], params['head']
  h = x @ dense['kernel'] + dense['bias'][None]
  mean, var = jnp.mean(h, axis=0), jnp.var(h, axis=0)
  h = (h - mean[None]) * jax.lax.rsqrt(var[None] + 1e-5)
  h = jnp.tanh(h * norm['scale'][None] + norm['bias'][None])
  old = model_state['norm']
  new = {
    'mean': MOMENTUM * old['mean'] + (1 - MOMENTUM) * mean,
    'var': MOMENTUM * old['var'] + (1 - MOMENTUM) * var,
  }
  return h @ head['kernel'] + head['bias'][None], {'norm': new}


def cross_entropy(logits, label):
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)
  return -jnp.mean(picked)


def loss_fn(params, model_state, batch):
  logits, model_state = forward(params, model_state, batch['image'])
  return cross_entropy(logits, batch['label']), model_state


plain_step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))


def make_batch(seed, size=16, features=5):
  rng = np.random.default_rng(1000 + seed)
  return {
    'image': jnp.asarray(rng.normal(size=(size, features)), jnp.float32),
    'label': jnp.asarray(rng.integers(CLASSES, size=size), jnp.int32),
  }


@jax.jit
def input_gradient(norm, shared, batch, x):
  def loss(x):
    value, _ = loss_fn(
      {**shared, 'norm': norm}, init_model()[1], {**batch, 'image': x}
    )
    return value

  return jax.grad(loss)(x)


def naive_attack(norm, shared, batch, *, epsilon, steps=1):
  """L-infinity PGD from the clean input, in the norm of one branch."""

  x = clean = np.asarray(batch['image'])
  size = epsilon if steps == 1 else 2.5 * epsilon / steps
  for _ in range(steps):
    gradient = np.asarray(input_gradient(norm, shared, batch, jnp.asarray(x)))
    x = np.clip(x + size * np.sign(gradient), clean - epsilon, clean + epsilon)
  return {**batch, 'image': jnp.asarray(x, jnp.float32)}


def in_parts(batch, count):
  """The batch in the order in which `count` devices get the micro-batches."""
  return jax.tree.map(
    lambda x: (
      x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    ),
    batch,
  )
