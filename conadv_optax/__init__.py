"""Concurrent Adversarial Learning for large-batch training in JAX."""

from conadv_optax import dual_bn, hessian
from conadv_optax.attacks.added_leaf import added_leaf
from conadv_optax.attacks.fgsm import fast_fgsm, fgsm
from conadv_optax.attacks.normalized import Normalized, normalized
from conadv_optax.attacks.pgd import pgd
from conadv_optax.attacks.targets import random_targets
from conadv_optax.controllers.absa import AbsaState, BatchController, absa
from conadv_optax.controllers.noise_scale import (
  NoiseScale,
  NoiseScaleState,
  noise_scale,
)
from conadv_optax.controllers.overfitting_guard import (
  OverfittingGuard,
  OverfittingGuardState,
  overfitting_guard,
)
from conadv_optax.core.types import (
  Attack,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
  Passes,
  PerGroup,
  Queue,
)
from conadv_optax.curvature.sharpness import Sharpness, sharpness
from conadv_optax.devices.accumulate import accumulate
from conadv_optax.devices.concurrent import concurrent
from conadv_optax.devices.data_parallel import data_parallel
from conadv_optax.devices.diffusion import (
  Diffusion,
  diffusion,
  metropolis_weights,
)
from conadv_optax.methods.batch_augment import batch_augment
from conadv_optax.methods.extrapolate import ExtrapolateState, extrapolate
from conadv_optax.methods.fast_advprop import fast_advprop
from conadv_optax.methods.sam import SamState, sam
from conadv_optax.methods.sparse_sam import SparseSamState, sparse_sam
from conadv_optax.optimizers.adaptive_multi_steps import (
  AdaptiveMultiStepsState,
  adaptive_multi_steps,
)
from conadv_optax.optimizers.agvm import AgvmState, agvm
from conadv_optax.optimizers.gsnr import scale_by_gsnr
from conadv_optax.optimizers.lars import LarsState, lars
from conadv_optax.optimizers.masks import exclude_norm_and_bias
from conadv_optax.optimizers.schedules import (
  legw,
  polynomial_warmup,
  scale_learning_rate,
)
from conadv_optax.training.perturb import perturb
from conadv_optax.training.plain import plain
from conadv_optax.training.staleness import StalenessReport, staleness_report
from conadv_optax.training.wrap import wrap

__version__ = '0.1.0'

__all__ = [
  'AbsaState',
  'AdaptiveMultiStepsState',
  'AgvmState',
  'Attack',
  'BatchController',
  'ConAdvAux',
  'ConAdvState',
  'Diffusion',
  'ExtrapolateState',
  'GradientFunction',
  'LarsState',
  'NoiseScale',
  'NoiseScaleState',
  'Normalized',
  'OverfittingGuard',
  'OverfittingGuardState',
  'Passes',
  'PerGroup',
  'Queue',
  'SamState',
  'Sharpness',
  'SparseSamState',
  'StalenessReport',
  'absa',
  'accumulate',
  'adaptive_multi_steps',
  'added_leaf',
  'agvm',
  'batch_augment',
  'concurrent',
  'data_parallel',
  'diffusion',
  'dual_bn',
  'exclude_norm_and_bias',
  'extrapolate',
  'fast_advprop',
  'fast_fgsm',
  'fgsm',
  'hessian',
  'lars',
  'legw',
  'metropolis_weights',
  'noise_scale',
  'normalized',
  'overfitting_guard',
  'perturb',
  'pgd',
  'plain',
  'polynomial_warmup',
  'random_targets',
  'sam',
  'scale_by_gsnr',
  'scale_learning_rate',
  'sharpness',
  'sparse_sam',
  'staleness_report',
  'wrap',
]
