"""The training step: the state, the gradient of the method, the update."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import traverse_util
from jax.sharding import Mesh

import conadv_optax as conadv
from reference.run import methods, models, objective

Batch = objective.Batch
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
  """All that a step changes, and the key that it folds its number into.

  Attributes:
    step: int32 scalar, the steps done.
    params: parameters, float32; `Branched` where the method has branches.
    model_state: BatchNorm statistics, likewise.
    opt_state: of the optimizer.
    conadv_state: the batches that wait for their step, and what else the
      gradient of the method remembers.
    noise_scale: the averages of the gradient noise scale, or `()`.
    absa: the batch and rate that ABSA has come to, or `()`.
    key: of all randomness on the device.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  conadv_state: Any
  noise_scale: Any
  absa: Any
  key: jax.Array


def make_state(
  model: models.Model,
  tx: optax.GradientTransformation,
  grad_fn: conadv.GradientFunction | conadv.Diffusion,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable[..., TrainState]:
  """The state before the first step, to be jitted.

  Returns:
    A function of `(key, first_batches, start)`: `grad_fn.staleness` batches as
    the input pipeline makes them, which wait in the state that it returns; and
    by their path those of the model's variables that are not drawn, by default
    none.
  """

  def init_fn(
    key: jax.Array,
    first_batches: list[Batch],
    start: Mapping[tuple[str, ...], jax.Array] | None = None,
  ) -> TrainState:
    model_key, attack_key, step_key = jax.random.split(key, 3)
    size, channels = config.data.size, len(config.data.mean)
    variables = model.init(
      model_key, jnp.zeros((1, size, size, channels)), train=False
    )
    if start:
      drawn = traverse_util.flatten_dict(variables)
      variables = traverse_util.unflatten_dict({**drawn, **start})
    params, model_state = variables['params'], variables.get('batch_stats', {})
    method = methods.METHODS[config.method]
    if methods.splits(config, model_state):
      params, model_state = conadv.dual_bn.split(
        params, model_state, branches=method.branches
      )
    if isinstance(grad_fn, conadv.Diffusion):
      params, model_state = grad_fn.spread((params, model_state))
    conadv_state = grad_fn.init(
      params,
      first_batches,
      model_state=model_state,
      key=attack_key,
    )
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=model_state,
      opt_state=tx.init(params),
      conadv_state=conadv_state,
      noise_scale=(
        methods.make_noise_scale(config, mesh).init()
        if config.noise_scale
        else ()
      ),
      absa=(
        methods.make_controller(config).init()
        if method.gradient == 'absa'
        else ()
      ),
      key=step_key,
    )

  return init_fn


def make_step(
  grad_fn: conadv.GradientFunction | conadv.Diffusion,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """One step of training, to be jitted.

  With ABSA a step takes one micro-batch, and the optimizer moves after as many
  as the controller says. Its learning rate is then 1, and the schedule's, times
  the controller's scale, stands outside of it: so the rate follows the epochs,
  however many micro-batches an update takes.

  Returns:
    A function of `(state, batch)`, the batch as the input pipeline makes it,
    that returns the next state and float32 scalars: the loss, the loss and
    the accuracy of each branch, the learning rate, and the norms of gradient
    and parameters; the noise scale and ABSA's micro-batches where there are.
  """
  method = methods.METHODS[config.method]
  examples = methods.examples(config, mesh)
  update = optax.with_extra_args_support(tx).update

  def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    key = jax.random.fold_in(state.key, state.step)
    rate = jnp.asarray(schedule(state.step), jnp.float32)
    extra: dict[str, Any] = {}
    metrics: Metrics = {}
    if method.copies:
      augment_key, key = jax.random.split(key)
      batch = methods.make_augmentation(config)(augment_key, batch)
    if method.gradient == 'absa':
      rate *= state.absa.learning_rate_scale
      extra['micro_batches'] = state.absa.micro_batches
      extra['learning_rate_scale'] = rate
      metrics['micro_batches'] = state.absa.micro_batches.astype(jnp.float32)
      attacked = state.opt_state.index < state.absa.attacked
      batch = {**batch, 'attacked': jnp.full((config.batch_size,), attacked)}
    (loss, aux), grads, conadv_state = grad_fn.value_and_grad(
      state.params,
      state.conadv_state,
      batch,
      model_state=state.model_state,
      key=key,
    )
    noise_scale = state.noise_scale
    if config.noise_scale:
      tracker = methods.make_noise_scale(config, mesh)
      metrics['noise_scale'], noise_scale = tracker.update(
        grads, state.noise_scale, second_moment=aux.second_moment
      )
    updates, opt_state = update(
      grads,
      state.opt_state,
      state.params,
      second_moment=aux.second_moment,
      **extra,
    )
    params = optax.apply_updates(state.params, updates)
    if isinstance(grad_fn, conadv.Diffusion):
      params = grad_fn.combine(params)
    metrics = {
      # Agents have a number each.
      'loss': loss.mean(),
      **{f'loss_{name}': value.mean() for name, value in aux.losses.items()},
      **{
        f'accuracy_{name}': correct.sum() / examples[name]
        for name, correct in aux.aux.items()
      },
      'learning_rate': rate,
      'gradient_norm': optax.tree.norm(grads),
      'parameter_norm': optax.tree.norm(params),
      **metrics,
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      model_state=aux.model_state,
      opt_state=opt_state,
      conadv_state=conadv_state,
      noise_scale=noise_scale,
      absa=state.absa,
      key=state.key,
    )
    return state, metrics

  return step_fn


def make_plain_step(
  model: models.Model,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: ml_collections.ConfigDict,
  mesh: Mesh,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """One step of `config.plain_epochs`, before its method sets in; to be jitted.

  The state is the method's. The batches that wait in it go on waiting, and the
  norm layers of the other branches are copies of the main branch's.

  Returns:
    A function of `(state, batch)`, as that of `make_step`.
  """
  plain = methods.before(config)
  grad_fn = methods.make_gradient(model, plain, mesh)
  plain_step = make_step(grad_fn, tx, schedule, plain, mesh)
  branches = methods.METHODS[config.method].branches

  def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    own = grad_fn.init(state.params, [], model_state=state.model_state)
    new, metrics = plain_step(state._replace(conadv_state=own), batch)
    params, model_state = new.params, new.model_state
    if isinstance(model_state, conadv.dual_bn.Branched):
      params, model_state = conadv.dual_bn.split(
        *map(conadv.dual_bn.main, (params, model_state)), branches=branches
      )
    return new._replace(
      params=params, model_state=model_state, conadv_state=state.conadv_state
    ), metrics

  return step_fn
