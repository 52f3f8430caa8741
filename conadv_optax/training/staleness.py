"""How much of an attack is left when its parameters are some steps old."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from conadv_optax.core.batches import check_arrays
from conadv_optax.core.calls import check_passes
from conadv_optax.core.types import Batch, GradientFunction, Passes, Queue


class StalenessReport(NamedTuple):
  """What `staleness_report` measures, float32 scalars.

  Attributes:
    sign_agreement: of the input elements that at least one attack moves, the
      share that both move the same way, 0 to 1; nan if none is moved.
    stale_gain: how much the stale attack adds to the adversarial branch's loss.
    fresh_gain: how much the fresh attack adds to it.
  """

  sign_agreement: jax.Array
  stale_gain: jax.Array
  fresh_gain: jax.Array


def staleness_report(
  grad_fn: GradientFunction,
  old_params: Any,
  params: Any,
  batch: Batch,
  *,
  model_state: Any = None,
  key: jax.Array | None = None,
) -> StalenessReport:
  r"""Compares the attack of old parameters with that of the present ones.

  .. math::

    \text{agreement} = \operatorname{mean}_{moved}\left[
      \mathrm{sign}(\hat x_{old} - x) = \mathrm{sign}(\hat x - x)
    \right]

  .. math::

    \text{gain}_{stale} = L_a(\theta; \hat x_{old}) - L_a(\theta; x), \qquad
    \text{gain}_{fresh} = L_a(\theta; \hat x) - L_a(\theta; x)

  where :math:`\hat x_{old}` and :math:`\hat x` are crafted with
  :math:`\theta_{old}` and :math:`\theta`, with the same random start and
  targets, and :math:`L_a` is the loss of the adversarial branch.

  To choose a staleness :math:`\tau`, keep the parameters of :math:`\tau` steps
  ago once. While the stale gain is near the fresh gain, training sees examples
  about as hard as a fresh attack's; a stale gain near 0 means that the examples
  have become noise. Both gains vary from batch to batch, so look at several
  batches, and at the start of training, when parameters move most.

  Args:
    grad_fn: what `conadv.wrap` itself returned, with `every=1` and without
      `reuse_gradient`. Its own staleness plays no part.
    old_params: the parameters of some steps ago, `Branched` or not.
    params: the present parameters, of the same structure.
    batch: a batch as for training.
    model_state: as for training, with `has_state`. Both attacks get the same,
      because they run in training mode, where a norm layer does not read it.
    key: a key, if the attack or the loss draws random numbers.

  Returns:
    A `StalenessReport`.

  Raises:
    TypeError: when `grad_fn` is no `GradientFunction`.
    ValueError: when `grad_fn` cannot be taken apart (its `passes` is None), or
      a key or a model state is missing.

  Examples:
    >>> import chex, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.wrap(
    ...     lambda w, batch: jnp.mean(batch['x'] @ w),
    ...     attack=conadv.fgsm(0.1), inputs='x')
    >>> # The second weight has changed its sign since the attack.
    >>> report = conadv.staleness_report(
    ...     grad_fn, jnp.array([3., 1.]), jnp.array([3., -1.]),
    ...     {'x': jnp.ones((4, 2))})
    >>> chex.assert_trees_all_close(
    ...     report, conadv.StalenessReport(0.5, 0.1 * (3 - 1), 0.1 * (3 + 1)),
    ...     rtol=1e-5)

  References:
    Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
    <https://arxiv.org/abs/2106.00221>`_, 2022
  """
  passes = check_passes(grad_fn, 'staleness_report')
  check_arrays(batch)
  return _report(
    passes,
    old_params,
    params,
    jax.tree.map(jnp.asarray, batch),
    model_state,
    key,
  )


# Compiled, so that of the training passes the losses alone are computed; here,
# so that the next report of the same passes is not compiled again.
@functools.partial(jax.jit, static_argnums=0)
def _report(
  passes: Passes,
  old_params: Any,
  params: Any,
  batch: Batch,
  model_state: Any,
  key: Any,
) -> StalenessReport:
  clean = passes.clean(batch)
  stale = passes.craft(old_params, model_state, batch, key)
  fresh = passes.craft(params, model_state, batch, key)

  def loss(inputs: Any) -> jax.Array:
    (_, aux), _ = passes.train(params, model_state, Queue(batch, inputs), key)
    return aux.losses['adversarial'].astype(jnp.float32)

  def moved(inputs: Any) -> Any:
    return jax.tree.map(lambda x, at: jnp.sign(x - at), inputs, clean)

  def share(agrees: Any, counts: Any) -> jax.Array:
    agreed, counted = (
      sum(jnp.sum(x, dtype=jnp.float32) for x in jax.tree.leaves(tree))
      for tree in (jax.tree.map(jnp.logical_and, agrees, counts), counts)
    )
    return jnp.asarray(agreed / counted)

  clean_loss = loss(clean)
  old, new = moved(stale), moved(fresh)
  return StalenessReport(
    share(
      jax.tree.map(jnp.equal, old, new),
      jax.tree.map(lambda x, y: (x != 0) | (y != 0), old, new),
    ),
    loss(stale) - clean_loss,
    loss(fresh) - clean_loss,
  )
