"""Steps of the reference pipeline on a few digits, and the same by hand."""

import functools

import flax.linen as nn
import jax
import numpy as np
import optax
from jax.sharding import AxisType, Mesh

from reference.configs import digits
from reference.data import sources
from reference.run import methods, parts

CLASSES = 10
RATE = 0.25
SGD = optax.sgd(RATE)
CONSTANT = optax.constant_schedule(RATE)


class Small(nn.Module):
  """A norm layer between two dense ones, with the ResNets' call."""

  num_classes: int = CLASSES

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(3)(x[:, 2:6, 2:6].reshape(x.shape[0], -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.Dense(self.num_classes)(nn.relu(x))


def tiny(method, **overrides):
  """The main job's config with a net of one block."""
  config = digits.get_config()
  config.update_from_flattened_dict(
    {
      'method': method,
      'batch_size': 16,
      'model.stage_sizes': (1,),
      'model.filters': 2,
      **overrides,
    }
  )
  return config


def make_mesh(devices):
  return Mesh(
    np.array(jax.devices()[:devices]), ('data',), axis_types=(AxisType.Auto,)
  )


@functools.cache
def digit_images():
  return sources.digits()


def make_batch(seed, count=16):
  images, labels = zip(*digit_images().train[:200], strict=True)
  chosen = np.random.default_rng(seed).permutation(200)[:count]
  return {
    'image': np.stack(images)[chosen],
    'label': np.array(labels, np.int32)[chosen],
  }


def first_state(config, model, tx, grad_fn, mesh, first_batches):
  """The state of a run that does not resume."""
  described = parts.describe_state(config, model, tx, grad_fn, mesh)
  return parts.make_state(
    config, model, tx, grad_fn, mesh, first_batches, described
  )


def start(
  config,
  *,
  devices=1,
  model=None,
  tx=SGD,
  schedule=CONSTANT,
  make=make_batch,
):
  """A state, the compiled step, and the placement of a batch."""
  mesh = make_mesh(devices)
  place = parts.make_placement(mesh)
  model = model or parts.make_model(config, num_classes=CLASSES)
  grad_fn = methods.make_gradient(model, config, mesh)
  first = [
    place(make(100 + i, config.batch_size)) for i in range(grad_fn.staleness)
  ]
  state = first_state(config, model, tx, grad_fn, mesh, first)
  take = parts.make_step(config, tx, schedule, grad_fn, state, mesh)
  return state, take, place


def arrays(state):
  """All of a state but its keys, in NumPy."""
  return jax.tree.map(np.array, state._replace(key=()))


def copy_of(state):
  """The same, as a step takes the memory of its state."""
  copied = jax.tree.map(
    lambda x: jax.device_put(np.array(x), x.sharding), state._replace(key=())
  )
  return copied._replace(key=jax.random.clone(state.key))


def assert_close(left, right, *, atol=1e-5):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol),
    left,
    right,
  )


def normalized(batch):
  return ((batch['image'] / 255 - 0.305) / 0.376).astype(np.float32)


def loss_by_hand(params, batch_stats, batch, *, is_training=True):
  images = normalized(batch)
  variables = {'params': params, 'batch_stats': batch_stats}
  if not is_training:
    logits = Small().apply(variables, images, train=False)
    right = jax.nn.one_hot(batch['label'], CLASSES)
  else:
    logits, _ = Small().apply(
      variables, images, train=True, mutable=['batch_stats']
    )
    right = 0.9 * jax.nn.one_hot(batch['label'], CLASSES) + 0.1 / CLASSES
  return -(right * jax.nn.log_softmax(logits)).sum(-1).mean()


gradient_by_hand = jax.jit(jax.grad(loss_by_hand))


def descend(params, gradient, rate=RATE):
  return jax.tree.map(lambda w, g: w - rate * g, params, gradient)
