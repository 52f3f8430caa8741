"""The methods: what each trains on, and its gradient.

A group is what shares batch statistics: a device's share of the batch, or a
micro-batch of it. Each group runs the method on its own, and the gradients of
all are averaged.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.sharding import Mesh

import conadv_optax as conadv
from conadv_optax.core.numeric import share_of
from reference.command import Mistake
from reference.run import models, objective

Batch = objective.Batch
# Takes what is perturbed from a batch, and puts it back.
Inputs = tuple[Callable[[Batch], jax.Array], Callable[[Batch, Any], Batch]]


class Method(NamedTuple):
  """What a method is made of.

  Attributes:
    gradient: which gradient of a group's batch; see `make_group_gradient`.
    images: of a batch, as the input pipeline names them.
    branches: beside 'main', each with norm layers of its own.
    around: what takes this gradient somewhere else; see `_AROUND`.
    compares: what the optimizer does with how far the groups' gradients agree:
      'gsnr' scales the gradient by that, 'agvm' each module's rate.
    copies: whether every image stands in the batch several times, augmented.
    agents: whether each device has parameters of its own, which it combines
      with its neighbours'.
  """

  gradient: str = 'plain'
  images: tuple[str, ...] = ('image',)
  branches: tuple[str, ...] = ()
  around: str = ''
  compares: str = ''
  copies: bool = False
  agents: bool = False

  @property
  def keeps_groups(self) -> bool:
    """Whether the state has a part for each group."""
    kept = 'looksam', 'ssam', 'extrapolate'
    return self.agents or self.around in kept


_CONADV = Method('conadv', branches=('adversarial',))

METHODS = {
  'vanilla': Method(),
  'autoaugment': Method(images=('image_augmented',)),
  'advprop': Method('advprop', branches=('adversarial',)),
  'conadv': _CONADV,
  'conadv_reuse': Method('conadv_reuse', branches=('adversarial',)),
  'conadv_autoaugment': Method(
    'conadv_autoaugment',
    images=('image', 'image_augmented'),
    branches=('adversarial', 'augmented'),
  ),
  'fast_advprop': Method('fast_advprop', branches=('adversarial',)),
  'absa': Method('absa'),
  'batch_augment': Method(copies=True),
  'sam': Method(around='sam'),
  'looksam': Method(around='looksam'),
  'ssam': Method(around='ssam'),
  'gradient_norm_penalty': Method(around='gradient_norm_penalty'),
  'extrapolate': Method(around='extrapolate'),
  'vrgd': Method(compares='gsnr'),
  'agvm': Method(compares='agvm'),
  'diffusion': _CONADV._replace(agents=True),
  'conadv_sam': _CONADV._replace(around='sam'),
  'conadv_looksam': _CONADV._replace(around='looksam'),
  'conadv_gradient_norm_penalty': _CONADV._replace(
    around='gradient_norm_penalty'
  ),
  'conadv_extrapolate': _CONADV._replace(around='extrapolate'),
  'conadv_vrgd': _CONADV._replace(compares='gsnr'),
}

_AROUND: dict[str, Callable[..., conadv.GradientFunction]] = {
  'sam': lambda grad_fn, numbers: conadv.sam(grad_fn, numbers.sam.radius),
  'looksam': lambda grad_fn, numbers: conadv.sam(
    grad_fn,
    numbers.looksam.radius,
    every=numbers.looksam.every,
    reuse_weight=numbers.looksam.reuse_weight,
  ),
  'ssam': lambda grad_fn, numbers: conadv.sparse_sam(
    grad_fn,
    numbers.ssam.radius,
    sparsity=numbers.ssam.sparsity,
    refresh_every=numbers.ssam.refresh_every,
    num_samples=numbers.ssam.num_samples,
  ),
  'gradient_norm_penalty': lambda grad_fn, numbers: conadv.sam(
    grad_fn,
    numbers.gradient_norm_penalty.radius,
    penalty=numbers.gradient_norm_penalty.penalty,
  ),
  'extrapolate': lambda grad_fn, numbers: conadv.extrapolate(
    grad_fn, numbers.extrapolate.rate
  ),
}


def copies(config: ml_collections.ConfigDict) -> int:
  """How often every image of a batch is trained on in a branch."""
  is_several = METHODS[config.method].copies
  return config.methods.batch_augment.copies if is_several else 1


def groups(config: ml_collections.ConfigDict, mesh: Mesh) -> int:
  """How many gradients a step averages, over devices and micro-batches."""
  return mesh.size * config.accumulate * copies(config)


def before(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
  """The config of `plain_epochs`: that of the run, without its method."""
  plain = config.copy_and_resolve_references()
  plain.method = 'vanilla'
  return plain


def compares_groups(config: ml_collections.ConfigDict) -> bool:
  """Whether a step needs the second moment of the groups' gradients."""
  return config.noise_scale or bool(METHODS[config.method].compares)


