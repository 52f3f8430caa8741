"""An evaluation of a linear model on files, one of which is damaged."""

import ml_collections
import numpy as np
from PIL import Image

from reference.data import evaluation_sets
from reference.run import trained
from reference.tools import examination, predictions

CLASSES = ('ant', 'bee', 'cat')
# Two may have one.
NAMES = ('insect', 'insect', 'tabby')
IMAGES = 30


def make_model():
  rng = np.random.default_rng(0)
  kernel = rng.normal(size=(4 * 4 * 3, 3)).astype(np.float32) / 4
  return trained.Trained(
    step=1,
    config=ml_collections.ConfigDict(
      {
        'seed': 0,
        'model': {'build': 'own_models:linear'},
        'data': {
          'source': 'jpeg_folder',
          'folder': '',
          'size': 4,
          'eval_crop': 'resize',
          'on_bad_image': 'stop',
          'mean': [0.5] * 3,
          'std': [0.25] * 3,
        },
      }
    ),
    classes=CLASSES,
    names=NAMES,
    params={'Dense_0': {'kernel': kernel, 'bias': np.zeros(3, np.float32)}},
    batch_stats={},
    metrics={},
    record={},
  )


def write_images(folder):
  """Ten images of each class, in the order in which they are read."""
  rng = np.random.default_rng(1)
  images = rng.integers(256, size=(IMAGES, 4, 4, 3), dtype=np.uint8)
  for number, image in enumerate(images):
    path = folder / CLASSES[number // 10] / f'{number:02}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(path)
  return images


def test_rows_classes_and_examples(tmp_path):
  images, model = write_images(tmp_path), make_model()
  damaged = tmp_path / 'bee' / '13.png'
  damaged.write_bytes(damaged.read_bytes()[:40])
  found = examination.examine(
    model,
    evaluation_sets.open_set(str(tmp_path), CLASSES, model.config.data),
    batch_size=8,
    adversary=predictions.Adversary(0.1, 2),
  )
  there = np.delete(np.arange(IMAGES), 13)
  labels = there // 10
  kernel = model.params['Dense_0']['kernel']
  pixels = images.reshape(IMAGES, -1)[there] / 255
  logits = (pixels - 0.5) / 0.25 @ kernel
  p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  said, confidence = p.argmax(axis=1), p.max(axis=1)

  clean, attacked = found.rows
  assert (clean['images'], clean['skipped'], clean['classes']) == (29, 1, 3)
  assert (clean['epsilon'], clean['steps']) == (0.0, 0)
  # Among three classes the label is always one of five.
  assert 'top_5' not in clean
  assert (attacked['epsilon'], attacked['steps']) == (0.1, 2)
  np.testing.assert_allclose(clean['top_1'], np.mean(said == labels))
  assert attacked['top_1'] < clean['top_1']
  assert list(found.skipped) == [str(damaged)]

  shares = [np.mean(said[labels == label] == label) for label in range(3)]
  worst_first = [CLASSES[label] for label in np.argsort(shares, kind='stable')]
  assert [row['class'] for row in found.classes] == worst_first
  for row in found.classes:
    label = CLASSES.index(row['class'])
    assert row['name'] == NAMES[label]
    for name, count in zip(
      NAMES, np.bincount(said[labels == label]), strict=True
    ):
      if name != NAMES[label] and count:
        assert f'{name} ({count})' in row['taken_for']
  assert {row['class']: row['right'] for row in found.classes} == dict(
    zip(CLASSES, shares, strict=True)
  )

  wrong = np.flatnonzero(said != labels)
  order = wrong[np.argsort(-confidence[wrong])][:16]
  mistakes = found.sections['The most confident mistakes']
  assert len(mistakes) == len(order)
  for example, at in zip(mistakes, order, strict=True):
    np.testing.assert_allclose(example.pixels, images[there[at]] / 255)
    assert example.label == NAMES[labels[at]]
    assert example.predicted == NAMES[said[at]]
    assert not example.right
    np.testing.assert_allclose(example.confidence, confidence[at], rtol=1e-4)

  spaced = found.sections['Evenly spaced']
  shown = found.sections['Evenly spaced, under PGD-2, 0.1']
  numbers = np.linspace(0, IMAGES - 1, 16).astype(int)
  numbers = numbers[numbers != 13]
  assert len(spaced) == len(shown) == len(numbers)
  for example, moved, number in zip(spaced, shown, numbers, strict=True):
    image = images[number] / 255
    np.testing.assert_allclose(example.pixels, image, atol=1e-6)
    assert example.label == moved.label == NAMES[number // 10]
    distance = np.abs(moved.pixels - image).max()
    assert 0.05 < distance < 0.1001
