"""The step and the evaluation, against loops over devices and images."""

import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
from digit_steps import copy_of, first_state

import conadv_optax as conadv
from reference.configs import methods as configs
from reference.data import input_pipeline, sources
from reference.run import evaluation, methods, objective, parts

DEVICES = 8
CLASSES = 3


class Model(nn.Module):
  """A norm layer between two dense ones, with the ResNets' call."""

  num_classes: int = CLASSES

  @nn.compact
  def __call__(self, x, *, train):
    x = nn.Dense(5)(x.reshape(x.shape[0], -1))
    x = nn.BatchNorm(use_running_average=not train, momentum=0.9)(x)
    return nn.Dense(self.num_classes)(nn.relu(x))


def make_config(**fields):
  return ml_collections.ConfigDict(
    {
      'seed': 0,
      'method': 'conadv',
      'staleness': 1,
      'batch_size': 16,
      'accumulate': 1,
      'queue_memory': 'device',
      'noise_scale': False,
      'label_smoothing': 0.1,
      'data': {
        'size': 4,
        'eval_crop': 'resize',
        'on_bad_image': 'stop',
        'mean': (0.4, 0.5),
        'std': (0.2, 0.3),
      },
      'attack': {'epsilon': 8.0, 'start_from_clean': 0.2},
      'methods': configs.make_section(),
      'run': {'threads': 1},
      **fields,
    }
  )


def make_batch(seed, count=16, images=('image',)):
  rng = np.random.default_rng(seed)
  batch = {'image': rng.integers(256, size=(count, 4, 4, 2), dtype=np.uint8)}
  labels = rng.integers(CLASSES, size=count).astype(np.int32)
  batch['image_augmented'] = rng.permutation(batch['image'] // 2)
  return {name: batch[name] for name in images} | {'label': labels}


MODEL = Model()


@functools.cache
def made(method):
  """The placement of a batch, the first state, and the compiled step."""
  config = make_config(method=method)
  mesh = parts.make_mesh(config.batch_size)
  place = parts.make_placement(mesh)
  tx = optax.sgd(0.5)
  grad_fn = methods.make_gradient(MODEL, config, mesh)
  images = methods.METHODS[method].images
  first = [
    place(make_batch(100 + i, images=images)) for i in range(grad_fn.staleness)
  ]
  state = first_state(config, MODEL, tx, grad_fn, mesh, first)
  take = parts.make_step(
    config, tx, optax.constant_schedule(0.5), grad_fn, state, mesh
  )
  return place, state, take


def make_all(method='conadv'):
  place, state, take = made(method)
  return place, copy_of(state), take


@jax.jit
def logits_of(params, batch_stats, images):
  return MODEL.apply(
    {'params': params, 'batch_stats': batch_stats}, images, train=False
  )


@functools.cache
def evaluation_of_model():
  place, _, _ = made('conadv')
  return evaluation.make_evaluation(MODEL, make_config(), place)


def evaluate(state, batch):
  records = list(zip(batch['image'], batch['label'], strict=True))
  source = sources.Source([], records, tuple('abc'))
  config = make_config()
  batches = input_pipeline.held_out_batches(
    source, config, batch_size=config.batch_size, skipped={}
  )
  return evaluation_of_model()(state, batches)


def test_normalize_is_mean_and_deviation_of_each_channel():
  config = make_config()
  batch = make_batch(0)
  image = objective.normalize(batch['image'], config.data)
  expected = (batch['image'] / 255 - [0.4, 0.5]) / [0.2, 0.3]
  assert image.dtype == jnp.float32
  np.testing.assert_allclose(image, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('smoothing', [None, 0.0, 0.5])
def test_labels_are_smoothed_by_what_the_loss_is_for(smoothing):
  logits = np.random.default_rng(0).normal(size=(16, CLASSES))
  batch = make_batch(0)
  of_all = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
  right = of_all[np.arange(16), batch['label']].mean()

  class Constant:
    """Of these logits, whatever it is given."""

    def apply(self, *_, **__):
      return jnp.asarray(logits, jnp.float32), {}

  attack = {} if smoothing is None else {'label_smoothing': smoothing}
  loss_fn = objective.make_loss(Constant(), make_config(attack=attack))
  for branch in ('main', 'adversarial', 'augmented', 'attack'):
    loss, _ = loss_fn({}, {}, batch, branch=branch)
    is_other = branch == 'attack' and smoothing is not None
    share = smoothing if is_other else 0.1
    expected = -(1 - share) * right - share * of_all.mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-5)


@pytest.mark.slow
def test_vanilla_is_the_mean_over_devices_of_the_plain_step():
  place, state, take = make_all('vanilla')
  before = jax.tree.map(np.array, state._replace(key=()))
  batch = make_batch(0)

  def smoothed_loss(params, images, labels):
    logits, updated = MODEL.apply(
      {'params': params, 'batch_stats': before.model_state},
      images,
      train=True,
      mutable=['batch_stats'],
    )
    right = 0.9 * jax.nn.one_hot(labels, CLASSES) + 0.1 / CLASSES
    loss = -(right * jax.nn.log_softmax(logits)).sum(-1).mean()
    return loss, updated['batch_stats']

  images = ((batch['image'] / 255 - [0.4, 0.5]) / [0.2, 0.3]).astype('float32')
  of_device = jax.jit(jax.value_and_grad(smoothed_loss, has_aux=True))
  per_device = [
    of_device(before.params, images[part], batch['label'][part])
    for part in np.arange(16).reshape(DEVICES, 2)
  ]
  mean = jax.tree.map(lambda *x: sum(x) / DEVICES, *per_device)
  (loss, batch_stats), gradient = mean

  state, values = take(state, place(batch))
  np.testing.assert_allclose(values['loss'], loss, rtol=1e-5)
  expected = jax.tree.map(lambda w, g: w - 0.5 * g, before.params, gradient)
  for got, want in ((state.params, expected), (state.model_state, batch_stats)):
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-4),
      got,
      want,
    )
  assert int(state.step) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  [
    'vanilla',
    'autoaugment',
    'advprop',
    'conadv',
    'conadv_reuse',
    'conadv_autoaugment',
  ],
)
def test_the_state_stays_where_and_what_it_is(method):
  place, state, take = make_all(method)

  def form(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)

  start = form(state)
  for seed in range(3):
    batch = make_batch(seed, images=methods.METHODS[method].images)
    state, values = take(state, place(batch))
    assert form(state) == start
  branches = {name for name in values if name.startswith('accuracy_')}
  expected = {'accuracy_main'}
  if method not in ('vanilla', 'autoaugment'):
    expected.add('accuracy_adversarial')
  if method == 'conadv_autoaugment':
    expected.add('accuracy_augmented')
  assert branches == expected
  assert 0 <= float(values['accuracy_main']) <= 1


