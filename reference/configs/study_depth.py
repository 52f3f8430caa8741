"""Grid D: a ResNet of 20 layers on part of CIFAR-10, for two CPU cores.

    python -m reference.study --workdir=runs/study_depth \\
      --config=reference/configs/study_depth.py \\
      --config.data.folder=/path/that/holds/train/and/test
    python -m reference.study --workdir=runs/study_depth \\
      --config=reference/configs/study_depth.py \\
      --config.data.folder=/path/that/holds/train/and/test \\
      --config.study.batch_sizes="(2048,)" \\
      --config.study.peaks="((16.,32.),)" --config.accumulate=16

The large batch is of 16 micro-batches, so that a BatchNorm sees 128 images at
either batch. 120 epochs are 4,688 steps of 128 and 293 of 2,048: the plain run
fits its images, which it does not in 195. On images of half the side it takes
four minutes of a core. The six variants are 9.8 plain runs by arithmetic; with
two peaks and three seeds a batch is 49, two to three hours of a core.
"""

import ml_collections

from reference.configs import study_cifar10, variants


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  config = study_cifar10.get_config()
  augmented = {'data': {'crop': 'pad', 'flip': True}}
  fast = variants.fast_advprop(0.35, epsilon=4.0)
  overrides = {
    'vanilla': {},
    'augmentation': augmented,
    'conadv': variants.CONADV,
    'conadv_augmentation': {**variants.CONADV, **augmented},
    # The cheapest of grid A2 that gain, with ConAdv's radius.
    'fast_advprop_35': fast,
    'fast_advprop_35_late': {**fast, 'plain_epochs': 84.0},
  }
  with config.unlocked():
    config.name = 'study_depth'
    config.batch_size = 128
    config.epochs = 120.0
    config.data.update({'size': 16, 'crop': 'resize', 'flip': False})
    config.model.update(
      {
        'stage_sizes': (3, 3, 3),  # on 8, 4 and 2 pixels
        'filters': 8,
        'stem': 'strided',
        'dtype': 'float32',
      }
    )
    config.lars.warmup_epochs = 24.0
    config.study.train_images = 5000
    config.study.batch_sizes = (128,)
    config.study.peaks = ((4.0, 8.0),)
    config.study.evaluate_every = 20
    config.study.robust_images = 0
    config.study.sharpness_seeds = 0
    config.study.variants = tuple(overrides)
    config.study.ablations = {}
    config.study.overrides = overrides
  return config
