"""Sparse SAM: masks and gradients against NumPy, and its reductions to SAM."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from error_checks import assert_says
from meshes import make_mesh

import conadv_optax as conadv

SIZE, BATCH, RADIUS, RATE = 9, 16, 0.4, 0.05
CLOSE = {'rtol': 2e-4, 'atol': 2e-6}
DYNAMIC = {'rule': 'dynamic', 'drop_rate': 0.5}


def loss_fn(params, batch):
  """Least squares, of a tree with two leaves."""
  w = jnp.concatenate([params['a'].ravel(), params['b']])
  return jnp.mean(0.5 * (batch['x'] @ w - batch['y']) ** 2)


def tree_of(w):
  w = jnp.asarray(w)
  return {'a': w[:6].reshape(2, 3), 'b': w[6:]}


def flat(tree):
  return np.concatenate([np.ravel(tree['a']), tree['b']])


def make_batch(t):
  rng = np.random.default_rng(t)
  # The last features have the largest gradients.
  x = rng.normal(size=(BATCH, SIZE)) * np.linspace(0.2, 2.0, SIZE)
  y = rng.normal(size=BATCH)
  return {'x': np.float32(x), 'y': np.float32(y)}


def naive_gradient(w, batch):
  return (batch['x'] @ w - batch['y']) @ batch['x'] / len(batch['y'])


def sharp_gradient(w, batch, mask):
  g = naive_gradient(w, batch)
  return naive_gradient(w + RADIUS * mask * g / np.linalg.norm(g), batch)


def information(w, batch, number):
  each = (batch['x'] @ w - batch['y'])[:, None] * batch['x']
  return np.sum(each[:number] ** 2, axis=0)


def largest(scores, count):
  mask = np.zeros(len(scores), bool)
  mask[np.argsort(-scores, kind='stable')[:count]] = True
  return mask


def part(batch, k, parts):
  """Micro-batch k of `accumulate`, or of one that is whole."""
  return {name: x[k::parts] for name, x in batch.items()}


@pytest.mark.parametrize(
  ('parts', 'sparsity', 'kept'),
  [(1, 0.5, 4), (1, 0.9, 0), (2, 0.5, 4), (2, 0.2, 7)],
)
def test_the_mask_is_that_of_the_fisher_information(parts, sparsity, kept):
  grad_fn = conadv.sparse_sam(
    loss_fn, RADIUS, sparsity=sparsity, refresh_every=2, num_samples=3
  )
  if parts > 1:
    grad_fn = conadv.accumulate(grad_fn, parts)
  w = np.linspace(-1.0, 1.0, SIZE)
  params = tree_of(np.float32(w))
  state = grad_fn.init(params, [])
  step = jax.jit(grad_fn.value_and_grad)
  masks = [None] * parts
  for t in range(5):
    batch = make_batch(t)
    (loss, _), grads, state = step(params, state, batch)
    params = optax.tree.add_scale(params, -RATE, grads)
    every = [part(batch, k, parts) for k in range(parts)]
    if t % 2 == 0:
      masks = [largest(information(w, one, 3), kept) for one in every]
    held = state.mask.value
    for k, mask in enumerate(masks):
      one = held if parts == 1 else jax.tree.map(lambda m, k=k: m[k], held)
      np.testing.assert_array_equal(flat(one), mask)
    loss_here = np.mean(0.5 * (batch['x'] @ w - batch['y']) ** 2)
    np.testing.assert_allclose(loss, loss_here, rtol=1e-4)
    sharp = map(sharp_gradient, [w] * parts, every, masks)
    w = w - RATE * np.mean(list(sharp), axis=0)
  chex.assert_trees_all_close(params, tree_of(np.float32(w)), **CLOSE)


# The schedule of Optax mixes counts and floats.
@pytest.mark.slow
@jax.numpy_dtype_promotion('standard')
def test_a_dynamic_mask_drops_the_smallest_and_grows_at_random():
  drop_rate = optax.cosine_decay_schedule(0.9, 8)
  grad_fn = conadv.sparse_sam(
    loss_fn,
    RADIUS,
    sparsity=0.4,
    refresh_every=2,
    rule='dynamic',
    drop_rate=drop_rate,
  )
  kept, away = 5, 4
  w = np.float32(np.linspace(-1.0, 1.0, SIZE))
  params = tree_of(w)
  keys = jax.random.split(jax.random.key(0), 400)
  states = jax.vmap(lambda key: grad_fn.init(params, [], key=key))(keys)
  step = jax.jit(
    jax.vmap(
      lambda state, batch, key: grad_fn.value_and_grad(
        params, state, batch, key=key
      )[1:],
      in_axes=(0, None, 0),
    )
  )
  rows = jax.vmap(lambda m: jnp.concatenate([m['a'].ravel(), m['b']]))
  old = np.asarray(rows(states.mask.value))
  np.testing.assert_array_equal(old.sum(axis=1), kept)
  # Each of the parameters in its turn, but for chance.
  np.testing.assert_allclose(old.mean(axis=0), kept / SIZE, atol=0.1)
  for t in range(9):
    batch = make_batch(t)
    grads, states = step(states, batch, keys)
    new = np.asarray(rows(states.mask.value))
    g = naive_gradient(w, batch)
    if t % 2:
      np.testing.assert_array_equal(new, old)
    else:
      share = 0.9 * (1 + np.cos(np.pi * t / 8)) / 2
      dropped = int(min(np.floor(kept * share), away))
      for before, after in zip(old, new, strict=True):
        size = np.where(before, np.abs(g), -1.0)
        stay = largest(size, kept - dropped)
        np.testing.assert_array_equal(after & before, stay)
        assert after.sum() == kept
      grown = (new & ~old).sum(axis=0) / np.maximum((~old).sum(axis=0), 1)
      outside = (~old).sum(axis=0) > 100
      np.testing.assert_allclose(grown[outside], dropped / away, atol=0.15)
    for k in (0, 7):
      np.testing.assert_allclose(
        rows(grads)[k], sharp_gradient(w, batch, new[k]), **CLOSE
      )
    old = new
  # At the end of the cosine nothing is dropped.
  np.testing.assert_allclose(float(drop_rate(8)), 0.0, atol=1e-6)


@pytest.mark.parametrize('rule', [{}, DYNAMIC])
def test_sparsity_0_is_sam_and_1_is_the_gradient(rule):
  def distance(params, batch):
    w = jnp.concatenate([params['a'].ravel(), params['b']])
    return jnp.mean(0.5 * jnp.sum((batch - w[None]) ** 2, axis=1))

  def sparse(sparsity):
    return conadv.sparse_sam(
      distance, 0.5, sparsity=sparsity, refresh_every=2, **rule
    )

  @jax.jit
  def gradients(params, batch):
    every = []
    for grad_fn in (
      conadv.sam(distance, 0.5),
      sparse(0.0),
      conadv.plain(distance),
      sparse(1.0),
    ):
      found, state = [], grad_fn.init(params, [], key=jax.random.key(0))
      for t in range(2):
        _, grads, state = grad_fn.value_and_grad(
          params, state, batch, key=jax.random.key(t)
        )
        found.append(grads)
      every.append(found)
    return every

  # The gradient is four twos, of norm 4: nothing is rounded.
  w = np.float32([2, 0, 2, 0, 2, 0, 0, 0, 2])
  sam, none, plain, all_ = gradients(
    {'a': w[:6].reshape(2, 3), 'b': w[6:]}, np.zeros((4, SIZE), np.float32)
  )
  chex.assert_trees_all_equal(none, sam)
  chex.assert_trees_all_equal(all_, plain)
  np.testing.assert_array_equal(flat(sam[0]), 1.125 * flat(plain[0]))


@pytest.mark.slow
@pytest.mark.parametrize('rule', [{}, DYNAMIC])
def test_with_an_axis_all_devices_have_one_mask(rule):
  def sparse(**kwargs):
    return conadv.sparse_sam(loss_fn, RADIUS, refresh_every=1, **rule, **kwargs)

  grad_fn = conadv.data_parallel(sparse(axis='data'), make_mesh(4))
  params = tree_of(np.linspace(-1, 1, SIZE, dtype=np.float32))
  batch, key = make_batch(0), jax.random.key(1)
  state = grad_fn.init(params, [], key=jax.random.key(0))
  _, grads, state = grad_fn.value_and_grad(params, state, batch, key=key)
  for leaf in jax.tree.leaves(state.mask):
    held = [np.asarray(shard.data) for shard in leaf.addressable_shards]
    np.testing.assert_array_equal(held, [held[0]] * 4)
  mask = flat(state.mask)
  assert mask.sum() == 4
  np.testing.assert_allclose(
    flat(grads), sharp_gradient(flat(params), batch, mask), **CLOSE
  )
  if not rule:
    whole = sparse()
    _, _, state = whole.value_and_grad(params, whole.init(params, []), batch)
    np.testing.assert_array_equal(mask, flat(state.mask.value))


@pytest.mark.slow
def test_another_loss_may_be_looked_at_and_padding_is_not():
  def masked(params, batch):
    w = jnp.concatenate([params['a'].ravel(), params['b']])
    losses = 0.5 * (batch['x'] @ w - batch['y']) ** 2
    return jnp.sum(losses * batch['mask']) / jnp.sum(batch['mask'])

  batch = {**make_batch(0), 'mask': np.float32(np.arange(BATCH) % 3 == 0)}
  params = tree_of(np.linspace(-1, 1, SIZE, dtype=np.float32))
  grad_fn = conadv.sparse_sam(
    # A queue would take no single example.
    conadv.wrap(loss_fn, attack=conadv.fgsm(0.1), inputs='x'),
    RADIUS,
    refresh_every=1,
    fisher=masked,
  )
  state = grad_fn.init(params, [batch])
  _, _, state = grad_fn.value_and_grad(params, state, batch)
  seen = {name: x[::3] for name, x in batch.items()}
  np.testing.assert_array_equal(
    flat(state.mask.value), largest(information(flat(params), seen, 6), 4)
  )


def test_a_schedule_below_zero_drops_nothing():
  grad_fn = conadv.sparse_sam(
    loss_fn,
    RADIUS,
    refresh_every=1,
    sparsity=0.7,
    rule='dynamic',
    drop_rate=lambda count: -0.5,
  )
  params = tree_of(np.ones(SIZE, np.float32))
  state, key = (
    grad_fn.init(params, [], key=jax.random.key(0)),
    jax.random.key(1),
  )
  for _ in range(3):
    _, _, state = grad_fn.value_and_grad(params, state, make_batch(0), key=key)
    mask = getattr(state.mask, 'value', state.mask)
    assert flat(mask).sum() == int(0.3 * SIZE)


def test_a_gradient_that_is_no_number_leaves_as_many():
  grad_fn = conadv.sparse_sam(loss_fn, RADIUS, refresh_every=1, **DYNAMIC)
  params = tree_of(np.linspace(-1, 1, SIZE, dtype=np.float32))
  key = jax.random.key(0)
  state = grad_fn.init(params, [], key=key)
  batch = {**make_batch(0), 'y': np.full(BATCH, np.nan, np.float32)}
  _, _, state = grad_fn.value_and_grad(params, state, batch, key=key)
  assert flat(state.mask.value).sum() == 4


@pytest.mark.parametrize('rule', [{}, DYNAMIC])
def test_any_dtype_has_the_same_mask(rule):
  def loss(w, batch):
    error = batch['x'].astype(w.dtype) @ w - batch['y'].astype(w.dtype)
    return jnp.mean(jnp.abs(error) ** 2)

  @functools.partial(jax.jit, static_argnums=1)
  def masks_and_gradients(batch, dtypes):
    key, found = jax.random.key(0), []
    for dtype in dtypes:
      w = jnp.linspace(-1, 1, SIZE, dtype=jnp.float32).astype(dtype)
      grad_fn = conadv.sparse_sam(loss, RADIUS, refresh_every=1, **rule)
      state = grad_fn.init(w, [], key=key)
      _, grads, state = grad_fn.value_and_grad(w, state, batch, key=key)
      found.append((state.mask.value, grads))
    return found

  batch = make_batch(3)
  dtypes = ('float32', 'bfloat16', 'complex64')
  (expected, _), *found = masks_and_gradients(batch, dtypes)
  with jax.enable_x64(True):
    found += masks_and_gradients(batch, ('float64',))
  for dtype, (mask, grads) in zip((*dtypes[1:], 'float64'), found, strict=True):
    assert grads.dtype == dtype
    np.testing.assert_array_equal(mask, expected)


def test_radius_and_rate_may_be_traced():
  params, traces = tree_of(np.linspace(-1, 1, SIZE, dtype=np.float32)), []
  key, batch = jax.random.key(0), make_batch(0)

  def gradient(radius, rate):
    traces.append(0)
    grad_fn = conadv.sparse_sam(
      loss_fn, radius, refresh_every=1, rule='dynamic', drop_rate=rate
    )
    state = grad_fn.init(params, [], key=key)
    return grad_fn.value_and_grad(params, state, batch, key=key)[1]

  compiled = jax.jit(gradient)
  for radius, rate in ((0.1, 0.5), (0.3, 0.2)):
    chex.assert_trees_all_close(
      compiled(jnp.float32(radius), jnp.float32(rate)),
      gradient(radius, rate),
      rtol=1e-5,
    )
  assert len(traces) == 3


@pytest.mark.parametrize(
  ('arguments', 'parts'),
  [
    ({'sparsity': 1.5}, ('`sparsity`', '1.5')),
    ({'rule': 'random'}, ("'fisher' or 'dynamic'",)),
    ({'rule': 'dynamic'}, ('`drop_rate`', 'cosine_decay_schedule')),
    ({'drop_rate': 0.5}, ('`drop_rate`', "rule='dynamic'")),
    ({**DYNAMIC, 'num_samples': 2}, ('`num_samples`', "rule='fisher'")),
    ({**DYNAMIC, 'drop_rate': 2.0}, ('`drop_rate`', '2.0')),
    ({'num_samples': 0}, ('`num_samples`', 'at least 1')),
    ({'refresh_every': 0}, ('`refresh_every`',)),
    ({'radius': -1.0}, ('`radius`',)),
    ({'num_samples': 17}, ('num_samples=17 for 16', 'num_samples=16')),
    ({'axis': 'data'}, ("axis='data'", 'conadv.sparse_sam(')),
    (DYNAMIC, ('needs `key=`',)),
    (
      {'grad_fn': conadv.wrap(loss_fn, attack=conadv.fgsm(0.1), inputs='x')},
      ('staleness 1', 'fisher=loss_fn'),
    ),
  ],
)
def test_wrong_arguments(arguments, parts):
  params = tree_of(np.ones(SIZE, np.float32))
  arguments = {
    'grad_fn': loss_fn,
    'radius': 0.1,
    'refresh_every': 1,
    **arguments,
  }
  with pytest.raises(ValueError) as error:
    grad_fn = conadv.sparse_sam(**arguments)
    grad_fn.value_and_grad(params, grad_fn.init(params, []), make_batch(0))
  assert_says(error, *parts)


@pytest.mark.parametrize('leaf', [np.float32(0.5), np.ones(4, np.float32)])
def test_a_leaf_without_an_entry_for_each_example_is_named(leaf):
  # 'before' stands first among the leaves.
  params, batch = tree_of(np.ones(SIZE, np.float32)), make_batch(0)
  grad_fn = conadv.sparse_sam(loss_fn, 0.1, refresh_every=1, num_samples=3)
  with pytest.raises(ValueError) as error:
    grad_fn.value_and_grad(
      params, grad_fn.init(params, []), {**batch, 'before': leaf}
    )
  assert_says(error, "['before']", str(leaf.shape)[1:-1].strip(','))
