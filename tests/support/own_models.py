"""Models as a user of the pipeline writes them, and what is no model."""

import functools

import flax.linen as nn
import jax.numpy as jnp
from flax import nnx


class ViT(nn.Module):
  """Attention between patches of 2 pixels."""

  num_classes: int
  width: int

  @nn.compact
  def __call__(self, images, *, train):
    x = nn.Conv(self.width, (2, 2), (2, 2))(images)
    x = x.reshape(x.shape[0], -1, self.width)
    x += self.param('position', nn.initializers.normal(), (1, *x.shape[1:]))
    y = nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
    x += nn.Dropout(0.3, deterministic=not train)(y)
    return nn.Dense(self.num_classes)(nn.LayerNorm()(x).mean(axis=1))


def vit(*, num_classes, width=8):
  return ViT(num_classes, width)


class Linear(nn.Module):
  """A dense layer."""

  num_classes: int

  @nn.compact
  def __call__(self, images, *, train):
    return nn.Dense(self.num_classes)(images.reshape(images.shape[0], -1))


def linear(*, num_classes):
  return Linear(num_classes)


class Grouped(nnx.Module):
  """A list of convolutions and a norm layer, for images of 8 pixels."""

  def __init__(self, num_classes, *, norm, rngs, channels=1):
    self.convs = nnx.List(
      [nnx.Conv(n, 4, (3, 3), (2, 2), rngs=rngs) for n in (channels, 4)]
    )
    self.norm = norm(4, rngs=rngs)
    self.dropout = nnx.Dropout(0.3, rngs=rngs)
    self.head = nnx.Linear(16, num_classes, rngs=rngs)

  def __call__(self, x):
    for conv in self.convs:
      x = nnx.relu(conv(x))
    return self.head(self.dropout(self.norm(x)).reshape(x.shape[0], -1))


def grouped(*, num_classes, rngs):
  def norm(features, *, rngs):
    return nnx.GroupNorm(features, num_groups=2, rngs=rngs)

  return Grouped(num_classes, norm=norm, rngs=rngs)


def batch_normed(*, num_classes, rngs, channels=1):
  norm = functools.partial(nnx.BatchNorm, momentum=0.9)
  return Grouped(num_classes, norm=norm, rngs=rngs, channels=channels)


class Counting(nn.Module):
  """It keeps what is neither a parameter nor a batch statistic."""

  num_classes: int

  @nn.compact
  def __call__(self, images, *, train):
    self.variable('counts', 'calls', jnp.zeros, ())
    return nn.Dense(self.num_classes)(images.mean(axis=(1, 2)))


def counting(*, num_classes):
  return Counting(num_classes)


def headless(*, num_classes):
  del num_classes
  return ViT(3, 8)


def without_train(*, num_classes):
  return nn.Dense(num_classes)


def without_rngs(*, num_classes):
  return Grouped(num_classes, norm=nnx.BatchNorm, rngs=nnx.Rngs(0))


def no_nnx(*, num_classes, rngs):
  del rngs
  return ViT(num_classes, 8)


def positional(classes):
  return ViT(classes, 8)


not_a_function = 3
