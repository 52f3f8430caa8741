"""Grid A: part of Fashion-MNIST, for two CPU cores.

    apt-get install dataset-fashion-mnist    # or the four files from elsewhere
    python -m reference.study --workdir=runs/study \
      --config=reference/configs/study_fashion_mnist.py

2,000 images are trained on, so that the plain run fits them in a minute or so
and loses on the test images: 60 epochs are 2,400 steps of 50 and 240 of 500. A
plain run is 120,000 images forward and backward. The grid is 64 trials and 145
final runs.

The same net on all images, to compare with what others report:

    python -m reference.study --workdir=runs/study_baseline \
      --config=reference/configs/study_fashion_mnist.py \
      --config.study.train_images=60000 --config.study.validation_images=0 \
      --config.study.variants="('vanilla',)" --config.study.ablations={} \
      --config.study.batch_sizes="(64,)" --config.study.peaks="((8.,),)" \
      --config.study.seeds=1 --config.study.evaluate_every=5 \
      --config.epochs=15.0 --config.lars.warmup_epochs=3.0

Results: docs/results.md.
"""

import ml_collections

from reference.configs import methods, variants

_REUSE = {'method': 'conadv_reuse'}
_AUGMENTED = {'crop': 'pad', 'flip': True}


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  return ml_collections.ConfigDict(
    {
      'name': 'study_fashion_mnist',
      'seed': 0,
      'method': 'vanilla',  # what `study.overrides` changes
      'staleness': 1,
      'batch_size': 50,
      'accumulate': 1,
      'queue_memory': 'device',
      'noise_scale': False,
      'epochs': 60.0,
      'plain_epochs': 0.0,  # before the method sets in
      'label_smoothing': 0.1,
      'data': {
        'source': 'idx_folder',
        'folder': '/usr/share/datasets/fashion-mnist',
        'size': 28,
        'crop': 'resize',  # or pad, made on the device
        'flip': False,
        'eval_crop': 'resize',
        'mean': (0.286,),
        'std': (0.353,),
        'on_bad_image': 'stop',
      },
      # A strided net without shortcuts: 16, 32 and 64 channels on 14, 7 and 4
      # pixels.
      'model': {
        'stage_sizes': (0, 1, 1),
        'filters': 16,
        'block': 'plain',
        'stem': 'strided',
        'dtype': 'float32',
      },
      # Without `label_smoothing` the attack has that of training.
      'attack': {
        'epsilon': 8.0,  # of 255 levels
        'start_from_clean': 0.2,
      },
      'lars': {
        'peak': 8.0,  # that of a cell is one of `study.peaks`
        'warmup_epochs': 12.0,
        'power': 2.0,
        'end': 1e-4,
        'momentum': 0.9,
        'weight_decay': 1e-4,
      },
      'methods': methods.make_section(),
      'run': {
        'log_every': 10,
        'evaluate_every': 100,
        'checkpoint_every': 100,
        'keep': 2,
        'threads': 1,
        'workers': 0,
      },
      'study': {
        'train_images': 2000,
        'validation_images': 6000,
        'batch_sizes': (50, 500),
        # The trials of every variant, for each batch size: the best lie within.
        'peaks': ((4.0, 8.0, 16.0, 32.0), (8.0, 16.0, 32.0, 64.0)),
        'seeds': 5,
        'evaluate_every': 20,  # epochs
        'robust_images': 1000,  # the first of the test images
        'robust_epsilon': 8.0,  # of 255 levels, PGD-20
        'sharpness_seeds': 1,  # Hessian and sharpness, for so many
        'at_once': 2,  # cells on a device
        'variants': (
          'vanilla',
          'advprop',
          'conadv',
          'conadv_tau_4',
          'conadv_reuse',
          'conadv_fraction',
          'augmentation',
          'conadv_augmentation',
        ),
        # Of a variant a field and its values, tried at its best peak.
        'settings': {},
        # At the largest batch, with the peak of the variant named.
        'ablations': {
          # Which of two good peaks is taken is chance, and no part of what a
          # method does.
          'advprop_same_peak': 'conadv',
          'conadv_tau_4_same_peak': 'conadv',
          'conadv_reuse_same_peak': 'conadv',
          'conadv_peak_of_advprop': 'advprop',
          'conadv_tau_2': 'conadv',
          'conadv_tau_16': 'conadv',
          'conadv_epsilon_4': 'conadv',
          'conadv_epsilon_16': 'conadv',
          'conadv_untargeted': 'conadv',
          'conadv_fgsm': 'conadv',
          'conadv_reuse_tau_4': 'conadv_reuse',
          'conadv_reuse_epsilon_4': 'conadv_reuse',
          'conadv_reuse_epsilon_16': 'conadv_reuse',
        },
        'overrides': {
          **variants.make_section(),
          'advprop_same_peak': {'method': 'advprop'},
          'conadv_tau_4_same_peak': {**variants.CONADV, 'staleness': 4},
          'conadv_reuse_same_peak': _REUSE,
          'conadv_peak_of_advprop': variants.CONADV,
          'conadv_tau_2': {**variants.CONADV, 'staleness': 2},
          'conadv_epsilon_4': {**variants.CONADV, 'attack': {'epsilon': 4.0}},
          'conadv_epsilon_16': {**variants.CONADV, 'attack': {'epsilon': 16.0}},
          # As the reused gradient attacks: the true label, the clean image.
          'conadv_fgsm': {
            **variants.CONADV,
            'methods': {'conadv': {'targets': 'none'}},
            'attack': {'start_from_clean': 1.0},
          },
          'conadv_reuse_tau_4': {**_REUSE, 'staleness': 4},
          'conadv_reuse_epsilon_4': {**_REUSE, 'attack': {'epsilon': 4.0}},
          'conadv_reuse_epsilon_16': {**_REUSE, 'attack': {'epsilon': 16.0}},
          'augmentation': {'data': _AUGMENTED},
          'conadv_augmentation': {**variants.CONADV, 'data': _AUGMENTED},
        },
      },
    }
  )
