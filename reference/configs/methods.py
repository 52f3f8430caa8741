"""The few numbers of the methods of other papers, for every config.

Where a paper is named the number is its own; the others are for a start.
"""

from typing import Any


def make_section() -> dict[str, dict[str, Any]]:
  """The `methods` part of a config; each part is named after its method."""
  return {
    # Of every method that attacks for a branch of its own: how much of a batch
    # is attacked, one batch of how many, and towards what: a random wrong
    # class, or away from the label. The reused gradient allows the second
    # alone, of every batch. By how much the sides of images are divided, as the
    # attack's pass sees them, and as they are attacked and trained on. Norm
    # layers that keep no batch statistics can be shared by all branches, and
    # must be.
    'conadv': {
      'adversarial_fraction': 1.0,
      'every': 1,
      'targets': 'random',
      'attack_downscale': 1,
      'adversarial_downscale': 1,
      'shared_norm': False,
    },
    # Foret et al., https://arxiv.org/abs/2010.01412.
    'sam': {'radius': 0.05},
    # Liu et al., https://arxiv.org/abs/2203.02714; the radius is SAM's.
    'looksam': {'radius': 0.05, 'every': 5, 'reuse_weight': 0.7},
    # Mi et al., https://arxiv.org/abs/2210.05177: the radius is SAM's, the
    # sparsity the paper's on ImageNet. A group finds its mask anew at so many
    # steps, by the gradients of so many of its images, one after the other.
    'ssam': {
      'radius': 0.05,
      'sparsity': 0.5,
      'refresh_every': 100,
      'num_samples': 8,
    },
    # Zhao et al., https://arxiv.org/abs/2202.03599.
    'gradient_norm_penalty': {'radius': 0.05, 'penalty': 0.8},
    # Xue et al., https://arxiv.org/abs/2210.11078. The anchor is the key of the
    # module whose variance the others are brought to, their backbone.
    'agvm': {'anchor': 'stem', 'every': 10, 'decay': 0.97, 'start': 0},
    # Cao et al., https://arxiv.org/abs/2303.13326. Who combines with whom: a
    # 'ring' of the devices, or 'complete'; the mean of all is evaluated.
    'diffusion': {'graph': 'ring'},
    # What the past gradient is multiplied by; no paper's.
    'extrapolate': {'rate': 0.1},
    # Augmented copies of each image, each a BatchNorm group of its own. They
    # are cropped and mirrored again after `data.crop`; no paper's.
    'batch_augment': {'copies': 4},
    # Mei et al., https://arxiv.org/abs/2204.09838.
    'fast_advprop': {
      'epsilon': 1.0,  # of 255 levels
      'adversarial_fraction': 0.2,
      'attack_weight': 0.5,
    },
    # Yao et al., https://arxiv.org/abs/1810.01021. `batch_size` is the initial
    # batch, of which the largest is 128 times as many, 128 to 16,384.
    'absa': {
      'max_micro_batches': 128,
      'growth': 2,
      'patience': 10,  # evaluations, one an epoch, without growth
      'epsilon': 0.005,  # of pixels from 0 to 1
      'adversarial_fraction': 0.2,
    },
  }
