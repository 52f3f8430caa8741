r"""Sparse SAM: a mask of the perturbation that is found while training.

References:
  Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified
  Perturbation Approach <https://arxiv.org/abs/2210.05177>`_, 2022
"""

from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from conadv_optax.core.calls import Around, Call, around, pytree
from conadv_optax.core.micro_batches import cut, part_of
from conadv_optax.core.numeric import (
  abs_sq,
  check_choice,
  check_count,
  check_scalar,
  check_share,
  tree_at_least_float32,
  zeros_like,
)
from conadv_optax.core.types import (
  GradientFunction,
  LossFn,
)
from conadv_optax.methods.perturbed_point import (
  Axis,
  first_pass,
  held,
  hold,
  mean_over,
  perturbed,
  shared_key,
)
from conadv_optax.training.loss import check_key
from conadv_optax.training.plain import as_gradient_function

# What the key of a step is folded with, for a key that no pass of it makes.
_GROWTH = 0x53414D


class SparseSamState(NamedTuple):
  """State of `sparse_sam`.

  Attributes:
    inner: the state of the gradient function inside.
    count: int32 scalar, the steps so far.
    mask: arrays of bools like the parameters, True where one is perturbed; a
      `PerGroup` of them without `axis`.
  """

  inner: Any
  count: Any
  mask: Any


def sparse_sam(
  grad_fn: GradientFunction | LossFn,
  radius: ArrayLike,
  *,
  refresh_every: int,
  sparsity: float = 0.5,
  rule: Literal['fisher', 'dynamic'] = 'fisher',
  num_samples: int | None = None,
  fisher: GradientFunction | LossFn | None = None,
  drop_rate: optax.ScalarOrSchedule | None = None,
  axis: Axis = None,
) -> GradientFunction:
  r"""Sharpness-aware minimization of a part of the parameters.

  With a mask :math:`m` that is 1 at :math:`K` of :math:`N` parameters,
  :math:`K = \lfloor (1 - s) N \rfloor`, and norms over the whole gradient
  :math:`g = \nabla L(w)`,

  .. math::

    \hat g = \nabla L\left(w + \rho\, m \circ \frac{g}{\|g\|}\right)

  The mask is found anew at the first step and at each n-th after it:

  - 'fisher', SSAM-F: where the empirical Fisher information is largest, the sum
    of the squared gradients of single examples, :math:`\sum_i g_i^2`.
  - 'dynamic', SSAM-D: the mask is random at first. Then it drops the share
    :math:`r_t` where :math:`|g|` is smallest, and grows as many at random where
    it was 0. It drops no more than it can grow.

  With :math:`s = 0` it is `sam`. A mask makes dense code no faster: the second
  gradient is a whole one. A mask that never changes needs no state:
  `conadv.sam(grad_fn, radius, mask=...)`.

  Args:
    grad_fn: what `conadv.wrap` returned, say, or a loss function as for
      `plain`.
    radius: :math:`\rho`, a float or a scalar array.
    refresh_every: n, the steps from one mask to the next. The paper takes one
      epoch, or five.
    sparsity: :math:`s`, from 0 to 1, static.
    rule: 'fisher' or 'dynamic'.
    num_samples: for 'fisher': the number of examples, the first of the batch,
      whose gradients are taken, one after the other. None: all.
    fisher: for 'fisher': the loss function, or the gradient function of
      staleness 0, that gives these gradients, from the same parameters and
      model state. None is `grad_fn`, which must then not split a batch into
      parts. Batch statistics of one example say little: pass a loss in
      evaluation mode, or if the step has a model state
      `conadv.plain(eval_loss, has_state=True)`.
    drop_rate: for 'dynamic': :math:`r_t`, from 0 to 1, or a schedule of the
      steps so far. The paper's is
      `optax.cosine_decay_schedule(0.5, total_steps)`.
    axis: the axis of the mesh whose devices perturb together and have one mask,
      as for `sam`. None: each device, and each micro-batch of an `accumulate`
      outside, has its own.

  Returns:
    A `GradientFunction` with the staleness of `grad_fn`. Loss, aux, batch
    statistics and the state inside are those at :math:`w`.

  Raises:
    TypeError: for a `grad_fn` that is no function, a number of steps or
      examples that is no int, a radius that is a schedule or no scalar, or a
      state of another gradient function.
    ValueError: for a negative radius, a share outside of 0 to 1, an unknown
      rule, an argument of the other rule, a `fisher` with staleness, more
      examples than there are, 'dynamic' without a key, or an axis that is not
      there.

  Examples:
    >>> import chex, jax, jax.numpy as jnp
    >>> import conadv_optax as conadv
    >>> grad_fn = conadv.sparse_sam(
    ...     lambda w, batch: jnp.mean(batch @ w ** 2), 0.1, refresh_every=10)
    >>> w, batch = jnp.array([3., 4.]), jnp.ones((8, 2))
    >>> _, grads, state = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), batch)
    >>> # Every example's gradient is (6, 8), so half of (0.06, 0.08) is kept.
    >>> chex.assert_trees_all_close(grads, jnp.array([6., 8.16]), rtol=1e-6)

  References:
    Mi et al., `Make Sharpness-Aware Minimization Stronger: A Sparsified
    Perturbation Approach <https://arxiv.org/abs/2210.05177>`_, 2022
  """
  grad_fn = as_gradient_function(grad_fn)
  check_scalar('radius', radius)
  check_count('refresh_every', refresh_every)
  check_share('sparsity', sparsity, 'the share that is not perturbed')
  check_choice('rule', rule, ('fisher', 'dynamic'))
  is_dynamic = rule == 'dynamic'
  _check_rule(is_dynamic, drop_rate, num_samples, fisher)
  of_examples = None
  if not is_dynamic:
    of_examples = _of_examples(grad_fn if fisher is None else fisher)
  made = _SparseSam(
    grad_fn,
    radius,
    of_examples,
    drop_rate,
    sparsity,
    num_samples,
    refresh_every,
    axis,
  )
  return around(made)