@pytest.mark.slow
def test_conadv_waits_one_step_and_advprop_none():
  """The clean loss of the first step tells which batch was trained on."""
  losses = {}
  for method in ('vanilla', 'advprop', 'conadv'):
    place, state, take = make_all(method)
    _, values = take(state, place(make_batch(0)))
    losses[method] = float(values['loss_main'])
  assert losses['advprop'] == pytest.approx(losses['vanilla'], rel=1e-5)
  assert losses['conadv'] != pytest.approx(losses['vanilla'], rel=1e-2)
  place, state, take = make_all('vanilla')
  _, values = take(state, place(make_batch(100)))
  assert losses['conadv'] == pytest.approx(float(values['loss_main']), rel=1e-5)


BOTH = ('image', 'image_augmented')


def test_autoaugment_is_vanilla_on_the_second_view():
  states = []
  for method in ('vanilla', 'autoaugment'):
    place, state, take = make_all(method)
    for seed in range(2):
      batch = make_batch(seed, images=BOTH)
      view = batch['image_augmented']
      name = 'image' if method == 'vanilla' else 'image_augmented'
      state, _ = take(state, place({name: view, 'label': batch['label']}))
    states.append(state._replace(key=()))
  jax.tree.map(np.testing.assert_array_equal, *states)


