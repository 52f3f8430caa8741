"""One device for many: a step in micro-batches."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from conadv_optax.core import checks
from conadv_optax.core.numeric import at_least_float32
from conadv_optax.core.types import (
  Batch,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
)
from conadv_optax.devices import groups


def accumulate(
  grad_fn: GradientFunction, count: int, *, second_moment: bool = False
) -> GradientFunction:
  r"""Runs a gradient function on one micro-batch of the batch after another.

  .. math::

    g = \frac1K \sum_{k=1}^{K} g_k

  where :math:`g_k` is the gradient on the k-th of `count` = :math:`K` parts of
  the batch, in its order. One device then does what `data_parallel` does on
  `count` devices: BatchNorm's groups are the micro-batches, each of which folds
  its number into the key and starts from the same model state. It takes as many
  times longer, and the memory of one micro-batch beside batch and queue.

  With both, `data_parallel(accumulate(grad_fn, count), mesh)` reduces once a
  step over the devices.

  Args:
    grad_fn: what `conadv.wrap` returned, say.
    count: the number of micro-batches, static.
    second_moment: whether the aux holds :math:`\frac1K \sum_k g_k^2` too.

  Returns:
    A `GradientFunction`, whose state has the form of that on devices. Losses,
    gradients and the floating leaves of the model state are averaged in float32
    over the micro-batches (other leaves of the state are the last one's). Of
    the user's own aux, a floating scalar is averaged, another scalar is summed
    (booleans are counted), and an array is put together along its leading axis.

  Raises:
    TypeError: for a count that is not an int.
    ValueError: for a count below 1, or a leaf of a batch that does not divide
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
    >>> of_groups = 2 * jnp.array([0.5, 2.5, 4.5, 6.5])
    >>> chex.assert_trees_all_close(
    ...     aux.second_moment, jnp.mean(of_groups ** 2))

  References:
    Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
    <https://arxiv.org/abs/2106.00221>`_, 2022: the groups of its BatchNorm
  """
  if isinstance(count, bool) or not isinstance(count, int):
    raise TypeError(
      '`count` is a number of micro-batches, a Python int, because the shape '
      f'of each depends on it. Given {count!r} of type {type(count).__name__}.'
    )
  if count < 1:
    raise ValueError(
      '`count` is a number of micro-batches, 1 or more. Given '
      f'count={count}. Likely the division is upside down: '
      '`count=batch_size // micro_batch_size`.'
    )
  if count == 1 and not second_moment:
    return grad_fn

  def micro_batches(batch: Batch) -> Batch:
    batch = jax.tree.map(jnp.asarray, batch)
    groups.check_divides(batch, count, 'micro-batches', 'take another `count`')
    return jax.tree.map(
      lambda x: x.reshape(count, x.shape[0] // count, *x.shape[1:]), batch
    )

  def init(
    params: Any,
    first_batches: Sequence[Batch],
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> Any:
    checks.check_first_batches(first_batches, grad_fn.staleness)

    def init_one(args: tuple[jax.Array, list[Batch]]) -> Any:
      number, batches = args
      return grad_fn.init(
        params,
        batches,
        model_state=model_state,
        key=groups.own_key(key, number),
      )

    stacked = jax.lax.map(
      init_one,
      (jnp.arange(count), [micro_batches(batch) for batch in first_batches]),
    )
    return groups.map_state(
      stacked,
      queue=lambda part: ConAdvState(
        jax.tree.map(lambda x: x[0], part.slot),
        jax.tree.map(_join_second_axis, part.queue),
      ),
      own=lambda part: part,
      shared=lambda leaf: leaf[0],
    )

  def value_and_grad(
    params: Any,
    state: Any,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, Any]:
    batches = micro_batches(batch)

    def one(state: Any, batch: Batch, number: jax.Array) -> Any:
      (loss, aux), grads, state = grad_fn.value_and_grad(
        params,
        state,
        batch,
        model_state=model_state,
        key=groups.own_key(key, number),
      )
      squares = groups.second_moment(aux, grads, second_moment)
      scalars, arrays = groups.split_aux(aux.aux)
      scalars = jax.tree.map(_number, scalars)
      averaged = (loss, aux.losses, aux.model_state, grads, squares)
      return averaged, scalars, arrays, state

    def body(carry: Any, xs: tuple[jax.Array, Batch]) -> tuple[Any, Any]:
      written, part, averaged, scalars = carry
      number, batch = xs
      new_averaged, new_scalars, arrays, new = one(part, batch, number)
      written = _write(written, new, number)
      carry = (
        written,
        # Read after this part is written, the queue changes in place; read
        # before, the compiler copies all of it for each micro-batch.
        _read(state, written, number + 1, count),
        jax.tree.map(_add_or_last, averaged, new_averaged),
        jax.tree.map(_add, scalars, new_scalars),
      )
      return carry, arrays

    number = jnp.zeros([], jnp.int32)
    first = _read(state, state, number, count)
    shapes = jax.eval_shape(
      one, first, jax.tree.map(lambda x: x[0], batches), number
    )
    zeros = jax.tree.map(_zero, shapes[:2])
    (state, _, averaged, scalars), arrays = jax.lax.scan(
      body,
      (state, first, *zeros),
      (jnp.arange(count, dtype=jnp.int32), batches),
    )

    def mean(total: jax.Array, shape: jax.ShapeDtypeStruct) -> jax.Array:
      if not groups.is_floating(shape):
        return total
      return (total / count).astype(shape.dtype)

    loss, losses, model_state, grads, squares = jax.tree.map(
      mean, averaged, shapes[0]
    )
    scalars = jax.tree.map(mean, scalars, shapes[1])
    arrays = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), arrays)
    aux = ConAdvAux(
      losses, model_state, groups.join_aux(scalars, arrays), squares
    )
    return (loss, aux), grads, state

  return GradientFunction(init, value_and_grad, grad_fn.staleness)


def _join_second_axis(x: jax.Array) -> jax.Array:
  """From (K, tau, B / K, ...) to (tau, B, ...)."""
  x = jnp.moveaxis(x, 0, 1)
  return x.reshape(x.shape[0], -1, *x.shape[3:])


def _read(state: Any, written: Any, number: jax.Array, count: int) -> Any:
  """One micro-batch's part of `written`; what is shared is that of `state`."""

  def take(ring: jax.Array) -> jax.Array:
    size = ring.shape[1] // count
    return jax.lax.dynamic_slice_in_dim(ring, number * size, size, axis=1)

  def one(x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, number, keepdims=False)

  return groups.map_state(
    state,
    written,
    queue=lambda old, new: ConAdvState(old.slot, jax.tree.map(take, new.queue)),
    own=lambda old, new: jax.tree.map(one, new),
    shared=lambda old, new: old,
  )


def _write(written: Any, new: Any, number: jax.Array) -> Any:
  """Puts one micro-batch's part back in its place."""

  def put(ring: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(
      ring, x, number * x.shape[1], axis=1
    )

  def put_one(all_: jax.Array, x: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(all_, x, number, axis=0)

  return groups.map_state(
    written,
    new,
    queue=lambda old, new: ConAdvState(
      new.slot, jax.tree.map(put, old.queue, new.queue)
    ),
    own=lambda old, new: jax.tree.map(put_one, old, new),
    shared=lambda old, new: new,
  )


def _number(x: Any) -> jax.Array:
  """A scalar of which a sum makes sense: of booleans it is their count."""
  x = jnp.asarray(x)
  return x.astype(jnp.int32) if x.dtype == bool else x


def _zero(x: jax.ShapeDtypeStruct) -> jax.Array:
  zero = jnp.zeros(x.shape, x.dtype)
  return at_least_float32(zero) if groups.is_floating(x) else zero


def _add(total: jax.Array, x: jax.Array) -> jax.Array:
  return total + (at_least_float32(x) if groups.is_floating(x) else x)


def _add_or_last(total: jax.Array, x: jax.Array) -> jax.Array:
  return _add(total, x) if groups.is_floating(x) else x
