r"""The Hessian of a loss, by products with it: curvature of large models.

    @jax.jit
    def top(params, batch, key):
      hessian = operator(loss_fn, params, batch, micro_batches=4)
      return top_eigenpairs(hessian, params, 2, key=key)

An operator is a function that multiplies a vector, a pytree like the
parameters, by a symmetric matrix. The other functions take any such function:
a Hessian of the parameters, of the inputs, or a matrix of your own. All are
pure; call them inside `jax.jit`. Batch and parameters may be spread over
devices, and so are the vectors then; micro-batches keep memory at that of one
of them.

`loss_fn(params, batch)` returns the mean loss of the batch. A model with
statistics goes in as a closure, in evaluation mode:
`lambda params, batch: loss(params, batch_stats, batch, train=False)`.

References:
  Yao et al., `PyHessian: Neural Networks Through the Lens of the Hessian
  <https://arxiv.org/abs/1912.07145>`_, 2020
"""

from conadv_optax.curvature.operators import Operator, input_operator, operator
from conadv_optax.curvature.spectrum import (
  Eigenpairs,
  Spectrum,
  Trace,
  smoothed_density,
  spectral_density,
  top_eigenpairs,
  trace,
)

__all__ = [
  'Eigenpairs',
  'Operator',
  'Spectrum',
  'Trace',
  'input_operator',
  'operator',
  'smoothed_density',
  'spectral_density',
  'top_eigenpairs',
  'trace',
]
