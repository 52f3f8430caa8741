"""Attack and training on devices of their own, against `data_parallel`."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import init_model, loss_fn, make_batch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from meshes import make_mesh

import conadv_optax as conadv

CLOSE = {'rtol': 2e-5, 'atol': 5e-6}
RANDOM = conadv.pgd(0.1, start_from_clean=0.3, targets=conadv.random_targets(3))


def noisy_loss(params, model_state, batch, *, key):
  """Draws, and returns one value an example, a mean and a count."""
  noise = 0.1 * jax.random.normal(key, batch['image'].shape)
  batch = {**batch, 'image': batch['image'] + noise}
  loss, model_state = loss_fn(params, model_state, batch)
  aux = {
    'each': batch['image'][:, 0],
    'mean': jnp.mean(noise),
    'count': jnp.sum(batch['label']),
  }
  return loss, (model_state, aux)


def make_grad_fn(tau, **kwargs):
  kwargs = {'attack': RANDOM, 'has_state': True, **kwargs}
  return conadv.wrap(kwargs.pop('loss_fn', loss_fn), tau, **kwargs)


def run(grad_fn, batches, mesh, branches=('adversarial',)):
  """Gradient descent; what every step returns, and the last state."""
  params, model_state = jax.device_put(
    conadv.dual_bn.split(*init_model(), branches=branches),
    NamedSharding(mesh, P()),
  )
  tau, key = grad_fn.staleness, jax.random.key(5)
  state = jax.jit(grad_fn.init)(
    params, batches[:tau], model_state=model_state, key=key
  )

  @jax.jit
  def step(params, state, batch, model_state, t):
    (loss, aux), grads, state = grad_fn.value_and_grad(
      params,
      state,
      batch,
      model_state=model_state,
      key=jax.random.fold_in(key, t),
    )
    params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grads)
    return (loss, aux, grads), params, state

  rows = []
  for t, batch in enumerate(batches[tau:]):
    row, params, state = step(params, state, batch, model_state, t)
    model_state = row[1].model_state
    rows.append(row)
  return jax.device_get((rows, params)), state


def of_trainers(state, rows, roles, attackers):
  """The queue without the padding of the attackers."""

  def cut(x):
    x = np.asarray(x)
    parts = x.reshape(x.shape[0], rows, roles, -1, *x.shape[2:])
    return parts[:, :, : roles - attackers].reshape(
      x.shape[0], -1, *x.shape[2:]
    )

  return jax.tree.map(cut, state.queue)


def assert_same_as_data_parallel(layout, grad_fn, batches, **kwargs):
  rows, roles, attackers = layout
  trainers = rows * (roles - attackers)
  single = jax.make_mesh(
    (trainers,),
    ('data',),
    axis_types=(AxisType.Auto,),
    devices=jax.devices()[:trainers],
  )
  apart = conadv.concurrent(
    grad_fn, make_mesh(rows, roles), attackers=attackers
  )
  assert apart.staleness == grad_fn.staleness
  got, state = run(apart, batches, make_mesh(rows, roles), **kwargs)
  expected, parallel_state = run(
    conadv.data_parallel(grad_fn, single), batches, single, **kwargs
  )
  chex.assert_trees_all_close(got, expected, **CLOSE)
  chex.assert_trees_all_equal(state.slot, jax.device_get(parallel_state.slot))
  chex.assert_trees_all_close(
    of_trainers(state, *layout), jax.device_get(parallel_state.queue), **CLOSE
  )


# A layout is the rows, the devices in a row, and the attackers among them.
@pytest.mark.slow
def test_is_data_parallel_over_the_trainers():
  batches = [make_batch(t, size=12) for t in range(7)]
  assert_same_as_data_parallel((1, 5, 2), make_grad_fn(3), batches)


@pytest.mark.slow
def test_is_data_parallel_with_all_that_wrap_can_do():
  batches = [make_batch(t, size=24) for t in range(6)]
  for t, batch in enumerate(batches):
    batch['view'] = make_batch(10 + t, size=24)['image']
  grad_fn = make_grad_fn(
    2,
    loss_fn=noisy_loss,
    adversarial_fraction=0.5,
    extra_branches={'augmented': 'view'},
    weights={'main': 0.5, 'adversarial': 0.3, 'augmented': 0.2},
    has_aux=True,
    has_key=True,
  )
  assert_same_as_data_parallel(
    (2, 4, 2), grad_fn, batches, branches=('adversarial', 'augmented')
  )


@functools.cache
def compiled_step(mesh, batch_spec, attackers=1):
  """The program of one step without draws, and what it returns."""
  grad_fn = conadv.concurrent(
    make_grad_fn(1, attack=conadv.fgsm(0.1)), mesh, attackers=attackers
  )
  params, model_state = jax.device_put(
    conadv.dual_bn.split(*init_model()), NamedSharding(mesh, P())
  )
  batches = jax.device_put(
    [make_batch(t, size=24) for t in range(2)], NamedSharding(mesh, batch_spec)
  )
  state = jax.jit(grad_fn.init)(params, batches[:1], model_state=model_state)
  args = params, state, batches[1]
  lowered = jax.jit(grad_fn.value_and_grad).lower(
    *args, model_state=model_state
  )
  return lowered.compile().as_text(), lowered.out_info


def sent_bytes(program):
  """Bytes of every collective by its name; of point to point, of each pair."""
  total = {}
  for line in program.splitlines():
    found = re.search(
      r'= (.*?) (all-\w+|collective-\w+|reduce-scatter)(-start)?\(', line
    )
    if found:
      shapes = re.findall(r'(\w)(\d+)\[([\d,]*)\]', found[1])
      size = sum(
        int(bits) // 8 * np.prod([int(n) for n in dims.split(',') if n])
        for _, bits, dims in shapes
      )
      pairs = re.search(r'source_target_pairs=\{(\{.*?\})\}', line)
      count = pairs[1].count('{') if pairs else 1
      total[found[2]] = total.get(found[2], 0) + int(size) * count
  return total


def num_bytes(tree):
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.mark.parametrize(('rows', 'roles', 'attackers'), [(2, 4, 1), (1, 5, 2)])
def test_no_byte_travels_that_need_not(rows, roles, attackers):
  mesh = make_mesh(rows, roles)
  program, output = compiled_step(mesh, P('data'), attackers)
  (loss, aux), grads, _ = output
  assert sent_bytes(program) == {
    'all-reduce': num_bytes((loss, aux.losses, aux.model_state, grads)),
    'collective-permute': num_bytes(make_batch(0, size=24)['image']),
  }


def test_a_batch_spread_over_the_roles_has_to_travel():
  # So the test above can tell.
  program, _ = compiled_step(make_mesh(2, 4), P(('data', 'role')))
  assert sent_bytes(program)['all-gather'] > 0


def branches_of(program):
  """The lines of each branch of the program's one conditional, and the rest.

  A computation belongs to the branch that calls it.
  """
  computations, name = {}, None
  for line in program.splitlines():
    if line.endswith('{') and not line.startswith(' '):
      name = re.match(r'(?:ENTRY )?%(\S+)', line)
      name = name and name[1]
    elif name:
      computations.setdefault(name, []).append(line)

  def with_callees(name):
    lines = list(computations[name])
    for line in computations[name]:
      for callee in re.findall(r'%([\w.-]+)', line):
        if callee in computations:
          lines += with_callees(callee)
    return lines

  (conditional,) = re.findall(r' conditional\(.*', program)
  names = re.search(r'branch_computations=\{(.*?)\}', conditional)
  names = (
    names[1].split(', ')
    if names
    else re.findall(r'(?:false|true)_computation=(%[\w.-]+)', conditional)[::-1]
  )
  return [with_callees(name.lstrip('%')) for name in names]


def dots(lines):
  found = (re.search(r'= f32\[([\d,]+)\]\S* dot\(', line) for line in lines)
  return sorted(match[1] for match in found if match)


def test_each_role_runs_its_own_branch_of_the_program():
  program, _ = compiled_step(make_mesh(1, 5), P('data'), 2)
  attack, train = branches_of(program)
  # A share is 8 examples of 5 features, with 8 hidden units and 3 classes. The
  # attack: forward, and backward to the hidden units and the inputs.
  assert dots(attack) == sorted(['8,8', '8,3', '8,8', '8,5'])
  # Two branches: forward, backward to the hidden units, and both weights'.
  assert dots(train) == sorted(2 * ['8,8', '8,3', '8,8', '5,8', '8,3'])
  assert len(dots(program.splitlines())) == len(dots(attack) + dots(train))
  assert not sent_bytes('\n'.join(attack + train))


def test_attackers_alone_attack_and_trainers_alone_train():
  seen = {'attack': set(), 'train': set()}

  def record(what):
    def note(data, role):
      seen[what].add((int(data), int(role)))

    jax.debug.callback(
      note, jax.lax.axis_index('data'), jax.lax.axis_index('role')
    )

  @jax.custom_vjp
  def weight(w):
    return w

  def backward(_, gradient):
    record('train')
    return (gradient,)

  weight.defvjp(lambda w: (w, None), backward)

  def craft(key, gradient_fn, inputs):
    record('attack')
    return inputs + gradient_fn(inputs)

  grad_fn = conadv.concurrent(
    conadv.wrap(
      lambda w, batch: jnp.mean(weight(w) * batch['x']),
      attack=conadv.Attack(craft, draws=False),
      inputs='x',
    ),
    make_mesh(2, 4),
  )
  batch, w = {'x': jnp.ones(12)}, jnp.ones([])
  state = jax.jit(grad_fn.init)(w, [batch])
  jax.effects_barrier()
  seen['attack'].clear()
  jax.block_until_ready(jax.jit(grad_fn.value_and_grad)(w, state, batch))
  jax.effects_barrier()
  assert seen == {
    'attack': {(0, 3), (1, 3)},
    'train': {(row, role) for row in range(2) for role in range(3)},
  }


@pytest.mark.parametrize(
  ('shape', 'axis_type', 'jit'),
  [
    ((1, 3), AxisType.Auto, jax.jit),
    ((1, 3), AxisType.Explicit, lambda fn: fn),
    ((2, 2), AxisType.Explicit, jax.jit),
    ((2, 2), AxisType.Auto, lambda fn: fn),
  ],
)
def test_runs_on_any_mesh_with_and_without_jit(shape, axis_type, jit):
  axes = {'data_axis': 'rows', 'role_axis': 'place'}
  mesh = make_mesh(*shape, names=tuple(axes.values()), kind=axis_type)
  grad_fn = conadv.concurrent(
    conadv.wrap(
      lambda w, batch: jnp.mean((w * batch['x']) ** 2),
      attack=conadv.fgsm(0.5),
      inputs='x',
    ),
    mesh,
    **axes,
  )
  w = jax.device_put(jnp.float32(2.0), NamedSharding(mesh, P()))
  batch = {'x': jnp.arange(4.0)}
  state = jit(grad_fn.init)(w, [batch])
  (_, aux), grad, _ = jit(grad_fn.value_and_grad)(w, state, batch)
  # The gradient at 0 is 0, and so is the step.
  squares = {'main': 14 / 4, 'adversarial': (1.5**2 + 2.5**2 + 3.5**2) / 4}
  chex.assert_trees_all_close(
    aux.losses, jax.tree.map(lambda x: 4 * x, squares), rtol=1e-6
  )
  chex.assert_trees_all_close(grad, 2 * sum(squares.values()), rtol=1e-6)


def test_the_mean_is_taken_in_float32():
  # The sum of the three trainers is beyond float16.
  grad_fn = conadv.concurrent(
    conadv.wrap(
      lambda w, x: jnp.mean(w * x), attack=conadv.fgsm(0.0), inputs=()
    ),
    make_mesh(1, 4),
  )
  w, x = jnp.ones([], jnp.float16), jnp.full(3, 3e4, jnp.float16)
  _, grads, _ = jax.jit(grad_fn.value_and_grad)(
    w, jax.jit(grad_fn.init)(w, [x]), x
  )
  chex.assert_type(grads, jnp.float16)
  np.testing.assert_allclose(grads, 3e4, rtol=1e-3)


def test_counters_and_keys_in_the_model_state_are_those_of_a_trainer():
  def counting(w, model_state, batch):
    model_state = {
      'calls': model_state['calls'] + 1,
      'is_warm': jnp.array(True),
      'key': jax.random.fold_in(model_state['key'], 1),
    }
    return jnp.mean(w * batch['x']), model_state

  grad_fn = conadv.concurrent(
    conadv.wrap(counting, attack=conadv.fgsm(0.0), inputs='x', has_state=True),
    make_mesh(2, 2),
  )
  key = jax.random.key(4)
  model_state = {
    'calls': jnp.int32(3),
    'is_warm': jnp.array(False),
    'key': key,
  }
  w, batch = jnp.ones([]), {'x': jnp.ones(4)}
  state = grad_fn.init(w, [batch], model_state=model_state)
  (_, aux), _, _ = jax.jit(grad_fn.value_and_grad)(
    w, state, batch, model_state=model_state
  )
  assert int(aux.model_state['calls']) == 4
  assert bool(aux.model_state['is_warm'])
  chex.assert_trees_all_equal(
    jax.random.key_data(aux.model_state['key']),
    jax.random.key_data(jax.random.fold_in(key, 1)),
  )


def test_few_channels_do_not_leave_a_branch_as_the_last_axis():
  """A TPU would pad them to 128; the trainers still get them as they were."""

  def loss_fn(w, batch):
    return jnp.mean(jnp.einsum('bhwc,hwc->b', batch['image'], w) ** 2)

  grad_fn = conadv.wrap(loss_fn, attack=conadv.fgsm(0.1))
  team = conadv.concurrent(grad_fn, make_mesh(1, 4))
  line = conadv.data_parallel(
    grad_fn, jax.make_mesh((3,), ('data',), devices=jax.devices()[:3])
  )
  rng = np.random.default_rng(0)
  w = jnp.asarray(rng.normal(size=(6, 7, 3)), jnp.float32)
  batches = [
    {'image': jnp.asarray(rng.normal(size=(12, 6, 7, 3)), jnp.float32)}
    for _ in range(3)
  ]
  steps = [jax.jit(fn.value_and_grad) for fn in (team, line)]
  states = [jax.jit(fn.init)(w, batches[:1]) for fn in (team, line)]
  for batch in batches[1:]:
    outputs = [
      step(w, state, batch) for step, state in zip(steps, states, strict=True)
    ]
    states = [state for *_, state in outputs]
    chex.assert_trees_all_close(outputs[0][:2], outputs[1][:2], **CLOSE)

  program = str(jax.make_jaxpr(team.value_and_grad)(w, states[0], batches[0]))
  (conditional,) = re.findall(r'([^\n]*) = cond\[', program)
  # Three turns of a trainer's four images.
  assert 'f32[3,4,3,6,7]' in conditional
