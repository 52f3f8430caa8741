"""Grid D: a ResNet of 20 layers on part of CIFAR-10 as JPEGs, two CPU cores.

    python -m reference.study --workdir=runs/study_depth \\
      --config=reference/configs/study_depth.py \\
      --config.data.folder=/path/that/holds/train/and/test
    python -m reference.study --workdir=runs/study_depth \\
      --config=reference/configs/study_depth.py \\
      --config.data.folder=/path/that/holds/train/and/test \\
      --config.study.batch_sizes="(2048,)" \\
      --config.study.peaks="((8.,16.),)" --config.accumulate=16

Not yet run. The large batch is of 16 micro-batches, so that a BatchNorm sees
128 images at either batch. 60 epochs are 2,344 steps of 128 and 147 of 2,048. A
plain run is 300,000 images forward and backward, 5.6 minutes of a core at the
900 images a second that this net takes. The six variants are 10.2 plain runs by
arithmetic. With two peaks and three seeds a batch is 51, and both batches take
9.5 hours of a core.
"""

import ml_collections

from reference.configs import study_cifar10, variants


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  config = study_cifar10.get_config()
  augmented = {'data': {'crop': 'pad', 'flip': True}}
  overrides = {
    'vanilla': {},
    'augmentation': augmented,
    'conadv': variants.CONADV,
    'conadv_augmentation': {**variants.CONADV, **augmented},
    # The best two of grid A2, with ConAdv's radius.
    'fast_advprop_35': variants.fast_advprop(0.35, epsilon=4.0),
    'fast_advprop_50': variants.fast_advprop(0.5, epsilon=4.0),
  }
  with config.unlocked():
    config.name = 'study_depth'
    config.batch_size = 128
    config.epochs = 60.0
    config.data.update({'crop': 'resize', 'flip': False})
    config.model.update(
      {
        'stage_sizes': (3, 3, 3),  # on 16, 8 and 4 pixels
        'filters': 16,
        'stem': 'strided',
        'dtype': 'float32',
      }
    )
    config.lars.warmup_epochs = 12.0
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