def splits(config: ml_collections.ConfigDict, batch_stats: Any) -> bool:
  """Whether each branch has norm layers of its own.

  Raises:
    Mistake: when each should, and the model's keep no statistics.
  """
  if not METHODS[config.method].branches or config.methods.conadv.shared_norm:
    return False
  if not jax.tree.leaves(batch_stats):
    raise Mistake(
      f'`{config.method}` gives the norm layers of each branch statistics of '
      'their own, for which it needs BatchNorm. Given a model that keeps no '
      f'`batch_stats`, {config.model.get("build")!r}. Its norm layers look at '
      'one example alone, so all branches can share them: '
      '`--config.methods.conadv.shared_norm=True`. Or take a method without '
      'branches, `--config.method=vanilla`.'
    )
  return True


def examples(config: ml_collections.ConfigDict, mesh: Mesh) -> dict[str, int]:
  """How many examples each branch is trained on in a step."""
  method, count = METHODS[config.method], config.batch_size * copies(config)
  number = groups(config, mesh)
  is_fast = method.gradient == 'fast_advprop'
  numbers = config.methods.fast_advprop if is_fast else config.methods.conadv
  share = share_of(numbers.adversarial_fraction, count // number)
  attacked = number * share
  if is_fast:
    clean = count - attacked
    return {'attack': attacked, 'adversarial': attacked, 'main': clean}
  trained = dict.fromkeys(('main', *method.branches), count)
  if 'adversarial' in trained:
    trained['adversarial'] = attacked
  return trained


def make_inputs(
  config: ml_collections.ConfigDict, *, downscale: int = 1
) -> Inputs:
  """What an attack perturbs: the normalized images of a batch."""
  return (
    lambda batch: objective.downscale(
      objective.normalize(batch['image'], config.data), downscale
    ),
    lambda batch, image: {**batch, 'image': image},
  )


def make_ball(
  config: ml_collections.ConfigDict, epsilon: Any
) -> conadv.Normalized:
  """Radius and bounds of an attack on normalized images.

  Args:
    config: of the run.
    epsilon: the radius for pixels in [0, 1].
  """
  return conadv.normalized(
    epsilon,
    jnp.asarray(config.data.mean, jnp.float32),
    jnp.asarray(config.data.std, jnp.float32),
  )


def make_gradient(
  model: models.Model, config: ml_collections.ConfigDict, mesh: Mesh
) -> conadv.GradientFunction | conadv.Diffusion:
  """The gradient of `config.method`, averaged over all groups of a mesh.

  Of agents it is each agent's own.
  """
  grad_fn = make_group_gradient(model, config)
  if around := METHODS[config.method].around:
    grad_fn = _AROUND[around](grad_fn, config.methods)
  micro_batches = config.accumulate * copies(config)
  if METHODS[config.method].agents:
    if micro_batches > 1:
      grad_fn = conadv.accumulate(grad_fn, micro_batches)
    return conadv.diffusion(grad_fn, mesh, _weights(config, mesh.size))
  if micro_batches == 1:
    return conadv.data_parallel(
      grad_fn, mesh, second_moment=compares_groups(config)
    )
  grad_fn = conadv.accumulate(
    grad_fn,
    micro_batches,
    second_moment=compares_groups(config),
    # More take long to compile.
    unroll=micro_batches <= 16 and mesh.devices.flat[0].platform == 'cpu',
  )
  # One device then draws for its micro-batches what as many devices would
  # have drawn.
  return grad_fn if mesh.size == 1 else conadv.data_parallel(grad_fn, mesh)


def _weights(config: ml_collections.ConfigDict, agents: int) -> np.ndarray:
  """Of the graph that the agents of 'diffusion' are in."""
  own = np.arange(agents)
  apart = np.abs(own[:, None] - own)
  is_complete = config.methods.diffusion.graph == 'complete'
  return conadv.metropolis_weights(
    is_complete | np.isin(apart, (1, agents - 1))
  )


def as_one(config: ml_collections.ConfigDict, tree: Any) -> Any:
  """The model of a run: of agents it is their mean."""
  if not METHODS[config.method].agents:
    return tree
  # Compiled, as other processes have a part of the agents.
  return jax.jit(lambda tree: jax.tree.map(lambda x: x.mean(0), tree))(tree)


def make_attacks(
  config: ml_collections.ConfigDict, num_classes: int
) -> tuple[conadv.Attack, conadv.Attack]:
  """The attack of an attack pass, and that of a reused gradient."""
  epsilon, bounds = make_ball(config, config.attack.epsilon / 255)
  is_targeted = config.methods.conadv.targets == 'random'
  pgd = conadv.pgd(
    epsilon,
    start_from_clean=config.attack.start_from_clean,
    bounds=bounds,
    targets=conadv.random_targets(num_classes) if is_targeted else None,
  )
  return pgd, conadv.fgsm(epsilon, bounds=bounds)


def make_group_gradient(
  model: models.Model, config: ml_collections.ConfigDict
) -> conadv.GradientFunction:
  """The gradient on the batch of one group.

  ConAdv's attack steps towards a random wrong class, unless the config says
  otherwise: an attack away from the true label of the batch trained on would
  leak it through the batch's statistics. A reused gradient can only be that of
  the training loss, so `conadv_reuse` and `fast_advprop` attack the true label,
  smoothed as in training, the first from the clean image.
  """
  loss_fn = objective.make_loss(model, config)
  method, numbers = METHODS[config.method], config.methods

  inputs = make_inputs(config)

  if method.gradient == 'plain':
    [view] = method.images
    return conadv.plain(
      lambda params, batch_stats, batch, *, key: loss_fn(
        params, batch_stats, {**batch, 'image': batch[view]}, key=key
      ),
      has_state=True,
      has_aux=True,
      has_key=True,
    )
  if method.gradient == 'absa':
    epsilon, bounds = make_ball(config, numbers.absa.epsilon)
    return _absa_gradient(
      loss_fn,
      objective.make_evaluation_loss(model, config),
      conadv.fgsm(epsilon, bounds=bounds),
      inputs,
      numbers.absa.adversarial_fraction,
    )
  if method.gradient == 'fast_advprop':
    epsilon, bounds = make_ball(config, numbers.fast_advprop.epsilon / 255)
    return conadv.fast_advprop(
      loss_fn,
      attack=conadv.pgd(epsilon, bounds=bounds),
      inputs=inputs,
      adversarial_fraction=numbers.fast_advprop.adversarial_fraction,
      attack_weight=numbers.fast_advprop.attack_weight,
      has_state=True,
      has_aux=True,
      has_key=True,
    )
  pgd, fgsm = make_attacks(config, model.num_classes)
  arguments: dict[str, dict[str, Any]] = {
    'advprop': {'staleness': 0, 'attack': pgd},
    'conadv': {'staleness': config.staleness, 'attack': pgd},
    'conadv_reuse': {
      'staleness': config.staleness,
      'attack': fgsm,
      'reuse_gradient': True,
    },
    'conadv_autoaugment': {
      'staleness': config.staleness,
      'attack': pgd,
      'extra_branches': {'augmented': 'image_augmented'},
    },
  }
  return conadv.wrap(
    loss_fn,
    inputs=make_inputs(config, downscale=numbers.conadv.adversarial_downscale),
    # The first batches of `conadv_reuse` are attacked as all later ones.
    has_branch=method.gradient != 'conadv_reuse',
    adversarial_fraction=numbers.conadv.adversarial_fraction,
    every=numbers.conadv.every,
    has_state=True,
    has_aux=True,
    has_key=True,
    **arguments[method.gradient],
  )


def _absa_gradient(
  loss_fn: Callable[..., Any],
  evaluation_loss: Callable[[Any, Any, Batch], jax.Array],
  attack: conadv.Attack,
  inputs: Inputs,
  adversarial_fraction: float,
) -> conadv.GradientFunction:
  """The plain gradient on a batch whose first part is adversarial.

  It is where the batch's 'attacked' (B,), the same for all examples, is True.
  """
  plain = conadv.plain(loss_fn, has_state=True, has_aux=True, has_key=True)

  def value_and_grad(
    params: Any,
    state: Any,
    batch: Batch,
    *,
    model_state: Any = None,
    key: jax.Array | None = None,
  ) -> Any:
    attacked = batch['attacked'][0]
    clean = {name: x for name, x in batch.items() if name != 'attacked'}
    get, set_ = inputs
    mixed = jax.lax.cond(
      attacked,
      lambda: conadv.perturb(
        lambda params, batch: evaluation_loss(params, model_state, batch),
        params,
        clean,
        attack=attack,
        inputs=inputs,
        adversarial_fraction=adversarial_fraction,
      ),
      lambda: set_(clean, get(clean)),
    )
    return plain.value_and_grad(
      params, state, mixed, model_state=model_state, key=key
    )

  return plain._replace(value_and_grad=value_and_grad)


def make_controller(
  config: ml_collections.ConfigDict,
) -> conadv.BatchController:
  """ABSA's rule for the batch, with one evaluation an epoch."""
  numbers = config.methods.absa
  return conadv.absa(
    numbers.max_micro_batches,
    growth=numbers.growth,
    patience=numbers.patience,
    adversarial_evaluations=math.ceil(config.epochs / 2),
  )


def make_noise_scale(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> conadv.NoiseScale:
  """The tracker of the gradient noise scale, between groups."""
  return conadv.noise_scale(
    config.batch_size * copies(config), groups(config, mesh)
  )


def make_augmentation(
  config: ml_collections.ConfigDict,
) -> Callable[[jax.Array, Batch], Batch]:
  """Augmented copies of a batch of uint8 images, for `batch_augment`.

  Each is a crop of the image padded by an eighth with zeros, and a mirror image
  with probability 1/2 where the config flips. A device makes those of its own
  share.
  """

  def augment_one(key: jax.Array, example: Batch) -> Batch:
    crop_key, flip_key = jax.random.split(key)
    image = example['image']
    pad = max(1, config.data.size // 8)
    top, left = jax.random.randint(crop_key, (2,), 0, 2 * pad + 1)
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)))
    image = jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)
    if config.data.flip:
      image = jnp.where(jax.random.bernoulli(flip_key), image[:, ::-1], image)
    return {**example, 'image': image}

  return conadv.batch_augment(augment_one, copies(config))
