"""Attack and training on devices of their own, in one program."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from conadv_optax.core.calls import Call, around, check_passes, pytree
from conadv_optax.core.micro_batches import check_divides
from conadv_optax.core.types import (
  Batch,
  ConAdvState,
  Denominators,
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
  attacker are all busy. A step then takes three quarters of the time that
  `data_parallel` needs at the same share. The same devices train on as many
  examples a second, in smaller and faster steps.

  The last :math:`A` devices along `role_axis` craft and do not train; the
  others train and do not craft. Each trainer has a share of the batch, which is
  the group of its BatchNorm, and attacker :math:`a` crafts the shares of the
  trainers :math:`a, a + A, a + 2A, \ldots` of its row, one by one, and sends
  each to its trainer. The results are those of `data_parallel` on as many
  devices as there are trainers, within rounding.

  A loss may talk to other devices over `data_axis`, along which all have the
  same role, but not over `role_axis`, along which some do not train.

  The calls keep their form. In a step the adversarial inputs travel once, from
  the attacker to the trainer that will train on them, and gradients are summed
  over all devices. The clean batch does not travel between devices when it is
  placed where it is needed, split over `data_axis` alone:
  `jax.device_put(batch, NamedSharding(mesh, PartitionSpec('data')))`. If it is
  split over both axes, the host sends fewer bytes, and each row then gathers
  its part. Put the parameters on all devices before the first step,
  `jax.device_put(params, NamedSharding(mesh, PartitionSpec()))`, or the second
  step compiles again.

  Args:
    grad_fn: what `conadv.wrap` itself returned, with a staleness of at least 1,
      `every=1`, and without `reuse_gradient`.
    mesh: the devices, with these two axes and no other.
    data_axis: the axis of `mesh` along which rows work apart until the
      gradients are summed. It may have length 1.
    role_axis: the axis that trainers and attackers share.
    attackers: how many devices of each row craft.

  Returns:
    A `GradientFunction`. Losses, gradients, the model state and the user's own
    aux are averaged, summed or put together over the trainers as by
    `data_parallel`. The queue is split over all devices; the part of an
    attacker is padding.

  Raises:
    TypeError: when `grad_fn` is no `GradientFunction`.
    ValueError: when the mesh has other axes, a row has no attacker or more
      attackers than trainers, `grad_fn` cannot be taken apart (its `passes` is
      None) or has no staleness, a leaf of a batch does not divide evenly over
      the trainers, or the loss talks to attackers.

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
  check_passes(grad_fn, 'concurrent')
  if grad_fn.staleness == 0:
    raise ValueError(
      'With staleness 0 a batch is attacked in the step that trains on it, so '
      'its training waits for its attack. Write `conadv.wrap(loss_fn, '
      'staleness=1, ...)`, or `conadv.data_parallel` in place of `concurrent`.'
    )
  _check_roles(mesh, data_axis, role_axis, attackers)
  made = _Concurrent(grad_fn, mesh, data_axis, role_axis, attackers)
  return around(made)


@pytree('grad_fn')
class _Concurrent:
  grad_fn: GradientFunction
  mesh: Mesh
  data_axis: str
  role_axis: str
  attackers: int

  @property
  def axes(self) -> tuple[str, str]:
    return self.data_axis, self.role_axis

  @property
  def trainers(self) -> int:
    """How many of a row."""
    return self.mesh.shape[self.role_axis] - self.attackers

  @property
  def all_trainers(self) -> int:
    return self.mesh.shape[self.data_axis] * self.trainers

  @property
  def turns(self) -> int:
    """How many shares an attacker crafts."""
    return -(-self.trainers // self.attackers)

  def init(self, call: Call) -> ConAdvState:
    def local(grad_fn: GradientFunction, call: Call) -> ConAdvState:
      # Once, so each trainer crafts its own.
      trainer = self._own_trainer()
      call = call._replace(
        batch=self._share(call.batch, trainer),
        key=self._key_of(call.key, trainer),
      )
      return call.init(grad_fn)

    batches = [self._place(batch) for batch in call.batch]
    specs = (self._call_specs._replace(state=P()),)
    run = self._on_devices(local, specs, self._state_specs)
    return jax.jit(run)(call._replace(batch=batches))

  def value_and_grad(self, call: Call) -> tuple[Any, Any, ConAdvState]:
    queue.check_state(call.state, self.grad_fn.staleness)
    return self._compiled(call._replace(batch=self._place(call.batch)))

  def denominators(self, state: ConAdvState, batch: Batch) -> Denominators:
    specs = (self._state_specs, P(self.data_axis))
    run = self._on_devices(self._denominators, specs, P())
    return jax.jit(run)(state, self._place(batch))

  @functools.cached_property
  def _compiled(self) -> Callable[..., Any]:
    return jax.jit(self._run)

  def _run(self, call: Call) -> tuple[Any, Any, ConAdvState]:
    by_row = P(self.data_axis)
    parts, state = self._on_devices(
      self._local,
      (self._call_specs,),
      (groups.Parts(P(), P(), P(), by_row), self._state_specs),
    )(call)
    return *groups.put_together(parts, None, call), state

  def _local(self, grad_fn: GradientFunction, call: Call) -> Any:
    """What each device does."""
    role, trainer = jax.lax.axis_index(self.role_axis), self._own_trainer()
    params, model_state, key = call.params, call.model_state, call.key
    newest, oldest = self._share(call.batch, trainer), queue.oldest(call.state)
    queue.check_like(newest, oldest.batch, 'A later batch')
    of_mean = call.denominators
    if of_mean is None and grad_fn.denominators is not None:
      of_mean = self._denominators(grad_fn, call.state, call.batch)
    passes = check_passes(grad_fn, 'concurrent')

    def train() -> groups.Parts:
      own_key = self._key_of(key, trainer)
      return groups.take_apart(
        *passes.train(params, model_state, oldest, own_key, of_mean)
      )

    def craft(turn: jax.Array) -> Any:
      # Of nobody in a last turn that is not for all: it is not sent.
      served = turn * self.attackers + role - self.trainers
      share, key_of = self._share(call.batch, served), self._key_of(key, served)
      crafted = passes.craft(params, model_state, share, key_of)
      return jax.tree.map(_pack, crafted)

    def attack() -> Any:
      return _one_by_one(craft, self.turns)

    _check_alone(train, self.role_axis)
    # Neither branch talks to another device, so each device runs its own.
    parts, crafted = jax.lax.cond(
      role < self.trainers,
      lambda: (train(), _zeros(attack)),
      lambda: (_zeros(train), attack()),
    )
    delivered = self._deliver(crafted, passes.clean(newest))
    parts = groups.Parts(
      self._mean(parts.means),
      jax.lax.psum(parts.counts, self.axes),
      jax.tree.map(lambda x: self._every(x[None])[0], parts.kept),
      jax.tree.map(self._every, parts.arrays),
    )
    return parts, queue.push(call.state, Queue(newest, delivered))

  @property
  def _state_specs(self) -> ConAdvState:
    return ConAdvState(P(), P(None, self.axes))

  @property
  def _call_specs(self) -> Call:
    return Call(P(), self._state_specs, P(self.data_axis), P(), P(), P())

  def _on_devices(
    self, local: Callable[..., Any], in_specs: Any, out_specs: Any
  ) -> Callable[..., Any]:
    return groups.on_devices(
      self.grad_fn, local, self.mesh, self.axes, in_specs, out_specs
    )

  def _place(self, batch: Batch) -> Batch:
    check_divides(
      batch,
      self.all_trainers,
      'trainers',
      'take another mesh: `jax.make_mesh((rows, devices_in_a_row), ...)`',
    )
    sharding = NamedSharding(self.mesh, P(self.data_axis))
    return jax.device_put(batch, sharding)

  def _share(self, batch: Batch, trainer: jax.Array) -> Batch:
    """The part of one trainer of what its row has of the batch."""

    def cut(x: jax.Array) -> jax.Array:
      size = x.shape[0] // self.trainers
      return jax.lax.dynamic_slice_in_dim(x, trainer * size, size)

    return jax.tree.map(cut, batch)

  def _key_of(self, key: jax.Array | None, trainer: jax.Array) -> Any:
    """The key of one trainer, by its place among those of all rows."""
    row = jax.lax.axis_index(self.data_axis)
    return groups.own_key(key, row * self.trainers + trainer)

  def _own_trainer(self) -> jax.Array:
    """The place of a trainer in its row; attackers fill up as the last one."""
    role = jax.lax.axis_index(self.role_axis)
    return jnp.minimum(role, self.trainers - 1)

  def _deliver(self, crafted: Any, like: Any) -> Any:
    """From the attackers' turns to each trainer the one that is its own."""
    arrived = []
    for turn in range(self.turns):
      of_turn = jax.tree.map(lambda x, turn=turn: x[turn], crafted)
      first = turn * self.attackers
      route = [
        (self.trainers + trainer - first, trainer)
        for trainer in range(first, min(first + self.attackers, self.trainers))
      ]
      arrived.append(jax.lax.ppermute(of_turn, self.role_axis, route))
    own = self._own_trainer() // self.attackers
    return jax.tree.map(
      lambda like, *turns: _unpack(jax.lax.select_n(own, *turns), like),
      like,
      *arrived,
    )

  def _denominators(
    self, grad_fn: GradientFunction, state: ConAdvState, batch: Batch
  ) -> Denominators:
    """Their mean and the most over the trainers; an attacker has none."""
    assert grad_fn.denominators is not None
    own = grad_fn.denominators(state, self._share(batch, self._own_trainer()))
    trains = jax.lax.axis_index(self.role_axis) < self.trainers
    own = jax.tree.map(lambda x: jnp.where(trains, x, 0.0), own)
    most = functools.partial(jax.lax.pmax, axis_name=self.axes)
    return groups.over_groups(own, self._mean, most)

  def _mean(self, tree: Any) -> Any:
    """Over the trainers: attackers give zeros."""
    total = jax.lax.psum(tree, self.axes)
    return jax.tree.map(lambda x: x / self.all_trainers, total)

  def _every(self, x: jax.Array) -> jax.Array:
    """What the trainers of a row have, put together."""
    every = jax.lax.all_gather(x, self.role_axis, tiled=True)
    return every[: self.trainers * x.shape[0]]


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


