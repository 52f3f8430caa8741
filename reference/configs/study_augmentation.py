"""Grid C: ConAdv and augmentation, with steps enough for both.

    apt-get install dataset-fashion-mnist    # or the four files from elsewhere
    python -m reference.study --workdir=runs/study_augmentation \\
      --config=reference/configs/study_augmentation.py

Not yet run. Images, tuning and measures are those of `study_fashion_mnist.py`,
with twice the channels and six times the epochs.
"""

import ml_collections

from reference.configs import study_fashion_mnist


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  config = study_fashion_mnist.get_config()
  of_grid_a = config.study.overrides.to_dict()
  shared = ('vanilla', 'augmentation', 'conadv', 'conadv_augmentation')
  overrides = {
    **{name: of_grid_a[name] for name in shared},
    'advprop_augmentation': {
      **of_grid_a['advprop'],
      **of_grid_a['augmentation'],
    },
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
