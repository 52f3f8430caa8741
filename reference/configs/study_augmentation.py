"""Grid C: ConAdv and augmentation, with steps enough for both.

    apt-get install dataset-fashion-mnist    # or the four files from elsewhere
    python -m reference.study --workdir=runs/study_augmentation \\
      --config=reference/configs/study_augmentation.py

Images, tuning and measures are those of `study_fashion_mnist.py`. Channels and
epochs are so many that the plain run fits its augmented images.
"""

import ml_collections

from reference.configs import study_fashion_mnist, variants


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  config = study_fashion_mnist.get_config()
  augmented = {'data': {'crop': 'pad', 'flip': True}}
  overrides = {
    'vanilla': {},
    'augmentation': augmented,
    'conadv': variants.CONADV,
    'conadv_augmentation': {**variants.CONADV, **augmented},
    'advprop_augmentation': {'method': 'advprop', **augmented},
  }
  with config.unlocked():
    config.name = 'study_augmentation'
    config.epochs = 360.0
    config.lars.warmup_epochs = 72.0
    config.model.filters = 32
    config.study.batch_sizes = (500,)
    config.study.peaks = ((8.0, 16.0, 32.0),)
    config.study.evaluate_every = 60
    config.study.sharpness_seeds = 0
    config.study.variants = tuple(overrides)
    config.study.ablations = {}
    config.study.overrides = overrides
  return config
