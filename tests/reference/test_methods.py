"""The methods of the reference pipeline, against steps by hand."""

import functools
import itertools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from digit_steps import (
  SGD,
  Small,
  arrays,
  assert_close,
  copy_of,
  descend,
  gradient_by_hand,
  make_batch,
  make_mesh,
  normalized,
  start,
  tiny,
)
from jax.flatten_util import ravel_pytree
from meshes import dealt
from run_folders import assert_equal, rows_without_speed, saved

import conadv_optax as conadv
from reference.run import checks, loop, methods, metrics, parts, train, trained

SMALL = {'build': 'digit_steps:Small'}


def towards(params, gradient, distance):
  flat, unravel = ravel_pytree(gradient)
  ahead = unravel(distance * flat / jnp.linalg.norm(flat))
  return jax.tree.map(jnp.add, params, ahead)


@pytest.mark.slow
def test_eight_micro_batches_are_eight_devices():
  """Micro-batch k holds the rows k, k + 8 and so on, device k the k-th part."""
  results = []
  for devices, accumulate in ((8, 1), (1, 8)):
    config = tiny(
      'conadv_extrapolate',
      batch_size=32,
      accumulate=accumulate,
      noise_scale=True,
    )

    def make(*arguments, parts=accumulate):
      return dealt(make_batch(*arguments), parts)

    state, take, place = start(
      config, devices=devices, model=Small(), make=make
    )
    rows = []
    for seed in range(3):
      state, values = take(state, place(make(seed, 32)))
      rows.append(jax.device_get(values))
    # The waiting batches lie in another order, and show in the next steps.
    state = state._replace(conadv_state=state.conadv_state.past)
    results.append((arrays(state), rows))
  assert_close(*results, atol=1e-3)


@pytest.mark.parametrize('parts', [16, 32])
def test_few_micro_batches_on_a_cpu_are_no_loop(parts):
  config = tiny('vanilla', batch_size=32, accumulate=parts)
  grad_fn = methods.make_gradient(Small(), config, make_mesh(1))
  batch = make_batch(0, 32)
  variables = Small().init(jax.random.key(0), normalized(batch), train=False)
  params, stats = variables['params'], variables['batch_stats']
  state = grad_fn.init(params, [], model_state=stats)
  text = (
    jax.jit(grad_fn.value_and_grad)
    .lower(params, state, batch, model_state=stats, key=jax.random.key(0))
    .as_text()
  )
  assert ('stablehlo.while' in text) == (parts > 16)


@functools.cache
def with_lars(method):
  """With four groups of ten images, and the optimizer of a run."""
  config = tiny(
    method,
    batch_size=40,
    accumulate=2,
    **{
      'methods.conadv.adversarial_fraction': 0.25,
      'methods.agvm.anchor': 'Dense_0',
      'methods.agvm.every': 1,
      'lars.peak': 1.0,
      'lars.warmup_epochs': 0.0,
    },
  )
  groups = methods.groups(config, make_mesh(2))
  tx, _, _ = parts.make_optimizer(config, images=1437, groups=groups)
  return start(config, devices=2, model=Small(), tx=tx)


def assert_counts(state, take, place, batch):
  """A model that always says 0 is right on nothing but zeros."""
  zeros = place({**batch, 'label': np.zeros_like(batch['label'])})

  def say_zero(path, x):
    if [key.key for key in path[-2:]] != ['Dense_1', 'bias']:
      return x
    return jax.device_put(np.where(np.arange(10) > 0, x, 1e3), x.sharding)

  # The first step of two may train on the batch that waited.
  for _ in range(2):
    params = jax.tree_util.tree_map_with_path(say_zero, state.params)
    state, values = take(state._replace(params=params), zeros)
  accuracies = [x for name, x in values.items() if name.startswith('accuracy_')]
  assert accuracies
  assert set(map(float, accuracies)) == {1.0}


