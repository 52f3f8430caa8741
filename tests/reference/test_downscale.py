"""Attacks, and adversarial examples, on images that are smaller."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_runs import tiny

from conadv_optax import dual_bn
from reference.command import Mistake
from reference.run import checks, methods, models, objective

# With a pool over all places, as any image size needs.
_MODEL = models.ResNet(10, (1,), 4, 'basic', 'small', jnp.float32)


def _make(**numbers):
  """A config, a batch, and parameters and statistics of both branches."""
  config = tiny(**{f'methods.conadv.{k}': v for k, v in numbers.items()})
  rng = np.random.default_rng(0)
  batch = {
    'image': rng.integers(0, 256, (8, 8, 8, 1)).astype(np.uint8),
    'label': rng.integers(0, 10, 8).astype(np.int32),
  }
  variables = _MODEL.init(
    jax.random.key(0), jnp.ones((1, 8, 8, 1)), train=False
  )
  both = dual_bn.split(variables['params'], variables['batch_stats'])
  return config, batch, both


def _means(images):
  """NumPy's means over squares of two pixels a side."""
  b, h, w, c = images.shape
  return images.reshape(b, h // 2, 2, w // 2, 2, c).mean((2, 4))


def _normalized(config, batch):
  pixels = batch['image'].astype(np.float32) / 255
  return (pixels - np.float32(config.data.mean)) / np.float32(config.data.std)


def test_the_attack_climbs_the_loss_of_means_and_training_does_not():
  config, batch, both = _make(attack_downscale=2)
  params, stats = map(dual_bn.main, both)
  loss_fn = objective.make_loss(_MODEL, config)
  plain_fn = objective.make_loss(_MODEL, tiny())
  images = _normalized(config, batch)

  def gradient(loss_fn, images, branch):
    return jax.grad(
      lambda x: loss_fn(params, stats, {**batch, 'image': x}, branch=branch)[0]
    )(images)

  of_means = gradient(plain_fn, _means(images), 'attack')
  # Each pixel has a quarter of its square's.
  expected = np.kron(of_means, np.full((1, 2, 2, 1), 0.25))
  given = gradient(loss_fn, images, 'attack')
  np.testing.assert_allclose(given, expected, rtol=1e-4, atol=1e-7)
  for branch in ('main', 'adversarial'):
    np.testing.assert_array_equal(
      gradient(loss_fn, images, branch), gradient(plain_fn, images, branch)
    )


def test_adversarial_examples_are_made_of_means():
  config, batch, (params, stats) = _make(adversarial_downscale=2)
  config.attack.epsilon = 0.0
  grad_fn = methods.make_group_gradient(_MODEL, config)
  at = {'model_state': stats, 'key': jax.random.key(0)}
  state = grad_fn.init(params, [batch], **at)
  means = _means(_normalized(config, batch))
  np.testing.assert_allclose(
    state.queue.adversarial[0], means, rtol=1e-5, atol=1e-6
  )
  (_, aux), _, _ = grad_fn.value_and_grad(params, state, batch, **at)
  loss_fn = objective.make_loss(_MODEL, tiny())
  for branch, images in (
    ('main', batch['image']),
    ('adversarial', jnp.asarray(means)),
  ):
    expected, _ = loss_fn(
      dual_bn.main(params), dual_bn.main(stats), {**batch, 'image': images}
    )
    np.testing.assert_allclose(aux.losses[branch], expected, rtol=1e-5)


@pytest.mark.parametrize('name', ['attack_downscale', 'adversarial_downscale'])
def test_what_cannot_be_downscaled_is_refused(name):
  field = f'methods.conadv.{name}'
  with pytest.raises(Mistake, match=f'gradient of the clean.*{name}=2'):
    checks.check_choices(tiny('conadv_reuse', **{field: 2}))
  with pytest.raises(Mistake, match=r'data\.size=8.*' + f'{name}=3'):
    checks.check_choices(tiny(**{field: 3}))
  with pytest.raises(Mistake, match=f'{name}.*Given 0'):
    checks.check_numbers(tiny(**{field: 0}))
  checks.check_choices(tiny('vanilla', **{field: 3}))
  with pytest.raises(Mistake, match=f'fast_advprop.*{name}=2.*conadv'):
    checks.check_choices(tiny('fast_advprop', **{field: 2}))
