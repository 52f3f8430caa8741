"""One device for many: a step in micro-batches."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core.batches import as_arrays
from conadv_optax.core.micro_batches import cut, join, part_of
from conadv_optax.core.numeric import abs_sq, check_count
from conadv_optax.core.types import (
  Batch,
  ConAdvAux,
  ConAdvState,
  Denominators,
  GradientFunction,
  LossFn,
  gradient_function,
  pytree,
)
from conadv_optax.devices import groups
from conadv_optax.training.plain import as_gradient_function
from conadv_optax.training.queue import check_first_batches


def accumulate(
  grad_fn: GradientFunction | LossFn,
  micro_batches: int,
  *,
  second_moment: bool = False,
) -> GradientFunction:
  r"""Runs a gradient function on one micro-batch of the batch after another.

  .. math::

    g = \frac1K \sum_{k=1}^{K} g_k

  where :math:`g_k` is the gradient on the k-th of `micro_batches` = :math:`K`
  parts of the batch, its examples :math:`k, k + K, k + 2K, \ldots`, so that a
  batch which is spread over devices stays where it is. One device then does
  what `data_parallel` does on as many devices: BatchNorm's groups are the
  micro-batches, each of which folds its number into the key and starts from the
  same model state. It takes as many times longer, and the memory of one
  micro-batch beside batch and queue.

  With both, `data_parallel(accumulate(grad_fn, micro_batches), mesh)` reduces
  once a step over the devices.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    micro_batches: their number, static.
    second_moment: whether the aux holds :math:`\frac1K \sum_k g_k^2` too.

  Returns:
    A `GradientFunction`, whose state has the form of that on devices. Losses,
    gradients and the floating leaves of the model state are averaged in float32
    over the micro-batches (other leaves of the state are the last one's). Of
    the user's own aux, a floating scalar is averaged, another scalar is summed
    (booleans are counted), and an array is put together along its leading axis.

  Raises:
    TypeError: for a number that is not an int.
    ValueError: for a number below 1, or a leaf of a batch that does not divide
      evenly.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> plain = conadv.plain(lambda w, batch: jnp.mean(batch * w ** 2))
    >>> grad_fn = conadv.accumulate(plain, 4, second_moment=True)
    >>> w, batch = jnp.array(1.), jnp.arange(8.)
    >>> (loss, aux), grads, _ = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), batch)
    >>> chex.assert_trees_all_close(grads, 2 * batch.mean())
    >>> of_groups = 2 * jnp.array([2., 3., 4., 5.])
    >>> chex.assert_trees_all_close(
    ...     aux.second_moment, jnp.mean(of_groups ** 2))

  References:
    Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
    <https://arxiv.org/abs/2106.00221>`_, 2022: the groups of its BatchNorm
  """
  check_count('micro_batches', micro_batches)
  grad_fn = as_gradient_function(grad_fn)
  return gradient_function(
    _Accumulate(grad_fn, micro_batches, second_moment),
    grad_fn.staleness,
    has_denominators=grad_fn.denominators is not None,
  )


@pytree('grad_fn')
class _Accumulate:
  grad_fn: GradientFunction
  micro_batches: int
  second_moment: bool

  def init(
    self,
    params: Any,
    first_batches: Sequence[Batch],
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> Any:
    check_first_batches(first_batches, self.grad_fn.staleness)
    batches = [self._cut(batch) for batch in first_batches]
    return jax.jit(self._init)(params, batches, model_state, key)

  def value_and_grad(
    self,
    params: Any,
    state: Any,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
    denominators: Denominators | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, Any]:
    return self._compiled(
      params, state, self._cut(batch), model_state, key, denominators
    )

  def denominators(self, state: Any, batch: Batch) -> Denominators:
    """Their mean over the micro-batches."""
    return self._denominators(
      _cut(state, self.micro_batches), self._cut(batch)
    )

  def _init(self, params: Any, batches: Any, model_state: Any, key: Any) -> Any:
    def one(number: jax.Array) -> Any:
      return self.grad_fn.init(
        params,
        part_of(batches, number),
        model_state=model_state,
        key=groups.own_key(key, number),
      )

    stacked = jax.lax.map(one, jnp.arange(self.micro_batches))
    return groups.map_state(
      stacked,
      queue=lambda part: (
        ConAdvState(part.slot[0], jax.tree.map(_from_parts, part.queue))
        if jax.tree.leaves(part)
        else part
      ),
      own=lambda part: part,
      shared=lambda leaf: leaf[0],
    )

  def _run(
    self,
    params: Any,
    state: Any,
    batches: Batch,
    model_state: Any,
    key: Any,
    denominators: Denominators | None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, Any]:
    whole, state = denominators is None, _cut(state, self.micro_batches)
    if whole and self.grad_fn.denominators is not None:
      denominators = self._denominators(state, batches)

    def one(part: Any, number: jax.Array) -> Any:
      batch, own = part_of(batches, number), None
      if self.grad_fn.denominators is not None:
        own = self.grad_fn.denominators(part, batch)
      parts, moment, new = groups.run_group(
        self.grad_fn,
        params,
        part,
        batch,
        model_state,
        groups.own_key(key, number),
        denominators,
      )
      groups.check_one_kind(moment, self.second_moment)
      return parts, moment, groups.share_of_mean(own, denominators), new

    def body(carry: Any, number: jax.Array) -> tuple[Any, Any]:
      written, part, total, deviations, seen = carry
      new, moment, share, new_part = one(part, number)
      means = jax.tree.map(jnp.add, total.means, new.means)
      if deviations is not None:
        before, after = (
          _mean(total.means[2], seen),
          _mean(means[2], seen + share),
        )
        of_new = groups.deviation(new.means[2], moment, share, before, after)
        deviations = jax.tree.map(jnp.add, deviations, of_new)
      counts = jax.tree.map(jnp.add, total.counts, new.counts)
      written = _write(written, new_part, number)
      carry = (
        written,
        # Read after this part is written, the queue changes in place; read
        # before, the compiler copies all of it for each micro-batch.
        _read(state, written, number + 1),
        groups.Parts(means, counts, new.kept, None),
        deviations,
        seen + share,
      )
      return carry, new.arrays

    zero = jnp.zeros([], jnp.int32)
    first = _read(state, state, zero)
    shapes, moment, share, _ = jax.eval_shape(one, first, zero)
    wants_moment = self.second_moment or moment is not None
    zeros = (
      shapes._replace(arrays=None),
      shapes.means[2] if wants_moment else None,
      share,
    )
    (state, _, total, deviations, seen), arrays = jax.lax.scan(
      body,
      (state, first, *jax.tree.map(_zero, zeros)),
      jnp.arange(self.micro_batches, dtype=jnp.int32),
    )
    means = jax.tree.map(lambda x: x / self.micro_batches, total.means)
    if wants_moment:
      share = seen / self.micro_batches
      deviations = jax.tree.map(
        lambda g, part: (
          abs_sq(g) / jnp.where(share > 0, share, 1.0)
          + part / self.micro_batches
        ),
        means[2],
        deviations,
      )
    parts = groups.Parts(means, total.counts, total.kept, join(arrays))
    output, grads = groups.put_together(
      parts, deviations, params, model_state, whole
    )
    return output, grads, _uncut(state)

  def _denominators(self, state: Any, batches: Batch) -> Denominators:
    def one(number: jax.Array) -> Denominators:
      assert self.grad_fn.denominators is not None
      part = _read(state, state, number)
      return self.grad_fn.denominators(part, part_of(batches, number))

    every = jax.lax.map(one, jnp.arange(self.micro_batches))
    return jax.tree.map(jnp.mean, every)

  @functools.cached_property
  def _compiled(self) -> Callable[..., Any]:
    # Outside of `jit` a loop carries nothing that is spread over explicit axes.
    return jax.jit(self._run)

  def _cut(self, batch: Batch) -> Batch:
    return cut(as_arrays(batch), self.micro_batches)


def _cut(state: Any, micro_batches: int) -> Any:
  """The queue, (tau, B, ...), as (tau, B / K, K, ...)."""
  return _each_queue(
    lambda x: x.reshape(
      x.shape[0], x.shape[1] // micro_batches, micro_batches, *x.shape[2:]
    ),
    state,
  )


def _uncut(state: Any) -> Any:
  return _each_queue(lambda x: x.reshape(x.shape[0], -1, *x.shape[3:]), state)


def _from_parts(x: jax.Array) -> jax.Array:
  """From (K, tau, B / K, ...) to (tau, B, ...)."""
  return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])


def _each_queue(fn: Callable[[jax.Array], jax.Array], state: Any) -> Any:
  return groups.map_state(
    state,
    queue=lambda part: ConAdvState(part.slot, jax.tree.map(fn, part.queue)),
    own=lambda part: part,
    shared=lambda leaf: leaf,
  )


def _read(state: Any, written: Any, number: jax.Array) -> Any:
  """One micro-batch's part of `written`; what is shared is that of `state`."""

  def take(x: jax.Array, axis: int) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, axis=axis, keepdims=False)

  return groups.map_state(
    state,
    written,
    queue=lambda old, new: ConAdvState(
      old.slot, jax.tree.map(lambda x: take(x, 2), new.queue)
    ),
    own=lambda old, new: jax.tree.map(lambda x: take(x, 0), new),
    shared=lambda old, new: old,
  )


def _write(written: Any, new: Any, number: jax.Array) -> Any:
  """Puts one micro-batch's part back in its place."""

  def put(axis: int) -> Callable[[jax.Array, jax.Array], jax.Array]:
    return lambda every, x: jax.lax.dynamic_update_index_in_dim(
      every, x, number, axis
    )

  return groups.map_state(
    written,
    new,
    queue=lambda old, new: ConAdvState(
      new.slot, jax.tree.map(put(2), old.queue, new.queue)
    ),
    own=lambda old, new: jax.tree.map(put(0), old, new),
    shared=lambda old, new: new,
  )


def _mean(total: Any, seen: jax.Array) -> Any:
  return jax.tree.map(lambda x: x / jnp.where(seen > 0, seen, 1.0), total)


def _zero(x: jax.ShapeDtypeStruct) -> jax.Array:
  return jnp.zeros(x.shape, x.dtype)
