"""What a config must hold before a run starts."""

import difflib
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import ml_collections
from jax.sharding import Mesh

from reference.command import Mistake
from reference.configs import methods as method_numbers
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
  'model.dtype': ('float32', 'bfloat16', 'float16'),
  'methods.conadv.targets': ('random', 'none'),
  'methods.diffusion.graph': ('ring', 'complete'),
}
# Of the images of our own sources.
_CHANNELS = {'digits': 1, 'idx_folder': 1, 'jpeg_folder': 3, 'array_record': 3}


class _Rule(NamedTuple):
  """What a number must be.

  Attributes:
    fields: of the config, one or several; what is left out is not checked.
    holds: whether a value is such.
    words: what it is.
    likely: how it came about, and the flag that mends it.
  """

  fields: str
  holds: Callable[[Any], bool]
  words: str
  likely: str


_MISTYPED = 'Likely mistyped: `--config.{field}='
_RULES = (
  _Rule(
    'run.log_every run.evaluate_every run.checkpoint_every',
    lambda x: x >= 1,
    'a number of steps, 1 or more',
    'Likely it was to be turned off: take more than the run has, '
    '`--config.{field}=1000000`.',
  ),
  _Rule(
    'run.keep',
    lambda x: x >= 1,
    'a number of checkpoints, 1 or more',
    'Likely all were to be kept: `--config.{field}=1000000`.',
  ),
  _Rule(
    'run.threads',
    lambda x: x >= 1,
    'a number of threads, 1 or more',
    _MISTYPED + '4`.',
  ),
  _Rule(
    'batch_size',
    lambda x: x >= 1,
    'a number of images over all devices, 1 or more',
    _MISTYPED + '128`.',
  ),
  _Rule(
    'epochs',
    lambda x: 0 < x < math.inf,
    'how many times every image is trained on, more than 0',
    'Likely the run was only to be evaluated: `python -m reference.evaluate '
    '--workdir=`. Else `--config.{field}=30.0`.',
  ),
  _Rule(
    'plain_epochs',
    lambda x: 0 <= x < math.inf,
    'how many epochs are trained without the method at first, 0 or more',
    'For the method from the first step on: `--config.{field}=0.0`.',
  ),
  _Rule(
    'seed',
    lambda x: 0 <= x < 2**32,
    'an integer from 0 to 4294967295',
    _MISTYPED + '0`.',
  ),
  _Rule(
    'staleness',
    lambda x: x >= 0,
    'a number of steps, 0 or more',
    _MISTYPED + '1`.',
  ),
  _Rule(
    'label_smoothing attack.label_smoothing',
    lambda x: 0 <= x < 1,
    'what the true label gives to all, from 0 to less than 1',
    'Likely meant in percent: `--config.{field}=0.1`.',
  ),
  _Rule(
    'data.size',
    lambda x: x >= 1,
    'a number of pixels, 1 or more',
    _MISTYPED + '224`.',
  ),
  _Rule(
    'data.mean',
    lambda x: all(0 <= part < math.inf for part in x),
    'the mean of each channel, of pixels from 0 to 1',
    'Likely a fraction, which is no literal: `--config.{field}="(0.5,)"`.',
  ),
  _Rule(
    'data.std',
    lambda x: all(0 < part < math.inf for part in x),
    'what pixels from 0 to 1 are divided by, more than 0',
    'Likely they are not to be scaled: 1 for each channel, '
    '`--config.{field}="(1.0,)"`.',
  ),
  _Rule(
    'model.stage_sizes',
    lambda x: (
      bool(x) and all(isinstance(part, int) and part >= 0 for part in x)
    ),
    'the number of blocks of each stage, 0 or more',
    _MISTYPED + '"(3, 4, 6, 3)"`.',
  ),
  _Rule(
    'model.filters',
    lambda x: x >= 1,
    'a number of channels, 1 or more',
    _MISTYPED + '64`.',
  ),
  _Rule(
    'attack.epsilon methods.absa.epsilon methods.fast_advprop.epsilon',
    lambda x: 0 <= x < math.inf,
    'the radius of the attack, 0 or more',
    'Likely the attack was to be turned off: `--config.method=vanilla`.',
  ),
  _Rule(
    'attack.start_from_clean',
    lambda x: 0 <= x <= 1,
    'a probability, from 0 to 1',
    'Likely meant in percent: `--config.{field}=0.2`.',
  ),
  _Rule(
    'methods.conadv.adversarial_fraction '
    'methods.fast_advprop.adversarial_fraction '
    'methods.absa.adversarial_fraction',
    lambda x: 0 < x <= 1,
    'a part of the batch, more than 0 and up to 1',
    'Likely meant in percent: `--config.{field}=0.2`.',
  ),
  _Rule(
    'methods.conadv.every',
    lambda x: x >= 1,
    'one batch of how many is attacked, 1 or more',
    'For all of them write `--config.{field}=1`.',
  ),
  _Rule(
    'methods.conadv.attack_downscale methods.conadv.adversarial_downscale',
    lambda x: x >= 1,
    'what the sides of images are divided by, 1 or more',
    'For images as they are write `--config.{field}=1`.',
  ),
  _Rule(
    'lars.peak',
    lambda x: 0 < x < math.inf,
    'the largest learning rate, more than 0',
    'Below 0 a run climbs its loss. ' + _MISTYPED + '8.0`.',
  ),
  _Rule(
    'lars.warmup_epochs',
    lambda x: 0 <= x < math.inf,
    'a number of epochs, 0 or more',
    'Likely it was to be turned off: `--config.{field}=0.0`.',
  ),
  _Rule(
    'lars.power',
    lambda x: 0 < x < math.inf,
    'the exponent of the decay, more than 0',
    _MISTYPED + '2.0`.',
  ),
  _Rule(
    'lars.end lars.weight_decay',
    lambda x: 0 <= x < math.inf,
    'a number of 0 or more',
    _MISTYPED + '0.0001`.',
  ),
  _Rule(
    'lars.momentum',
    lambda x: 0 <= x < 1,
    'a number from 0 to less than 1',
    'Likely the rest to 1 was meant: `--config.{field}=0.9`.',
  ),
)


