"""What a config must hold before a run starts."""

import difflib

import ml_collections
from jax.sharding import Mesh

from reference.data import input_pipeline
from reference.run import methods, models

_CHOICES = {
  'method': tuple(methods.METHODS),
  'queue_memory': ('device', 'host'),
  'data.source': ('digits', 'idx_folder', 'jpeg_folder', 'array_record'),
  'data.crop': tuple(input_pipeline.TRAIN_CROPS),
  'data.eval_crop': tuple(input_pipeline.EVAL_CROPS),
  'data.on_bad_image': ('skip', 'stop'),
  'model.block': tuple(models.BLOCKS),
  'model.stem': ('small', 'strided', 'imagenet'),
  'model.padding': tuple(models.PADDINGS),
  'methods.conadv.targets': ('random', 'none'),
}


def check_choices(config: ml_collections.ConfigDict) -> None:
  """Refuses a field that names what does not exist.

  Raises:
    ValueError: naming the allowed values and the nearest.
  """
  for field, allowed in _CHOICES.items():
    if field.startswith('model.') and config.model.get('build'):
      continue
    given = config
    for name in field.split('.'):
      given = given.get(name)
    if given is None:
      continue  # what a config may leave out
    if field == 'data.source' and ':' in given:
      continue  # a function of the user's own
    if given not in allowed:
      nearest = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.0)
      raise ValueError(
        f'`{field}` must be one of {", ".join(allowed)}. Given {given!r}. '
        f'Likely misspelt: `--config.{field}={nearest[0]}`.'
      )


def check_numbers(config: ml_collections.ConfigDict) -> None:
  """Refuses how often and how many that are none.

  Raises:
    ValueError: naming the field.
  """
  for name in ('log_every', 'evaluate_every', 'checkpoint_every', 'keep'):
    if config.run[name] < 1:
      raise ValueError(
        f'`run.{name}` is a number of '
        f'{"checkpoints" if name == "keep" else "steps"}, 1 or more. Given '
        f'{config.run[name]}. Likely it was to be turned off: take more than '
        f'the run has, `--config.run.{name}=1000000`.'
      )
  for name, value in (
    ('label_smoothing', config.label_smoothing),
    ('attack.label_smoothing', config.attack.get('label_smoothing', 0.0)),
  ):
    if not 0 <= value < 1:
      raise ValueError(
        f'`{name}` is what the true label gives to all, from 0 to less than 1. '
        f'Given {value}. Likely meant in percent: `--config.{name}=0.1`.'
      )


def check_channels(config: ml_collections.ConfigDict) -> None:
  """Refuses AutoAugment of images that are not RGB.

  Raises:
    ValueError: naming what else to take.
  """
  channels = len(config.data.mean)
  if (
    'image_augmented' in methods.METHODS[config.method].images and channels != 3
  ):
    raise ValueError(
      'AutoAugment is for RGB images, of which `data.mean` has three values. '
      f'Given {config.method!r} and {channels}. Likely the images are grey: '
      'take a method without it, `--config.method=conadv`, or RGB images, '
      '`--config=reference/configs/jpeg_folder.py`.'
    )


def check_classes(config: ml_collections.ConfigDict, found: int) -> None:
  """Refuses images of more or fewer classes than the config is for.

  Args:
    config: of the run; one without `data.classes` takes any number.
    found: number of classes of the images.

  Raises:
    ValueError: naming both.
  """
  expected = config.data.get('classes', found)
  if found != expected:
    where = config.data.get('folder', config.data.source)
    raise ValueError(
      f'The images must be of `data.classes` classes, {expected}. Given '
      f'{found} in {where}. Likely a copy broke off or a folder '
      'is no class; if they are meant to be so many, '
      f'`--config.data.classes={found}`.'
    )


def check_batch(batch_size: int, devices: int, *, accumulate: int) -> None:
  """Refuses a batch that does not divide over devices and micro-batches.

  Raises:
    ValueError: naming the nearest batch that does.
  """
  if accumulate < 1:
    raise ValueError(
      '`accumulate` is the number of micro-batches in which a device takes its '
      f'share of a batch, 1 or more. Given {accumulate}. Take '
      '`--config.accumulate=1` for one.'
    )
  parts = devices * accumulate
  if batch_size % parts:
    nearest = max(parts, round(batch_size / parts) * parts)
    raise ValueError(
      'Every device takes the same share of a batch, in micro-batches of one '
      'size, so `batch_size` must be a multiple of the number of devices times '
      f'`accumulate`. Given {batch_size} on {devices} devices with '
      f'accumulate={accumulate}. Take the nearest: '
      f'`--config.batch_size={nearest}`.'
    )


def check_groups(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses to compare the gradients of groups where there is only one.

  Raises:
    ValueError: naming how to have several.
  """
  if methods.compares_groups(config) and methods.groups(config, mesh) < 2:
    field = (
      'noise_scale=True' if config.noise_scale else f'method={config.method}'
    )
    raise ValueError(
      f'`{field}` compares the gradients of several groups, devices or '
      'micro-batches. Given one device and accumulate=1. Take eight '
      'micro-batches, `--config.accumulate=8`, and a batch of as many '
      'BatchNorm groups.'
    )


def check_queue(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses a queue on the host that a TPU's compiler does not leave there.

  Raises:
    ValueError: naming what to take instead.
  """
  if (
    config.queue_memory == 'host'
    and config.accumulate > 1
    and mesh.devices.flat[0].platform == 'tpu'
  ):
    raise ValueError(
      '`queue_memory=host` saves nothing beside micro-batches on a TPU: its '
      'compiler moves all of the queue through the memory of the device, or '
      f'refuses it. Given accumulate={config.accumulate} on '
      f'{mesh.devices.flat[0].device_kind}. Take more devices, '
      '`--config.accumulate=1`, or leave the queue there, '
      '`--config.queue_memory=device`.'
    )