@pytree('grad_fn', 'radius', 'fisher', 'drop_rate')
class _SparseSam(Around):
  radius: ArrayLike
  fisher: GradientFunction | None
  drop_rate: optax.ScalarOrSchedule | None
  sparsity: float
  num_samples: int | None
  refresh_every: int
  axis: Axis
  state_kind = SparseSamState

  def init(self, call: Call) -> SparseSamState:
    zeros = zeros_like(tree_at_least_float32(call.params))
    if self.fisher is None:
      mask = _largest(self._random(call.key, zeros), self._kept(zeros))
    else:
      # The first step finds its own.
      mask = jax.tree.map(lambda x: x == 0, zeros)
    inner = call.init(self.grad_fn)
    return SparseSamState(
      inner, jnp.zeros([], jnp.int32), hold(self.axis, mask)
    )

  def value_and_grad(self, call: Call) -> tuple[Any, Any, SparseSamState]:
    state, call = call.state, call._replace(state=call.state.inner)
    output, _, gradient, inner = first_pass(
      self.grad_fn, call, self.axis, 'sparse_sam'
    )
    old = held(self.axis, state.mask)
    # The count is the same on all devices, so that they may talk in a branch.
    mask = jax.lax.cond(
      state.count % self.refresh_every == 0,
      lambda: self._refreshed(call, state.count, gradient, old),
      lambda: old,
    )
    point = perturbed(call.params, gradient, self.radius, mask=mask)
    there = call._replace(params=point)
    sharp = there.value_and_grad(self.grad_fn)[1]
    count = optax.safe_increment(state.count)
    return output, sharp, SparseSamState(inner, count, hold(self.axis, mask))

  def _refreshed(
    self, call: Call, count: jax.Array, gradient: Any, mask: Any
  ) -> Any:
    kept = self._kept(mask)
    if self.fisher is not None:
      return _largest(self._information(call), kept)
    rate = self.drop_rate
    rate = jnp.asarray(rate(count) if callable(rate) else rate, jnp.float32)
    most = min(kept, _size(mask) - kept)
    rate = jnp.clip(rate, 0.0, 1.0)
    dropped = jnp.minimum((rate * kept).astype(jnp.int32), most)
    # A size is 0 or more, so what is -1 comes last.
    there = jax.tree.map(
      lambda g, m: jnp.where(m, _squared(g), -1.0), gradient, mask
    )
    away = jax.tree.map(
      lambda x, m: jnp.where(m, -1.0, x), self._random(call.key, mask), mask
    )
    return jax.tree.map(
      jnp.logical_or, _largest(there, kept - dropped), _largest(away, dropped)
    )

  def _information(self, call: Call) -> Any:
    """The mean over devices of the examples' squared gradients, summed."""
    assert self.fisher is not None
    fisher = self.fisher
    batch = jax.tree.map(_whole, call.batch)
    shapes = [jnp.shape(x) for x in jax.tree.leaves(batch)]
    size = max([1, *(shape[0] for shape in shapes if shape)])
    number = size if self.num_samples is None else self.num_samples
    if number > size:
      raise ValueError(
        '`num_samples` is how many examples of a batch, or of a share of it, '
        f'are looked at. Given num_samples={number} for {size} examples. Write '
        f'`num_samples={size}`, or leave it out for all of them.'
      )
    # It refuses a leaf that has no examples, or fewer.
    examples = cut(batch, size)

    def add(total: Any, i: jax.Array) -> tuple[Any, None]:
      key = call.key
      if key is not None:
        key = jax.random.fold_in(key, i)
      one = Call(call.params, None, [], call.model_state, key)
      one = one._replace(state=one.init(fisher), batch=part_of(examples, i))
      grads = one.value_and_grad(fisher)[1]
      squares = jax.tree.map(_squared, grads)
      return jax.tree.map(jnp.add, total, squares), None

    zeros = jax.tree.map(
      _squared, zeros_like(tree_at_least_float32(call.params))
    )
    return self._mean(jax.lax.scan(add, zeros, jnp.arange(number))[0])

  def _random(self, key: jax.Array | None, like: Any) -> Any:
    """Uniform numbers, the same on all devices of the axis."""
    own_key = check_key(True, key)
    growth_key = jax.random.fold_in(own_key, _GROWTH)
    growth_key = shared_key(self.axis, growth_key, 'sparse_sam')
    leaves, treedef = jax.tree.flatten(like)
    keys = jax.random.split(growth_key, len(leaves))
    drawn = [
      _laid_like(jax.random.uniform(leaf_key, x.shape, jnp.float32), x)
      for leaf_key, x in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, drawn)

  def _kept(self, tree: Any) -> int:
    """How many parameters are perturbed."""
    # As decimals are meant: 1 - 0.9 of 10 is below 1 in binary.
    return int(round((1 - self.sparsity) * _size(tree), 6))

  def _mean(self, tree: Any) -> Any:
    return mean_over(self.axis, tree, 'sparse_sam')


