"""Images as a user of the pipeline brings them, and what is no source."""

import io

import numpy as np
from PIL import Image

from reference.data import sources

CLASSES = ('dark', 'light')


def arrays(config):
  """Squares whose level is their number."""
  images = np.full((12, config.size, config.size, 3), 0, np.uint8)
  images += 20 * np.arange(12, dtype=np.uint8)[:, None, None, None]
  records = [(image, int(i >= 6)) for i, image in enumerate(images)]
  return sources.Source(records[:8], records[8:], CLASSES)


def encoded(config):
  """The same as PNGs, the third of which is cut short."""

  def encode(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, 'PNG')
    return file.getvalue()

  train, held_out = (
    [(encode(image), label) for image, label in split]
    for split in arrays(config)[:2]
  )
  train[2] = train[2][0][:-30], 0
  return sources.Source(train, held_out, CLASSES)


def first_cut_short(config):
  """The same, and the first is."""
  source = encoded(config)
  image, label = source.train[0]
  return source._replace(train=[(image[:-30], label), *source.train[1:]])


def generated(config):
  """Records are numbers, and an image is made when it is read."""

  def read(number):
    return np.full((9, 7, 3), number, np.uint8), number % 2

  return sources.Source(range(8), range(8, 12), list(CLASSES), read, 'mine')


def coloured_digits(config):
  """The digits as RGB."""
  grey = sources.digits()
  train, held_out = (
    [(np.repeat(image, 3, axis=2), label) for image, label in split]
    for split in (grey.train, grey.held_out)
  )
  return sources.Source(train, held_out, grey.classes)


def in_floats(config):
  return sources.Source([(np.zeros((8, 8, 3)), 0)], [0], CLASSES)


def without_channels(config):
  return sources.Source([(np.zeros((8, 8), np.uint8), 0)], [0], CLASSES)


def from_one(config):
  return sources.Source([(np.zeros((8, 8, 3), np.uint8), 2)], [0], CLASSES)


def late_from_one(config):
  records = [(np.zeros((8, 8, 3), np.uint8), 1 + i % 2) for i in range(8)]
  return sources.Source(records, records, CLASSES)


def grey(config):
  return sources.Source([(np.zeros((8, 8, 1), np.uint8), 0)], [0], CLASSES)


def empty(config):
  return sources.Source([], [0], CLASSES)


def no_source(config):
  return []