@pytest.mark.slow
@pytest.mark.parametrize('method', ['fast_advprop', 'agvm', 'conadv_vrgd'])
def test_a_method_learns_its_batch_and_counts_what_is_right(method):
  state, take, place = with_lars(method)
  state = copy_of(state)
  # Eight images again and again, which a few steps learn.
  batch = {
    name: np.resize(x, (40, *x.shape[1:]))
    for name, x in make_batch(0, 8).items()
  }
  form = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
  losses = []
  for _ in range(8):
    state, values = take(state, place(batch))
    assert all(np.isfinite(float(x)) for x in values.values())
    losses.append(float(values['loss_main']))
  assert losses[-1] < 0.9 * losses[1]
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == form
  assert_counts(state, take, place, batch)


@pytest.mark.slow
def test_sam_and_its_kin_take_the_gradient_where_the_papers_say():
  batches = [make_batch(seed) for seed in range(2)]
  started = {
    # A larger rate ahead, so that it shows; and of the sparse one all
    # parameters, so that it is SAM.
    method: start(
      tiny(
        method,
        **{'methods.extrapolate.rate': 0.5, 'methods.ssam.sparsity': 0.0},
      ),
      model=Small(),
    )
    for method in (
      'sam',
      'looksam',
      'ssam',
      'gradient_norm_penalty',
      'extrapolate',
    )
  }
  before = arrays(started['sam'][0])
  params, batch_stats = before.params, before.model_state
  gradient = gradient_by_hand(params, batch_stats, batches[0])
  sharp = gradient_by_hand(
    towards(params, gradient, 0.05), batch_stats, batches[0]
  )
  mixed = jax.tree.map(lambda g, s: 0.2 * g + 0.8 * s, gradient, sharp)
  # There is no past gradient yet.
  expected = {'gradient_norm_penalty': mixed, 'extrapolate': gradient}
  second = {}
  for method, (state, take, place) in started.items():
    state, _ = take(state, place(batches[0]))
    after = arrays(state)
    wanted = descend(params, expected.get(method, sharp))
    assert_close(after.params, wanted, atol=1e-6)
    state, _ = take(state, place(batches[1]))
    second[method] = after, arrays(state).params

  after, found = second['extrapolate']
  ahead = descend(after.params, gradient, 0.5)
  there = gradient_by_hand(ahead, after.model_state, batches[1])
  assert_close(found, descend(after.params, there), atol=1e-6)

  after, found = second['looksam']
  new, unravel = ravel_pytree(
    gradient_by_hand(after.params, after.model_state, batches[1])
  )
  old, kept = ravel_pytree(gradient)[0], ravel_pytree(sharp)[0]
  kept = kept - (kept @ old) / (old @ old) * old
  reused = new + 0.7 * jnp.linalg.norm(new) / jnp.linalg.norm(kept) * kept
  assert_close(found, descend(after.params, unravel(reused)), atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize('method', ['conadv', 'conadv_reuse'])
def test_the_attack_alone_has_labels_of_its_own(method):
  """It steps from the clean image away from the label."""
  config = tiny(
    method,
    **{
      'attack.label_smoothing': 0.9,
      'attack.start_from_clean': 1.0,
      'methods.conadv.targets': 'none',
    },
  )
  state, take, place = start(config, model=Small())
  params, stats = arrays(state).params.main, arrays(state).model_state.main

  @jax.jit
  @jax.value_and_grad
  def loss_of(image, label, smoothing):
    logits, _ = Small().apply(
      {'params': params, 'batch_stats': stats},
      image,
      train=True,
      mutable=['batch_stats'],
    )
    of_all = jax.nn.log_softmax(logits)
    of_label = of_all[np.arange(16), label]
    return -jnp.mean(
      (1 - smoothing) * of_label + smoothing * of_all.mean(axis=1)
    )

  # A reused gradient has the training's.
  smoothing = 0.9 if method == 'conadv' else 0.1

  def checked_copies(batch):
    queue = state.conadv_state.queue
    found = queue.adversarial if method == 'conadv' else queue.batch['image']
    image = normalized(batch)
    _, gradient = loss_of(image, batch['label'], smoothing)
    moved = image + 16 / 255 / 0.376 * np.sign(gradient)
    expected = np.clip(moved, -0.305 / 0.376, 0.695 / 0.376)
    np.testing.assert_allclose(found[0], expected, atol=1e-5)
    return np.array(found[0])

  waiting, batch = make_batch(100), make_batch(0)
  copies = checked_copies(waiting)
  state, values = take(state, place(batch))
  checked_copies(batch)
  # With a reused gradient a clean image does not wait.
  clean = waiting if method == 'conadv' else batch
  for branch, image, label in (
    ('main', normalized(clean), clean['label']),
    ('adversarial', copies, waiting['label']),
  ):
    expected, _ = loss_of(image, label, 0.1)
    np.testing.assert_allclose(values[f'loss_{branch}'], expected, rtol=1e-5)


@pytest.mark.slow
def test_vrgd_and_the_noise_scale_compare_all_groups():
  # Four images a group: of two, BatchNorm makes a gradient of rounding alone.
  config = tiny('vrgd', accumulate=2, noise_scale=True)
  tx = optax.chain(conadv.scale_by_gsnr(), SGD)
  state, take, place = start(config, devices=2, model=Small(), tx=tx)
  before, batch = arrays(state), make_batch(0)
  state, values = take(state, place(batch))
  of_groups = [
    gradient_by_hand(
      before.params,
      before.model_state,
      {name: x[part] for name, x in batch.items()},
    )
    # Of each device two micro-batches, dealt.
    for part in np.arange(16).reshape(2, 4, 2).swapaxes(1, 2).reshape(4, 4)
  ]

  def scaled(*gradients):
    g = np.stack(gradients).astype(np.float64)
    mean, variance = g.mean(0), g.var(0)
    # Where no group has a gradient there is nothing to scale.
    r = np.where(variance > 1e-12, mean**2 / np.maximum(variance, 1e-12), 0)
    r = r / r[variance > 1e-12].mean() if (variance > 1e-12).any() else r
    return mean * np.clip(r, 0.1, 1)

  wanted = descend(before.params, jax.tree.map(scaled, *of_groups))
  assert_close(arrays(state).params, wanted, atol=1e-4)

  flat = np.stack([ravel_pytree(g)[0] for g in of_groups])
  small, large = (flat**2).sum(1).mean(), (flat.mean(0) ** 2).sum()
  noise = (small - large) / (1 / 4 - 1 / 16)
  signal = (16 * large - 4 * small) / (16 - 4)
  np.testing.assert_allclose(values['noise_scale'], noise / signal, rtol=1e-3)
  np.testing.assert_allclose(state.noise_scale.weight, 0.01, rtol=1e-4)
  state, _ = take(state, place(batch))
  np.testing.assert_allclose(state.noise_scale.weight, 0.0199, rtol=1e-4)

  # In a run the ratio comes before LARS.
  tx, schedule, _ = parts.make_optimizer(config, images=1437)
  lars = conadv.lars(schedule, weight_decay=config.lars.weight_decay)
  mean = jax.tree.map(lambda *g: np.float32(np.mean(g, 0)), *of_groups)
  moment = jax.tree.map(
    lambda *g: np.float32(np.mean(np.square(g), 0)), *of_groups
  )
  ratio = jax.tree.map(lambda *g: np.float32(scaled(*g)), *of_groups)
  found, expected = tx.init(before.params), lars.init(before.params)
  for _ in range(2):  # The warm-up begins at 0.
    updates, found = jax.jit(tx.update)(
      mean, found, before.params, second_moment=moment
    )
    wanted, expected = jax.jit(lars.update)(ratio, expected, before.params)
  assert optax.tree.norm(updates) > 0
  assert_close(updates, wanted, atol=1e-4)


@pytest.mark.slow
def test_fast_advprop_weighs_its_passes():
  config = tiny('fast_advprop')
  config.methods.fast_advprop.update(
    {'adversarial_fraction': 0.25, 'attack_weight': 0.3}
  )
  state, take, place = start(config, model=Small())
  _, values = take(state, place(make_batch(0)))
  # Four of sixteen examples are attacked.
  passes = {'attack': 4 * 0.3, 'adversarial': 4 * 0.7, 'main': 12}
  expected = sum(n * values[f'loss_{name}'] for name, n in passes.items()) / 16
  np.testing.assert_allclose(values['loss'], expected, rtol=1e-5)


@pytest.mark.slow
def test_agvm_multiplies_the_updates_of_modules():
  state, take, place = with_lars('agvm')
  state = copy_of(state)
  assert set(state.opt_state.factors) == set(state.params)
  state, _ = take(state, place(make_batch(0, 40)))
  factors = arrays(state).opt_state.factors
  assert factors['Dense_0'] == 1
  assert all(0.97 < x < 1.1 for x in factors.values())
  assert len({float(x) for x in factors.values()}) > 1


@functools.cache
def three_steps(method, **overrides):
  """State and metrics after them, on two devices."""
  config = tiny(
    method,
    accumulate=2,
    **{'methods.diffusion.graph': 'complete'},
    **overrides,
  )
  tx = SGD
  if method == 'diffusion':
    tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
  state, take, place = start(config, devices=2, model=Small(), tx=tx)
  rows = []
  for seed in range(3):
    state, values = take(state, place(make_batch(seed)))
    rows.append(jax.device_get(values))
  return state, rows


@pytest.mark.slow
def test_a_share_is_counted_as_it_is_taken():
  # 0.29 * 100 is 28.999999999999996.
  numbers = {'adversarial_fraction': 0.29}
  config = tiny('conadv', batch_size=200)
  config.methods.conadv.update(numbers)
  assert methods.examples(config, make_mesh(2))['adversarial'] == 2 * 29
  config = tiny('fast_advprop', batch_size=200)
  config.methods.fast_advprop.update(numbers)
  found = methods.examples(config, make_mesh(2))
  assert found == {'attack': 58, 'adversarial': 58, 'main': 142}


def test_agents_that_all_hear_each_other_are_conadv():
  results = []
  for method in ('conadv', 'diffusion'):
    state, rows = three_steps(method)
    model = methods.as_one(tiny(method), (state.params, state.model_state))
    scalars = [(row['loss'], row['accuracy_adversarial']) for row in rows]
    results.append((jax.tree.map(np.array, model), scalars))
  assert_close(*results, atol=1e-4)


@pytest.mark.slow
def test_agents_in_a_ring_train_and_go_on(tmp_path, monkeypatch):
  # The figure takes longer than the steps.
  monkeypatch.setattr(metrics, 'draw', lambda *_: None)
  config = tiny('diffusion', epochs=0.1)
  config.model = SMALL
  config.lars.warmup_epochs = 0.0
  config.run.checkpoint_every = 4
  row = train.train(config, tmp_path)
  read = trained.load(tmp_path)
  # A model of ordinary shapes, which is the one that was evaluated.
  assert read.params['Dense_1']['bias'].shape == (10,)
  again = train.train(config, tmp_path)
  assert again['held_out_loss'] == row['held_out_loss']
  for field in ({'noise_scale': True}, {'queue_memory': 'host'}):
    with pytest.raises(ValueError, match=r'--config\.method=conadv'):
      checks.check_agents(tiny('diffusion', **field))


def test_copies_are_crops_of_the_padded_image():
  config = tiny('batch_augment', **{'data.flip': True})
  mesh = make_mesh(2)
  batch = make_batch(0, 8)
  augment = jax.jit(methods.make_augmentation(config))
  result = augment(jax.random.key(1), parts.make_placement(mesh)(batch))
  image, label = (np.array(result[name]) for name in ('image', 'label'))
  assert (image.dtype, image.shape) == (np.uint8, (32, 8, 8, 1))
  draws = []
  for at in range(32):
    original = at // 4
    assert label[at] == batch['label'][original]
    padded = np.pad(batch['image'][original], ((1, 1), (1, 1), (0, 0)))
    [draw] = [
      (top, left, flip)
      for top, left, flip in itertools.product(range(3), range(3), (1, -1))
      if np.array_equal(
        padded[top : top + 8, left : left + 8][:, ::flip], image[at]
      )
    ]
    draws.append(draw)
  assert draws[:16] != draws[16:]
  assert 4 < sum(flip == -1 for _, _, flip in draws) < 28
  assert {draw[:2] for draw in draws} == set(
    itertools.product(range(3), range(3))
  )


@pytest.mark.slow
def test_each_copy_is_a_group_of_its_own():
  config = tiny('batch_augment', accumulate=2)
  state, take, place = start(config, model=Small())
  before, batch = arrays(state), make_batch(0)
  key, _ = jax.random.split(jax.random.fold_in(state.key, 0))
  augment = jax.jit(methods.make_augmentation(config))
  augmented = jax.tree.map(np.array, augment(key, place(batch)))
  gradients = [
    gradient_by_hand(
      before.params,
      before.model_state,
      # A copy of every other image.
      {name: x[group::8] for name, x in augmented.items()},
    )
    for group in range(8)
  ]
  mean = jax.tree.map(lambda *x: sum(x) / 8, *gradients)
  state, _ = take(state, place(batch))
  assert_close(arrays(state).params, descend(before.params, mean), atol=1e-6)
  assert_counts(state, take, place, batch)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('method', 'overrides'),
  [
    (
      'conadv_extrapolate',
      {
        'accumulate': 2,
        'noise_scale': True,
        'queue_memory': 'host',
        'staleness': 2,
      },
    ),
    # The third step ends an epoch.
    ('absa', {'batch_size': 480, 'methods.absa.patience': 1}),
  ],
)
def test_a_resumed_run_is_the_uninterrupted_one(
  method, overrides, tmp_path, monkeypatch, capsys
):
  config = tiny(method, **overrides)
  config.model = SMALL
  config.update_from_flattened_dict(
    {
      'epochs': 5.5 * config.batch_size / 1437,
      'lars.warmup_epochs': config.batch_size / 1437,
      'run.log_every': 1,
      'run.evaluate_every': 6,
      'run.checkpoint_every': 2,
    }
  )
  kinds, made = [], []

  def spy(config, tx, schedule, grad_fn, state, mesh, make=parts.make_step):
    kinds.append(
      {x.sharding.memory_kind for x in jax.tree.leaves(state.conadv_state)}
    )
    # The same takes the state of both.
    if not made:
      made.append(make(config, tx, schedule, grad_fn, state, mesh))
    return made[0]

  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  monkeypatch.setattr(parts, 'make_step', spy)
  monkeypatch.setattr(metrics, 'draw', lambda *_: None)
  train.train(config, whole)
  # As a kill during step 6 leaves it.
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / 'checkpoints' / '6')
  train.train(config, broken)
  out = capsys.readouterr().out
  assert '4 of 6 steps done' in out
  states = [saved(folder, 6)[0] for folder in (whole, broken)]
  assert_equal(*states)
  rows = rows_without_speed(whole)
  assert rows == rows_without_speed(broken)
  if method == 'absa':
    assert [float(row['micro_batches']) for row in rows] == [1, 1, 1, 2, 2, 2]
    assert int(states[0]['absa']['evaluations']) == 2
  else:
    assert all('pinned_host' in found for found in kinds)
    assert len(kinds) == 2
    assert all(float(row['noise_scale']) >= 0 for row in rows)
    assert 'noise scale' in out


