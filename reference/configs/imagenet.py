"""What the ImageNet runs share: ResNet-50, its images, its loss, its attack.

No run itself: a file for each batch, `imagenet_4k.py` to `imagenet_96k.py`,
fills in the rest and says what to expect. What is here follows the public
TensorFlow code of the paper's largest run, https://github.com/conadv/ConAdv,
presumably its authors'.

The attack's radius there is 18/255 in units of normalised images, which times
ImageNet's deviations is 4.0 to 4.1 of 255 levels; here it is 4.0. The attack is
one step of that length towards a random wrong class, from a uniform random
start, or with probability 0.2 from the clean image. That code then clips the
normalised image to [-1, 1], which changes clean pixels too; here a pixel stays
within 0 and 255. Every branch has label smoothing 0.1 and the same weight; the
loss that the attack lowers has none.
"""

import ml_collections

from reference.configs import methods

CLASSES = 1000
TRAIN_IMAGES = 1_281_167


def make_config(
  *,
  name: str,
  batch_size: int,
  epochs: float,
  peak: float,
  warmup_epochs: float,
  power: float,
  momentum: float,
  weight_decay: float,
) -> ml_collections.ConfigDict:
  """The config of a run, from what depends on its batch.

  Args:
    name: of the run.
    batch_size: images a step, over all devices.
    epochs: length of the run.
    peak: the largest learning rate.
    warmup_epochs: length of the linear warm-up.
    power: exponent of the decay after it.
    momentum: of LARS.
    weight_decay: of LARS.
  """
  epoch = round(TRAIN_IMAGES / batch_size)
  return ml_collections.ConfigDict(
    {
      'name': name,
      'seed': 0,
      'method': 'conadv',  # or another of reference/run/methods.py
      'staleness': 1,  # steps between the attack and its use
      'batch_size': batch_size,
      # Micro-batches of a device's share, each a BatchNorm group of its own.
      'accumulate': 1,
      'queue_memory': 'device',  # or host, where the waiting batches lie
      'noise_scale': False,  # measured between devices and micro-batches
      'epochs': epochs,
      'plain_epochs': 0.0,  # before the method sets in
      'label_smoothing': 0.1,
      'data': {
        'source': 'array_record',  # or jpeg_folder
        # Holds the shards of prepare_data; or train/CLASS/*.jpg and val/.
        'folder': '',
        'classes': CLASSES,
        'size': 224,
        'crop': 'random_resized',
        'flip': True,
        'level_factor': 0.8,  # times AutoAugment's levels, where it is used
        'eval_crop': 'center',
        'mean': (0.485, 0.456, 0.406),
        'std': (0.229, 0.224, 0.225),
        'on_bad_image': 'skip',  # or stop
      },
      'model': {
        'build': '',  # or my_models:make, a function of your own
        'stage_sizes': (3, 4, 6, 3),
        'filters': 64,
        'block': 'bottleneck',
        'stem': 'imagenet',
        'padding': 'symmetric',  # as in PyTorch; or same
        'dtype': 'bfloat16',
      },
      'attack': {
        'epsilon': 4.0,  # of 255 levels
        'start_from_clean': 0.2,
        # A reused gradient has the training's, above.
        'label_smoothing': 0.0,
      },
      'lars': {
        'peak': peak,
        'warmup_epochs': warmup_epochs,
        'power': power,
        'end': 1e-4,
        'momentum': momentum,
        'weight_decay': weight_decay,
      },
      'methods': methods.make_section(),
      # How the run is watched and saved; these may change between restarts.
      'run': {
        'log_every': 10,
        'evaluate_every': 4 * epoch,
        'checkpoint_every': 4 * epoch,
        'keep': 2,
        'writer': '',  # or my_metrics:make, beside CSV and TensorBoard
        'threads': 4,  # in each worker process
        'workers': 4,  # that make training images; 0 for threads alone
      },
    }
  )
