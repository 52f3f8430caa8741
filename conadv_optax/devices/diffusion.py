r"""Diffusion over a graph: devices that agree with their neighbours alone.

References:
  Cao et al., `Decentralized Adversarial Training over Graphs
  <https://arxiv.org/abs/2303.13326>`_, 2023
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import Partial
from jax.typing import ArrayLike

from conadv_optax.core.calls import Call, gradient_function, pytree
from conadv_optax.core.micro_batches import check_divides
from conadv_optax.core.numeric import (
  at_least_float32,
  describe,
  is_inexact,
)
from conadv_optax.core.paths import named
from conadv_optax.core.types import Batch, GradientFunction, LossFn
from conadv_optax.devices import groups
from conadv_optax.training.plain import as_gradient_function


class Diffusion(NamedTuple):
  """Agents on devices, each with parameters of its own.

  All trees have a leading axis of agents, which is split over the devices:
  parameters, gradients, states, losses and aux.

  Attributes:
    spread: `spread(tree)` copies the tree of one agent to all agents.
    init: as that of a `GradientFunction`.
    value_and_grad: likewise; nothing is averaged.
    staleness: how many batches `init` wants.
    combine: `combine(tree)` returns for each agent the weighted sum over itself
      and its neighbours.
  """

  spread: Callable[[Any], Any]
  init: Callable[..., Any]
  value_and_grad: Callable[..., tuple[tuple[jax.Array, Any], Any, Any]]
  staleness: int
  combine: Callable[[Any], Any]


def diffusion(
  grad_fn: GradientFunction | LossFn,
  mesh: Mesh,
  weights: ArrayLike,
  *,
  axis: str = 'data',
) -> Diffusion:
  r"""Adapt, then combine: no device waits for more than its neighbours.

  .. math::

    \phi_k = w_k + \mathrm{update}\left(\nabla L(w_k; B_k)\right), \qquad
    w_k \leftarrow \sum_l a_{lk}\, \phi_l

  where :math:`B_k` is agent :math:`k`'s share of the batch, clean and
  adversarial, attacked with the agent's own parameters. :math:`A` is a doubly
  stochastic matrix that is zero between agents that are no neighbours. Along
  each edge the parameters travel once a step, in float32 or wider; nothing is
  summed over all devices. The paper trains on the adversarial examples alone:
  `wrap` with a staleness of 0 and `weights={'main': 0., 'adversarial': 1.}`.

  An optimizer with norms, LARS say, must see one agent at a time. Run any
  optimizer under `jax.vmap`: `jax.vmap(tx.init)(params)` and
  `jax.vmap(tx.update)(grads, opt_state, params)`.

  Reductions: with :math:`a_{lk} = 1/K` and plain gradient descent it is
  `data_parallel`; with the identity every agent trains by itself.

  Args:
    grad_fn: what `wrap` returned, say, or a loss function as for `plain`.
    mesh: the devices.
    weights: :math:`A`, (agents, agents), concrete: not negative, with rows and
      columns that sum to 1. `metropolis_weights` makes it from a graph.
    axis: the axis of `mesh` along which each device is an agent.

  Returns:
    A `Diffusion`. The model's own state can be combined too, or stay apart.

  Raises:
    TypeError: for a `grad_fn` that is no function, or weights that are traced.
    ValueError: when the mesh has no such axis, weights are of another shape or
      not doubly stochastic, or a leaf of a batch does not divide evenly over
      the agents.

  Examples:
    >>> import chex, jax, jax.numpy as jnp, optax
    >>> import conadv_optax as conadv
    >>> agents = jax.device_count()
    >>> mesh = jax.make_mesh((agents,), ('data',))
    >>> everyone = conadv.metropolis_weights(jnp.ones((agents, agents)))
    >>> agreeing = conadv.diffusion(
    ...     lambda w, x: jnp.mean((w - x) ** 2), mesh, everyone)
    >>> x, w = jnp.arange(float(agents)), agreeing.spread(jnp.array(0.))
    >>> _, grads, _ = agreeing.value_and_grad(w, agreeing.init(w, []), x)
    >>> # Each goes all the way to its own example, and then to the mean.
    >>> w = agreeing.combine(w - 0.5 * grads)
    >>> chex.assert_trees_all_close(w, jnp.full(agents, jnp.mean(x)))

  References:
    Cao et al., `Decentralized Adversarial Training over Graphs
    <https://arxiv.org/abs/2303.13326>`_, 2023
  """
  if axis not in mesh.axis_names:
    raise ValueError(
      f'`axis` must be an axis of the mesh. Given axis={axis!r} for a mesh '
      f'with {mesh.axis_names}. Write `axis={mesh.axis_names[0]!r}`.'
    )
  grad_fn = as_gradient_function(grad_fn)
  matrix = _checked(weights, mesh.shape[axis])
  made = _Agents(grad_fn, mesh, axis)
  apart = gradient_function(made, grad_fn.staleness, has_denominators=False)
  return Diffusion(
    Partial(_Agents.spread, made),
    apart.init,
    apart.value_and_grad,
    grad_fn.staleness,
    _combination(matrix, mesh, axis),
  )


@pytree('grad_fn')
class _Agents:
  grad_fn: GradientFunction
  mesh: Mesh
  axis: str

  @property
  def agents(self) -> int:
    return self.mesh.shape[self.axis]

  def spread(self, tree: Any) -> Any:
    def copies(x: jax.Array) -> jax.Array:
      x = jnp.asarray(x)
      every = jnp.broadcast_to(x[None], (self.agents, *x.shape))
      # As `combine` returns it, or the second step would compile again.
      spec = P(self.axis, *[None] * x.ndim)
      return jax.device_put(every, NamedSharding(self.mesh, spec))

    return jax.tree.map(copies, tree)

  def init(self, call: Call) -> Any:
    _check_agents((call.params, call.model_state), self.agents)
    batches = [self._place(batch) for batch in call.batch]
    return self._init(call._replace(batch=batches))

  def value_and_grad(self, call: Call) -> tuple[Any, Any, Any]:
    trees = call.params, call.model_state, call.state
    _check_agents(trees, self.agents)
    return self._step(call._replace(batch=self._place(call.batch)))

  @functools.cached_property
  def _init(self) -> Callable[..., Any]:
    return self._alone(lambda grad_fn, call: call.init(grad_fn))

  @functools.cached_property
  def _step(self) -> Callable[..., Any]:
    return self._alone(lambda grad_fn, call: call.value_and_grad(grad_fn))

  def _alone(self, fn: Callable[[GradientFunction, Call], Any]) -> Any:
    """A function of calls whose trees have the axis of agents."""

    def local(grad_fn: GradientFunction, call: Call) -> Any:
      params, state, model_state = jax.tree.map(
        lambda x: x[0], (call.params, call.state, call.model_state)
      )
      own_key = groups.own_key(call.key, jax.lax.axis_index(self.axis))
      own = Call(params, state, call.batch, model_state, own_key)
      return jax.tree.map(lambda x: jnp.asarray(x)[None], fn(grad_fn, own))

    by_agent = P(self.axis)
    specs = (Call(by_agent, by_agent, by_agent, by_agent, P(), P()),)
    return jax.jit(
      groups.on_devices(
        self.grad_fn, local, self.mesh, (self.axis,), specs, by_agent
      )
    )

  def _place(self, batch: Batch) -> Batch:
    check_divides(
      batch,
      self.agents,
      'agents',
      f"take fewer devices: `jax.make_mesh((n,), ('{self.axis}',))`",
    )
    return jax.device_put(batch, NamedSharding(self.mesh, P(self.axis)))


def _combination(matrix: np.ndarray, mesh: Mesh, axis: str) -> Any:
  agents = len(matrix)

  def weigh(from_before: int, x: jax.Array) -> jax.Array:
    """`x` times the weight of the agent so many places before."""
    own = np.arange(agents)
    of_each = jnp.asarray(matrix[own - from_before, own], x.dtype)
    return of_each[jax.lax.axis_index(axis)] * x

  def local(x: jax.Array) -> jax.Array:
    if is_inexact(x):
      own = at_least_float32(x)
      return (weigh(0, own) + from_others(own, lambda x: x)).astype(x.dtype)
    # By how far they are apart: of large integers float32 holds not each.
    kind = np.promote_types(x.dtype, np.int32)
    own = x.astype(jax.dtypes.canonicalize_dtype(kind))
    step = from_others(own, lambda x: (x - own).astype(jnp.float32))
    return (own + jnp.round(step).astype(own.dtype)).astype(x.dtype)

  def from_others(own: jax.Array, part: Callable[..., Any]) -> jax.Array:
    """The weighted sum of a part of what neighbours have."""
    total = jnp.zeros_like(part(own))
    # All edges of one length at once, along which each agent gets from one.
    for length in range(1, agents):
      edges = [
        ((k - length) % agents, k)
        for k in range(agents)
        if matrix[k - length, k]
      ]
      if edges:
        total += weigh(length, part(jax.lax.ppermute(own, axis, edges)))
    return total

  spec = P(axis)
  mapped = jax.shard_map(
    lambda tree: jax.tree.map(local, tree),
    mesh=mesh,
    in_specs=spec,
    out_specs=spec,
    axis_names={axis},
    check_vma=False,
  )

  def combine(tree: Any) -> Any:
    _check_agents(tree, agents)
    return mapped(tree)

  return jax.jit(combine)


def _check_agents(tree: Any, agents: int) -> None:
  for path, x in named(tree).items():
    if jnp.shape(x)[:1] != (agents,):
      raise ValueError(
        'Every tree of a `diffusion` has a leading axis with an entry for each '
        f'agent, here {agents}. Leaf {list(path)} is {describe(x)}. Likely it '
        'is the tree of one agent: write `params = agents.spread(params)`. Or '
        'it is of a run on other devices: take one agent, or their mean, and '
        'spread that.'
      )


def metropolis_weights(neighbours: ArrayLike) -> np.ndarray:
  r"""Doubly stochastic weights of a graph, for `diffusion`.

  .. math::

    a_{lk} = \frac{1}{1 + \max(d_l, d_k)} \ \text{for neighbours}, \qquad
    a_{kk} = 1 - \sum_{l \neq k} a_{lk}

  with :math:`d_k` the number of neighbours of :math:`k`.

  Args:
    neighbours: (agents, agents), symmetric, not 0 between neighbours. The
      diagonal does not count. A ring of 8 is `np.roll(np.eye(8), 1, 0) +
      np.roll(np.eye(8), -1, 0)`; NetworkX has others,
      `networkx.to_numpy_array(networkx.erdos_renyi_graph(8, 0.5))`.

  Returns:
    A float64 NumPy array, (agents, agents).

  Raises:
    ValueError: for an array that is not square or not symmetric.

  Examples:
    >>> import chex, numpy as np
    >>> import conadv_optax as conadv
    >>> path = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]])
    >>> chex.assert_trees_all_close(
    ...     conadv.metropolis_weights(path),
    ...     np.array([[2., 1., 0.], [1., 1., 1.], [0., 1., 2.]]) / 3)

  References:
    Cao et al., `Decentralized Adversarial Training over Graphs
    <https://arxiv.org/abs/2303.13326>`_, 2023
  """
  graph = np.asarray(neighbours) != 0
  if (
    graph.ndim != 2 or graph.shape != graph.T.shape or (graph != graph.T).any()
  ):
    raise ValueError(
      '`neighbours` is a square matrix, the same along rows and columns: who '
      'hears is heard. Given the shape '
      f'{graph.shape}. Where it is square, likely edges of one direction: '
      'write `neighbours + neighbours.T`.'
    )
  np.fill_diagonal(graph, False)
  degrees = graph.sum(0)
  weights = graph / (1.0 + np.maximum(degrees[:, None], degrees[None]))
  np.fill_diagonal(weights, 1 - weights.sum(0))
  return weights


def _checked(weights: ArrayLike, agents: int) -> np.ndarray:
  if isinstance(weights, jax.core.Tracer):
    raise TypeError(
      '`weights` say who sends to whom, so they are part of the program, and '
      'cannot be traced. Make them outside of `jax.jit`: '
      '`conadv.metropolis_weights(neighbours)`.'
    )
  matrix = np.asarray(weights, np.float64)
  if matrix.shape != (agents, agents):
    raise ValueError(
      '`weights` have a row and a column for each agent, of which the mesh has '
      f'{agents}. Given the shape {matrix.shape}.'
    )
  sums = np.concatenate([matrix.sum(0), matrix.sum(1)])
  if not (matrix >= 0).all() or not np.allclose(sums, 1, atol=1e-5):
    raise ValueError(
      '`weights` must be doubly stochastic, or agents drift to one side: not '
      'negative, rows and columns that sum to 1. Given a least entry of '
      f'{matrix.min():.3g} and sums from {sums.min():.3g} to {sums.max():.3g}. '
      'Write `conadv.metropolis_weights(neighbours)`.'
    )
  return matrix
