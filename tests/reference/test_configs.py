"""The ImageNet configs: their recipes, their arithmetic, their model."""

import csv
import importlib
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from reference.configs import study_fashion_mnist
from reference.run import checks, methods, parts
from reference.study import grid

IMAGES = 1_281_167
METHODS = (
  'vanilla',
  'autoaugment',
  'advprop',
  'conadv',
  'conadv_reuse',
  'conadv_autoaugment',
)
# Batch, peak, warm-up epochs, steps, momentum, weight decay, power.
RECIPES = {
  'imagenet_4k': (4096, 10.0, 5, 28151, 0.9, 2e-4, 2.0),
  'imagenet_8k': (8192, 17.0, 5, 14076, 0.9, 2e-4, 2.0),
  'imagenet_16k': (16384, 25.0, 5, 7116, 0.9, 5e-5, 2.0),
  'imagenet_32k': (32768, 31.2, 25, 3558, 0.9, 5e-5, 2.0),
  'imagenet_64k': (65536, 35.6, 40, 1760, 0.92, 5e-5, 1.6),
  'imagenet_96k': (98304, 43.0, 41, 1301, 0.92, 5e-5, 1.6),
}
# Top-1 in percent, of ResNet-50 on ImageNet.
PUBLISHED = {
  ('imagenet_4k', 'vanilla'): 76.9,
  ('imagenet_8k', 'vanilla'): 76.6,
  ('imagenet_16k', 'vanilla'): 76.6,
  ('imagenet_32k', 'vanilla'): 76.6,
  ('imagenet_64k', 'vanilla'): 75.3,
  ('imagenet_96k', 'vanilla'): 74.3,
  ('imagenet_96k', 'conadv'): 75.3,
  ('imagenet_96k', 'conadv_autoaugment'): 76.2,
}

DOCS = Path(__file__).parents[2] / 'docs'

configs = pytest.mark.parametrize('name', RECIPES)


def module_of(name):
  return importlib.import_module(f'reference.configs.{name}')


def make(name, **overrides):
  config = module_of(name).get_config()
  config.update_from_flattened_dict(overrides)
  return config


def numbers(pattern, text):
  [found] = re.findall(pattern, ' '.join(text.split()))
  return [float(number.replace(',', '')) for number in found]


@configs
@pytest.mark.parametrize('method', METHODS)
def test_every_method_is_a_choice(name, method):
  assert method in methods.METHODS
  config = make(name, method=method)
  assert config.name == name
  checks.check_choices(config)
  checks.check_channels(config)
  checks.check_numbers(config)
  checks.check_classes(config, 1000)
  with pytest.raises(ValueError, match=r'1000\. Given 999.*data\.classes=999'):
    checks.check_classes(config, 999)


