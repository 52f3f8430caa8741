"""The training step: the loss, the methods, the update."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import optax

import conadv_optax as conadv
from reference import models

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class Method(NamedTuple):
  """What a method trains on.

  Attributes:
    images: of a batch, as the input pipeline names them.
    branches: beside 'main', each with norm layers of its own.
  """

  images: tuple[str, ...]
  branches: tuple[str, ...]


METHODS = {
  'vanilla': Method(('image',), ()),
  'autoaugment': Method(('image_augmented',), ()),
  'advprop': Method(('image',), ('adversarial',)),
  'conadv': Method(('image',), ('adversarial',)),
  'conadv_reuse': Method(('image',), ('adversarial',)),
  'conadv_autoaugment': Method(
    ('image', 'image_augmented'), ('adversarial', 'augmented')
  ),
}


class TrainState(NamedTuple):
  """All that a step changes, and the key that it folds its number into.

  Attributes:
    step: int32 scalar, the steps done.
    params: parameters, float32; `Branched` where the method has branches.
    model_state: BatchNorm statistics, likewise.
    opt_state: of the optimizer.
    conadv_state: the batches that wait for their step.
    key: of all randomness on the device.
  """

  step: jax.Array
  params: Any
  model_state: Any
  opt_state: Any
  conadv_state: Any
  key: jax.Array


def normalize(batch: Batch, config: ml_collections.ConfigDict) -> Batch:
  """Turns images from uint8 into float32 of mean 0 and deviation 1.

  Args:
    batch: holds 'image', 'image_augmented' or both, uint8 (B, H, W, C).
    config: the `data` part of a config: `mean` and `std` of each channel, for
      pixels in [0, 1].
  """
  mean = jnp.asarray(config.mean, jnp.float32).reshape(1, 1, 1, -1)
  std = jnp.asarray(config.std, jnp.float32).reshape(1, 1, 1, -1)
  images = {
    name: (array.astype(jnp.float32) / 255.0 - mean) / std
    for name, array in batch.items()
    if name.startswith('image')
  }
  return {**batch, **images}


def make_loss(
  model: models.ResNet, *, label_smoothing: float
) -> Callable[..., tuple[jax.Array, tuple[Any, jax.Array]]]:
  """The loss of one branch, which knows of no other.

  Returns:
    A function of `(params, batch_stats, batch)` that returns `(loss,
    (batch_stats, correct))`: float32 cross entropy with smoothed labels, and
    the int32 count of right answers.
  """

  def loss_fn(
    params: Any, batch_stats: Any, batch: Batch
  ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
    logits, updated = model.apply(
      {'params': params, 'batch_stats': batch_stats},
      batch['image'],
      train=True,
      mutable=['batch_stats'],
    )
    labels = optax.smooth_labels(
      jax.nn.one_hot(batch['label'], logits.shape[-1]), label_smoothing
    )
    loss = optax.softmax_cross_entropy(logits, labels).mean()
    correct = (logits.argmax(-1) == batch['label']).sum(dtype=jnp.int32)
    return loss, (updated['batch_stats'], correct)

  return loss_fn


def plain(
  loss_fn: Callable[..., Any], *, inputs: str
) -> conadv.GradientFunction:
  """The plain step in the form of `conadv.wrap`: one branch, no memory.

  Args:
    loss_fn: of `(params, batch_stats, batch)`, which reads `batch['image']`.
    inputs: the images of the batch that take this place.
  """

  def init_fn(
    params: Any,
    first_batches: Any,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> conadv.ConAdvState:
    del params, first_batches, model_state, key
    return conadv.ConAdvState(slot=jnp.zeros((), jnp.int32), queue=())

  def value_and_grad_fn(
    params: Any,
    state: conadv.ConAdvState,
    batch: Any,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> tuple[tuple[jax.Array, conadv.ConAdvAux], Any, conadv.ConAdvState]:
    del key
    (loss, (model_state, aux)), grads = jax.value_and_grad(
      loss_fn, has_aux=True
    )(params, model_state, {**batch, 'image': batch[inputs]})
    aux = conadv.ConAdvAux({'main': loss}, model_state, {'main': aux})
    return (loss, aux), grads, state

  return conadv.GradientFunction(init_fn, value_and_grad_fn, staleness=0)


def make_gradient(
  model: models.ResNet, config: ml_collections.ConfigDict
) -> conadv.GradientFunction:
  """The gradient of the method that `config.method` names.

  The attack steps towards a random wrong class: an attack away from the true
  label of the batch trained on would leak it through the batch's statistics.
  A reused gradient can only be that of the training loss, so `conadv_reuse`
  attacks the true label, from the clean image.
  """
  loss_fn = make_loss(model, label_smoothing=config.label_smoothing)
  epsilon, bounds = conadv.normalized(
    config.attack.epsilon / 255,
    jnp.asarray(config.data.mean, jnp.float32),
    jnp.asarray(config.data.std, jnp.float32),
  )
  pgd = conadv.pgd(
    epsilon,
    start_from_clean=config.attack.start_from_clean,
    bounds=bounds,
    targets=conadv.random_targets(model.num_classes),
  )
  method = METHODS[config.method]
  if not method.branches:
    return plain(loss_fn, inputs=method.images[0])
  arguments: dict[str, dict[str, Any]] = {
    'advprop': {'staleness': 0, 'attack': pgd},
    'conadv': {'staleness': config.staleness, 'attack': pgd},
    'conadv_reuse': {
      'staleness': config.staleness,
      'attack': conadv.fgsm(epsilon, bounds=bounds),
      'reuse_gradient': True,
    },
    'conadv_autoaugment': {
      'staleness': config.staleness,
      'attack': pgd,
      'extra_branches': {'augmented': 'image_augmented'},
    },
  }
  return conadv.wrap(
    loss_fn, has_state=True, has_aux=True, **arguments[config.method]
  )


def make_state(
  model: models.ResNet,
  tx: optax.GradientTransformation,
  grad_fn: conadv.GradientFunction,
  config: ml_collections.ConfigDict,
) -> Callable[[jax.Array, list[Batch]], TrainState]:
  """The state before the first step, to be jitted.

  Returns:
    A function of `(key, first_batches)`, `grad_fn.staleness` batches as the
    input pipeline makes them, which wait in the state that it returns.
  """

  def init_fn(key: jax.Array, first_batches: list[Batch]) -> TrainState:
    model_key, attack_key, step_key = jax.random.split(key, 3)
    size, channels = config.data.size, len(config.data.mean)
    variables = model.init(
      model_key, jnp.zeros((1, size, size, channels)), train=False
    )
    params, model_state = variables['params'], variables['batch_stats']
    branches = METHODS[config.method].branches
    if branches:
      params, model_state = conadv.dual_bn.split(
        params, model_state, branches=branches
      )
    conadv_state = grad_fn.init(
      params,
      [normalize(batch, config.data) for batch in first_batches],
      model_state=model_state,
      key=attack_key,
    )
    return TrainState(
      step=jnp.zeros((), jnp.int32),
      params=params,
      model_state=model_state,
      opt_state=tx.init(params),
      conadv_state=conadv_state,
      key=step_key,
    )

  return init_fn


def make_step(
  grad_fn: conadv.GradientFunction,
  tx: optax.GradientTransformation,
  schedule: optax.Schedule,
  config: ml_collections.ConfigDict,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
  """One step of training, to be jitted.

  Returns:
    A function of `(state, batch)`, the batch as the input pipeline makes it,
    that returns the next state and float32 scalars: the loss, the loss and
    the accuracy of each branch, the learning rate, and the norms of gradient
    and parameters.
  """

  def step_fn(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    (loss, aux), grads, conadv_state = grad_fn.value_and_grad(
      state.params,
      state.conadv_state,
      normalize(batch, config.data),
      model_state=state.model_state,
      key=jax.random.fold_in(state.key, state.step),
    )
    updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': loss,
      **{f'loss_{name}': value for name, value in aux.losses.items()},
      **{
        f'accuracy_{name}': correct / config.batch_size
        for name, correct in aux.aux.items()
      },
      'learning_rate': jnp.asarray(schedule(state.step), jnp.float32),
      'gradient_norm': optax.tree.norm(grads),
      'parameter_norm': optax.tree.norm(params),
    }
    state = TrainState(
      step=state.step + 1,
      params=params,
      model_state=aux.model_state,
      opt_state=opt_state,
      conadv_state=conadv_state,
      key=state.key,
    )
    return state, metrics

  return step_fn
