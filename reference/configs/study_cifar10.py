"""Grid B: CIFAR-10 as a folder of JPEGs, for one GPU. Not yet run.

    python -m reference.study --workdir=runs/study_cifar10 \
      --config=reference/configs/study_cifar10.py \
      --config.data.folder=/path/that/holds/train/and/test

The images have been through JPEG compression, so accuracies are not to be
compared with those on the original pixels to a tenth of a percent.

Of the 50,000 training images 5,000 tune the peaks and 45,000 are trained on: 15
epochs are 1,319 steps of 512, 165 of 4,096 and 42 of 16,384. Per image and step
of the plain run the net takes 1.2 GFLOPs.
"""

import ml_collections

from reference.configs import methods, variants

_RESIZE = {'crop': 'resize', 'flip': False}


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  return ml_collections.ConfigDict(
    {
      'name': 'study_cifar10',
      'seed': 0,
      'method': 'vanilla',  # `study.overrides` has that of a variant
      'staleness': 1,
      'batch_size': 512,
      'accumulate': 1,
      'queue_memory': 'device',
      'noise_scale': False,
      'epochs': 15.0,
      'plain_epochs': 0.0,  # before the method sets in
      'label_smoothing': 0.1,
      'data': {
        'source': 'jpeg_folder',
        'folder': '',
        'size': 32,
        'crop': 'pad',  # made on the device
        'flip': True,
        'eval_crop': 'resize',
        'mean': (0.491, 0.482, 0.447),
        'std': (0.247, 0.243, 0.262),
        'on_bad_image': 'stop',
      },
      'model': {
        'stage_sizes': (1, 1, 1),
        'filters': 64,
        'block': 'basic',
        'stem': 'small',
        'dtype': 'bfloat16',
      },
      # Without `label_smoothing` the attack has that of training.
      'attack': {
        'epsilon': 4.0,  # of 255 levels
        'start_from_clean': 0.2,
      },
      'lars': {
        'peak': 8.0,  # `study.peaks` has those that are tried
        'warmup_epochs': 3.0,
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
        'threads': 2,
        'workers': 0,
      },
      'study': {
        'train_images': 45_000,
        'validation_images': 5_000,
        'batch_sizes': (512, 4096, 16_384),
        'peaks': ((4.0, 8.0), (8.0, 16.0), (16.0, 32.0)),
        'seeds': 3,
        'evaluate_every': 5,  # epochs
        'robust_images': 1000,  # the first of the test images
        'robust_epsilon': 4.0,  # of 255 levels, PGD-20
        'sharpness_seeds': 1,  # Hessian and sharpness, for so many
        'at_once': 2,  # cells on a device
        'variants': (
          'vanilla',
          'advprop',
          'conadv',
          'conadv_tau_4',
          'conadv_reuse',
          'conadv_fraction',
          'vrgd',
          'sam',
          'batch_augment',
        ),
        # Of a variant a field and its values, tried at its best peak.
        'settings': {},
        # At the largest batch, with the peak of the variant named.
        'ablations': {
          'plain_images': 'vanilla',
          'conadv_plain_images': 'conadv',
          'conadv_tau_16': 'conadv',
          'conadv_epsilon_8': 'conadv',
          'conadv_untargeted': 'conadv',
        },
        'overrides': {
          **variants.make_section(),
          'conadv_epsilon_8': {**variants.CONADV, 'attack': {'epsilon': 8.0}},
          # Of crops and flips, which every other variant has.
          'plain_images': {'data': _RESIZE},
          'conadv_plain_images': {**variants.CONADV, 'data': _RESIZE},
          # Eight micro-batches, between which the gradients are compared.
          'vrgd': {'method': 'vrgd', 'accumulate': 8},
          'sam': {'method': 'sam'},
          # It makes its own crops.
          'batch_augment': {
            'method': 'batch_augment',
            'methods': {'batch_augment': {'copies': 2}},
            'data': {'crop': 'resize'},
          },
        },
      },
    }
  )
