"""Many devices, each with batch statistics of its own."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_optax.core.calls import Call, around, pytree, share_of_mean
from conadv_optax.core.micro_batches import check_divides
from conadv_optax.core.numeric import abs_sq, inverse, scale
from conadv_optax.core.types import (
  Batch,
  ConAdvState,
  Denominators,
  GradientFunction,
  LossFn,
)
from conadv_optax.devices import groups
from conadv_optax.training.plain import as_gradient_function


def data_parallel(
  grad_fn: GradientFunction | LossFn,
  mesh: Mesh,
  *,
  axis: str | tuple[str, ...] = 'data',
  second_moment: bool = False,
) -> GradientFunction:
  r"""Runs a gradient function on each device's share of the batch.

  .. math::

    g = \frac1K \sum_{k=1}^{K} g_k

  where device :math:`k` sees only its shard, so BatchNorm's groups are the
  shards. Under plain `jit` a sharded batch works too, and BatchNorm's group is
  then the whole batch.

  A loss may talk to the other devices over `axis`: with
  `nn.BatchNorm(axis_name='data')` statistics are those of the whole batch.
  Losses that are means over a mask are weighted by the `denominator` that
  `wrap` was given.

  The calls keep their form. Every leaf of a batch is split along its leading
  axis; the queue is split like the batch, and parameters and model state are
  the same on all devices. Each device folds its index into the key. Put the
  parameters on all devices before the first step,
  `jax.device_put(params, NamedSharding(mesh, PartitionSpec()))`, or the second
  step compiles again.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    mesh: the devices.
    axis: the axis of `mesh` that the batch is split over, or a tuple of axes.
      Parameters may be spread over the other axes of the mesh. Parameters that
      are spread over an axis of the batch are put together on each device, and
      their gradients come back whole.
    second_moment: whether the aux holds :math:`\frac1K \sum_k g_k^2` too. It
      is sent like the gradient, so twice as much is sent.

  Returns:
    A `GradientFunction`. Losses, gradients and the floating leaves of the model
    state are averaged over the devices, and sent, in float32 or wider (other
    leaves of the state, counters say, are the same everywhere). Of the user's
    own aux, a floating scalar is averaged, another scalar is summed (booleans
    are counted), and an array is taken to be one value an example and put
    together along its leading axis.

  Raises:
    TypeError: for a `grad_fn` that is no function.
    ValueError: when the mesh has no such axis, a leaf of a batch does not
      divide evenly over it, or both wrappers are asked for the second moment.

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
  axes = (axis,) if isinstance(axis, str) else tuple(axis)
  if not axes or not set(axes) <= set(mesh.axis_names):
    raise ValueError(
      '`axis` must be an axis of the mesh, or some of them. Given '
      f'axis={axis!r} for a mesh with {mesh.axis_names}. Write '
      f'`axis={mesh.axis_names[0]!r}`.'
    )
  grad_fn = as_gradient_function(grad_fn)
  return around(_DataParallel(grad_fn, mesh, axes, second_moment))


