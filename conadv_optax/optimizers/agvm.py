r"""Adaptive gradient variance modulation: a rate for each module.

References:
  Xue et al., `Large-batch Optimization for Dense Visual Predictions
  <https://arxiv.org/abs/2210.11078>`_, 2022
"""

import difflib
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from conadv_optax.core.numeric import (
  abs_sq,
  at_least_float32,
  check_count,
  check_share,
)
from conadv_optax.core.paths import named
from conadv_optax.core.second_moment import check_second_moment
from conadv_optax.dual_bn import Branched

# Where a module's groups agree, its variance is rounding: the authors' numbers.
_EPSILON = 1e-6
_LEAST, _MOST = 0.5, 10.0


class AgvmState(NamedTuple):
  """State of `agvm`.

  Attributes:
    count: int32 scalar, the updates so far.
    factors: the factor of the rate of each module, float32 scalars, by name.
    inner: the optimizer's own state.
  """

  count: Any
  factors: dict[str, jax.Array]
  inner: optax.OptState


def agvm(
  optimizer: optax.GradientTransformation,
  *,
  groups: int,
  anchor: str,
  modules: Sequence[str] | None = None,
  every: int = 10,
  start: int = 0,
  decay: ArrayLike = 0.97,
) -> optax.GradientTransformationExtraArgs:
  r"""Scales each module's updates so that their variances are alike.

  A detector's backbone, neck and heads have gradients of unlike variance, and
  at large batches one rate does not fit them all. With :math:`g_k` the gradient
  of a module in group :math:`k` of :math:`K`, and :math:`g` their mean,

  .. math::

    D = \frac{\frac1K \sum_k |g_k|^2 - |g|^2}{K - 1}, \qquad
    \Phi = \frac{2 D}{|g|^2 + D}, \qquad
    \mu \leftarrow d \mu + (1 - d) \sqrt{\mathrm{clip}\left(
      \frac{\Phi_\text{anchor} + 10^{-6}}{\Phi + 10^{-6}},\ 0.5,\ 10 \right)}

  and the module's updates are multiplied by :math:`\mu`, 1 at first.

  The paper splits the workers in two halves and takes :math:`1 - \cos(G_1,
  G_2)` of the halves' gradients for :math:`\Phi`. Here :math:`D` is the mean of
  :math:`|G_1 - G_2|^2 / 4` over all ways to split the workers evenly, and
  :math:`\Phi` is the paper's with the mean of :math:`|G_1|^2` and
  :math:`|G_2|^2` in place of the root of their product. This has less noise,
  and takes squares that other methods need as well. It costs no second pass,
  and one more reduction of the gradient's size.

  The factor stands outside of the optimizer's momentum.

  Args:
    optimizer: any Optax optimizer.
    groups: :math:`K`, as many as the gradients are averaged over, at least 2.
    anchor: the module whose variance the others are brought to, the backbone.
    modules: names of modules, each the beginning of the path of their
      parameters, keys joined by '/': `['backbone', 'head/box']`. A parameter
      belongs to the first that fits; one that fits none has a factor of 1.
      None: the keys at the top of the parameters.
    every: the number of updates from one move of the factors to the next.
    start: the number of updates before the factors move at all. The paper waits
      for 100 after the warm-up.
    decay: :math:`d`, in [0, 1].

  Returns:
    A gradient transformation whose `update` also takes `second_moment=`, the
    mean over groups of their squared gradients, as `data_parallel` and
    `accumulate` return it. All arguments go on to the optimizer.

  Raises:
    TypeError: for a number of groups or updates that is no int, or a function
      for the decay.
    ValueError: for fewer than two groups, a decay outside [0, 1], a module or
      an anchor without parameters, or an `update` without the second moment of
      these gradients.

  Examples:
    >>> import chex, jax.numpy as jnp, optax
    >>> import conadv_optax as conadv
    >>> # Two groups: those of the body agree less than those of the head.
    >>> loss_fn = lambda w, x: jnp.mean(x['a'] * w['body'] + x['b'] * w['head'])
    >>> x = {'a': jnp.array([3., 1.]), 'b': jnp.array([2.2, 1.8])}
    >>> grad_fn = conadv.accumulate(loss_fn, 2, second_moment=True)
    >>> w = {'body': jnp.array(0.), 'head': jnp.array(0.)}
    >>> (_, aux), grads, _ = grad_fn.value_and_grad(
    ...     w, grad_fn.init(w, []), x)
    >>> tx = conadv.agvm(
    ...     optax.sgd(1.), groups=2, anchor='body', every=1, decay=0.)
    >>> updates, _ = tx.update(
    ...     grads, tx.init(w), w, second_moment=aux.second_moment)
    >>> # 1 - cosine is 2 / (4 + 1) and 0.08 / (4 + 0.04): the ratio is cut.
    >>> chex.assert_trees_all_close(
    ...     updates, {'body': -2., 'head': -2. * 10 ** 0.5}, rtol=1e-5)

  References:
    Xue et al., `Large-batch Optimization for Dense Visual Predictions
    <https://arxiv.org/abs/2210.11078>`_, 2022
  """
  check_count('groups', groups, least=2)
  check_count('every', every)
  check_count('start', start, least=0)
  check_share('decay', decay, 'the share of a factor that stays')
  inner = optax.with_extra_args_support(optimizer)

  def init_fn(params: optax.Params) -> AgvmState:
    names = _names(params, modules)
    factors: Any = {
      name: jnp.ones([], jnp.float32) for name in sorted(set(names) - {''})
    }
    if names:
      _check_names(names, params, anchor, modules)
    else:
      # `optax.tree_map_params` asks with a tree that stands for any other.
      factors = jnp.ones([], jnp.float32)
    return AgvmState(jnp.zeros([], jnp.int32), factors, inner.init(params))

  def update_fn(
    updates: optax.Updates,
    state: AgvmState,
    params: optax.Params | None = None,
    *,
    second_moment: Any = None,
    **extra_args: Any,
  ) -> tuple[optax.Updates, AgvmState]:
    call = 'tx.update(grads, state, params, second_moment=aux.second_moment)'
    check_second_moment(second_moment, updates, call)
    names = _names(updates, modules)
    _check_names(names, updates, anchor, modules)
    variances = _variances(names, updates, second_moment, groups)
    count = state.count + 1
    moves = (count > start) & (count % every == 0)
    kept = jnp.asarray(decay, jnp.float32)

    def moved(name: str) -> jax.Array:
      ratio = (variances[anchor] + _EPSILON) / (variances[name] + _EPSILON)
      new = jnp.sqrt(jnp.clip(ratio, _LEAST, _MOST))
      old = state.factors[name]
      is_number = jnp.isfinite(new)
      return jnp.where(moves & is_number, kept * old + (1 - kept) * new, old)

    factors = {name: moved(name) for name in state.factors}
    steps, inner_state = inner.update(
      updates, state.inner, params, second_moment=second_moment, **extra_args
    )
    leaves, treedef = jax.tree.flatten(steps)
    scaled = [
      x if not name else _times(factors[name], x)
      for name, x in zip(names, leaves, strict=True)
    ]
    steps = jax.tree.unflatten(treedef, scaled)
    return steps, AgvmState(count, factors, inner_state)

  return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _times(factor: jax.Array, x: jax.Array) -> jax.Array:
  wide = at_least_float32(x)
  return (factor.astype(wide.dtype) * wide).astype(x.dtype)


