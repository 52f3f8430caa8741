"""A small net and its dense Hessian."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree


def random_arrays(seed, *shapes):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def make_net(dtype=jnp.float32):
  kernel, bias, head = random_arrays(0, (3, 4), (4,), (4, 2))
  params = {'dense': {'kernel': kernel, 'bias': bias}, 'head': head}
  return jax.tree.map(lambda x: x.astype(dtype), params)


def make_batch(size=16):
  image, noise = random_arrays(1, (size, 3), (size,))
  return {'image': image, 'label': (image[:, 0] + noise > 0).astype(jnp.int32)}


def net_loss(params, batch):
  dense, head = params['dense'], params['head']
  image = batch['image'].astype(head.dtype)
  hidden = jnp.tanh(image @ dense['kernel'] + dense['bias'][None])
  labels = jax.nn.one_hot(batch['label'], 2, dtype=head.dtype)
  losses = optax.softmax_cross_entropy(hidden @ head, labels)
  return jnp.mean(losses)


def dense_hessian(params, batch):
  flat, unravel = ravel_pytree(params)
  dense = jax.jit(jax.hessian(lambda w: net_loss(unravel(w), batch)))
  return np.asarray(dense(flat))
