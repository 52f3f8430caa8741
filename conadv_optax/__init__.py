"""Concurrent Adversarial Learning for large-batch training in JAX."""

from conadv_optax import dual_bn
from conadv_optax._attacks import (
  Normalized,
  fast_fgsm,
  fgsm,
  normalized,
  pgd,
  random_targets,
)
from conadv_optax._lars import LarsState, lars
from conadv_optax._masks import exclude_norm_and_bias
from conadv_optax._parallel import data_parallel
from conadv_optax._schedules import legw, polynomial_warmup, scale_learning_rate
from conadv_optax._types import (
  Attack,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
  Queue,
)
from conadv_optax._wrap import wrap

__version__ = '0.1.0'

__all__ = [
  'Attack',
  'ConAdvAux',
  'ConAdvState',
  'GradientFunction',
  'LarsState',
  'Normalized',
  'Queue',
  'data_parallel',
  'dual_bn',
  'exclude_norm_and_bias',
  'fast_fgsm',
  'fgsm',
  'lars',
  'legw',
  'normalized',
  'pgd',
  'polynomial_warmup',
  'random_targets',
  'scale_learning_rate',
  'wrap',
]