@configs
def test_the_schedule_is_the_published_one(name):
  batch, peak, warmup_epochs, steps, momentum, decay, power = RECIPES[name]
  config = make(name)
  tx, schedule, total = parts.make_optimizer(config, images=IMAGES)
  assert config.batch_size == batch
  assert total == steps
  warmup = round(warmup_epochs * IMAGES / batch)
  for at in (0, warmup // 2, warmup, (warmup + steps) // 2, steps - 1, steps):
    if at <= warmup:
      expected = peak * at / warmup
    else:
      left = (steps - at) / (steps - warmup)
      expected = (peak - 1e-4) * left**power + 1e-4
    np.testing.assert_allclose(schedule(at), expected, rtol=1e-4)

  # Three steps of one layer by hand; the first has rate 0.
  w, g = np.array([[3.0, 4.0]]), np.array([[0.0, 2.0]])
  params, grads = {'w': jnp.asarray(w)}, {'w': jnp.asarray(g)}
  direction = 1e-3 * 5 / (2 + decay * 5) * (g + decay * w)
  velocity, state = 0.0, tx.init(params)
  for at in range(3):
    updates, state = tx.update(grads, state, params)
    velocity = momentum * velocity + peak * at / warmup * direction
    np.testing.assert_allclose(updates['w'], -velocity, rtol=1e-3)


@configs
def test_the_arithmetic_of_the_docstring(name):
  doc, config = module_of(name).__doc__, make(name)
  assert f'--config=reference/configs/{name}.py' in doc
  total, share, cores, group = numbers(
    r"Batch: ([\d,]+) = (\d+) x ([\d,]+) cores; a core's (\d+) are", doc
  )
  assert total == share * cores == config.batch_size
  assert group == share
  pod, chips, height, width = numbers(
    r'Pod: v3-(\d+), (\d+) chips \(`--topology=v3:(\d+)x(\d+)`', doc
  )
  # A v3 chip has two cores.
  assert pod == cores == 2 * chips == 2 * height * width
  images, batch, an_epoch = numbers(
    r'Steps: ([\d,]+) images / ([\d,]+) = ([\d.]+) an epoch', doc
  )
  assert (images, batch) == (IMAGES, config.batch_size)
  assert an_epoch == round(IMAGES / config.batch_size, 2)
  epochs, steps, warmup, warmup_epochs = numbers(
    r'; ([\d.]+) epochs are ([\d,]+) steps, the first ([\d,]+) of them '
    r'\((\d+) epochs\)',
    doc,
  )
  assert (epochs, warmup_epochs) == (config.epochs, config.lars.warmup_epochs)
  assert steps == RECIPES[name][3]
  assert warmup == round(warmup_epochs * IMAGES / config.batch_size)


@configs
def test_the_docstring_says_what_to_expect(name):
  doc = module_of(name).__doc__
  assert 'https://arxiv.org/abs/2106.00221' in doc
  for method in METHODS:
    figure = PUBLISHED.get((name, method))
    expected = (
      'not yet run'
      if figure is None
      else f'published: {figure} %; not yet run here'
    )
    assert re.findall(rf'^  {method} +(.+)$', doc, re.MULTILINE) == [expected]


def test_the_model_is_resnet_50_in_bfloat16():
  config = make('imagenet_96k')
  model = parts.make_model(config, num_classes=1000)

  def call():
    images = jnp.ones((2, 224, 224, 3))
    variables = model.init(jax.random.key(0), images, train=False)
    logits, computed = model.apply(
      variables, images, train=True, capture_intermediates=True, mutable=True
    )
    return variables, logits, computed

  # Flax's BatchNorm mixes the two dtypes itself.
  with jax.numpy_dtype_promotion('standard'):
    variables, logits, computed = jax.eval_shape(call)
  assert sum(x.size for x in jax.tree.leaves(variables['params'])) == 25_557_032
  for leaf in jax.tree.leaves((variables, computed['batch_stats'])):
    assert leaf.dtype == jnp.float32
  assert (logits.shape, logits.dtype) == ((2, 1000), jnp.float32)
  outputs = {
    name: values['__call__'][0]
    for name, values in computed['intermediates'].items()
    if name != '__call__'
  }
  blocks = [name for name in outputs if name.startswith('Bottleneck')]
  assert len(blocks) == 3 + 4 + 6 + 3
  for name in ('stem', *blocks):
    assert outputs[name].dtype == jnp.bfloat16
  assert outputs['BottleneckBlock_15'].shape == (2, 7, 7, 2048)


@configs
def test_the_attack_is_that_of_the_largest_run(name):
  config = make(name)
  # 9 of 255 on a scale from -1 to 1, in units of normalised images.
  raw_levels = 9 * 2 / 255 * np.array([0.229, 0.224, 0.225]) * 255
  np.testing.assert_allclose(config.attack.epsilon, raw_levels, rtol=0.04)
  assert config.attack.start_from_clean == 0.2
  assert config.attack.label_smoothing == 0.0
  assert config.data.level_factor == 0.8
  assert config.label_smoothing == 0.1
  assert (config.data.size, config.data.crop) == (224, 'random_resized')
  assert config.data.eval_crop == 'center'


def test_the_rows_in_the_docs_are_cells_of_the_study():
  """What a cell's result depends on is in its name."""
  config = study_fashion_mnist.get_config()
  with (DOCS / 'study_fashion_mnist.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 209
  for row in rows:
    cell = grid.Cell(
      row['variant'],
      int(row['batch_size']),
      float(row['peak']),
      int(row['seed']),
      final=row['kind'] == 'final',
    )
    assert grid.identify(config, cell) == row['cell'], cell
