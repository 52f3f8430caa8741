"""The methods of the reference pipeline, against steps by hand."""

import csv
import itertools
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from digit_steps import (
  RATE,
  Small,
  arrays,
  assert_close,
  descend,
  gradient_by_hand,
  make_batch,
  make_mesh,
  start,
  tiny,
)
from jax.flatten_util import ravel_pytree

import conadv_optax as conadv
from reference.run import checks, loop, methods, metrics, train, trained

OLD = (
  'vanilla',
  'autoaugment',
  'advprop',
  'conadv',
  'conadv_reuse',
  'conadv_autoaugment',
)
NEW = tuple(name for name in methods.METHODS if name not in OLD)


def towards(params, gradient, distance):
  flat, unravel = ravel_pytree(gradient)
  ahead = unravel(distance * flat / jnp.linalg.norm(flat))
  return jax.tree.map(jnp.add, params, ahead)


def dealt(x, parts):
  """The rows in turn from each of the parts, which lie one after another."""
  rows = x.reshape(parts, x.shape[0] // parts, *x.shape[1:])
  return rows.swapaxes(0, 1).reshape(x.shape)


@pytest.mark.slow
def test_eight_micro_batches_are_eight_devices():
  """Micro-batch k holds the rows k, k + 8 and so on, device k the k-th part."""
  results = []
  for devices, accumulate in ((8, 1), (1, 8)):
    config = tiny('conadv_extrapolate', accumulate=accumulate, noise_scale=True)

    def make(*arguments, parts=accumulate):
      batch = make_batch(*arguments)
      return {name: dealt(x, parts) for name, x in batch.items()}

    state, take, place = start(config, devices=devices, make=make)
    rows = []
    for seed in range(3):
      state, values = take(state, place(make(seed)))
      rows.append(jax.device_get(values))
    # The waiting batches lie in another order, and show in the next steps.
    state = state._replace(conadv_state=state.conadv_state.past)
    results.append((arrays(state), rows))
  assert_close(*results, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize('method', NEW)
def test_every_new_method_learns_its_batch(method):
  config = tiny(method, accumulate=2, **{'methods.agvm.anchor': 'Dense_0'})
  config.lars.update({'peak': 1.0, 'warmup_epochs': 0.0})
  tx, _, _ = train.make_optimizer(config, images=1437, groups=2)
  state, take, place = start(config, model=Small(), tx=tx)
  form = jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state)
  losses = []
  for _ in range(8):
    state, values = take(state, place(make_batch(0)))
    assert all(np.isfinite(float(x)) for x in values.values())
    losses.append(float(values['loss_main']))
  assert losses[-1] < 0.95 * losses[1]
  assert jax.tree.map(lambda x: (x.shape, x.dtype, x.sharding), state) == form


@pytest.mark.slow
def test_sam_and_its_kin_take_the_gradient_where_the_papers_say():
  batches = [make_batch(seed) for seed in range(2)]
  state, take, place = start(tiny('vanilla'), model=Small())
  params, batch_stats = arrays(state).params, arrays(state).model_state
  gradient = gradient_by_hand(params, batch_stats, batches[0])
  sharp = gradient_by_hand(
    towards(params, gradient, 0.05), batch_stats, batches[0]
  )
  mixed = jax.tree.map(lambda g, s: 0.2 * g + 0.8 * s, gradient, sharp)
  expected = {
    'vanilla': descend(params, gradient),
    'sam': descend(params, sharp),
    'looksam': descend(params, sharp),
    # All of the parameters, so that it is SAM.
    'ssam': descend(params, sharp),
    'gradient_norm_penalty': descend(params, mixed),
    # There is no past gradient yet.
    'extrapolate': descend(params, gradient),
  }
  second = {}
  for method, wanted in expected.items():
    # A larger rate ahead, so that it shows.
    config = tiny(
      method,
      **{'methods.extrapolate.rate': 0.5, 'methods.ssam.sparsity': 0.0},
    )
    state, take, place = start(config, model=Small())
    state, _ = take(state, place(batches[0]))
    after = arrays(state)
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
  batch, waiting, smoothings = make_batch(0), make_batch(1), (0.0, 0.9)
  pixels = (waiting['image'] / 255 - 0.305) / 0.376
  first, after = [], []

  def copies_of(queue):
    return queue.adversarial if method == 'conadv' else queue.batch['image']

  for smoothing in smoothings:
    config = tiny(
      method,
      **{
        'attack.label_smoothing': smoothing,
        'attack.start_from_clean': 1.0,
        'methods.conadv.targets': 'none',
      },
    )
    state, take, place = start(config, model=Small())
    queue = state.conadv_state.queue
    first.append(np.array(copies_of(queue)))
    trained, old = arrays(state).params.main, arrays(state).model_state.main
    # Both train on the same copy, whatever their attack made of the first.
    copy = {'image': pixels.astype('float32'), 'label': waiting['label']}
    if method == 'conadv':
      copy = queue.adversarial.at[0].set(copy['image'])
      queue = queue._replace(adversarial=copy)
    else:
      queue = queue._replace(batch=jax.tree.map(lambda x: x[None], place(copy)))
    state, values = take(
      state._replace(conadv_state=state.conadv_state._replace(queue=queue)),
      place(batch),
    )
    copies = np.array(copies_of(state.conadv_state.queue)[0])
    values, state = jax.device_get(values), arrays(state)
    after.append((values, state.params, state.model_state, copies))

  def loss(image, smoothing):
    logits, _ = Small().apply(
      {'params': trained, 'batch_stats': old},
      image,
      train=True,
      mutable=['batch_stats'],
    )
    of_all = jax.nn.log_softmax(logits)
    of_label = of_all[np.arange(16), batch['label']]
    return -jnp.mean(
      (1 - smoothing) * of_label + smoothing * of_all.mean(axis=1)
    )

  image = ((batch['image'] / 255 - 0.305) / 0.376).astype(np.float32)
  expected = []
  for smoothing in smoothings if method == 'conadv' else (0.1, 0.1):
    moved = image + 16 / 255 / 0.376 * np.sign(jax.grad(loss)(image, smoothing))
    expected.append(np.clip(moved, -0.305 / 0.376, 0.695 / 0.376))
  for (*_, copies), by_hand in zip(after, expected, strict=True):
    np.testing.assert_allclose(copies, by_hand, atol=1e-5)
  assert np.array_equal(*expected) == (method == 'conadv_reuse')
  assert np.array_equal(*first) == (method == 'conadv_reuse')
  jax.tree.map(np.testing.assert_array_equal, after[0][:3], after[1][:3])


@pytest.mark.slow
def test_vrgd_and_the_noise_scale_compare_all_groups():
  # Four images a group: of two, BatchNorm makes a gradient of rounding alone.
  config = tiny('vrgd', accumulate=2, noise_scale=True)
  tx = optax.chain(conadv.scale_by_gsnr(), optax.sgd(RATE))
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

  tx, _, _ = train.make_optimizer(config, images=1437)
  assert len(tx.init(before.params)) == 2


@pytest.mark.slow
def test_agvm_multiplies_the_updates_of_modules():
  numbers = {'methods.agvm.anchor': 'Dense_0', 'methods.agvm.every': 1}
  config = tiny('agvm', accumulate=2, **numbers)
  tx, _, _ = train.make_optimizer(config, images=1437, groups=4)
  state, take, place = start(config, devices=2, model=Small(), tx=tx)
  before = arrays(state)
  assert set(before.opt_state.factors) == set(before.params)
  state, _ = take(state, place(make_batch(0)))
  factors = arrays(state).opt_state.factors
  assert factors['Dense_0'] == 1
  assert all(0.97 < x < 1.1 for x in factors.values())
  assert len({float(x) for x in factors.values()}) > 1


@pytest.mark.slow
def test_agents_that_all_hear_each_other_are_conadv():
  results = []
  for method in ('conadv', 'diffusion'):
    numbers = {'methods.diffusion.graph': 'complete'}
    config = tiny(method, **numbers)
    tx = optax.sgd(RATE)
    if method == 'diffusion':
      tx = optax.GradientTransformation(jax.vmap(tx.init), jax.vmap(tx.update))
    state, take, place = start(config, devices=4, model=Small(), tx=tx)
    rows = []
    for seed in range(3):
      state, values = take(state, place(make_batch(seed)))
      rows.append(jax.device_get(values))
    model = methods.as_one(config, (state.params, state.model_state))
    losses = [row['loss'] for row in rows]
    results.append((jax.tree.map(np.array, model), losses))
  assert_close(*results, atol=1e-4)


@pytest.mark.slow
def test_agents_in_a_ring_train_and_go_on(tmp_path):
  config = tiny('diffusion', epochs=0.1)
  config.lars.warmup_epochs = 0.0
  config.run.checkpoint_every = 4
  row = train.train(config, tmp_path)
  read = trained.load(tmp_path)
  # A model of ordinary shapes, which is the one that was evaluated.
  assert read.params['head']['bias'].shape == (10,)
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
  result = augment(jax.random.key(1), train.make_placement(mesh)(batch))
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
  config = tiny('batch_augment')
  state, take, place = start(config, model=Small())
  before, batch = arrays(state), make_batch(0)
  key, _ = jax.random.split(jax.random.fold_in(state.key, 0))
  augment = jax.jit(methods.make_augmentation(config))
  augmented = jax.tree.map(
    lambda x: np.array(x).reshape(16, 4, *x.shape[1:]).swapaxes(0, 1),
    augment(key, place(batch)),
  )
  gradients = [
    gradient_by_hand(
      before.params,
      before.model_state,
      {name: x[copy] for name, x in augmented.items()},
    )
    for copy in range(4)
  ]
  mean = jax.tree.map(lambda *x: sum(x) / 4, *gradients)
  state, _ = take(state, place(batch))
  assert_close(arrays(state).params, descend(before.params, mean), atol=1e-6)


@pytest.mark.slow
def test_accuracies_count_what_each_branch_was_trained_on():
  """A model that always says 0, on nothing but zeros."""
  for method, overrides in (
    ('fast_advprop', {}),
    ('batch_augment', {}),
    ('advprop', {'methods.conadv.adversarial_fraction': 0.25}),
  ):
    config = tiny(method, batch_size=40, **overrides)
    state, take, place = start(config, devices=4, model=Small(), rate=0.0)
    params = jax.tree.map(jnp.copy, state.params)
    bias = conadv.dual_bn.main(params)['Dense_1']['bias']
    params = jax.tree.map(
      lambda x, bias=bias: x.at[0].set(1e3) if x.shape == bias.shape else x,
      params,
    )
    batch = make_batch(0, 40)
    zeros = place({**batch, 'label': np.zeros_like(batch['label'])})
    _, values = take(state._replace(params=params), zeros)
    accuracies = {
      name: float(x)
      for name, x in values.items()
      if name.startswith('accuracy_')
    }
    assert set(accuracies.values()) == {1.0}, (method, accuracies)
  assert methods.examples(
    tiny('fast_advprop', batch_size=40), make_mesh(4)
  ) == {
    'attack': 8,
    'adversarial': 8,
    'main': 32,
  }


def read_rows(workdir):
  with (workdir / 'metrics.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  for row in rows:
    del row['images_per_second']
  return rows


def final_state(workdir, number):
  with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
    state = manager.restore(
      number, args=ocp.args.Composite(state=ocp.args.StandardRestore())
    ).state
  state['key'] = jax.random.key_data(state['key'])
  return state


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
  config.update_from_flattened_dict(
    {
      'epochs': 5.5 * config.batch_size / 1437,
      'lars.warmup_epochs': config.batch_size / 1437,
      'run.log_every': 1,
      'run.evaluate_every': 6,
      'run.checkpoint_every': 2,
    }
  )
  kinds = []

  def spy(config, tx, schedule, grad_fn, state, mesh, make=train.make_step):
    kinds.append(
      {x.sharding.memory_kind for x in jax.tree.leaves(state.conadv_state)}
    )
    return make(config, tx, schedule, grad_fn, state, mesh)

  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  monkeypatch.setattr(train, 'make_step', spy)
  train.train(config, whole)
  # As a kill during step 6 leaves it.
  shutil.copytree(whole, broken)
  shutil.rmtree(broken / 'checkpoints' / '6')
  train.train(config, broken)
  out = capsys.readouterr().out
  assert '4 of 6 steps done' in out
  states = [final_state(folder, 6) for folder in (whole, broken)]
  jax.tree.map(np.testing.assert_array_equal, *states)
  rows = read_rows(whole)
  assert rows == read_rows(broken)
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
  for memory in ('device', 'host'):
    config = tiny('conadv', accumulate=2, queue_memory=memory)
    state, take, place = start(config, devices=2, model=Small())
    for seed in range(3):
      state, _ = take(state, place(make_batch(seed)))
      kinds = {
        name: {x.sharding.memory_kind for x in jax.tree.leaves(leaves)}
        for name, leaves in {
          'image': state.conadv_state.queue.batch['image'],
          'label': state.conadv_state.queue.batch['label'],
          'adversarial': state.conadv_state.queue.adversarial,
        }.items()
      }
      of_images = {'pinned_host' if memory == 'host' else 'device'}
      assert kinds == {
        'image': of_images,
        'label': {'device'},
        'adversarial': of_images,
      }
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
    train.make_mesh(20, accumulate=2)
  with pytest.raises(ValueError, match=r'1 or more\. Given 0.*accumulate=1`'):
    train.make_mesh(16, accumulate=0)


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
  model = train.make_model(config, num_classes=10)
  methods.make_group_gradient(model, config)
  [attack], [arguments] = attacks, wrapped
  assert arguments['adversarial_fraction'] == fraction
  assert (attack['targets'] is None) == (targets == 'none')