def _one_by_one(fn: Callable[[jax.Array], Any], number: int) -> Any:
  # Not a loop of one, for the reason given in `pgd`.
  if number == 1:
    return jax.tree.map(lambda x: x[None], fn(jnp.zeros([], jnp.int32)))
  return jax.lax.map(fn, jnp.arange(number, dtype=jnp.int32))


def _check_alone(train: Callable[[], Any], axis: str) -> None:
  """Training waits for no device of another role."""

  def talks(jaxpr: Any) -> bool:
    inner = getattr(jaxpr, 'jaxpr', jaxpr)
    for equation in getattr(inner, 'eqns', ()):
      params = equation.params
      names = jax.tree.leaves((params.get('axes'), params.get('axis_name')))
      if axis in names and equation.primitive.name != 'axis_index':
        return True
      if any(map(talks, jax.tree.leaves(list(params.values())))):
        return True
    return False

  if talks(jax.make_jaxpr(train)()):
    raise ValueError(
      f'The loss talks to other devices over the axis {axis!r}, along which '
      'some attack and do not train: it would wait for them, or take what they '
      'have for its own. Let it talk over `data_axis`, or write '
      '`conadv.data_parallel` in place of `concurrent`.'
    )


def _check_roles(
  mesh: Mesh, data_axis: str, role_axis: str, attackers: int
) -> None:
  """Rows of trainers and attackers, no more of these than of those."""
  if set(mesh.axis_names) != {data_axis, role_axis} or data_axis == role_axis:
    raise ValueError(
      'The mesh needs two axes, one along which the batch is split and one '
      'along which devices have roles. Given '
      f'data_axis={data_axis!r}, role_axis={role_axis!r} for a mesh with '
      f'{mesh.axis_names}. Write `jax.make_mesh((rows, devices_in_a_row), '
      f"('data', 'role'))`."
    )
  devices = mesh.shape[role_axis]
  if attackers not in range(1, devices // 2 + 1):
    raise ValueError(
      'Every row of the mesh needs an attacker, and at least as many trainers: '
      'one attacker crafts for whole trainers. Given '
      f'attackers={attackers!r} for rows of {devices} devices. Write '
      "`attackers=1`, and `jax.make_mesh((rows, 4), ('data', 'role'))` for "
      'three trainers to each.'
    )
