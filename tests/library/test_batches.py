"""Batches in every container give what the same arrays in a dict give."""

import dataclasses
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import conadv_optax as conadv


class Batch(NamedTuple):
  image: Any
  label: Any


@chex.dataclass
class ChexBatch:
  image: Any
  label: Any


class FlaxBatch(flax.struct.PyTreeNode):
  image: Any
  label: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class PlainBatch:
  image: Any
  label: Any


class Container(NamedTuple):
  """How a batch is built, taken apart, and its inputs named."""

  pack: Callable[[Any, Any], Any]
  unpack: Callable[[Any], tuple[Any, Any]]
  inputs: Any


def fields(batch):
  return batch.image, batch.label


CONTAINERS = {
  'nested dict': Container(
    lambda x, y: {'views': {'image': x, 'label': x}, 'label': {'image': y}},
    lambda b: (b['views']['image'], b['label']['image']),
    ('views', 'image'),
  ),
  'tuple': Container(lambda x, y: (y, x), lambda b: (b[1], b[0]), 1),
  'list': Container(lambda x, y: [x, y], tuple, 0),
  'tuple in a dict': Container(
    lambda x, y: {'data': (x, y), 'mask': y > 0},
    lambda b: b['data'],
    ('data', 0),
  ),
  'NamedTuple': Container(Batch, fields, 'image'),
  'chex.dataclass': Container(
    lambda x, y: ChexBatch(image=x, label=y), fields, 'image'
  ),
  'flax.struct': Container(FlaxBatch, fields, 'image'),
  'dataclass': Container(PlainBatch, fields, 'image'),
  'dataclass in a dict': Container(
    lambda x, y: {'train': PlainBatch(x, y), 'id': np.arange(len(y))},
    lambda b: fields(b['train']),
    ('train', 'image'),
  ),
  'get and set': Container(
    lambda x, y: {'image': x, 'label': y},
    lambda b: (b['image'], b['label']),
    (lambda b: b['image'], lambda b, x: {**b, 'image': x}),
  ),
  'get and set of a dataclass': Container(
    PlainBatch,
    fields,
    (lambda b: b.image, lambda b, x: dataclasses.replace(b, image=x)),
  ),
}

FORMS = {
  'staleness-0': {'staleness': 0},
  'staleness-2': {'staleness': 2, 'adversarial_fraction': 0.5},
  'reuse': {'reuse_gradient': True, 'adversarial_fraction': 0.5},
}


def loss_of(params, image, label):
  logits = image @ params['w'] + params['b'][None]
  picked = jnp.take_along_axis(jax.nn.log_softmax(logits), label[:, None], 1)
  return -jnp.mean(picked)


def arrays(seed):
  """NumPy arrays, as a data loader gives them."""
  rng = np.random.default_rng(seed)
  image = rng.normal(size=(6, 4)).astype(np.float32)
  return image, rng.integers(3, size=6).astype(np.int32)


def train(container, params, arrays, **form):
  """Two steps; everything that a step returns, and the batches that wait."""
  batches = [container.pack(*pair) for pair in arrays]

  def loss_fn(params, batch):
    assert jax.tree.structure(batch) == jax.tree.structure(batches[0]), (
      'The loss sees the container of the user.'
    )
    return loss_of(params, *container.unpack(batch))

  grad_fn = conadv.wrap(
    loss_fn, attack=conadv.fgsm(0.2), inputs=container.inputs, **form
  )
  tau, rows = grad_fn.staleness, []
  state = grad_fn.init(params, batches[:tau])
  for batch in batches[tau : tau + 2]:
    (loss, aux), grads, state = grad_fn.value_and_grad(params, state, batch)
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    rows.append((loss, aux.losses, grads))
  if not state.queue:
    return rows, ()
  wait = container.unpack(state.queue.batch)
  return rows, (wait, state.queue.adversarial)


