"""Learning rates for large batches: warm-up, decay, and how both scale."""

import math
from typing import Literal

import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  check_choice,
  check_not_negative,
  concrete,
)


def polynomial_warmup(
  peak: ArrayLike,
  warmup_steps: int,
  total_steps: int,
  *,
  power: float = 2.0,
  end: ArrayLike | None = None,
) -> optax.Schedule:
  r"""Linear warm-up from 0, then polynomial decay.

  .. math::

    \eta_t = peak \cdot t / W \quad (t < W), \qquad
    \eta_t = (peak - end)\left(1 - \frac{t - W}{T - W}\right)^{power} + end
    \quad (W \le t \le T)

  and `end` after that, so that the rate never rises after the warm-up.

  Args:
    peak: the largest rate, reached at step `warmup_steps`.
    warmup_steps: length :math:`W` of the warm-up in steps, 0 for none.
    total_steps: length :math:`T` of the run in steps, warm-up included.
    power: exponent of the decay.
    end: the last rate, not above the peak. None: 1e-4, or a tenth of the peak
      where that is lower.

  Returns:
    A schedule: a function from the step, an int scalar, to the rate.

  Raises:
    TypeError: for a function in place of `peak` or `end`.
    ValueError: unless `0 <= warmup_steps < total_steps` and `0 <= end <= peak`.
      `peak` and `end` may be traced, and are then not compared.

  Examples:
    >>> import chex
    >>> import conadv_optax as conadv
    >>> rate = conadv.polynomial_warmup(8., 10, 30, power=2., end=0.)
    >>> chex.assert_trees_all_close(
    ...     [float(rate(t)) for t in (0, 5, 10, 20, 30, 99)],
    ...     [0., 4., 8., 2., 0., 0.])

  References:
    Mattson et al., `MLPerf Training Benchmark
    <https://arxiv.org/abs/1910.01500>`_, 2020
  """
  if not 0 <= warmup_steps < total_steps:
    raise ValueError(
      'The warm-up must end before the run does: 0 <= warmup_steps < '
      f'total_steps. Given warmup_steps={warmup_steps}, '
      f'total_steps={total_steps}. Likely one is in epochs: both are in steps. '
      'In `legw` a batch k times larger warms up for k times the epochs: lower '
      '`base_warmup_epochs`, or raise `epochs`.'
    )
  check_not_negative('peak', peak)
  if end is None:
    end = jnp.minimum(1e-4, 0.1 * peak)
  check_not_negative('end', end)
  first, last = concrete(peak), concrete(end)
  if first is not None and last is not None and first < last:
    raise ValueError(
      'The rate must not rise after the warm-up: `end` is at most the peak. '
      f'Given end={last}, and a peak of {first}. Leave `end` out, and it is a '
      'tenth of a peak as low.'
    )
  steps = total_steps - warmup_steps
  return optax.join_schedules(
    [
      optax.linear_schedule(0.0, peak, warmup_steps),
      optax.polynomial_schedule(peak, end, power, steps),
      # At its last step a root of the one before may be taken of -1e-8.
      optax.constant_schedule(end),
    ],
    [warmup_steps, total_steps],
  )


def legw(
  base_peak: float,
  base_warmup_epochs: float,
  *,
  base_batch: int,
  batch: int,
  num_examples: int,
  epochs: float,
  power: float = 2.0,
  end: ArrayLike | None = None,
) -> optax.Schedule:
  r"""Linear-epoch gradual warm-up: a schedule tuned at one batch, at another.

  For a batch :math:`k` times larger the peak grows by :math:`\sqrt k` and the
  warm-up takes :math:`k` times the epochs, hence the same number of steps:

  .. math::

    peak = base\_peak \cdot \sqrt{batch / base\_batch}, \qquad
    warmup\_epochs = base\_warmup\_epochs \cdot batch / base\_batch

  The schedule is `polynomial_warmup` with these.

  Args:
    base_peak: the largest rate at `base_batch`.
    base_warmup_epochs: the warm-up in epochs at `base_batch`.
    base_batch: the batch in examples for which the two were tuned.
    batch: the batch in examples to train with.
    num_examples: training examples in an epoch.
    epochs: length of the run in epochs.
    power: exponent of the decay.
    end: the last rate, as in `polynomial_warmup`.

  Returns:
    A schedule: a function from the step, an int scalar, to the rate.

  Raises:
    TypeError: for a function in place of `base_peak` or `end`.
    ValueError: for a batch that is not positive, a warm-up that would not end
      before the run does, or an `end` above the peak.

  Examples:
    >>> import chex
    >>> import conadv_optax as conadv
    >>> rate = conadv.legw(1., 1., base_batch=10, batch=40, num_examples=1000,
    ...                    epochs=8., end=0.)
    >>> chex.assert_trees_all_close(
    ...     [float(rate(t)) for t in (50, 100, 200)], [1., 2., 0.])

  References:
    You et al., `Large-Batch Training for LSTM and Beyond
    <https://arxiv.org/abs/1901.08256>`_, 2019
  """
  peak = scale_learning_rate(base_peak, base_batch, batch, rule='sqrt')
  warmup_steps = round(base_warmup_epochs * num_examples / base_batch)
  total_steps = round(epochs * num_examples / batch)
  return polynomial_warmup(
    peak, warmup_steps, total_steps, power=power, end=end
  )


def scale_learning_rate(
  base: float,
  base_batch: int,
  batch: int,
  *,
  rule: Literal['linear', 'sqrt'] = 'linear',
) -> float:
  r"""A learning rate tuned at one batch, for another.

  .. math::

    base \cdot batch / base\_batch \quad (linear), \qquad
    base \cdot \sqrt{batch / base\_batch} \quad (sqrt)

  Args:
    base: the rate at `base_batch`.
    base_batch: a batch in examples, positive.
    batch: another, positive.
    rule: 'linear' or 'sqrt'.

  Returns:
    The rate at `batch`.

  Raises:
    ValueError: for a batch that is not positive, or an unknown rule.

  Examples:
    >>> import chex
    >>> import conadv_optax as conadv
    >>> chex.assert_trees_all_close(
    ...     conadv.scale_learning_rate(0.1, 256, 1024), 0.4)
    >>> chex.assert_trees_all_close(
    ...     conadv.scale_learning_rate(0.1, 256, 1024, rule='sqrt'), 0.2)

  References:
    Goyal et al., `Accurate, Large Minibatch SGD
    <https://arxiv.org/abs/1706.02677>`_, 2017; Krizhevsky, `One weird trick
    for parallelizing convolutional neural networks
    <https://arxiv.org/abs/1404.5997>`_, 2014
  """
  if base_batch <= 0 or batch <= 0:
    raise ValueError(
      'A batch has a positive number of examples. Given '
      f'base_batch={base_batch}, batch={batch}.'
    )
  check_choice('rule', rule, ('linear', 'sqrt'))
  k = batch / base_batch
  return base * (k if rule == 'linear' else math.sqrt(k))
