"""A folder of 32-pixel JPEGs in the manner of CIFAR-10, with ConAdv.

    python -m reference.main --config=reference/configs/jpeg_folder.py \
      --config.data.folder=/path/that/holds/train/and/test

50,000 training images in batches of 128 are 390.6 steps an epoch; one epoch is
391 steps. The net is small enough for a CPU: for ResNet-18 take
`--config.model.stage_sizes='(2,2,2,2)' --config.model.filters=64`, more epochs,
and a GPU or TPU.

Result on CIFAR-10 as 60,000 JPEGs: 43.02 % of the 10,000 held-out images right,
the training loss from 2.30 to 1.70, in 11 minutes at about 90 images a second
on two CPU cores that did other work beside. (Crops were drawn and windows were
padded otherwise then; not yet run as it is now.)
"""

import ml_collections

from reference.configs import methods


def get_config() -> ml_collections.ConfigDict:
  """The config; every field can be overridden on the command line."""
  return ml_collections.ConfigDict(
    {
      'name': 'jpeg_folder',
      'seed': 0,
      'method': 'conadv',  # or another of reference/run/methods.py
      'staleness': 1,  # steps between the attack and its use
      'batch_size': 128,
      # Micro-batches of a device's share, each a BatchNorm group of its own.
      'accumulate': 1,
      'queue_memory': 'device',  # or host, where the waiting batches lie
      'noise_scale': False,  # measured between devices and micro-batches
      'epochs': 1.0,
      'plain_epochs': 0.0,  # before the method sets in
      'label_smoothing': 0.1,
      'data': {
        # or array_record, or my_data:make, a function of your own
        'source': 'jpeg_folder',
        # Holds train/CLASS/*.jpg, and val/ or test/; or the shards.
        'folder': '',
        'size': 32,
        'crop': 'pad',  # or resize, random_resized
        'flip': True,
        'level_factor': 1.0,  # times AutoAugment's levels, where it is used
        'eval_crop': 'resize',  # or center
        'mean': (0.491, 0.482, 0.447),
        'std': (0.247, 0.243, 0.262),
        'on_bad_image': 'skip',  # or stop
      },
      'model': {
        'build': '',  # or my_models:make, a function of your own
        'stage_sizes': (1, 1, 1),
        'filters': 16,
        'block': 'basic',  # or bottleneck
        'stem': 'small',  # or imagenet
        'padding': 'symmetric',  # as in PyTorch; or same
        'dtype': 'float32',  # or bfloat16, on a TPU or GPU
      },
      'attack': {
        'epsilon': 4.0,  # of 255 levels
        'start_from_clean': 0.2,
        # A reused gradient has the training's, above.
        'label_smoothing': 0.0,
      },
      'lars': {
        'peak': 8.0,
        'warmup_epochs': 0.1,
        'power': 2.0,
        'end': 1e-4,
        'momentum': 0.9,
        'weight_decay': 1e-4,
      },
      'methods': methods.make_section(),
      # How the run is watched and saved; these may change between restarts.
      'run': {
        'log_every': 10,
        'evaluate_every': 130,
        'checkpoint_every': 130,
        'keep': 2,
        'writer': '',  # or my_metrics:make, beside CSV and TensorBoard
        'threads': 2,
        'workers': 0,  # processes beside this one that make training images
      },
    }
  )
