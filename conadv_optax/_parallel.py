"""Many devices, each with batch statistics of its own."""

from typing import Any

import chex
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_optax._numeric import describe
from conadv_optax._paths import path_names
from conadv_optax._types import (
  Batch,
  ConAdvAux,
  ConAdvState,
  GradientFunction,
)


def data_parallel(
  grad_fn: GradientFunction, mesh: Mesh, *, axis: str = 'data'
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
    grad_fn: what `conadv.wrap` returned.
    mesh: the devices.
    axis: the axis of `mesh` that the batch is split over.

  Returns:
    A `GradientFunction`. Losses, gradients and the floating leaves of the model
    state are averaged over the devices (other leaves of the state, counters
    say, are the same everywhere). Of the user's own aux, a floating scalar is
    averaged, another scalar is summed, and an array is taken to be one value an
    example and put together along its leading axis.

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
    >>> batch = {'x': jnp.arange(2. * jax.device_count())}
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
  state_spec = ConAdvState(shared, P(None, axis))

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
    _check_divides(batch, mesh.shape[axis])
    # A mesh with explicit axes does not split an argument by itself.
    return jax.device_put(batch, NamedSharding(mesh, split))

  def own(key: chex.PRNGKey | None) -> chex.PRNGKey | None:
    if key is None:
      return None
    return jax.random.fold_in(key, jax.lax.axis_index(axis))

  def init(
    params: Any,
    first_batches: Any,
    *,
    model_state: Any = None,
    key: chex.PRNGKey | None = None,
  ) -> ConAdvState:
    first_batches = [place(batch) for batch in first_batches]

    def local(
      params: Any, batches: Any, model_state: Any, key: Any
    ) -> ConAdvState:
      return grad_fn.init(
        params, batches, model_state=model_state, key=own(key)
      )

    return on_devices(local, (shared, split, shared, shared), state_spec)(
      params, first_batches, model_state, key
    )

  def value_and_grad(
    params: Any,
    state: ConAdvState,
    batch: Batch,
    *,
    model_state: Any = None,
    key: chex.PRNGKey | None = None,
  ) -> tuple[tuple[chex.Array, ConAdvAux], Any, ConAdvState]:
    batch = place(batch)

    def local(
      params: Any, state: ConAdvState, batch: Batch, model_state: Any, key: Any
    ) -> Any:
      (loss, aux), grads, state = grad_fn.value_and_grad(
        params, state, batch, model_state=model_state, key=own(key)
      )
      scalars = jax.tree.map(lambda x: None if jnp.ndim(x) else x, aux.aux)
      arrays = jax.tree.map(lambda x: x if jnp.ndim(x) else None, aux.aux)
      averaged = _mean((loss, aux.losses, aux.model_state, grads), axis)
      return averaged, _mean_or_sum(scalars, axis), arrays, state

    (loss, losses, model_state, grads), scalars, arrays, state = on_devices(
      local,
      (shared, state_spec, split, shared, shared),
      (shared, shared, split, state_spec),
    )(params, state, batch, model_state, key)
    user_aux = jax.tree.map(
      lambda x, y: y if x is None else x,
      scalars,
      arrays,
      is_leaf=lambda x: x is None,
    )
    return (loss, ConAdvAux(losses, model_state, user_aux)), grads, state

  return GradientFunction(init, value_and_grad, grad_fn.staleness)


def _mean(tree: Any, axis: str) -> Any:
  """The mean over devices of floating leaves; others are equal on all."""
  return jax.tree.map(
    lambda x: (
      jax.lax.pmean(x, axis) if jnp.issubdtype(x.dtype, jnp.floating) else x
    ),
    tree,
  )


def _mean_or_sum(tree: Any, axis: str) -> Any:
  return jax.tree.map(
    lambda x: (
      jax.lax.pmean(x, axis)
      if jnp.issubdtype(jnp.result_type(x), jnp.floating)
      else jax.lax.psum(x, axis)
    ),
    tree,
  )


def _check_divides(batch: Batch, devices: int) -> None:
  for path, value in jax.tree_util.tree_flatten_with_path(batch)[0]:
    shape = jnp.shape(value)
    if not shape or shape[0] % devices or not shape[0]:
      raise ValueError(
        'Every leaf of a batch is split along its leading axis, so the batch '
        f'must be a multiple of the {devices} devices. Leaf '
        f'{list(path_names(path))} is {describe(value)}. Change the batch, '
        'drop or pad the last one of an epoch, or take fewer devices: '
        '`jax.make_mesh((n,), (axis,))`.'
      )
