"""Attack and training on devices of their own, in one program."""

from collections.abc import Callable, Sequence
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
  Queue,
)
from conadv_optax.devices import groups
from conadv_optax.training import queue


def concurrent(
  grad_fn: GradientFunction,
  mesh: Mesh,
  *,
  data_axis: str = 'data',
  role_axis: str = 'role',
  attackers: int = 1,
) -> GradientFunction:
  r"""Puts the attack on devices of its own, beside those that train.

  Neither the attack of a step nor its training waits for the other, so

  .. math::

    t_\text{step} = \max\left(t_\text{train},\
      \left\lceil T / A \right\rceil t_\text{attack}\right)

  with :math:`T` trainers and :math:`A` attackers in each row of the mesh,
  :math:`t_\text{train}` the time of the training passes on one share of the
  batch and :math:`t_\text{attack}` that of the attack pass on it. Where an
  attack pass costs a third of the training passes, three trainers and one
  attacker are all busy, and a step takes three quarters of the time that
  `data_parallel` needs at the same share: as many examples a second on the same
  devices, in smaller and faster steps.

  The last :math:`A` devices along `role_axis` craft and do not train; the
  others train and do not craft. Each trainer has a share of the batch, which is
  the group of its BatchNorm, and attacker :math:`a` crafts the shares of the
  trainers :math:`a, a + A, a + 2A, \ldots` of its row, one by one, and sends
  each to its trainer. The results are those of `data_parallel` on as many
  devices as there are trainers, within rounding.

  The calls keep their form. In a step the adversarial inputs travel once, from
  the attacker to the trainer that will train on them, and gradients are summed
  over all devices. The clean batch does not travel between devices when it is
  placed where it is needed, split over `data_axis` alone:
  `jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))`. Split
  over both axes it takes fewer bytes from the host, and each row then gathers
  its part. Put the parameters on all devices before the first step,
  `jax.device_put(params, NamedSharding(mesh, PartitionSpec()))`, or the second
  step compiles again.

  Args:
    grad_fn: what `conadv.wrap` returned, with a staleness of at least 1 and
      without `reuse_gradient`.
    mesh: the devices, with these two axes and no other.
    data_axis: the axis of `mesh` whose rows work apart until the gradients are
      summed. It may have length 1.
    role_axis: the axis that trainers and attackers share.
    attackers: how many devices of each row craft.

  Returns:
    A `GradientFunction`. Losses, gradients, the model state and the user's own
    aux are averaged, summed or put together over the trainers as by
    `data_parallel`. The queue is split over all devices; the part of an
    attacker is padding.

  Raises:
    TypeError: when `grad_fn` is no `GradientFunction`.
    ValueError: when the mesh has other axes, a row has no attacker or more of
      them than trainers, `grad_fn` has no attack pass of its own or no
      staleness, or a leaf of a batch does not divide evenly over the trainers.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.wrap(
    ...     lambda w, batch: jnp.mean((batch['x'] * w) ** 2),
    ...     staleness=1, attack=conadv.fgsm(0.5), inputs='x')
    >>> devices = jax.device_count()
    >>> if devices > 1:
    ...   mesh = jax.make_mesh((1, devices), ('data', 'role'))
    ...   grad_fn = conadv.concurrent(grad_fn, mesh)
    >>> batch = {'x': jnp.ones(4 * max(devices - 1, 1))}
    >>> w = jnp.array(1.)
    >>> state = grad_fn.init(w, [batch])
    >>> (_, aux), _, _ = grad_fn.value_and_grad(w, state, batch)
    >>> chex.assert_trees_all_close(
    ...     aux.losses, {'main': 1., 'adversarial': 1.5 ** 2})

  References:
    Liu et al., `Concurrent Adversarial Learning for Large-Batch Training
    <https://arxiv.org/abs/2106.00221>`_, 2022
  """
  passes = checks.check_passes(grad_fn, 'concurrent')
  if grad_fn.staleness == 0:
    raise ValueError(
      'With staleness 0 a batch is attacked in the step that trains on it, so '
      'its training waits for its attack. Write `conadv.wrap(loss_fn, '
      'staleness=1, ...)`, or `conadv.data_parallel` in place of `concurrent`.'
    )
  checks.check_roles(mesh, data_axis, role_axis, attackers)
  trainers = mesh.shape[role_axis] - attackers
  all_trainers = mesh.shape[data_axis] * trainers
  axes = (data_axis, role_axis)
  shared, by_row = P(), P(data_axis)
  state_spec = ConAdvState(shared, P(None, axes))

  def on_devices(fn: Any, in_specs: Any, out_specs: Any) -> Any:
    return jax.shard_map(
      fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False
    )

  def place(batch: Batch) -> Batch:
    groups.check_divides(
      batch,
      all_trainers,
      'trainers',
      'take another mesh: `jax.make_mesh((rows, devices_in_a_row), ...)`',
    )
    return jax.device_put(batch, NamedSharding(mesh, by_row))

  def share(batch: Batch, trainer: jax.Array) -> Batch:
    """The part of one trainer of what its row has of the batch."""

    def cut(x: jax.Array) -> jax.Array:
      size = x.shape[0] // trainers
      return jax.lax.dynamic_slice_in_dim(x, trainer * size, size)

    return jax.tree.map(cut, batch)

  def key_of(key: jax.Array | None, trainer: jax.Array) -> Any:
    """The key of one trainer, by its place among those of all rows."""
    row = jax.lax.axis_index(data_axis)
    return groups.own_key(key, row * trainers + trainer)

  def own_trainer() -> jax.Array:
    """The place of a trainer in its row; attackers fill up as the last one."""
    return jnp.minimum(jax.lax.axis_index(role_axis), trainers - 1)

  # How many shares an attacker crafts, and whose the share of a turn is.
  turns = -(-trainers // attackers)
  routes = [
    [
      (trainers + attacker, turn * attackers + attacker)
      for attacker in range(attackers)
      if turn * attackers + attacker < trainers
    ]
    for turn in range(turns)
  ]

  def deliver(crafted: jax.Array, like: jax.Array) -> jax.Array:
    """From the attackers' turns to each trainer the one that is its own."""
    arrived = [
      jax.lax.ppermute(of_turn, role_axis, route)
      for of_turn, route in zip(crafted, routes, strict=True)
    ]
    return _unpack(jax.lax.select_n(own_trainer() // attackers, *arrived), like)

  # All of these are over the trainers: attackers give zeros.
  def mean(x: jax.Array) -> jax.Array:
    total = jax.lax.psum(at_least_float32(x), axes)
    return (total / all_trainers).astype(x.dtype)

  def mean_or_sum(x: jax.Array) -> jax.Array:
    return mean(x) if groups.is_floating(x) else jax.lax.psum(x, axes)

  def mean_or_first(x: jax.Array) -> jax.Array:
    return mean(x) if groups.is_floating(x) else put_together(x[None])[0]

  def put_together(x: jax.Array) -> jax.Array:
    every = jax.lax.all_gather(x, role_axis, tiled=True)
    return every[: trainers * x.shape[0]]

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
      # Once, so each trainer crafts its own.
      trainer = own_trainer()
      return grad_fn.init(
        params,
        [share(batch, trainer) for batch in batches],
        model_state=model_state,
        key=key_of(key, trainer),
      )

    return on_devices(local, (shared, by_row, shared, shared), state_spec)(
      params, first_batches, model_state, key
    )

  def value_and_grad(
    params: Any,
    state: ConAdvState,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, ConAdvAux], Any, ConAdvState]:
    checks.check_state(state, grad_fn.staleness)
    batch = place(batch)

    def local(
      params: Any, state: ConAdvState, batch: Batch, model_state: Any, key: Any
    ) -> Any:
      role, trainer = jax.lax.axis_index(role_axis), own_trainer()
      newest, oldest = share(batch, trainer), queue.oldest(state)
      checks.check_like(newest, oldest.batch, 'A later batch')

      def train() -> Any:
        return passes.train(params, model_state, oldest, key_of(key, trainer))

      def attack() -> jax.Array:
        def craft(turn: jax.Array) -> jax.Array:
          # Of nobody in a last turn that is not for all: it is not sent.
          served = turn * attackers + role - trainers
          return _pack(
            passes.craft(
              params, model_state, share(batch, served), key_of(key, served)
            )
          )

        return _one_by_one(craft, turns)

      # Neither branch talks to another device, so each device runs its own.
      ((loss, aux), grads), crafted = jax.lax.cond(
        role < trainers,
        lambda: (train(), _zeros(attack)),
        lambda: (_zeros(train), attack()),
      )
      delivered = deliver(crafted, passes.clean(newest))
      state = queue.push(state, Queue(newest, delivered))
      scalars, arrays = groups.split_aux(aux.aux)
      return (
        jax.tree.map(mean, (loss, aux.losses, grads)),
        jax.tree.map(mean_or_first, aux.model_state),
        jax.tree.map(mean_or_sum, scalars),
        jax.tree.map(put_together, arrays),
        state,
      )

    (loss, losses, grads), model_state, scalars, arrays, state = on_devices(
      local,
      (shared, state_spec, by_row, shared, shared),
      (shared, shared, shared, by_row, state_spec),
    )(params, state, batch, model_state, key)
    user_aux = groups.join_aux(scalars, arrays)
    return (loss, ConAdvAux(losses, model_state, user_aux)), grads, state

  return GradientFunction(init, value_and_grad, grad_fn.staleness)


def _order(shape: Sequence[int]) -> tuple[int, ...]:
  return (0, *sorted(range(1, len(shape)), key=lambda axis: shape[axis]))


def _pack(x: jax.Array) -> jax.Array:
  """With the longest axes last.

  What a conditional returns lies in memory as its axes stand, and a TPU pads
  the last one to 128: three channels would take 40 times their bytes.
  """
  return x.transpose(_order(x.shape))


def _unpack(x: jax.Array, like: jax.Array) -> jax.Array:
  """The inverse of `_pack` for an array of the shape of `like`."""
  order = _order(like.shape)
  return x.transpose([order.index(axis) for axis in range(x.ndim)])


def _zeros(fn: Callable[[], Any]) -> Any:
  """Zeros in place of what `fn` returns, which is not run."""
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(fn))


def _one_by_one(fn: Callable[[jax.Array], jax.Array], number: int) -> jax.Array:
  # Not a loop of one, for the reason given in `pgd`.
  if number == 1:
    return fn(jnp.zeros([], jnp.int32))[None]
  return jax.lax.map(fn, jnp.arange(number, dtype=jnp.int32))