@pytest.mark.slow
def test_three_branches_see_their_images_with_norm_layers_of_their_own():
  """Each branch is, as far as it can be seen, a plain step on its images."""
  place, state, take = make_all('conadv_autoaugment')
  # `conadv` trains on the batch before.
  first = make_batch(100, images=BOTH)
  adversarial = np.array(state.conadv_state.queue.adversarial[0])
  state, values = take(state, place(make_batch(0, images=BOTH)))

  pixels = adversarial * [0.2, 0.3] + [0.4, 0.5]
  # Epsilon is 8 of 255 levels.
  difference = np.abs(pixels - first['image'] / 255).max()
  assert 7 / 255 < difference < 8.01 / 255

  for branch, image in (
    ('main', 'image'),
    ('augmented', 'image_augmented'),
  ):
    place, plain_state, plain = make_all('vanilla')
    batch = {'image': first[image], 'label': first['label']}
    plain_state, plain_values = plain(plain_state, place(batch))
    assert float(values[f'loss_{branch}']) == pytest.approx(
      float(plain_values['loss']), rel=1e-5
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      conadv.dual_bn.select(state.model_state, branch),
      plain_state.model_state,
    )
  losses = [
    float(values[f'loss_{branch}'])
    for branch in ('main', 'augmented', 'adversarial')
  ]
  assert float(values['loss']) == pytest.approx(np.mean(losses), rel=1e-5)
  assert len(set(losses)) == 3
  scales = [
    np.array(
      conadv.dual_bn.select(state.params, branch)['BatchNorm_0']['scale']
    )
    for branch in ('main', 'augmented', 'adversarial')
  ]
  for a, b in itertools.combinations(scales, 2):
    assert not np.array_equal(a, b)


@pytest.mark.parametrize('count', [37, 16, 5])
def test_evaluation_counts_every_image_once_on_main_statistics(count):
  place, state, take = make_all()
  for seed in range(3):
    state, _ = take(state, place(make_batch(seed)))
  batch = make_batch(7, count)

  params = conadv.dual_bn.main(state.params)
  batch_stats = conadv.dual_bn.main(state.model_state)
  correct, loss = 0, 0.0
  for image, label in zip(batch['image'], batch['label'], strict=True):
    pixels = (image / 255 - [0.4, 0.5]) / [0.2, 0.3]
    logits = logits_of(params, batch_stats, pixels[None].astype('float32'))
    logits = np.asarray(logits[0], np.float64)
    correct += int(np.argmax(logits) == label)
    loss -= logits[label] - np.log(np.exp(logits).sum())

  # What belongs to the adversarial branch alone must not be looked at.
  spoilt = jax.tree.map(lambda x: x * np.nan, (state.params, state.model_state))
  result = evaluate(
    state._replace(
      params=spoilt[0]._replace(main=params),
      model_state=spoilt[1]._replace(main=batch_stats),
    ),
    batch,
  )
  assert result['held_out_images'] == count
  assert result['held_out_accuracy'] == correct / count
  assert result['held_out_loss'] == pytest.approx(loss / count, rel=1e-4)


def test_padding_is_never_right():
  _, state, _ = made('conadv')
  batch = make_batch(7, 5)
  # A model that always says 0, which is what labels are padded with.
  params = conadv.dual_bn.main(state.params)
  bias = np.array([1e3, 0.0, 0.0], np.float32)
  head = {**params['Dense_1'], 'bias': bias}
  params = {**params, 'Dense_1': head}
  result = evaluate(state._replace(params=params), batch)
  assert result['held_out_accuracy'] == np.mean(batch['label'] == 0)


def test_every_step_draws_anew():
  """The same batch is attacked twice, with the same parameters."""
  place, state, take = make_all()
  copies = []
  for _ in range(2):
    first = copy_of(made('conadv')[1])
    state = state._replace(params=first.params, model_state=first.model_state)
    state, _ = take(state, place(make_batch(0)))
    copies.append(np.array(state.conadv_state.queue.adversarial))
  assert not np.array_equal(*copies)


def test_evaluation_is_split_over_the_devices():
  place, _, _ = made('conadv')
  config = make_config()
  source = sources.Source(
    [],
    list(zip(*make_batch(0, 16).values(), strict=True)),
    tuple('abc'),
  )
  [batch] = input_pipeline.held_out_batches(
    source, config, batch_size=config.batch_size, skipped={}
  )
  for array in place(batch).values():
    assert len(array.sharding.device_set) == DEVICES
    assert array.addressable_shards[0].data.shape[0] == 2


def test_a_batch_that_does_not_divide_is_explained():
  with pytest.raises(ValueError, match=r'Given 12 on 8.*batch_size=1?[68]'):
    parts.make_mesh(12)
  with pytest.raises(ValueError, match=r'batch_size=8`'):
    parts.make_mesh(3)