def _get(config: ml_collections.ConfigDict, field: str) -> Any:
  """A field; None for what a config may leave out."""
  value = config
  for name in field.split('.'):
    value = None if value is None else value.get(name)
  return value


def check_choices(config: ml_collections.ConfigDict) -> None:
  """Refuses a field that names what does not exist.

  Raises:
    Mistake: naming the allowed values and the nearest.
  """
  for field, allowed in _CHOICES.items():
    if field.startswith('model.') and config.model.get('build'):
      continue
    given = _get(config, field)
    if given is None:
      continue
    if field == 'data.source' and ':' in given:
      continue  # a function of the user's own
    if given not in allowed:
      nearest = difflib.get_close_matches(str(given), allowed, n=1, cutoff=0.0)
      raise Mistake(
        f'`{field}` must be one of {", ".join(allowed)}. Given {given!r}. '
        f'Likely misspelt: `--config.{field}={nearest[0]}`.'
      )
  _check_price(config)
  _check_plain_epochs(config)


def _check_plain_epochs(config: ml_collections.ConfigDict) -> None:
  """Refuses plain epochs before what is plain, or whose state is another."""
  given = config.get('plain_epochs', 0.0)
  if not given:
    return
  method = methods.METHODS[config.method]
  if not method.branches or method.agents or method.compares:
    raise Mistake(
      '`plain_epochs` come before a method that attacks, of one model, whose '
      f'optimizer is LARS alone. Given plain_epochs={given} with '
      f'method={config.method}. Take `--config.plain_epochs=0.0`, or for '
      'example `--config.method=fast_advprop`.'
    )
  if given >= config.epochs:
    raise Mistake(
      'The method sets in after `plain_epochs`, and before the run is over. '
      f'Given {given} of {config.epochs} epochs. Likely the run was made '
      f'shorter alone: `--config.plain_epochs={0.7 * config.epochs:g}`.'
    )