@pytest.mark.slow
@pytest.mark.parametrize('form', FORMS)
def test_container_makes_no_difference(form):
  plain = Container(
    lambda x, y: {'image': x, 'label': y},
    lambda b: (b['image'], b['label']),
    'image',
  )

  # How a container is read and written does not depend on the form.
  containers = list(CONTAINERS.values())[:: 1 if form == 'staleness-2' else 3]

  @jax.jit
  def every(params, arrays):
    return [
      train(container, params, arrays, **FORMS[form])
      for container in (plain, *containers)
    ]

  params = {
    'b': np.zeros(3, np.float32),
    'w': np.random.default_rng(9).normal(size=(4, 3)).astype(np.float32),
  }
  (expected, expected_queue), *others = every(
    params, [arrays(seed) for seed in range(4)]
  )
  for rows, queue in others:
    chex.assert_trees_all_close(rows, expected, rtol=1e-5)
    chex.assert_trees_all_close(queue, expected_queue, rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(queue, expected_queue)
  for _, losses, _ in expected:
    assert losses['adversarial'] != losses['main']


@pytest.mark.parametrize('form', FORMS)
def test_bare_array_is_a_batch(form):
  def loss_of_array(w, x):
    return jnp.mean(jnp.tanh(x @ w) ** 2)

  bare = conadv.wrap(
    loss_of_array, attack=conadv.fgsm(0.2), inputs=(), **FORMS[form]
  )
  boxed = conadv.wrap(
    lambda w, batch: loss_of_array(w, batch['x']),
    attack=conadv.fgsm(0.2),
    inputs='x',
    **FORMS[form],
  )

  @functools.partial(jax.jit, static_argnums=0)
  def two_steps(grad_fn, w, batches):
    tau, outputs = grad_fn.staleness, []
    state = grad_fn.init(w, batches[:tau])
    for batch in batches[tau : tau + 2]:
      (loss, aux), grads, state = grad_fn.value_and_grad(w, state, batch)
      outputs.append((loss, aux.losses, grads))
    return outputs, state

  w = np.arange(4, dtype=np.float32)
  xs = [arrays(seed)[0] for seed in range(4)]
  outputs, state = two_steps(bare, w, xs)
  boxed_outputs, _ = two_steps(boxed, w, [{'x': x} for x in xs])
  chex.assert_trees_all_close(outputs, boxed_outputs)
  for _, losses, _ in outputs:
    assert losses['adversarial'] != losses['main']
  if bare.staleness:
    assert state.queue.batch.ndim == 3


CONVERTED = {
  'attack pass': {
    'attack': conadv.pgd(0.3),
    'extra_branches': {'flipped': 'flipped'},
  },
  'reused gradient': {'attack': conadv.fgsm(0.3), 'reuse_gradient': True},
  'fraction': {'attack': conadv.fgsm(0.3), 'adversarial_fraction': 0.5},
}


@pytest.mark.slow
@pytest.mark.parametrize('name', CONVERTED)
def test_get_can_convert_and_clean_batches_wait_as_they_are(name):
  """The same as floats from the start, in a queue of fewer bytes."""

  def to_float(pixels):
    is_raw = pixels.dtype == jnp.uint8
    return pixels.astype(jnp.float32) / 255 - 0.5 if is_raw else pixels

  def loss_fn(w, batch):
    return jnp.mean((to_float(batch['image']) @ w - batch['label']) ** 2)

  pixels = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
  raw = [
    {'image': x, 'flipped': y, 'label': np.ones(4, np.float32)}
    for x, y in zip(*pixels, strict=True)
  ]
  floats = [
    {
      key: np.float32(x) / 255 - np.float32(0.5) if key != 'label' else x
      for key, x in batch.items()
    }
    for batch in raw
  ]

  @functools.partial(jax.jit, static_argnums=1)
  def run(batches, inputs):
    grad_fn = conadv.wrap(loss_fn, 2, inputs=inputs, **CONVERTED[name])
    w, key = jnp.array([0.5, -1.0, 2.0]), jax.random.key(0)
    state = grad_fn.init(w, batches[:2], key=key)
    outputs = []
    for number, batch in enumerate(batches[2:]):
      step_key = jax.random.fold_in(key, number)
      (loss, aux), grads, state = grad_fn.value_and_grad(
        w, state, batch, key=step_key
      )
      outputs.append((loss, aux.losses, grads))
      w -= 0.1 * grads
    return outputs, state.queue

  pair = (
    lambda batch: to_float(batch['image']),
    lambda batch, image: {**batch, 'image': image},
  )
  outputs, queue = run(raw, pair)
  expected, float_queue = run(floats, 'image')
  chex.assert_trees_all_close(outputs, expected, rtol=1e-5, atol=1e-6)
  kind = jnp.float32 if name == 'reused gradient' else jnp.uint8
  assert queue.batch['image'].dtype == kind
  chex.assert_trees_all_close(
    queue.adversarial, float_queue.adversarial, rtol=1e-5, atol=1e-6
  )


def test_part_of_a_leaf_can_be_perturbed():
  def loss_fn(w, batch):
    return jnp.mean((batch['x'] @ w) ** 2)

  def set_colours(batch, colours):
    return {**batch, 'x': batch['x'].at[:, :3].set(colours)}

  grad_fn = conadv.wrap(
    loss_fn,
    attack=conadv.fgsm(0.2),
    inputs=(lambda batch: batch['x'][:, :3], set_colours),
    weights={'main': 0.0, 'adversarial': 1.0},
  )
  w = jnp.array([1.0, -1.0, 2.0, 1.0])
  first, second = ({'x': jnp.asarray(arrays(seed)[0])} for seed in range(2))
  state = jax.jit(grad_fn.init)(w, [first])
  chex.assert_shape(state.queue.adversarial, (1, 6, 3))
  (loss, _), _, _ = jax.jit(grad_fn.value_and_grad)(w, state, second)
  x = np.asarray(first['x'])
  # The gradient of a square has the sign of its root, times that of w.
  sign = np.sign(x @ np.asarray(w))[:, None] * np.sign(np.asarray(w))[None]
  x = np.concatenate([x[:, :3] + 0.2 * sign[:, :3], x[:, 3:]], axis=1)
  np.testing.assert_allclose(loss, np.mean((x @ np.asarray(w)) ** 2), rtol=1e-5)


def test_leaves_beside_the_inputs_come_back_untouched():
  seen = []

  def loss_fn(w, batch):
    jax.debug.callback(lambda b: seen.append(b), batch)
    return jnp.mean(batch['x'] @ w)

  def batch_of(seed):
    x, y = arrays(seed)
    return {
      'x': x,
      'label': y,
      'weight': x[:, 0].astype(np.float16),
      'valid': y > 0,
      'pixels': (100 * np.abs(x)).astype(np.uint8),
    }

  grad_fn = conadv.wrap(loss_fn, 1, attack=conadv.fgsm(0.2), inputs='x')
  w, batches = jnp.arange(4.0), [batch_of(seed) for seed in range(3)]
  state = jax.jit(grad_fn.init)(w, batches[:1])
  step = jax.jit(grad_fn.value_and_grad)
  for old, new in itertools.pairwise(batches):
    jax.effects_barrier()
    seen.clear()
    _, _, state = step(w, state, new)
    jax.effects_barrier()
    for batch in seen:
      x = np.asarray(batch['x'])
      origin = min((old, new), key=lambda b: np.max(np.abs(b['x'] - x)))
      rest = {name: batch[name] for name in batch if name != 'x'}
      chex.assert_trees_all_equal(rest, {name: origin[name] for name in rest})
      chex.assert_trees_all_equal_dtypes(rest, {n: origin[n] for n in rest})
    assert len(seen) == 3, 'The attack, the adversarial pass, the clean pass.'
    chex.assert_trees_all_equal(
      jax.tree.map(lambda ring: ring[0], state.queue.batch), new
    )