@pytest.mark.slow
def test_a_queue_in_host_memory_changes_nothing():
  results = []
  for overrides, of_images in (
    ({}, {'device'}),
    ({'queue_memory': 'host'}, {'pinned_host'}),
  ):
    state, _ = three_steps('conadv', **overrides)
    queue = state.conadv_state.queue
    kinds = [
      {x.sharding.memory_kind for x in jax.tree.leaves(leaves)}
      for leaves in (
        queue.batch['image'],
        queue.adversarial,
        queue.batch['label'],
      )
    ]
    assert kinds == [of_images, of_images, {'device'}]
    results.append(arrays(state))
  jax.tree.map(np.testing.assert_array_equal, *results)


def test_an_infinite_noise_scale_does_not_stop_a_run(tmp_path):
  values = {'loss': jnp.float32(1), 'noise_scale': jnp.float32(np.inf)}
  read = loop.fetch(values, done=1, workdir=tmp_path)
  assert read == {'loss': 1.0, 'noise_scale': np.inf}
  with pytest.raises(FloatingPointError, match='gradient_norm'):
    loop.fetch(
      {**values, 'gradient_norm': jnp.float32(np.nan)},
      done=1,
      workdir=tmp_path,
    )
  record = metrics.open_record(tmp_path, last_step=0)
  for number in (np.inf, np.nan):
    metrics.add(record, {'step': 1.0, 'epoch': 0.1, 'noise_scale': number})
  metrics.close(record)
  (inf, nan), _ = metrics.read_rows(record.path)
  assert inf['noise_scale'] == np.inf
  assert np.isnan(nan['noise_scale'])
  assert 'noise scale inf' in metrics.describe(inf)


