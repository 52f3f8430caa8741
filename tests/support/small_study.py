"""Grid A on the digits, for the tests of the study."""

import jax

from reference.configs import study_fashion_mnist


def make_config(**fields):
  """A config, small enough to run in a second or two."""
  config = study_fashion_mnist.get_config()
  config.update_from_flattened_dict(
    {
      'data.source': 'digits',
      'data.size': 8,
      'epochs': 2.0,
      'lars.warmup_epochs': 0.5,
      'study.train_images': 160,
      'study.validation_images': 80,
      'study.batch_sizes': (40,),
      'study.peaks': ((2.0, 8.0),),
      'study.seeds': 2,
      'study.evaluate_every': 1,
      'study.robust_images': 20,
      'study.sharpness_seeds': 0,
      'study.variants': ('vanilla',),
      **fields,
    }
  )
  config.model = {'build': 'digit_steps:Small'}
  config.study.ablations = {}
  return config


def use_one_device(monkeypatch):
  """As on a machine that has one."""
  [device, *_] = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  return device
