"""Grid C: ConAdv and augmentation, with steps enough for both.

    apt-get install dataset-fashion-mnist    # or the four files from elsewhere
    python -m reference.study --workdir=runs/study_augmentation \\
      --config=reference/configs/study_augmentation.py

Tuning and measures are those of `study_fashion_mnist.py`. A net of twice the
channels sees half of its images eight times as often: the plain run with
augmentation then fits more than 98 % of them. 480 epochs are 9,600 steps of 50
and 960 of 500. The grid is 30 trials and 55 final runs.
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
    config.epochs = 480.0
    config.lars.warmup_epochs = 96.0
    config.model.filters = 32
    config.study.train_images = 1000
    config.study.peaks = ((4.0, 8.0, 16.0), (8.0, 16.0, 32.0))
    config.study.evaluate_every = 120
    config.study.sharpness_seeds = 0
    config.study.variants = tuple(overrides)
    # Which of two good peaks is taken is chance.
    config.study.ablations = {'augmentation_same_peak': 'conadv_augmentation'}
    config.study.overrides = {
      **overrides,
      'augmentation_same_peak': overrides['augmentation'],
    }
  return config