def test_a_batch_that_does_not_divide_is_explained():
  with pytest.raises(ValueError, match=r'Given 20 on 8.*accumulate=2.*=16`'):
    parts.make_mesh(20, accumulate=2)
  with pytest.raises(ValueError, match=r'1 or more\. Given 0.*accumulate=1`'):
    parts.make_mesh(16, accumulate=0)


@pytest.mark.parametrize(
  'config',
  [
    tiny('vrgd'),
    tiny('conadv_vrgd'),
    tiny('agvm'),
    tiny('sam', noise_scale=True),
  ],
)
def test_a_single_group_cannot_be_compared(config):
  with pytest.raises(ValueError, match=r'one device.*--config\.accumulate=8'):
    checks.check_groups(config, make_mesh(1))
  checks.check_groups(config, make_mesh(2))
  config.accumulate = 2
  checks.check_groups(config, make_mesh(1))


def test_copies_of_an_image_are_no_groups_of_a_noise_scale():
  config = tiny('batch_augment', noise_scale=True)
  with pytest.raises(ValueError, match=r'noise_scale.*copies of the same ones'):
    checks.check_groups(config, make_mesh(2))


def test_a_memory_that_does_not_exist():
  with pytest.raises(ValueError, match=r'device, host.*queue_memory=host`'):
    checks.check_choices(tiny('conadv', queue_memory='hosts'))


