"""Predictions of a linear model, against NumPy and closed forms."""

import ml_collections
import numpy as np
import pytest
from own_models import Linear

from reference.command import Mistake
from reference.data import input_pipeline, jpeg, sources
from reference.run import parts
from reference.tools import predictions

MEAN, STD = (0.4, 0.5), (0.2, 0.3)


def make_config():
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'data': {
        'size': 4,
        'eval_crop': 'resize',
        'on_bad_image': 'skip',
        'mean': MEAN,
        'std': STD,
      },
      'run': {'threads': 1},
    }
  )


def make_images(count, labels):
  rng = np.random.default_rng(count)
  images = rng.integers(256, size=(count, 4, 4, 2), dtype=np.uint8)
  return images, rng.choice(labels, size=count).tolist()


def make_params(classes):
  rng = np.random.default_rng(classes)
  kernel = rng.normal(size=(32, classes)) / 4
  layer = {'kernel': kernel, 'bias': rng.normal(size=classes)}
  return {'Dense_0': {name: x.astype('float32') for name, x in layer.items()}}


def logits_of(params, pixels):
  """By hand, of pixels from 0 to 1."""
  normalized = (pixels - np.array(MEAN)) / np.array(STD)
  layer = params['Dense_0']
  return normalized.reshape(len(pixels), -1) @ layer['kernel'] + layer['bias']


def see(images, labels, *, classes, among, bad=(), show=(), adversary=None):
  def read(number):
    if number in bad:
      raise jpeg.BadImageError(f'{number}.jpg', 'Premature end')
    return images[number], labels[number]

  source = sources.Source(
    train=[],
    held_out=range(len(images)),
    classes=tuple(map(str, range(classes))),
    read=read,
  )
  config = make_config()
  predict = predictions.make_predict(
    Linear(classes),
    config,
    make_params(classes),
    {},
    parts.make_placement(parts.make_mesh(8)),
    among=among,
    adversary=adversary,
  )
  batches = input_pipeline.held_out_batches(
    source, config, batch_size=8, skipped={}
  )
  return predict(batches, show)


def test_every_readable_image_once_and_in_order():
  images, labels = make_images(21, range(6))
  bad = {0, 8, 20}
  seen = see(
    images, labels, classes=6, among=range(6), bad=bad, show=[3, 8, 19]
  )
  there = [number for number in range(21) if number not in bad]
  assert seen.numbers.tolist() == there
  assert seen.all.labels.tolist() == [labels[x] for x in there]
  logits = logits_of(make_params(6), images[there] / 255)
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  order = np.argsort(-logits, axis=1)
  np.testing.assert_array_equal(seen.all.top, order[:, :5])
  np.testing.assert_allclose(seen.all.confidence, p.max(axis=1), rtol=1e-4)
  rows = np.arange(len(there))
  np.testing.assert_allclose(
    seen.all.losses, -np.log(p[rows, seen.all.labels]), rtol=1e-3
  )
  assert seen.among is None
  # The eighth could not be read.
  assert sorted(seen.shown) == [3, 19]
  for number, pixels in seen.shown.items():
    np.testing.assert_allclose(pixels, images[number] / 255, atol=1e-6)


def test_a_part_of_the_classes_competes_alone():
  images, labels = make_images(19, (1, 4))
  seen = see(images, labels, classes=6, among=(1, 4))
  logits = logits_of(make_params(6), images / 255)
  np.testing.assert_array_equal(seen.all.top[:, 0], logits.argmax(axis=1))
  part = logits[:, [1, 4]]
  winner = np.array([1, 4])[part.argmax(axis=1)]
  np.testing.assert_array_equal(seen.among.top[:, 0], winner)
  p = np.exp(part) / np.exp(part).sum(axis=1, keepdims=True)
  np.testing.assert_allclose(seen.among.confidence, p.max(axis=1), rtol=1e-4)
  assert not np.array_equal(seen.all.top[:, 0], winner)


def test_the_strength_of_an_attack():
  assert predictions.make_adversary(0.0, 20) is None
  assert predictions.make_adversary(0.5, 3) == (0.5, 3)
  with pytest.raises(Mistake, match=r'Given 4\..*--epsilon=0\.01569`'):
    predictions.make_adversary(4.0, 20)
  with pytest.raises(Mistake, match=r'1 or more\. Given 0'):
    predictions.make_adversary(0.1, 0)


@pytest.mark.parametrize('epsilon', [0.02, 0.3])
def test_the_attack_goes_to_the_corner_of_the_ball(epsilon):
  """Of two classes the gradient of a linear model has one sign everywhere."""
  images, labels = make_images(13, (0, 1))
  seen = see(
    images,
    labels,
    classes=2,
    among=(0, 1),
    show=range(13),
    adversary=predictions.Adversary(epsilon, 20),
  )
  params = make_params(2)
  towards_1 = np.diff(params['Dense_0']['kernel'], axis=1)[:, 0]
  away = np.where(np.array(labels) == 0, 1, -1)
  moved = images / 255 + epsilon * (
    away[:, None] * np.sign(towards_1)[None]
  ).reshape(-1, 4, 4, 2)
  moved = np.clip(moved, 0, 1)
  for number in range(13):
    np.testing.assert_allclose(seen.shown[number], moved[number], atol=1e-5)
  logits = logits_of(params, moved)
  np.testing.assert_array_equal(seen.all.top[:, 0], logits.argmax(axis=1))
  clean = logits_of(params, images / 255).argmax(axis=1) == labels
  assert seen.all.right.sum() < clean.sum()
