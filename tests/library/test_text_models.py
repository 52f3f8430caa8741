"""Transformers that know nothing of noise, on text with noise.

One in Linen is trained, with dropout where `loss_fn` has a key. docs/text.md
trains it in NNX and Haiku, too; here these two have the noise alone.
"""

import functools
import os
from operator import itemgetter
from pathlib import Path

import chex
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from meshes import make_mesh

import conadv_optax as conadv

LENGTH, WIDTH, BYTES, EPSILON = 12, 16, 128, 0.5


def read_text():
  """Lines of Python's own library, a byte a token, 0 where a line has ended."""
  file = Path(os.__file__).parent / 'argparse.py'
  lines = file.read_text(encoding='utf-8').split('\n')
  words = [x.strip().encode()[: LENGTH + 1] for x in lines if x.isascii()]
  rows = np.zeros((len(words), LENGTH + 1), np.int32)
  for row, word in zip(rows, words, strict=True):
    row[: len(word)] = list(word)
  rows = rows[(rows > 0).sum(1) > 2]
  return np.random.default_rng(0).permutation(rows)


def as_batch(rows):
  return {'tokens': rows[:, :-1], 'target': rows[:, 1:]}


TEXT = read_text()
HELD_OUT, TRAIN = as_batch(TEXT[:128]), TEXT[128:]


def make_batch(step, size=32):
  return as_batch(np.random.default_rng(step).choice(TRAIN, size))


def tokens_of(batch):
  return jnp.sum(batch['target'] > 0).astype(jnp.float32)


def mean_loss(logits, batch):
  """The mean over real tokens; 0 / 0 where there is none."""
  losses = optax.softmax_cross_entropy_with_integer_labels(
    logits, batch['target']
  )
  return jnp.sum(losses, where=batch['target'] > 0) / tokens_of(batch)


NOISE = conadv.added_leaf(
  'noise',
  lambda batch: jax.ShapeDtypeStruct(
    (*batch['tokens'].shape, WIDTH), 'float32'
  ),
)


def add_to(name, noise):
  def interceptor(call, args, kwargs, context):
    output = call(*args, **kwargs)
    is_call = context.method_name == '__call__'
    return output + noise if context.module.name == name and is_call else output

  return interceptor


class Linen(nn.Module):
  @nn.compact
  def __call__(self, tokens, *, train):
    x = nn.Embed(BYTES, WIDTH)(tokens)
    x += nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))[None]
    y = nn.MultiHeadDotProductAttention(2)(
      nn.LayerNorm()(x), mask=nn.make_causal_mask(tokens)
    )
    x += nn.Dropout(0.1, deterministic=not train)(y)
    y = nn.Dense(WIDTH)(nn.relu(nn.Dense(2 * WIDTH)(nn.LayerNorm()(x))))
    x += nn.Dropout(0.1, deterministic=not train)(y)
    return nn.Dense(BYTES)(nn.LayerNorm()(x))


def make_linen():
  model = Linen()

  def loss_fn(params, batch, *, key=None):
    with nn.intercept_methods(add_to('Embed_0', batch.get('noise', 0.0))):
      logits = model.apply(
        {'params': params},
        batch['tokens'],
        train=key is not None,
        rngs=None if key is None else {'dropout': key},
      )
    return mean_loss(logits, batch)

  init = jax.jit(functools.partial(model.init, train=False))
  return loss_fn, init(jax.random.key(0), HELD_OUT['tokens'])['params']


class Nnx(nnx.Module):
  def __init__(self, *, rngs):
    self.embed = nnx.Embed(BYTES, WIDTH, rngs=rngs)
    self.places = nnx.Embed(LENGTH, WIDTH, rngs=rngs)
    self.norms = nnx.List(nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(3))
    self.attend = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
    self.widen = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
    self.narrow = nnx.Linear(2 * WIDTH, WIDTH, rngs=rngs)
    self.head = nnx.Linear(WIDTH, BYTES, rngs=rngs)

  def __call__(self, tokens):
    x = self.embed(tokens) + self.places(jnp.arange(LENGTH))[None]
    mask = nnx.make_causal_mask(tokens)
    x += self.attend(self.norms[0](x), mask=mask)
    x += self.narrow(nnx.relu(self.widen(self.norms[1](x))))
    return self.head(self.norms[2](x))


def make_nnx():
  graphdef, params = nnx.split(Nnx(rngs=nnx.Rngs(0)), nnx.Param)

  def loss_fn(params, batch):
    model = nnx.merge(graphdef, params, copy=True)
    embed = model.embed
    model.embed = lambda tokens: embed(tokens) + batch.get('noise', 0.0)
    return mean_loss(model(batch['tokens']), batch)

  return loss_fn, params