def _check_price(config: ml_collections.ConfigDict) -> None:
  """Refuses a cheaper attack where there is none, and parts of pixels."""
  numbers = config.methods.conadv
  sides = numbers.adversarial_downscale, numbers.attack_downscale
  if config.method == 'conadv_reuse' and numbers.every > 1:
    share = round(1 / numbers.every, 3)
    raise Mistake(
      '`conadv_reuse` has no attack pass that could be left out. Given '
      f'methods.conadv.every={numbers.every}. Attack a part of each batch: '
      f'`--config.methods.conadv.adversarial_fraction={share}`.'
    )
  if config.method == 'conadv_reuse' and sides != (1, 1):
    raise Mistake(
      '`conadv_reuse` attacks with the gradient of the clean pass, which is at '
      'images as they are. Given methods.conadv.adversarial_downscale='
      f'{sides[0]} and attack_downscale={sides[1]}. An attack pass can be on '
      'smaller ones: `--config.method=conadv`.'
    )
  if config.method == 'fast_advprop':
    for name, default in method_numbers.make_section()['conadv'].items():
      # Which is of every method that attacks.
      if name != 'shared_norm' and numbers[name] != default:
        raise Mistake(
          '`fast_advprop` attacks with the gradient that it trains with, by '
          'the numbers of `methods.fast_advprop` alone. Given methods.conadv.'
          f'{name}={numbers[name]}. Likely meant for another method: '
          '`--config.method=conadv`; or, for example, '
          '`--config.methods.fast_advprop.adversarial_fraction=0.35`.'
        )
  if methods.METHODS[config.method].branches and config.data.size % math.prod(
    sides
  ):
    raise Mistake(
      'Downscaled images are means of whole squares of pixels. Given '
      f'data.size={config.data.size}, methods.conadv.adversarial_downscale='
      f'{sides[0]} and attack_downscale={sides[1]}. Take divisors of the size: '
      '`--config.methods.conadv.adversarial_downscale=2`.'
    )


def check_numbers(config: ml_collections.ConfigDict) -> None:
  """Refuses numbers out of their range.

  Raises:
    Mistake: naming the field.
  """
  for rule in _RULES:
    for field in rule.fields.split():
      value = _get(config, field)
      if value is None or (
        field.startswith('model.') and config.model.get('build')
      ):
        continue
      try:
        holds = rule.holds(value)
      except TypeError:
        holds = False
      if not holds:
        raise Mistake(
          f'`{field}` is {rule.words}. Given {value!r}. '
          + rule.likely.format(field=field)
        )