def _largest(scores: Any, count: ArrayLike) -> Any:
  """True at the `count` largest scores of a tree, the first of equal ones."""
  leaves, treedef = jax.tree.flatten(scores)
  if not leaves:
    return scores
  flat = jnp.concatenate([_whole(x).ravel() for x in leaves])
  order = jnp.argsort(flat, descending=True, stable=True)
  places = jnp.arange(flat.size, dtype=jnp.int32)
  ranks = jnp.zeros_like(places).at[order].set(places)
  chosen, start = [], 0
  for x in leaves:
    part = ranks[start : start + x.size] < count
    chosen.append(_laid_like(part.reshape(x.shape), x))
    start += x.size
  return jax.tree.unflatten(treedef, chosen)


def _squared(x: jax.Array) -> jax.Array:
  """Float32, 0 where it is no number: of an example of padding alone, say."""
  square = abs_sq(x).astype(jnp.float32)
  return jnp.where(jnp.isnan(square), 0.0, square)


def _size(tree: Any) -> int:
  return sum(x.size for x in jax.tree.leaves(tree))


def _whole(x: jax.Array) -> jax.Array:
  """`x` on every device, where a mesh has explicit axes."""
  sharding = jax.typeof(x).sharding
  if not sharding.mesh.explicit_axes:
    return x
  return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P()))


def _laid_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """`x` spread over devices as `like` is, where a mesh has explicit axes."""
  sharding = jax.typeof(like).sharding
  return jax.sharding.reshard(x, sharding) if sharding.mesh.explicit_axes else x


def _of_examples(fisher: GradientFunction | LossFn) -> GradientFunction:
  """The gradient function of single examples."""
  fisher = as_gradient_function(fisher)
  if fisher.staleness:
    raise ValueError(
      "`rule='fisher'` takes the gradient of single examples, which cannot "
      f'wait in a queue. Given a gradient function of staleness '
      f'{fisher.staleness}. Say what is looked at, the plain loss most likely: '
      '`fisher=loss_fn`, or with a model state `fisher=conadv.plain(loss_fn, '
      'has_state=True)`.'
    )
  return fisher


def _check_rule(
  is_dynamic: bool, drop_rate: Any, num_samples: Any, fisher: Any
) -> None:
  """Each rule has its own arguments, and 'dynamic' needs a rate."""
  given = drop_rate is not None, (num_samples, fisher) != (None, None)
  if given[0] != is_dynamic or (is_dynamic and given[1]):
    raise ValueError(
      "`num_samples` and `fisher` are for `rule='fisher'`, `drop_rate` is for "
      f"`rule='dynamic'`, which needs it. Given drop_rate={drop_rate!r}, "
      f'num_samples={num_samples!r}, fisher={fisher!r} with the rule '
      f'{"dynamic" if is_dynamic else "fisher"!r}. '
      "Write `rule='dynamic', drop_rate=optax.cosine_decay_schedule(0.5, "
      "total_steps)`, or `rule='fisher'` without it."
    )
  if num_samples is not None:
    check_count('num_samples', num_samples)
  if drop_rate is not None and not callable(drop_rate):
    check_share('drop_rate', drop_rate, 'the share of the mask that is renewed')