def _variances(
  names: list[str], gradients: Any, second_moment: Any, groups: int
) -> dict[str, jax.Array]:
  """How far from parallel two halves of the groups are, 1 - cos, by module."""
  signal: dict[str, Any] = {}
  noise: dict[str, Any] = {}
  leaves = jax.tree.leaves(gradients), jax.tree.leaves(second_moment)
  for name, g, moment in zip(names, *leaves, strict=True):
    square = abs_sq(g).astype(jnp.float32)
    spread = jnp.sum(moment.astype(jnp.float32) - square) / (groups - 1)
    signal[name] = signal.get(name, 0.0) + jnp.sum(square)
    noise[name] = noise.get(name, 0.0) + spread

  def of_module(name: str) -> jax.Array:
    # The mean of squares is no smaller than the square of the mean, but for
    # rounding.
    difference = jnp.maximum(noise[name], 0.0)
    # A module without a gradient has no cosine: NaN, by which nothing moves.
    return 2 * difference / (signal[name] + difference)

  return {name: of_module(name) for name in signal}


def _names(tree: Any, modules: Sequence[str] | None) -> list[str]:
  """The module of each leaf; '' for none."""
  if isinstance(tree, Branched):
    # In the order of their leaves.
    trees = (
      tree.main,
      *(tree.branches[name] for name in sorted(tree.branches)),
    )
    return [name for part in trees for name in _names(part, modules)]
  if modules is None:
    # A key may have slashes of its own, as Haiku's do.
    return [str(path[0]) if path else '' for path in named(tree)]
  paths = ['/'.join(map(str, path)) for path in named(tree)]
  return [
    next((m for m in modules if f'{path}/'.startswith(f'{m}/')), '')
    for path in paths
  ]


def _check_names(
  names: list[str], params: Any, anchor: str, modules: Sequence[str] | None
) -> None:
  if isinstance(modules, str):
    raise TypeError(
      '`modules` is a list of names. Given a string. Write '
      f'`modules=[{modules!r}]`.'
    )
  for wanted in (anchor, *(modules or ())):
    if wanted not in names or not wanted:
      there = sorted((set(names) | set(_names(params, None))) - {''})
      near = difflib.get_close_matches(wanted, there, n=1, cutoff=0.0)
      hint = f" Did you mean '{near[0]}'?" if near else ''
      raise ValueError(
        'The anchor and every module must be the beginning of the path of a '
        'parameter, the anchor one of the modules, none behind one that it '
        f'begins with. Given {wanted!r}; the '
        f'parameters are under {", ".join(there)[:200]}.{hint}'
      )
