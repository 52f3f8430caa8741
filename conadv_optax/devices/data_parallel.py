"""Many devices, each with batch statistics of its own."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_optax.core import checks
from conadv_optax.core.numeric import at_least_float32
from conadv_optax.core.types import (
  Batch,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
)
from conadv_optax.devices import groups


def data_parallel(
  grad_fn: GradientFunction,
  mesh: Mesh,
  *,
  axis: str = 'data',
  second_moment: bool = False,
) -> GradientFunction:
  r"""Runs a gradient function on each device's share of the batch.

  .. math::

    g = \frac1K \sum_{k=1}^{K} g_k

  where device :math:`k` sees its shard alone, so that BatchNorm's groups are
  the shards. Under plain `jit` a sharded batch works too, and BatchNorm is then
  over the whole of it.

  The calls keep their form. Every leaf of a batch is split along its leading
  axis; the queue is split like the batch, and parameters and model state are
  the same on all devices. Each device folds its index into the key. Put the
  parameters on all devices before the first step,
  `jax.device_put(params, NamedSharding(mesh, PartitionSpec()))`, or the second
  step compiles again.

  Args:
    grad_fn: what `conadv.wrap` returned, say.
    mesh: the devices.
    axis: the axis of `mesh` that the batch is split over.
    second_moment: whether the aux holds :math:`\frac1K \sum_k g_k^2` too,
      which is sent like the gradient, and doubles that traffic.

  Returns:
    A `GradientFunction`. Losses, gradients and the floating leaves of the model
    state are averaged over the devices, and sent, in float32 or wider (other
    leaves of the state, counters say, are the same everywhere). Of the user's
    own aux, a floating scalar is averaged, another scalar is summed (booleans
    are counted), and an array is taken to be one value an example and put
    together along its leading axis.

  Raises:
    ValueError: when the mesh has no such axis, or a leaf of a batch does not
      divide evenly over it.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.wrap(
    ...     lambda w, batch: jnp.mean((batch['x'] * w) ** 2),
    ...     staleness=0, attack=conadv.fgsm(0.), inputs='x')
    >>> mesh = jax.make_mesh((jax.device_count(),), ('data',))
    >>> parallel = conadv.data_parallel(grad_fn, mesh)
    >>> batch = {'x': 1. + jnp.arange(2. * jax.device_count())}
    >>> w = jnp.array(1.)
    >>> _, grads, _ = parallel.value_and_grad(w, parallel.init(w, []), batch)
    >>> chex.assert_trees_all_close(grads, 2 * jnp.mean(batch['x'] ** 2))

  References:
    Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
    <https://arxiv.org/abs/2106.00221>`_, 2022
  """
  if axis not in mesh.axis_names:
    raise ValueError(
      f'`axis` must be an axis of the mesh. Given axis={axis!r} for a mesh '
      f'with {mesh.axis_names}. Write `jax.make_mesh((jax.device_count(),), '
      f'({axis!r},))`.'
    )
  shared, split = P(), P(axis)

  def on_devices(fn: Any, in_specs: Any, out_specs: Any) -> Any:
    # The gradients are averaged by hand, so replication is not tracked: any
    # model may run inside, whatever its loops carry.
    return jax.shard_map(
      fn,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      axis_names={axis},
      check_vma=False,
    )

  def place(batch: Batch) -> Batch:
    groups.check_divides(
      batch,
      mesh.shape[axis],
      'devices',
      'take fewer devices: `jax.make_mesh((n,), (axis,))`',
    )
    # A mesh with explicit axes does not split an argument by itself.
    return jax.device_put(batch, NamedSharding(mesh, split))

  def specs(state: Any) -> Any:
    return groups.map_state(
      state,
      queue=lambda part: ConAdvState(shared, P(None, axis)),
      own=lambda part: split,
      shared=lambda leaf: shared,
    )

  def init(
    params: Any,
    first_batches: Any,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> ConAdvState:
    checks.check_first_batches(first_batches, grad_fn.staleness)
    first_batches = [place(batch) for batch in first_batches]

    def local(
      params: Any, batches: Any, model_state: Any, key: Any
    ) -> ConAdvState:
      key = groups.own_key(key, jax.lax.axis_index(axis))
      state = grad_fn.init(params, batches, model_state=model_state, key=key)
      return _add_axis(state)

    state = jax.eval_shape(
      lambda params, batches, model_state, key: grad_fn.init(
        params, batches, model_state=model_state, key=key
      ),
      _shapes(params),
      _shapes(first_batches, parts=mesh.shape[axis]),
      _shapes(model_state),
      _shapes(key),
    )
    return on_devices(local, (shared, split, shared, shared), specs(state))(
      params, first_batches, model_state, key
    )

  def value_and_grad(
    params: Any,
    state: Any,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, Any]:
    batch = place(batch)

    def local(
      params: Any, state: Any, batch: Batch, model_state: Any, key: Any
    ) -> Any:
      (loss, aux), grads, state = grad_fn.value_and_grad(
        params,
        _drop_axis(state),
        batch,
        model_state=model_state,
        key=groups.own_key(key, jax.lax.axis_index(axis)),
      )
      squares = groups.second_moment(aux, grads, second_moment)
      scalars, arrays = groups.split_aux(aux.aux)
      averaged = _mean(
        (loss, aux.losses, aux.model_state, grads, squares), axis
      )
      return averaged, _mean_or_sum(scalars, axis), arrays, _add_axis(state)

    state_specs = specs(state)
    averaged, scalars, arrays, state = on_devices(
      local,
      (shared, state_specs, split, shared, shared),
      (shared, shared, split, state_specs),
    )(params, state, batch, model_state, key)
    loss, losses, model_state, grads, squares = averaged
    user_aux = groups.join_aux(scalars, arrays)
    aux = ConAdvAux(losses, model_state, user_aux, squares)
    return (loss, aux), grads, state

  return GradientFunction(init, value_and_grad, grad_fn.staleness)


def _shapes(tree: Any, *, parts: int = 1) -> Any:
  """The shapes of one part, without the whole's place on the mesh."""
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (x.shape[0] // parts, *x.shape[1:]) if parts > 1 else x.shape, x.dtype
    ),
    tree,
  )


def _add_axis(state: Any) -> Any:
  """Gives what is each device's own the axis along which it is split."""
  return _own(lambda x: x[None], state)


def _drop_axis(state: Any) -> Any:
  return _own(lambda x: x[0], state)


def _own(fn: Callable[[jax.Array], jax.Array], state: Any) -> Any:
  return groups.map_state(
    state,
    queue=lambda part: part,
    own=lambda part: jax.tree.map(fn, part),
    shared=lambda leaf: leaf,
  )


def _mean(tree: Any, axis: str) -> Any:
  """The mean over devices of floating leaves; others are equal on all."""
  return jax.tree.map(
    lambda x: _pmean(x, axis) if groups.is_floating(x) else x, tree
  )


def _mean_or_sum(tree: Any, axis: str) -> Any:
  return jax.tree.map(
    lambda x: (
      _pmean(jnp.asarray(x), axis)
      if groups.is_floating(x)
      else jax.lax.psum(x, axis)
    ),
    tree,
  )


def _pmean(x: jax.Array, axis: str) -> jax.Array:
  # A sum in float16 overflows, and one in bfloat16 loses what is small.
  return jax.lax.pmean(at_least_float32(x), axis).astype(x.dtype)
