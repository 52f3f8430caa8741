r"""ABSA: the batch grows as the loss gets flatter.

A large batch is reached from a small one: whenever the largest eigenvalue of
the Hessian has fallen far enough, the batch and the learning rate are doubled,
and the share of adversarial examples is halved.

References:
  Yao et al., `Large batch size training of neural networks with adversarial
  training and second-order information <https://arxiv.org/abs/1810.01021>`_,
  2018
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from conadv_optax.controllers.order import check_order
from conadv_optax.core.numeric import check_count


class AbsaState(NamedTuple):
  """What the next steps train with, and what the next decision needs.

  Attributes:
    micro_batches: int32 scalar, the micro-batches of a step.
    attacked: int32 scalar, how many of them are adversarial in part; 0 when
      the adversary is off.
    learning_rate_scale: float32 scalar, what the learning rate is multiplied
      by: the batch over the initial one.
    reference: float32 scalar, the eigenvalue that the next ones are compared
      with, or 0 before there is one.
    waited: int32 scalar, the evaluations since the batch has grown.
    evaluations: int32 scalar, all evaluations.
  """

  micro_batches: jax.Array
  attacked: jax.Array
  learning_rate_scale: jax.Array
  reference: jax.Array
  waited: jax.Array
  evaluations: jax.Array


class BatchController(NamedTuple):
  """A rule for the size of the batch: two pure functions.

  Attributes:
    init: `init()` returns the state to start with.
    update: `update(eigenvalue, state)` returns the state after an evaluation.
  """

  init: Callable[[], AbsaState]
  update: Callable[[ArrayLike, AbsaState], AbsaState]


def absa(
  max_micro_batches: int,
  *,
  micro_batches: int = 1,
  growth: int = 2,
  shrink: float | None = 0.5,
  patience: int | None = 10,
  adversarial_evaluations: int | None = None,
) -> BatchController:
  r"""Adaptive batch size, driven by the largest eigenvalue of the Hessian.

  Each evaluation, one an epoch say, gives an eigenvalue :math:`\lambda`. The
  first is the reference :math:`\lambda_0`, and

  .. math::

    \lambda \le s \lambda_0 \text{ or } p \text{ evaluations without growth}
    \ \Rightarrow\ m \leftarrow \min(g\, m,\ m_{\max}),
    \quad \eta \leftarrow \eta\, m_{\text{new}} / m_{\text{old}}

  and, by the first of the two conditions alone,
  :math:`\lambda_0 \leftarrow \lambda`. A step takes :math:`m` micro-batches of
  one size, so nothing is compiled anew: `adaptive_multi_steps` takes :math:`m`
  and the rate as arrays, and finishes the step that it is in before either
  changes.

  For the adversarial part, `perturb` the first share :math:`\gamma` of each of
  the first `attacked` micro-batches of a step. `attacked` stays the initial
  number of micro-batches, so the attacked share of the whole batch falls as the
  batch grows. The paper takes `fgsm` with epsilon 0.005 and
  :math:`\gamma = 0.2`. The adversary is off at the largest batch, and after
  `adversarial_evaluations`.

  Args:
    max_micro_batches: :math:`m_{\max}`, the micro-batches of the largest batch.
    micro_batches: the micro-batches to start with.
    growth: :math:`g`, the factor that the batch is multiplied by.
    shrink: :math:`s`, the share of the reference that the eigenvalue must have
      fallen to. None: the eigenvalue never makes the batch grow.
    patience: :math:`p`, the evaluations without growth after which the batch
      grows all the same. None: only the eigenvalue makes it grow.
    adversarial_evaluations: the evaluations after which the adversary is off.
      The paper takes half of the epochs, with an evaluation in each. None: only
      the largest batch turns it off.

  Returns:
    A `BatchController`. Take for `eigenvalue` the algebraically largest one
    (`hessian.top_eigenpairs`) on one fixed batch, with the model in evaluation
    mode. An eigenvalue that is negative, zero or not finite says nothing about
    a flatter loss: it is never compared and never becomes the reference, but
    the evaluation counts. With `shrink=None`, `patience=None` and
    `adversarial_evaluations=0` it is plain training.

  Raises:
    TypeError: for a number of things that is not an int, or an `update` with
      an eigenvalue that is no scalar or the state in its place.
    ValueError: for an initial batch above the largest, a growth below 2, a
      `shrink` outside (0, 1), or a patience below 1.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> controller = conadv.absa(8)
    >>> state = controller.init()
    >>> for eigenvalue in (10., 6., 5., 2.4, 1.):
    ...   state = controller.update(eigenvalue, state)
    >>> # It grew at 5 (half of 10), at 2.4 and at 1.
    >>> chex.assert_trees_all_equal(state.micro_batches, jnp.int32(8))
    >>> chex.assert_trees_all_equal(state.learning_rate_scale, jnp.float32(8))
    >>> chex.assert_trees_all_equal(state.attacked, jnp.int32(0))

  References:
    Yao et al., `Large batch size training of neural networks with adversarial
    training and second-order information <https://arxiv.org/abs/1810.01021>`_,
    2018
  """
  check_count('micro_batches', micro_batches)
  check_count('max_micro_batches', max_micro_batches)
  check_count('growth', growth, least=2)
  if patience is not None:
    check_count('patience', patience)
  if adversarial_evaluations is not None:
    check_count('adversarial_evaluations', adversarial_evaluations, least=0)
  if shrink is not None and not 0 < shrink < 1:
    raise ValueError(
      '`shrink` is the share of the reference that the eigenvalue must have '
      f'fallen to, in (0, 1). Given shrink={shrink!r}. Write `shrink=0.5`, or '
      '`shrink=None` to leave the eigenvalue out.'
    )
  if micro_batches > max_micro_batches:
    raise ValueError(
      'The batch starts at `micro_batches` and grows to `max_micro_batches`. '
      f'Given micro_batches={micro_batches} above '
      f'max_micro_batches={max_micro_batches}. Likely they are swapped: '
      f'`conadv.absa({micro_batches}, micro_batches={max_micro_batches})`.'
    )

  def attacked(size: jax.Array, evaluations: jax.Array) -> jax.Array:
    on = size < max_micro_batches
    if adversarial_evaluations is not None:
      on &= evaluations < adversarial_evaluations
    return jnp.where(on, jnp.int32(micro_batches), jnp.int32(0))

  def init_fn() -> AbsaState:
    size = jnp.int32(micro_batches)
    return AbsaState(
      micro_batches=size,
      attacked=attacked(size, jnp.int32(0)),
      learning_rate_scale=jnp.float32(1),
      reference=jnp.float32(0),
      waited=jnp.int32(0),
      evaluations=jnp.int32(0),
    )

  def update_fn(eigenvalue: ArrayLike, state: AbsaState) -> AbsaState:
    call = 'controller.update(pairs.values[0], state)'
    check_order(call, state, AbsaState, measured=eigenvalue)
    eigenvalue = jnp.asarray(eigenvalue, jnp.float32)
    usable = jnp.isfinite(eigenvalue) & (eigenvalue > 0)
    evaluations, waited = state.evaluations + 1, state.waited + 1
    # Nothing usable is below a share of 0.
    is_flatter = usable & (eigenvalue <= (shrink or 0.0) * state.reference)
    grows = is_flatter
    if patience is not None:
      grows |= waited >= patience
    size = jnp.where(
      grows,
      jnp.minimum(growth * state.micro_batches, max_micro_batches),
      state.micro_batches,
    )
    is_first = usable & (state.reference == 0)
    return AbsaState(
      micro_batches=size,
      attacked=attacked(size, evaluations),
      learning_rate_scale=size.astype(jnp.float32) / micro_batches,
      reference=jnp.where(is_first | is_flatter, eigenvalue, state.reference),
      waited=jnp.where(grows, 0, waited),
      evaluations=evaluations,
    )

  return BatchController(init_fn, update_fn)