@pytree('grad_fn')
class _DataParallel:
  grad_fn: GradientFunction
  mesh: Mesh
  axes: tuple[str, ...]
  second_moment: bool

  def init(self, call: Call) -> Any:
    batches = [self._place(batch) for batch in call.batch]
    return jax.jit(self._init)(call._replace(batch=batches))

  def value_and_grad(self, call: Call) -> tuple[Any, Any, Any]:
    groups.check_groups(call.state, self._devices)
    return self._compiled(call._replace(batch=self._place(call.batch)))

  def denominators(self, state: Any, batch: Batch) -> Denominators:
    def local(grad_fn: GradientFunction, state: Any, batch: Batch) -> Any:
      assert grad_fn.denominators is not None
      own = grad_fn.denominators(_own(lambda x: x[0], state), batch)
      return self._of_all(own)

    specs = (self._specs(state), P(self.axes))
    run = self._on_devices(local, specs, P())
    return jax.jit(run)(state, self._place(batch))

  @property
  def _devices(self) -> int:
    return math.prod(self.mesh.shape[axis] for axis in self.axes)

  @functools.cached_property
  def _compiled(self) -> Callable[..., Any]:
    # Outside of `jit` `shard_map` knows no second axis.
    return jax.jit(self._run)

  def _shared(self, call: Call) -> Call:
    """With what all devices need whole on each, where axes are explicit."""

    def whole(x: jax.Array) -> jax.Array:
      sharding = jax.typeof(x).sharding
      if not sharding.mesh.explicit_axes:
        return x
      spec = [
        tuple(a for a in jax.tree.leaves(axis) if a not in self.axes) or None
        for axis in sharding.spec
      ]
      return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P(*spec)))

    return call._replace(
      params=jax.tree.map(whole, call.params),
      model_state=jax.tree.map(whole, call.model_state),
    )

  def _init(self, call: Call) -> Any:
    call = self._shared(call)

    def local(grad_fn: GradientFunction, call: Call) -> Any:
      state = call._replace(key=self._own_key(call.key)).init(grad_fn)
      return _own(lambda x: x[None], state)

    specs = (self._call_specs(P()),)
    # What the state is made of decides how it lies on the devices.
    state = jax.eval_shape(self._on_devices(local, specs, P()), call)
    return self._on_devices(local, specs, self._specs(state))(call)

  def _run(self, call: Call) -> tuple[Any, Any, Any]:
    call = self._shared(call)

    def local(grad_fn: GradientFunction, call: Call) -> Any:
      call = call._replace(
        state=_own(lambda x: x[0], call.state), key=self._own_key(call.key)
      )
      own = None
      if grad_fn.denominators is not None:
        own = grad_fn.denominators(call.state, call.batch)
        if call.denominators is None:
          call = call._replace(denominators=self._of_all(own))
      parts, moment, state = groups.run_group(grad_fn, call)
      groups.check_one_kind(moment, self.second_moment)
      means = self._mean(parts.means)
      if moment is not None or self.second_moment:
        share = share_of_mean(own, call.denominators)
        moment = self._moment(parts.means[2], means[2], moment, share)
      counts = jax.lax.psum(parts.counts, self.axes)
      parts = parts._replace(means=means, counts=counts)
      return parts, moment, _own(lambda x: x[None], state)

    state_specs = self._specs(call.state)
    parts, moment, state = self._on_devices(
      local,
      (self._call_specs(state_specs),),
      (groups.Parts(P(), P(), P(), P(self.axes)), P(), state_specs),
    )(call)
    return *groups.put_together(parts, moment, call), state

  def _on_devices(
    self, local: Callable[..., Any], in_specs: Any, out_specs: Any
  ) -> Callable[..., Any]:
    return groups.on_devices(
      self.grad_fn, local, self.mesh, self.axes, in_specs, out_specs
    )

  def _place(self, batch: Batch) -> Batch:
    check_divides(
      batch,
      self._devices,
      'devices',
      f'take fewer devices: `jax.make_mesh((n,), {self.axes[:1]})`',
    )
    # A mesh with explicit axes does not split an argument by itself.
    return jax.device_put(batch, NamedSharding(self.mesh, P(self.axes)))

  def _call_specs(self, state: Any) -> Call:
    return Call(P(), state, P(self.axes), P(), P(), P())

  def _specs(self, state: Any) -> Any:
    """How a state lies on the devices."""
    return groups.map_state(
      state,
      queue=lambda part: ConAdvState(P(), P(None, self.axes)),
      own=lambda part: P(self.axes),
      shared=lambda leaf: P(),
    )

  def _own_key(self, key: jax.Array | None) -> Any:
    return groups.own_key(key, jax.lax.axis_index(self.axes))

  def _mean(self, tree: Any) -> Any:
    return jax.lax.pmean(tree, self.axes)

  def _of_all(self, own: Denominators) -> Denominators:
    most = functools.partial(jax.lax.pmax, axis_name=self.axes)
    return groups.over_groups(own, self._mean, most)

  def _moment(self, own: Any, mean: Any, within: Any, share: jax.Array) -> Any:
    """The second moment of the devices' gradients."""
    # Nothing, where all is padding.
    factor = inverse(self._mean(share))
    center = scale(factor, mean)
    parts = groups.deviation(own, within, share, center, center)
    return jax.tree.map(
      lambda g, part: scale(factor, abs_sq(g)) + part,
      mean,
      self._mean(parts),
    )


def _own(fn: Callable[[jax.Array], jax.Array], state: Any) -> Any:
  """Adds or drops the axis along which what is a device's own is split."""
  return groups.map_state(
    state,
    queue=lambda part: part,
    own=lambda part: jax.tree.map(fn, part),
    shared=lambda leaf: leaf,
  )
