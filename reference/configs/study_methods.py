"""Grid A2: every method on the images of grid A, for two CPU cores.

    apt-get install dataset-fashion-mnist    # or the four files from elsewhere
    python -m reference.study --workdir=runs/study_methods \\
      --config=reference/configs/study_methods.py

Images, net and peaks are those of `study_fashion_mnist.py`. Beside four peaks
each variant has two trials of a number of its own; one that has none tries the
weight decay. The eigenvalue, which takes longer than the training, is left out.
The grid is 288 trials and 240 final runs.

LEGW has no trials, as it fixes peak and warm-up of the larger batch by those of
the smaller one. With P, sqrt(10) times the best peak of `short_warmup` at 50:

    python -m reference.study --workdir=runs/study_methods \\
      --config=reference/configs/study_methods.py \\
      --config.study.variants="('legw',)" --config.study.batch_sizes="(500,)" \\
      --config.study.peaks="((P,),)"
"""

from typing import Any

import ml_collections

from reference.configs import study_fashion_mnist, variants


def _in_parts(method: str) -> dict[str, Any]:
  # Five divide both batches.
  return {'method': method, 'accumulate': 5}


def _copies(number: int) -> dict[str, Any]:
  return {
    'method': 'batch_augment',
    'methods': {'batch_augment': {'copies': number}},
    'data': {'flip': True},
  }


def _fast_advprop(adversarial_fraction: float) -> tuple[Any, Any]:
  # The best radius of 'fast_advprop', whose fraction is 0.2.
  return (
    variants.fast_advprop(adversarial_fraction, epsilon=4.0),
    ('methods.fast_advprop.epsilon', 2.0, 8.0),
  )


def _fast_late(adversarial_fraction: float) -> tuple[Any, Any]:
  # Of 60 epochs, and of ConAdv's radius, which was best for both fractions.
  late = variants.fast_advprop(adversarial_fraction, epsilon=8.0)
  return (
    {**late, 'plain_epochs': 42.0},
    ('methods.fast_advprop.epsilon', 4.0, 16.0),
  )


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  config = study_fashion_mnist.get_config()
  decay = ('lars.weight_decay', 5e-4, 2e-3)
  parts = ('accumulate', 2, 10)
  grid = {
    'vanilla': ({}, decay),
    'short_warmup': ({'lars': {'warmup_epochs': 1.2}}, decay),
    'conadv': (variants.CONADV, ('attack.epsilon', 4.0, 16.0)),
    'fast_advprop': (
      {'method': 'fast_advprop'},
      ('methods.fast_advprop.epsilon', 4.0, 8.0),
    ),
    'fast_advprop_10': _fast_advprop(0.1),
    'fast_advprop_15': _fast_advprop(0.15),
    'fast_advprop_35': _fast_advprop(0.35),
    'fast_advprop_50': _fast_advprop(0.5),
    'conadv_late': (
      {**variants.CONADV, 'plain_epochs': 42.0},
      ('attack.epsilon', 4.0, 16.0),
    ),
    'fast_advprop_35_late': _fast_late(0.35),
    'fast_advprop_50_late': _fast_late(0.5),
    'sam': ({'method': 'sam'}, ('methods.sam.radius', 0.02, 0.2)),
    'looksam': ({'method': 'looksam'}, ('methods.looksam.radius', 0.02, 0.2)),
    # A weight of 0.7 for what is reused turned out to be far too much.
    'looksam_light': (
      {'method': 'looksam', 'methods': {'looksam': {'reuse_weight': 0.1}}},
      ('methods.looksam.reuse_weight', 0.03, 0.3),
    ),
    'ssam': ({'method': 'ssam'}, ('methods.ssam.radius', 0.02, 0.2)),
    'gradient_norm_penalty': (
      {'method': 'gradient_norm_penalty'},
      ('methods.gradient_norm_penalty.radius', 0.02, 0.2),
    ),
    'extrapolate': (
      {'method': 'extrapolate'},
      ('methods.extrapolate.rate', 0.02, 0.5),
    ),
    # The plain step in micro-batches, to compare the next two with.
    'micro_batches': (_in_parts('vanilla') | {'noise_scale': True}, parts),
    'vrgd': (_in_parts('vrgd') | {'noise_scale': True}, parts),
    'agvm': (_in_parts('agvm'), ('methods.agvm.every', 2, 50)),
    'batch_augment_2': (_copies(2), decay),
    'batch_augment_4': (_copies(4), decay),
    'conadv_sam': ({'method': 'conadv_sam'}, ('methods.sam.radius', 0.02, 0.2)),
    'conadv_vrgd': (_in_parts('conadv_vrgd'), parts),
  }
  with config.unlocked():
    config.name = 'study_methods'
    config.study.sharpness_seeds = 0
    config.study.variants = tuple(grid)
    config.study.settings = {name: own for name, (_, own) in grid.items()}
    config.study.ablations = {}
    config.study.overrides = {
      **{name: over for name, (over, _) in grid.items()},
      # LEGW: a batch of 500 has ten times the warm-up of 'short_warmup' at 50,
      # which is that of all others, sqrt(10) times its peak, and its decay.
      'legw': {'lars': {'weight_decay': 2e-3}},
    }
  return config
