"""What the gain costs: grid A's large batch, and cheaper forms of ConAdv.

    apt-get install dataset-fashion-mnist    # or the four files from elsewhere
    python -m reference.study --workdir=runs/study_price \\
      --config=reference/configs/study_price.py

Images, net, tuning and measures are those of `study_fashion_mnist.py`, at a
batch of 500, but for the eigenvalue, which takes longer than the training. The
grid is 84 trials and 115 final runs.
"""

from typing import Any

import ml_collections

from reference.configs import study_fashion_mnist, variants


def _conadv(**numbers: Any) -> dict[str, Any]:
  return {**variants.CONADV, 'methods': {'conadv': numbers}}


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  config = study_fashion_mnist.get_config()
  reuse = {'method': 'conadv_reuse'}
  half = {'adversarial_downscale': 2}
  wide = {'attack': {'epsilon': 16.0}}
  overrides = {
    'vanilla': {},
    'conadv': variants.CONADV,
    'conadv_fraction_50': _conadv(adversarial_fraction=0.5),
    'conadv_fraction_20': _conadv(adversarial_fraction=0.2),
    'conadv_fraction_10': _conadv(adversarial_fraction=0.1),
    'conadv_every_2': _conadv(every=2),
    'conadv_every_5': _conadv(every=5),
    'conadv_every_10': _conadv(every=10),
    'conadv_every_5_fraction_50': _conadv(every=5, adversarial_fraction=0.5),
    # A larger radius is as cheap.
    'conadv_epsilon_16': _conadv() | wide,
    'conadv_fraction_9_epsilon_16': _conadv(adversarial_fraction=0.09) | wide,
    'conadv_every_5_fraction_45_epsilon_16': (
      _conadv(every=5, adversarial_fraction=0.45) | wide
    ),
    'conadv_half_attack': _conadv(attack_downscale=2),
    'conadv_half_attack_fraction_12': _conadv(
      attack_downscale=2, adversarial_fraction=0.125
    ),
    'conadv_half': _conadv(**half),
    'conadv_half_fraction_50': _conadv(**half, adversarial_fraction=0.5),
    'conadv_half_fraction_35': _conadv(**half, adversarial_fraction=0.35),
    'conadv_quarter': _conadv(adversarial_downscale=4),
    'conadv_reuse': reuse,
    'conadv_reuse_fraction_20': _conadv(adversarial_fraction=0.2) | reuse,
    'conadv_reuse_fraction_10': _conadv(adversarial_fraction=0.1) | reuse,
  }
  with config.unlocked():
    config.name = 'study_price'
    config.study.batch_sizes = (500,)
    config.study.sharpness_seeds = 0
    config.study.peaks = (config.study.peaks[1],)
    config.study.variants = tuple(overrides)
    # Which of several good peaks is taken is chance, most of all for the plain
    # run, which all are compared with: once more with another's.
    config.study.ablations = {
      'vanilla_peak_16': 'conadv_fraction_20',
      'conadv_bfloat16': 'conadv',
    }
    config.study.overrides = {
      **overrides,
      'vanilla_peak_16': {},
      # Training passes, too, of which the attack's is the smaller part.
      'conadv_bfloat16': {**variants.CONADV, 'model': {'dtype': 'bfloat16'}},
    }
  return config