def check_channels(config: ml_collections.ConfigDict) -> None:
  """Refuses a normalisation, or AutoAugment, that does not fit the images.

  Raises:
    Mistake: naming what else to take.
  """
  mean, std = config.data.mean, config.data.std
  source = config.data.source
  channels = _CHANNELS.get(source, len(mean))
  if {len(mean), len(std)} != {channels}:
    means, stds = (
      ((0.5,), (0.25,))
      if channels == 1
      else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    raise Mistake(
      '`data.mean` and `data.std` have a value for each channel of the images, '
      f'{channels} with data.source={source}. Given {mean} and {std}. Likely '
      'they are of grey images, or of RGB, and these are not: '
      f"`--config.data.mean='{means}' --config.data.std='{stds}'`."
    )
  if (
    'image_augmented' in methods.METHODS[config.method].images and channels != 3
  ):
    raise Mistake(
      'AutoAugment is for RGB images, of which `data.mean` has three values. '
      f'Given {config.method!r} and {channels}. Likely the images are grey: '
      'take a method without it, `--config.method=conadv`, or RGB images, '
      '`--config=reference/configs/jpeg_folder.py`.'
    )


def check_warmup(
  config: ml_collections.ConfigDict, *, warmup: int, steps: int
) -> None:
  """Refuses a warm-up that is not over before the run is.

  Args:
    config: of the run.
    warmup: its steps.
    steps: of the whole run.

  Raises:
    Mistake: naming both.
  """
  if warmup >= steps:
    raise Mistake(
      'The warm-up must be over before the run is. Given `epochs` '
      f'{config.epochs}, which are {steps} step(s), and `lars.warmup_epochs` '
      f'{config.lars.warmup_epochs}, which are {warmup}. Likely the run was '
      'made shorter alone: `--config.lars.warmup_epochs=0.0`.'
    )


def check_plain_steps(
  config: ml_collections.ConfigDict, *, plain: int, steps: int
) -> None:
  """Refuses plain epochs that are no step, or all of them.

  Args:
    config: of the run.
    plain: the steps of its plain epochs.
    steps: of the whole run.

  Raises:
    Mistake: naming both.
  """
  given = config.get('plain_epochs', 0.0)
  if given and not 0 < plain < steps:
    raise Mistake(
      '`plain_epochs` are some steps of a run, and its method has others. '
      f'Given {given} of {config.epochs} epochs, which are {plain} of {steps} '
      'step(s). Likely the run is too short for it: '
      '`--config.plain_epochs=0.0`.'
    )


def check_classes(config: ml_collections.ConfigDict, found: int) -> None:
  """Refuses images of more or fewer classes than the config is for.

  Args:
    config: of the run; one without `data.classes` takes any number.
    found: number of classes of the images.

  Raises:
    Mistake: naming both.
  """
  expected = config.data.get('classes', found)
  if found != expected:
    where = config.data.get('folder', config.data.source)
    raise Mistake(
      f'The images must be of `data.classes` classes, {expected}. Given '
      f'{found} in {where}. Likely a copy broke off or a folder '
      'is no class; if they are meant to be so many, '
      f'`--config.data.classes={found}`.'
    )


def check_batch(batch_size: int, devices: int, *, accumulate: int) -> None:
  """Refuses a batch that does not divide over devices and micro-batches.

  Raises:
    Mistake: naming the nearest batch that does.
  """
  if accumulate < 1:
    raise Mistake(
      '`accumulate` is the number of micro-batches in which a device takes its '
      f'share of a batch, 1 or more. Given {accumulate}. Take '
      '`--config.accumulate=1` for one.'
    )
  parts = devices * accumulate
  if batch_size % parts:
    nearest = max(parts, round(batch_size / parts) * parts)
    raise Mistake(
      'Every device takes the same share of a batch, in micro-batches of one '
      'size, so `batch_size` must be a multiple of the number of devices times '
      f'`accumulate`. Given {batch_size} on {devices} devices with '
      f'accumulate={accumulate}. Take the nearest: '
      f'`--config.batch_size={nearest}`.'
    )


def check_on(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses what does not go on the devices of a mesh.

  Raises:
    Mistake: when groups, queue or agents do not.
  """
  check_groups(config, mesh)
  check_queue(config, mesh)
  check_agents(config)


def check_groups(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses to compare the gradients of groups where there is only one.

  Raises:
    Mistake: naming how to have several.
  """
  if config.noise_scale and methods.METHODS[config.method].copies:
    raise Mistake(
      '`noise_scale=True` compares groups of different images. Given '
      f'method={config.method}, whose groups hold copies of the same ones. '
      'Leave it out, or take `--config.method=vanilla`.'
    )
  if methods.compares_groups(config) and methods.groups(config, mesh) < 2:
    field = (
      'noise_scale=True' if config.noise_scale else f'method={config.method}'
    )
    raise Mistake(
      f'`{field}` compares the gradients of several groups, devices or '
      'micro-batches. Given one device and accumulate=1. Take eight '
      'micro-batches, `--config.accumulate=8`, and a batch of as many '
      'BatchNorm groups.'
    )


def check_agents(config: ml_collections.ConfigDict) -> None:
  """Refuses what asks for one gradient, or one queue, of agents.

  Raises:
    Mistake: naming what to leave out.
  """
  given = [
    name
    for name, is_asked in (
      ('noise_scale=True', config.noise_scale),
      ('queue_memory=host', config.queue_memory == 'host'),
    )
    if is_asked
  ]
  if methods.METHODS[config.method].agents and given:
    raise Mistake(
      f'`method={config.method}` gives each device parameters, gradient and '
      f'queue of its own. Given also {given[0]}, which is of one for all. '
      'Leave it out, or take `--config.method=conadv`.'
    )


def check_queue(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
  """Refuses a queue on the host that a TPU's compiler does not leave there.

  Raises:
    Mistake: naming what to take instead.
  """
  if (
    config.queue_memory == 'host'
    and config.accumulate > 1
    and mesh.devices.flat[0].platform == 'tpu'
  ):
    raise Mistake(
      '`queue_memory=host` saves nothing beside micro-batches on a TPU: its '
      'compiler moves all of the queue through the memory of the device, or '
      f'refuses it. Given accumulate={config.accumulate} on '
      f'{mesh.devices.flat[0].device_kind}. Take more devices, '
      '`--config.accumulate=1`, or leave the queue there, '
      '`--config.queue_memory=device`.'
    )
