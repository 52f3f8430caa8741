"""Evaluation against a loop over the images, whatever the hosts and devices."""

import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from reference.data import input_pipeline, jpeg, sources
from reference.run import evaluation, parts

CLASSES = 3


class Model(nn.Module):
  """A dense layer with the ResNets' call."""

  @nn.compact
  def __call__(self, x, *, train):
    return nn.Dense(CLASSES)(x.reshape(x.shape[0], -1))


def make_config(batch_size):
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'method': 'vanilla',
      'batch_size': batch_size,
      'data': {
        'size': 4,
        'eval_crop': 'resize',
        'on_bad_image': 'skip',
        'mean': (0.4, 0.5),
        'std': (0.2, 0.3),
      },
      'run': {'threads': 1},
    }
  )


def make_source(count, bad=()):
  rng = np.random.default_rng(count)
  images = rng.integers(256, size=(count, 4, 4, 2), dtype=np.uint8)
  labels = rng.integers(CLASSES, size=count).tolist()

  def read(number):
    if number in bad:
      raise jpeg.BadImageError(f'{number}.jpg', 'Premature end')
    return images[number], labels[number]

  return sources.Source([], range(count), tuple('abc'), read)


def evaluated(source, *, batch_size=8, hosts=1):
  """The result, and the parameters that it is of."""
  config = make_config(batch_size)
  model = Model()
  params = model.init(jax.random.key(0), jnp.zeros((1, 4, 4, 2)), train=False)[
    'params'
  ]
  of_hosts = [
    input_pipeline.held_out_batches(
      source, config, batch_size=batch_size, skipped={}, host=host, hosts=hosts
    )
    for host in range(hosts)
  ]
  # As the devices of all hosts see them.
  batches = (
    jax.tree.map(lambda *x: np.concatenate(x), *part)
    for part in zip(*of_hosts, strict=True)
  )
  place = parts.make_placement(parts.make_mesh(batch_size))
  state = types.SimpleNamespace(params=params, model_state={})
  return evaluation.make_evaluation(model, config, place)(
    state, batches
  ), params


@pytest.mark.parametrize('hosts', [1, 4])
@pytest.mark.parametrize(
  ('count', 'bad'), [(1, ()), (3, ()), (8, ()), (21, ()), (21, {0, 8, 20})]
)
def test_every_image_counts_once_even_if_there_are_fewer_than_devices(
  count, bad, hosts
):
  source = make_source(count, bad)
  result, params = evaluated(source, hosts=hosts)
  kernel = np.asarray(params['Dense_0']['kernel'], np.float64)
  readable = [number for number in range(count) if number not in bad]
  losses, right = [], 0
  for number in readable:
    image, label = source.read(number)
    logits = ((image / 255 - [0.4, 0.5]) / [0.2, 0.3]).ravel() @ kernel
    losses.append(np.log(np.exp(logits).sum()) - logits[label])
    right += logits.argmax() == label
  assert result['held_out_images'] == len(readable)
  assert result['held_out_accuracy'] == right / len(readable)
  assert result['held_out_loss'] == pytest.approx(np.mean(losses), rel=1e-4)


@pytest.mark.parametrize('hosts', [1, 2])
def test_no_readable_image_is_explained(hosts):
  with pytest.raises(ValueError, match=r'[Aa]t least one'):
    evaluated(make_source(3, bad={0, 1, 2}), hosts=hosts)
