"""The loss of a model on one batch, in training and in evaluation."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from reference.run import models

Batch = dict[str, jax.Array]


def normalize(
  images: jax.Array, config: ml_collections.ConfigDict
) -> jax.Array:
  """Turns uint8 images into float32 of mean 0 and deviation 1.

  Done as late as can be, so that batches wait and travel as uint8.

  Args:
    images: (B, H, W, C) uint8; or float32, normalized already, as an attack
      makes them of normalized images.
    config: the `data` part of a config: `mean` and `std` of each channel, for
      pixels in [0, 1].
  """
  if images.dtype != jnp.uint8:
    return images
  mean = jnp.asarray(config.mean, jnp.float32).reshape(1, 1, 1, -1)
  std = jnp.asarray(config.std, jnp.float32).reshape(1, 1, 1, -1)
  return (images.astype(jnp.float32) / 255.0 - mean) / std


def downscale(images: jax.Array, factor: int) -> jax.Array:
  """Images (B, H, W, C) of means over squares of `factor` pixels a side."""
  if factor == 1:
    return images
  batch, height, width, channels = images.shape
  rows, columns = height // factor, width // factor
  squares = images.reshape(batch, rows, factor, columns, factor, channels)
  return squares.mean((2, 4))


def make_loss(
  model: models.Model, config: ml_collections.ConfigDict
) -> Callable[..., tuple[jax.Array, tuple[Any, jax.Array]]]:
  """The loss of one branch, which knows of no other.

  Returns:
    A function of `(params, batch_stats, batch)`, the `key` of the model's own
    randomness, and `branch`, what the loss is for. It returns `(loss,
    (batch_stats, correct))`: float32 cross entropy with smoothed labels, and
    the int32 count of right answers. For 'attack' the labels are smoothed by
    `config.attack.label_smoothing`, or without that field as for training, and
    the images are downscaled by `config.methods.conadv.attack_downscale`.
  """
  training = config.label_smoothing
  attack = config.attack.get('label_smoothing', training)

  def loss_fn(
    params: Any,
    batch_stats: Any,
    batch: Batch,
    *,
    key: jax.Array | None = None,
    branch: str = 'main',
  ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    images = normalize(batch['image'], config.data)
    if branch == 'attack':
      images = downscale(images, config.methods.conadv.attack_downscale)
    logits, updated = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      images,
      train=True,
      mutable=['batch_stats'],
      # In Flax what has no key of its name, as 'dropout', takes this one.
      rngs=None if key is None else {'params': key},
    )
    labels = optax.smooth_labels(
      jax.nn.one_hot(batch['label'], logits.shape[-1]),
      attack if branch == 'attack' else training,
    )
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    correct = (logits.argmax(-1) == batch['label']).sum(dtype=jnp.int32)
    return loss, (updated.get('batch_stats', {}), correct)

  return loss_fn


def make_evaluation_loss(
  model: models.Model, config: ml_collections.ConfigDict
) -> Callable[[Any, Any, Batch], jax.Array]:
  """The loss with running statistics, as ABSA attacks and measures it.

  Returns:
    A function of `(params, batch_stats, batch)` that returns the float32 mean
    cross entropy. Where the batch has a 'mask', what is False does not count.
  """

  def loss_fn(params: Any, batch_stats: Any, batch: Batch) -> jax.Array:
    logits: Any = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      normalize(batch['image'], config.data),
      train=False,
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(
      logits, batch['label']
    )
    mask = batch.get('mask', True)
    count = jnp.maximum(count_images(batch), 1.0)
    return jnp.where(mask, losses, 0.0).sum() / count

  return loss_fn


def count_images(batch: Batch) -> jax.Array:
  """The images that the evaluation loss is a mean of."""
  mask = batch.get('mask', jnp.ones_like(batch['label'], bool))
  return mask.sum(dtype=jnp.float32)
