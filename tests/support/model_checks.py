"""Images for the model tests, and what dual BatchNorm must show with each."""

import chex
import jax
import jax.numpy as jnp
import numpy as np

import conadv_optax as conadv

CLASSES = 3
MOMENTUM = 0.9


def make_images(seed, *, size=12, side=8, channels=1):
  """A bright patch on noise; where it lies is the class."""
  rng = np.random.default_rng(seed)
  label = np.arange(size, dtype=np.int32) % CLASSES
  image = 0.3 * rng.normal(size=(size, side, side, channels))
  for example, place in zip(image, label, strict=True):
    example[2 * place : 2 * place + 3, 2 * place : 2 * place + 3] += 1.5
  return {'image': image.astype(np.float32), 'label': label}


def convolve(image, kernel, *, stride=1):
  """A convolution with zero padding ('SAME'), in NumPy."""
  image, kernel = np.asarray(image), np.asarray(kernel)
  pads = [(0, 0)]
  for n, k in zip(image.shape[1:3], kernel.shape[:2], strict=True):
    total = max((-(-n // stride) - 1) * stride + k - n, 0)
    pads.append((total // 2, total - total // 2))
  windows = np.lib.stride_tricks.sliding_window_view(
    np.pad(image, [*pads, (0, 0)]), kernel.shape[:2], axis=(1, 2)
  )[:, ::stride, ::stride]
  return np.einsum('bijcxy,xyco->bijo', windows, kernel)


def moments(activations):
  """Mean and (biased) variance of each channel."""
  axes = tuple(range(activations.ndim - 1))
  return activations.mean(axis=axes), activations.var(axis=axes)


def check_falls(losses, *, by=0.8):
  """Both losses are lower at the end than at the start."""
  for branch in losses[0]:
    assert losses[-1][branch] < by * losses[0][branch], branch


def check_statistics(grad_fn, params, model_state, batches, statistics, read):
  """Each branch's statistics move once a step, by its own examples alone.

  Args:
    grad_fn: of `wrap` with `staleness=1`.
    params: `Branched` parameters.
    model_state: `Branched` statistics.
    batches: the first to train on, and those after it.
    statistics: `statistics(params, image)` gives what the first norm layer of
      the model sees, as NumPy mean and variance; `params` of one branch.
    read: `read(model_state)` gives the running mean and variance of that
      layer; `model_state` of one branch.
  """
  branches = ('main', 'adversarial')
  key = jax.random.key(3)

  @jax.jit
  def step(params, state, batch, model_state):
    (_, aux), grads, state = grad_fn.value_and_grad(
      params, state, batch, model_state=model_state, key=key
    )
    params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
    return params, state, aux.model_state

  first, *batches = batches
  init = jax.jit(grad_fn.init)
  state = init(params, [first], model_state=model_state, key=key)
  for batch in batches:
    images = {
      'main': state.queue.batch['image'][0],
      'adversarial': state.queue.adversarial[0],
    }
    assert np.max(np.abs(images['main'] - images['adversarial'])) > 0.05
    trained, state, new_state = step(params, state, batch, model_state)
    for branch in branches:
      old = read(conadv.dual_bn.select(model_state, branch))
      new = read(conadv.dual_bn.select(new_state, branch))
      seen = statistics(
        conadv.dual_bn.select(params, branch), np.asarray(images[branch])
      )
      for before, after, moment in zip(old, new, seen, strict=True):
        # Once: had the attack or the other pass counted, there were two terms.
        np.testing.assert_allclose(
          np.ravel(after),
          MOMENTUM * np.ravel(before) + (1 - MOMENTUM) * moment,
          rtol=1e-3,
          atol=1e-5,
        )
    params, model_state = trained, new_state
  mains, others = (
    jax.tree.leaves(conadv.dual_bn.select(model_state, branch))
    for branch in branches
  )
  assert any(np.any(a != b) for a, b in zip(mains, others, strict=True))


def check_gradients(make_grad_fn, params, model_state, batch, key):
  """A branch's own leaves hear its loss alone, the shared ones both.

  Args:
    make_grad_fn: `make_grad_fn(weights)` wraps the loss, with `staleness=1`.
    params: `Branched` parameters.
    model_state: `Branched` statistics, or None.
    batch: to train on.
    key: a key, or None where nothing draws.
  """

  @jax.jit
  def grads_of(main, adversarial, state):
    grad_fn = make_grad_fn({'main': main, 'adversarial': adversarial})
    _, grads, _ = grad_fn.value_and_grad(
      params, state, batch, model_state=model_state, key=key
    )
    return grads

  init = jax.jit(make_grad_fn(None).init)
  state = init(params, [batch], model_state=model_state, key=key)
  main, adversarial, both = (
    jax.device_get(grads_of(*map(jnp.float32, weights), state))
    for weights in ((1, 0), (0, 1), (1, 1))
  )

  def is_zero(x):
    return not np.any(x)

  own = jax.tree.map(
    lambda x: x is not None,
    params.branches['adversarial'],
    is_leaf=lambda x: x is None,
  )
  assert any(jax.tree.leaves(own))
  assert not all(jax.tree.leaves(own))
  assert all(map(is_zero, jax.tree.leaves(main.branches)))
  assert not all(map(is_zero, jax.tree.leaves(adversarial.branches)))
  assert not all(map(is_zero, jax.tree.leaves(main.main)))
  # Of the main tree the adversarial loss moves what is shared, no more.
  moved = jax.tree.map(lambda g: not is_zero(g), adversarial.main)
  shared = jax.tree.map(lambda x: not x, own)
  for is_moved, is_shared in zip(
    *map(jax.tree.leaves, (moved, shared)), strict=True
  ):
    assert is_shared or not is_moved
  assert any(jax.tree.leaves(moved))
  total = jax.tree.map(np.add, main, adversarial)
  chex.assert_trees_all_close(both, total, rtol=1e-3, atol=1e-5)