def test_a_tpu_does_not_leave_micro_batches_on_the_host():
  chip = types.SimpleNamespace(platform='tpu', device_kind='TPU v5 lite')
  mesh = types.SimpleNamespace(devices=np.array([chip]))
  config = tiny('conadv', accumulate=4, queue_memory='host')
  with pytest.raises(ValueError, match=r'=4 on TPU v5 lite.*accumulate=1`'):
    checks.check_queue(config, mesh)
  checks.check_queue(config, make_mesh(1))
  config.accumulate = 1
  checks.check_queue(config, mesh)


@pytest.mark.parametrize('fraction', [0.2, 1.0])
@pytest.mark.parametrize('targets', ['random', 'none'])
def test_fraction_and_targets_reach_the_attack(monkeypatch, fraction, targets):
  attacks, wrapped = [], []

  def pgd(*args, pgd=conadv.pgd, **keywords):
    attacks.append(keywords)
    return pgd(*args, **keywords)

  def wrap(*args, **keywords):
    wrapped.append(keywords)

  monkeypatch.setattr(conadv, 'pgd', pgd)
  monkeypatch.setattr(conadv, 'wrap', wrap)
  config = tiny('conadv')
  config.methods.conadv.adversarial_fraction = fraction
  config.methods.conadv.targets = targets
  model = parts.make_model(config, num_classes=10)
  methods.make_group_gradient(model, config)
  [attack], [arguments] = attacks, wrapped
  assert arguments['adversarial_fraction'] == fraction
  assert (attack['targets'] is None) == (targets == 'none')