@hk.without_apply_rng
@hk.transform
def haiku_net(tokens):
  def norm(x):
    return hk.LayerNorm(-1, True, True)(x)

  init = hk.initializers.VarianceScaling(1.0)
  x = hk.Embed(BYTES, WIDTH, w_init=init)(tokens)
  x += hk.Embed(LENGTH, WIDTH, w_init=init)(jnp.arange(LENGTH))[None]
  y, mask = norm(x), jnp.tril(jnp.ones((1, 1, LENGTH, LENGTH)))
  x += hk.MultiHeadAttention(2, WIDTH // 2, w_init=init)(y, y, y, mask)
  x += hk.Linear(WIDTH)(jax.nn.relu(hk.Linear(2 * WIDTH)(norm(x))))
  return hk.Linear(BYTES)(norm(x))


def make_haiku():
  def loss_fn(params, batch):
    with hk.intercept_methods(add_to('embed', batch.get('noise', 0.0))):
      logits = haiku_net.apply(params, batch['tokens'])
    return mean_loss(logits, batch)

  init = jax.jit(haiku_net.init)
  return loss_fn, init(jax.random.key(0), HELD_OUT['tokens'])


def attack(epsilon=EPSILON):
  return conadv.pgd(epsilon, norm='l2', batch_axes=2, random_start=False)


def train(loss_fn, params, steps):
  """Parameters trained with noise and without, and the losses of either."""
  tx = optax.adam(5e-3)

  def grad_fn(weights):
    return conadv.wrap(
      loss_fn,
      attack=attack(),
      inputs=NOISE,
      weights=dict(zip(('main', 'adversarial'), weights, strict=True)),
      denominator=tokens_of,
      has_key=True,
    )

  @jax.jit
  def train_step(carry, batch, key, weights):
    params, opt_state, state = carry
    (_, aux), grads, state = grad_fn(weights).value_and_grad(
      params, state, batch, key=key
    )
    updates, opt_state = tx.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    return (params, opt_state, state), aux.losses

  key, results = jax.random.key(1), []
  init = jax.jit(grad_fn(jnp.array([0.5, 0.5])).init)
  state = init(params, [make_batch(0)], key=key)
  for weights in ([0.5, 0.5], [1.0, 0.0]):
    carry, history = (params, tx.init(params), state), []
    for step in range(1, steps + 1):
      carry, losses = train_step(
        carry,
        make_batch(step),
        jax.random.fold_in(key, step),
        jnp.array(weights),
      )
      history.append(losses)
    results.append((carry[0], jax.device_get(history)))
  return results


def evaluator(loss_fn):
  """The loss without noise and with it, and the noise."""

  @jax.jit
  def held_out(params):
    hit = conadv.perturb(
      loss_fn, params, HELD_OUT, attack=attack(), inputs=NOISE
    )
    return loss_fn(params, HELD_OUT), loss_fn(params, hit), hit['noise']

  return held_out


# Adam and Haiku's layers mix dtypes.
@pytest.mark.slow
@jax.numpy_dtype_promotion('standard')
def test_a_transformer_trains_with_noise_at_its_embedding():
  loss_fn, params = make_linen()
  (noisy, history), (plain, _) = train(loss_fn, params, 40)
  for branch in ('main', 'adversarial'):
    losses = [entry[branch] for entry in history]
    assert np.mean(losses[-5:]) < 0.75 * losses[0], branch
  held_out = evaluator(loss_fn)
  clean, hit, noise = held_out(noisy)
  _, hit_of_plain, _ = held_out(plain)
  # Without noise in training, noise does more harm.
  assert clean < hit < hit_of_plain - 0.05
  assert clean < 0.75 * history[0]['main']
  check_noise(loss_fn, noisy, noise)


@pytest.mark.slow
@pytest.mark.parametrize('make', [make_nnx, make_haiku])
@jax.numpy_dtype_promotion('standard')
def test_noise_is_added_to_the_embedding(make):
  loss_fn, params = make()
  clean, hit, noise = evaluator(loss_fn)(params)
  assert clean < hit
  check_noise(loss_fn, params, noise)


def check_noise(loss_fn, params, noise):
  """A ball for each token, along the gradient of a table of a line's own."""
  # There is none at padding, of which no loss hears.
  np.testing.assert_allclose(
    np.linalg.norm(noise, axis=2),
    EPSILON * (HELD_OUT['target'] > 0),
    rtol=1e-4,
  )
  [table] = [x for x in jax.tree.leaves(params) if x.shape == (BYTES, WIDTH)]
  own = jnp.zeros_like(table).at[:LENGTH].set(table[HELD_OUT['tokens'][0]])

  def of_table(own):
    alone = jax.tree.map(lambda x: own if x.shape == own.shape else x, params)
    line = {
      'tokens': jnp.arange(LENGTH)[None],
      'target': HELD_OUT['target'][:1],
    }
    return loss_fn(alone, line)

  gradient = np.asarray(jax.jit(jax.grad(of_table))(own))[:LENGTH]
  length = np.linalg.norm(gradient, axis=1, keepdims=True)
  expected = EPSILON * gradient / np.where(length > 0, length, 1.0)
  np.testing.assert_allclose(noise[0], expected, rtol=1e-3, atol=1e-4)


PADDED = jax.tree.map(lambda x: x.copy(), make_batch(0))
for leaf in PADDED.values():
  leaf[-4:] = 0  # On eight devices the last has no token at all.


def small_loss(params, batch):
  """Of a model that reads the tokens before, as a transformer does."""
  x = params['embed'][batch['tokens']] + batch.get('noise', 0.0)
  return mean_loss(jnp.tanh(jnp.cumsum(x, axis=1)) @ params['head'], batch)


def small_params():
  rng = np.random.default_rng(0)
  return {
    name: jnp.asarray(rng.normal(size=shape), jnp.float32)
    for name, shape in (('embed', (BYTES, WIDTH)), ('head', (WIDTH, BYTES)))
  }


def gradients_of(grad_fn):
  params = small_params()
  batches = [PADDED, *map(make_batch, range(1, 3))]
  state = jax.jit(grad_fn.init)(params, batches[: grad_fn.staleness])
  step = jax.jit(grad_fn.value_and_grad)
  results = []
  for batch in batches[grad_fn.staleness :]:
    (_, aux), grads, state = step(params, state, batch)
    results.append((aux.losses, grads))
  return results


@functools.cache
def on_one_device(reuse):
  return gradients_of(wrapped(reuse))


def wrapped(reuse):
  return conadv.wrap(
    small_loss,
    attack=attack(),
    inputs=NOISE,
    denominator=tokens_of,
    reuse_gradient=reuse,
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ('wrapper', 'reuse'),
  [
    ('devices', False),
    ('devices', True),
    ('micro-batches', False),
    ('roles', False),
  ],
)
def test_groups_of_lines_of_unequal_length_are_one_batch(wrapper, reuse):
  grad_fn = wrapped(reuse)
  if wrapper == 'devices':
    grad_fn = conadv.data_parallel(grad_fn, make_mesh(8))
  elif wrapper == 'micro-batches':
    grad_fn = conadv.accumulate(grad_fn, 4)
  else:
    mesh = make_mesh(2, 3)
    grad_fn = conadv.concurrent(grad_fn, mesh)
  chex.assert_trees_all_close(
    gradients_of(grad_fn), on_one_device(reuse), rtol=2e-3, atol=1e-5
  )


@pytest.mark.slow
def test_fast_advprop_at_an_embedding():
  params = small_params()
  grad_fn = conadv.fast_advprop(
    small_loss,
    attack=attack(),
    inputs=NOISE,
    adversarial_fraction=0.25,
    attack_weight=0.4,
    denominator=tokens_of,
  )
  (losses, grads), *_ = gradients_of(grad_fn)
  attacked, rest = (
    jax.tree.map(itemgetter(part), PADDED)
    for part in (slice(8), slice(8, None))
  )
  height = jax.jit(jax.value_and_grad(small_loss))
  hit = jax.jit(
    lambda batch: conadv.perturb(
      small_loss, params, batch, attack=attack(), inputs=NOISE
    )
  )(attacked)
  a, c = tokens_of(attacked), tokens_of(rest)
  parts = {
    'attack': (0.4 * a / (a + c), height(params, attacked)),
    'adversarial': (0.6 * a / (a + c), height(params, hit)),
    'main': (c / (a + c), height(params, rest)),
  }
  expected = {name: value for name, (_, (value, _)) in parts.items()}
  chex.assert_trees_all_close(losses, expected, rtol=1e-4)
  chex.assert_trees_all_close(
    grads,
    jax.tree.map(
      lambda *g: sum(
        np.multiply(share, x)
        for x, (share, _) in zip(g, parts.values(), strict=True)
      ),
      *(gradient for _, (_, gradient) in parts.values()),
    ),
    rtol=1e-3,
    atol=1e-5,
  )
