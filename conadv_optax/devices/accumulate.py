"""One device for many: a step in micro-batches."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from conadv_optax.core.calls import Call, around, pytree, share_of_mean
from conadv_optax.core.micro_batches import cut, join, merged, part_of
from conadv_optax.core.numeric import abs_sq, check_count, full, inverse, scale
from conadv_optax.core.types import (
  Batch,
  ConAdvState,
  Denominators,
  GradientFunction,
  LossFn,
)
from conadv_optax.devices import groups
from conadv_optax.training.plain import as_gradient_function


def accumulate(
  grad_fn: GradientFunction | LossFn,
  micro_batches: int,
  *,
  second_moment: bool = False,
  unroll: bool = False,
) -> GradientFunction:
  r"""Runs a gradient function on one micro-batch of the batch after another.

  .. math::

    g = \frac1K \sum_{k=1}^{K} g_k

  where :math:`g_k` is the gradient on the k-th of `micro_batches` = :math:`K`
  parts of the batch. Part k holds the examples :math:`k, k + K, k + 2K,
  \ldots`, so a batch that is spread over devices stays where it is. One device
  then does what `data_parallel` does on as many devices: BatchNorm's groups are
  the micro-batches, each of which folds its number into the key and starts from
  the same model state. It takes :math:`K` times as long, and needs the
  memory of one micro-batch beside batch and queue.

  `data_parallel(accumulate(grad_fn, micro_batches), mesh)` does both, and
  reduces once a step over the devices.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    micro_batches: their number, static.
    second_moment: whether the aux holds :math:`\frac1K \sum_k g_k^2` too.
    unroll: whether the program holds a copy of `grad_fn` for each micro-batch
      in place of a loop. It takes longer to compile. XLA for CPUs runs
      convolutions in a loop many times slower than outside of it.

  Returns:
    A `GradientFunction`, whose state has the form of that on devices. Losses,
    gradients and the floating leaves of the model state are averaged in float32
    over the micro-batches (other leaves of the state are the last one's). Of
    the user's own aux, a floating scalar is averaged, another scalar is summed
    (booleans are counted), and an array is put together along its leading axis.

  Raises:
    TypeError: for a number that is not an int, or a `grad_fn` that is no
      function.
    ValueError: for a number below 1, a leaf of a batch that does not divide
      evenly, or a second moment that both wrappers are asked for.

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
  made = _Accumulate(grad_fn, micro_batches, second_moment, unroll)
  return around(made)


@pytree('grad_fn')
class _Accumulate:
  grad_fn: GradientFunction
  micro_batches: int
  second_moment: bool
  unroll: bool

  def init(self, call: Call) -> Any:
    batches = cut(call.batch, self.micro_batches)
    return jax.jit(self._init)(call._replace(batch=batches))

  def value_and_grad(self, call: Call) -> tuple[Any, Any, Any]:
    groups.check_groups(call.state, self.micro_batches)
    batches = cut(call.batch, self.micro_batches)
    return self._compiled(call._replace(batch=batches))

  def denominators(self, state: Any, batch: Batch) -> Denominators:
    batches = cut(batch, self.micro_batches)
    return self._denominators(_cut(state, self.micro_batches), batches)

  @functools.cached_property
  def _compiled(self) -> Callable[..., Any]:
    # Outside of `jit` a loop carries nothing that is spread over explicit axes.
    return jax.jit(self._run)

  def _init(self, call: Call) -> Any:
    stacked = jax.lax.map(
      lambda number: _of_part(call, number).init(self.grad_fn),
      jnp.arange(self.micro_batches),
    )
    return groups.map_state(
      stacked,
      # From (K, tau, B / K, ...) to (tau, B, ...).
      queue=lambda part: jax.tree.map(
        lambda x: merged(jnp.moveaxis(x, 0, 2), 1) if x.ndim > 1 else x[0],
        part,
      ),
      own=lambda part: part,
      shared=lambda leaf: leaf[0],
    )

  def _run(self, call: Call) -> tuple[Any, Any, Any]:
    whole, state = call, _cut(call.state, self.micro_batches)
    if call.denominators is None and self.grad_fn.denominators is not None:
      own = self._denominators(state, call.batch)
      call = call._replace(denominators=own)

    def one(part: Any, number: jax.Array) -> Any:
      of_part, own = _of_part(call._replace(state=part), number), None
      if self.grad_fn.denominators is not None:
        own = self.grad_fn.denominators(part, of_part.batch)
      parts, moment, new = groups.run_group(self.grad_fn, of_part)
      groups.check_one_kind(moment, self.second_moment)
      return parts, moment, share_of_mean(own, call.denominators), new

    def body(carry: Any, number: jax.Array) -> tuple[Any, Any]:
      written, part, total, deviations, seen = carry
      new, moment, share, new_part = one(part, number)
      means = optax.tree.add(total.means, new.means)
      if deviations is not None:
        before = _over(total.means[2], seen)
        after = _over(means[2], seen + share)
        of_new = groups.deviation(new.means[2], moment, share, before, after)
        deviations = optax.tree.add(deviations, of_new)
      counts = optax.tree.add(total.counts, new.counts)
      written = _write(written, new_part, number)
      # Read after this part is written, the queue changes in place; read
      # before, the compiler copies all of it for each micro-batch.
      part = _read(state, written, number + 1)
      total = groups.Parts(means, counts, new.kept, None)
      return (written, part, total, deviations, seen + share), new.arrays

    zero = jnp.zeros([], jnp.int32)
    first = _read(state, state, zero)
    shapes, moment, share, _ = jax.eval_shape(one, first, zero)
    wants_moment = self.second_moment or moment is not None
    moment = jax.eval_shape(lambda g: jax.tree.map(abs_sq, g), shapes.means[2])
    # Spread as the sums are to be, which inside of a `shard_map` must be said.
    zeros = jax.tree.map(
      lambda x: full(x, 0),
      (
        shapes._replace(arrays=None),
        moment if wants_moment else None,
        share,
      ),
    )
    (state, _, total, moment, seen), arrays = jax.lax.scan(
      body,
      (state, first, *zeros),
      jnp.arange(self.micro_batches, dtype=jnp.int32),
      unroll=self.unroll,
    )
    means = scale(1 / self.micro_batches, total.means)
    if wants_moment:
      # The mean share is 1, unless this is a part of another mean.
      squares = _over(jax.tree.map(abs_sq, means[2]), seen / self.micro_batches)
      moment = optax.tree.add_scale(squares, 1 / self.micro_batches, moment)
    parts = groups.Parts(means, total.counts, total.kept, join(arrays))
    state = _each_queue(lambda x: merged(x, 1), state)
    return *groups.put_together(parts, moment, whole), state

  def _denominators(self, state: Any, batches: Batch) -> Denominators:
    """Their mean and the most over the micro-batches."""

    def one(number: jax.Array) -> Denominators:
      assert self.grad_fn.denominators is not None
      part = _read(state, state, number)
      return self.grad_fn.denominators(part, part_of(batches, number))

    every = jax.lax.map(one, jnp.arange(self.micro_batches))
    return groups.over_groups(every, jnp.mean, jnp.max)


def _of_part(call: Call, number: jax.Array) -> Call:
  """The call of one micro-batch, of one whose batch is cut."""
  return call._replace(
    batch=part_of(call.batch, number), key=groups.own_key(call.key, number)
  )


def _cut(state: Any, micro_batches: int) -> Any:
  """The queue, (tau, B, ...), as (tau, B / K, K, ...)."""
  return _each_queue(
    lambda x: x.reshape(
      x.shape[0], x.shape[1] // micro_batches, micro_batches, *x.shape[2:]
    ),
    state,
  )


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


def _over(total: Any, seen: jax.Array) -> Any:
  """A mean; zero of nothing."""
  return scale(inverse(seen), total)
