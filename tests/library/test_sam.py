"""SAM and its forms, against NumPy and Optax."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import in_parts, init_model, loss_fn, make_batch
from meshes import make_mesh
from public_names import make_batch as make_regression
from public_names import make_params, plain_loss

import conadv_optax as conadv
from conadv_optax.methods.perturbed_point import perturbed

CLOSE = {'rtol': 2e-5, 'atol': 2e-6}
MATRIX = np.array([[3.0, 1.0, 0.0], [1.0, 2.0, 0.5], [0.0, 0.5, 1.0]])
RADIUS, RATE = 0.3, 0.1


def quadratic(params, center):
  """Half of (w - c)' A (w - c), of a tree with two leaves."""
  w = jnp.concatenate([params['a'], params['b']]) - jnp.mean(center, axis=0)
  return 0.5 * w @ jnp.asarray(MATRIX, w.dtype) @ w


def tree_of(w, dtype=jnp.float32):
  return {'a': jnp.asarray(w[:1], dtype), 'b': jnp.asarray(w[1:], dtype)}


def naive_run(w, centers, *, every=1, reuse_weight=0.7, penalty=1.0):
  """Gradient descent by SAM, LookSAM or the penalty on the quadratic."""
  for t, center in enumerate(centers):
    g = MATRIX @ (w - center)
    if t % every == 0:
      sharp = MATRIX @ (w + RADIUS * g / np.linalg.norm(g) - center)
      kept = sharp - g * (sharp @ g) / (g @ g)
    else:
      size = np.linalg.norm(g) / np.linalg.norm(kept)
      sharp = g + reuse_weight * size * kept
    w = w - RATE * ((1 - penalty) * g + penalty * sharp)
  return w


@pytest.mark.parametrize(
  ('every', 'penalty'), [(1, 1.0), (1, 0.8), (2, 0.8), (3, 1.0), (20, 0.8)]
)
def test_is_the_method_in_numpy_on_a_quadratic(every, penalty):
  centers = np.random.default_rng(0).normal(size=(7, 3))
  start = np.array([1.0, -2.0, 0.5])
  grad_fn = conadv.sam(
    quadratic, RADIUS, every=every, penalty=penalty, reuse_weight=0.6
  )
  params = tree_of(start)
  state = grad_fn.init(params, [])
  step = jax.jit(grad_fn.value_and_grad)
  for center in centers:
    _, grads, state = step(
      params, state, jnp.asarray(center[None], jnp.float32)
    )
    params = optax.tree.add_scale(params, -RATE, grads)
  expected = naive_run(
    start, centers, every=every, penalty=penalty, reuse_weight=0.6
  )
  chex.assert_trees_all_close(params, tree_of(expected), **CLOSE)


def test_is_sam_of_optax():
  tx = optax.contrib.sam(
    optax.sgd(RATE),
    optax.chain(optax.contrib.normalize(), optax.sgd(0.05)),
    opaque_mode=True,
  )
  grad_fn = conadv.sam(plain_loss, 0.05)
  ours = theirs = make_params()
  state, opt_state = grad_fn.init(ours, []), tx.init(theirs)
  step = jax.jit(grad_fn.value_and_grad)
  gradient = jax.jit(jax.grad(plain_loss))
  for t in range(5):
    batch = make_regression(t)
    _, grads, state = step(ours, state, batch)
    ours = optax.tree.add_scale(ours, -RATE, grads)
    updates, opt_state = tx.update(
      gradient(theirs, batch),
      opt_state,
      theirs,
      grad_fn=lambda params, _, batch=batch: gradient(params, batch),
    )
    theirs = optax.apply_updates(theirs, updates)
  chex.assert_trees_all_close(ours, theirs, **CLOSE)


def test_the_penalty_is_of_the_gradient_norm():
  # On a quadratic to all orders, so a second derivative can tell.
  params = tree_of(np.array([1.0, -2.0, 0.5]))
  center = np.ones((1, 3), np.float32)

  @jax.jit
  def both(params, share):
    def penalized(params):
      norm = optax.tree.norm(jax.grad(quadratic)(params, center))
      return quadratic(params, center) + share * RADIUS * norm

    grad_fn = conadv.sam(quadratic, RADIUS, penalty=share)
    state = grad_fn.init(params, [])
    _, grads, _ = grad_fn.value_and_grad(params, state, center)
    return grads, jax.grad(penalized)(params)

  for share in (0.0, 0.3, 1.0):
    chex.assert_trees_all_close(*both(params, share), **CLOSE)


LEAVES = (slice(0, 1), slice(1, 3))
MOVES = np.array([True, False, True])


def sharp_point(w, g, form):
  """Where the second gradient is taken, one leaf or one element at a time."""
  move = np.zeros(3)
  if form == 'layer':
    for leaf in LEAVES:
      move[leaf] = np.linalg.norm(w[leaf]) * g[leaf] / np.linalg.norm(g[leaf])
    move /= np.linalg.norm(w)
  elif form == 'element':
    move = w**2 * g / np.sqrt(np.sum((w * g) ** 2))
  else:
    move = g / np.sqrt(np.sum(g**2))
  if form == 'masked':
    move[~MOVES] = 0
  return w + RADIUS * move


@pytest.mark.parametrize(
  ('form', 'arguments'),
  [
    ('layer', {'adaptive': 'layer'}),
    ('element', {'adaptive': 'element'}),
    ('masked', {'mask': {'a': True, 'b': np.array([False, True])}}),
    ('plain', {'gap_weight': 0.4}),
    ('layer', {'adaptive': 'layer', 'gap_weight': 0.4, 'every': 2}),
  ],
)
def test_forms_of_sam_in_numpy(form, arguments):
  centers = np.random.default_rng(1).normal(size=(4, 3))
  w = np.array([1.0, -2.0, 0.5])
  grad_fn = conadv.sam(quadratic, RADIUS, **arguments)
  params = tree_of(w)
  state = grad_fn.init(params, [])
  step = jax.jit(grad_fn.value_and_grad)
  for t, center in enumerate(centers):
    _, grads, state = step(
      params, state, jnp.asarray(center[None], jnp.float32)
    )
    params = optax.tree.add_scale(params, -RATE, grads)
    g = MATRIX @ (w - center)
    if t % arguments.get('every', 1) == 0:
      sharp = MATRIX @ (sharp_point(w, g, form) - center)
      kept = sharp - g * (sharp @ g) / (g @ g)
    else:
      sharp = g + 0.7 * kept * np.linalg.norm(g) / np.linalg.norm(kept)
    beside = g - sharp * (g @ sharp) / (sharp @ sharp)
    w = w - RATE * (sharp - arguments.get('gap_weight', 0.0) * beside)
  chex.assert_trees_all_close(params, tree_of(w), **CLOSE)


@pytest.mark.slow
def test_the_forms_move_as_far_as_they_say():
  key = jax.random.key(0)
  params = {'a': jnp.ones((3, 2)), 'b': jnp.zeros(2), 'c': jnp.full(4, 3.0)}
  gradient = optax.tree.random_like(key, params)

  def moved(**kwargs):
    point = perturbed(params, gradient, 0.5, **kwargs)
    return optax.tree.sub(point, params)

  layers = moved(adaptive='layer')
  np.testing.assert_allclose(optax.tree.norm(layers), 0.5, rtol=1e-5)
  np.testing.assert_allclose(
    optax.tree.norm(layers['c']) / optax.tree.norm(layers['a']),
    np.sqrt(36 / 6),
    rtol=1e-5,
  )
  for adaptive in ('layer', 'element'):
    # What weighs nothing stays, and so does all without a gradient.
    chex.assert_trees_all_equal(moved(adaptive=adaptive)['b'], jnp.zeros(2))
    still = perturbed(
      params, optax.tree.zeros_like(gradient), 0.5, adaptive=adaptive
    )
    chex.assert_trees_all_equal(still, params)


def test_an_element_may_be_complex():
  w, g = np.array([1 + 1j, 0.5j, 2.0]), np.array([1j, 2 - 1j, 0.5])
  move = np.abs(w) ** 2 * np.conj(g) / np.linalg.norm(w * g)
  point = perturbed(
    jnp.complex64(w), jnp.complex64(g), RADIUS, adaptive='element'
  )
  np.testing.assert_allclose(point, w + RADIUS * move, rtol=1e-5)


def test_a_mask_may_be_a_function_a_tree_or_a_prefix():
  tree = {'dense': True, 'head': {'kernel': True}, 'norm': False}
  arrays = jax.tree.map(lambda x: np.full(x.shape, x.ndim > 1), make_params())
  masks = [
    None,
    True,
    False,
    conadv.exclude_norm_and_bias,
    tree,
    arrays,
    lambda params: tree,
  ]

  @jax.jit
  def gradients(params, batch):
    found = [jax.grad(plain_loss)(params, batch)]
    for mask in masks:
      grad_fn = conadv.sam(plain_loss, 0.3, mask=mask)
      state = grad_fn.init(params, [])
      found.append(grad_fn.value_and_grad(params, state, batch)[1])
    return found

  first, everywhere, everything, nothing, weights, *others = gradients(
    make_params(), make_regression(0)
  )
  chex.assert_trees_all_equal(everything, everywhere)
  for other in others:
    chex.assert_trees_all_equal(other, weights)
  assert optax.tree.norm(optax.tree.sub(weights, everywhere)) > 1e-3
  # Without a perturbation the second gradient is the first.
  chex.assert_trees_all_close(nothing, first, rtol=1e-6)


@pytest.mark.parametrize(
  ('mask', 'kind', 'says'),
  [
    (1.0, TypeError, 'Given a leaf float'),
    (lambda params: params, TypeError, 'lambda m: m > 0'),
    ({'a': True, 'b': np.ones(3, bool)}, ValueError, r'bool\[3\] for float32'),
  ],
)
def test_a_mask_that_is_none(mask, kind, says):
  grad_fn = conadv.sam(quadratic, 0.1, mask=mask)
  params = tree_of(np.ones(3))
  with pytest.raises(kind, match=says):
    grad_fn.value_and_grad(params, grad_fn.init(params, []), jnp.ones((1, 3)))


def test_float32_parameters_keep_the_move_that_bfloat16_loses():
  """As the docstring has it, with a tenth of the weights and their radius."""
  keys = jax.random.split(jax.random.key(0))
  size, radius = 1_000_000, 0.05 * 0.1**0.5
  w = 0.02 * jax.random.normal(keys[0], (size,))
  g = jax.random.normal(keys[1], (size,))

  def along(params):
    short = params.astype(jnp.bfloat16).astype(jnp.float32)
    point = perturbed(params, g, radius).astype(jnp.bfloat16)
    move = point.astype(jnp.float32) - short
    return jnp.mean(move != 0), move @ g / jnp.linalg.norm(g) / radius

  share, length = along(w.astype(jnp.bfloat16))
  np.testing.assert_allclose((share, length), (0.18, 0.43), atol=0.01)
  share, length = along(w)
  np.testing.assert_allclose((share, length), (0.27, 1.0), atol=0.01)


def make_conadv(staleness=1):
  return conadv.wrap(loss_fn, staleness, attack=conadv.pgd(0.1), has_state=True)


def first_calls(*grad_fns, size=16):
  """What a call of each returns on the model with batch statistics."""
  batches = [make_batch(t, size=size) for t in range(3)]

  @jax.jit
  def run(params, model_state, batches):
    outputs = []
    for grad_fn in grad_fns:
      first, key = batches[: grad_fn.staleness], jax.random.key(0)
      state = grad_fn.init(params, first, model_state=model_state, key=key)
      outputs.append(
        grad_fn.value_and_grad(
          params,
          state,
          batches[-1],
          model_state=model_state,
          key=jax.random.key(1),
        )
      )
    return outputs

  return run(*init_model(), batches)


def exact_loss(w, model_state, batch):
  """Of small integers, and halves of them: nothing is rounded in float32."""
  error = batch['image'] @ w - batch['y']
  mean = jnp.mean(batch['image'], axis=0)
  return jnp.mean(error**2), 0.5 * model_state + 0.5 * mean


@pytest.mark.parametrize('inner', ['plain', 'conadv'])
def test_a_radius_of_zero_is_the_gradient_itself(inner):
  grad_fn = {
    'plain': conadv.plain(exact_loss, has_state=True),
    'conadv': conadv.wrap(exact_loss, attack=conadv.fgsm(0.5), has_state=True),
  }[inner]
  rng = np.random.default_rng(0)
  w, statistics, image, y = (
    rng.integers(-3, 4, shape).astype(np.float32)
    for shape in (3, 3, (3, 4, 3), (3, 4))
  )

  @jax.jit
  def two_steps(w, model_state, batches):
    first, *batches = batches
    outputs = []
    for fn in (grad_fn, *(conadv.sam(grad_fn, 0.0, every=k) for k in (1, 2))):
      state = fn.init(w, [first][: fn.staleness], model_state=model_state)
      for batch in batches:
        output, grads, state = fn.value_and_grad(
          w, state, batch, model_state=model_state
        )
        outputs.append((output, grads))
      outputs.append(state)
    return outputs

  first, second, state, *of_sam = two_steps(
    w, statistics, [{'image': image[t], 'y': y[t]} for t in range(3)]
  )
  for got_first, got_second, got_state in (of_sam[:3], of_sam[3:]):
    chex.assert_trees_all_equal(
      (got_first, got_second, got_state.inner), (first, second, state)
    )


@pytest.mark.slow
def test_loss_statistics_and_queue_are_those_of_the_first_pass():
  (output, grads, state), *of_sam = first_calls(
    make_conadv(),
    *(conadv.sam(make_conadv(), 0.5, every=every) for every in (1, 2)),
    conadv.sparse_sam(
      make_conadv(),
      0.5,
      refresh_every=1,
      fisher=conadv.plain(loss_fn, has_state=True),
    ),
  )
  for got_output, got_grads, got_state in of_sam:
    chex.assert_trees_all_close(got_output, output, rtol=1e-6)
    chex.assert_trees_all_close(got_state.inner, state, rtol=1e-6)
    difference = optax.tree.norm(optax.tree.sub(got_grads, grads))
    assert difference > 0.01 * optax.tree.norm(grads)


def test_the_second_moment_is_that_of_the_groups_outside():
  def loss(w, x):
    return jnp.mean(jnp.cos(w) * x)

  def second_moment_and_gradient(grad_fn):
    w, x = jnp.float32(0.4), jnp.ones(4)
    (_, aux), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), x)
    return aux.second_moment, grads

  squares, gradient = second_moment_and_gradient(
    conadv.accumulate(conadv.sam(loss, 0.3), 2, second_moment=True)
  )
  # The groups are alike, and uphill of 0.4 is 0.4 - 0.3.
  np.testing.assert_allclose(squares, np.sin(0.1) ** 2, rtol=1e-5)
  np.testing.assert_allclose(gradient, -np.sin(0.1), rtol=1e-5)
  inside, gradient = second_moment_and_gradient(
    conadv.sam(
      conadv.accumulate(conadv.plain(loss), 2, second_moment=True), 0.3
    )
  )
  np.testing.assert_allclose(gradient, -np.sin(0.1), rtol=1e-5)
  assert inside is None


def test_a_gradient_that_overflows_is_not_reused():
  def loss(w, x):
    return jnp.sum(x * w**2)

  grad_fn = conadv.sam(loss, 0.5, every=3, reuse_weight=0.7)
  w, good = jnp.array([3.0, 4.0]), jnp.ones(2)
  step = jax.jit(grad_fn.value_and_grad)
  _, grads, state = step(w, grad_fn.init(w, []), jnp.array([jnp.inf, 1.0]))
  assert not np.isfinite(grads).all()
  for _ in range(2):
    _, grads, state = step(w, state, good)
    np.testing.assert_allclose(grads, 2 * w)


@pytest.mark.parametrize('gap_weight', [None, 0.0])
@pytest.mark.parametrize('every', [1, 2])
def test_a_part_of_a_mean_over_devices_is_shifted_by_its_share(
  every, gap_weight
):
  """Two micro-batches of two real examples and of one."""

  def loss(w, batch):
    total = jnp.sum(batch['mask'] * batch['x'] * w**2)
    return total / jnp.sum(batch['mask'])

  plain = conadv.plain(loss, denominator=lambda batch: jnp.sum(batch['mask']))
  sam = conadv.sam(plain, 0.5, every=every, gap_weight=gap_weight, axis='data')
  grad_fn = conadv.accumulate(conadv.data_parallel(sam, make_mesh(1)), 2)
  batch = {'x': jnp.ones(4), 'mask': jnp.array([1.0, 1.0, 1.0, 0.0])}
  w = jnp.float32(1.0)
  _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  # Everywhere the loss is w^2.
  np.testing.assert_allclose(grads, 2 * 1.5, rtol=1e-6)


def test_both_passes_draw_the_same():
  def noisy(w, batch, *, key):
    return jnp.sum(batch * w * jax.random.normal(key, w.shape))

  # Linear, so the gradient is the same everywhere unless the noise is not.
  batch, w = jnp.ones(3), jnp.ones(3)
  key = jax.random.key(3)
  grad_fn = conadv.sam(conadv.plain(noisy, has_key=True), 0.5)
  _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch, key=key)
  chex.assert_trees_all_close(grads, jax.random.normal(key, (3,)), rtol=1e-6)


@pytest.mark.parametrize('every', [1, 2])
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_no_gradient_and_nothing_kept_are_finite(every, dtype):
  # At 0 the gradient is zero. Along one dimension nothing is orthogonal to it.
  grad_fn = conadv.sam(
    lambda w, batch: jnp.sum(batch.astype(w.dtype) * w**2), 0.05, every=every
  )
  step = jax.jit(grad_fn.value_and_grad)
  for start in (0.0, 1.0):
    w = jnp.full((1,), start, dtype)
    state = grad_fn.init(w, [])
    for _ in range(3):
      _, grads, state = step(w, state, jnp.ones(1))
      chex.assert_tree_all_finite((grads, state))
      chex.assert_type(grads, dtype)
      if start == 0:
        chex.assert_trees_all_equal(grads, jnp.zeros(1, dtype))


def test_the_norm_is_float32_and_of_the_whole_tree():
  # A square of 300 is beyond float16.
  params = {'a': jnp.zeros(4, jnp.float16), 'b': jnp.zeros(4, jnp.float16)}

  def loss(params, batch):
    slope = sum(jnp.sum(300 * x) for x in params.values())
    curve = sum(jnp.sum(16 * x**2) for x in params.values())
    return slope + curve + 0 * batch[0]

  grad_fn = conadv.sam(loss, 1.0)
  _, grads, _ = grad_fn.value_and_grad(
    params, grad_fn.init(params, []), jnp.zeros(1, jnp.float16)
  )
  # The gradient is 300 in each of 8 places, so each moves by 1 / sqrt(8).
  # Leaf by leaf it would be 1 / 2.
  expected = jax.tree.map(lambda x: jnp.full_like(x, 300 + 32 / 8**0.5), params)
  chex.assert_trees_all_close(grads, expected, rtol=1e-3)
  at_zero = jax.tree.map(lambda x: jnp.full_like(x, 300), params)
  assert not np.array_equal(grads['a'], at_zero['a'])


def run(grad_fn, steps=4, size=32, parts=1):
  """Parameters and state after a few steps of the regression."""
  batches = [
    in_parts(make_regression(t, size=size), parts) for t in range(steps)
  ]

  @jax.jit
  def descend(params, batches):
    def step(carry, batch):
      params, state = carry
      _, grads, state = grad_fn.value_and_grad(params, state, batch)
      return (optax.tree.add_scale(params, -RATE, grads), state), None

    return jax.lax.scan(step, (params, grad_fn.init(params, [])), batches)[0]

  return descend(make_params(), jax.tree.map(lambda *x: np.stack(x), *batches))


@pytest.mark.parametrize('every', [1, 2])
def test_on_devices_each_perturbs_by_its_own_gradient(every):
  got, state = run(
    conadv.data_parallel(conadv.sam(plain_loss, 0.2, every=every), make_mesh(8))
  )
  grad_fn = conadv.sam(plain_loss, 0.2, every=every)
  step = jax.jit(grad_fn.value_and_grad)
  params = make_params()
  states = [grad_fn.init(params, []) for _ in range(8)]
  for t in range(4):
    batch = make_regression(t, size=32)
    every_grads = []
    for k in range(8):
      part = jax.tree.map(lambda x, k=k: x[4 * k : 4 * k + 4], batch)
      _, grads, states[k] = step(params, states[k], part)
      every_grads.append(grads)
    mean = jax.tree.map(lambda *g: np.mean(g, axis=0), *every_grads)
    params = jax.tree.map(lambda w, g: w - RATE * g, params, mean)
  chex.assert_trees_all_close(got, params, **CLOSE)
  if every > 1:
    own = [s.direction.value for s in states]
    stacked = jax.tree.map(lambda *v: jnp.stack(v), *own)
    chex.assert_trees_all_close(state.direction.value, stacked, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize(
  'kwargs',
  [{'every': 1}, {'every': 3}, {'adaptive': 'layer', 'gap_weight': 0.5}],
)
def test_with_an_axis_devices_perturb_as_one(kwargs):
  every = kwargs.get('every', 1)
  together = conadv.sam(plain_loss, 0.2, axis='data', **kwargs)
  got, state = run(conadv.data_parallel(together, make_mesh(8)))
  whole, expected = run(conadv.sam(plain_loss, 0.2, **kwargs))
  chex.assert_trees_all_close(got, whole, **CLOSE)
  if every > 1:
    chex.assert_trees_all_close(
      state.direction, expected.direction.value, **CLOSE
    )
  if every > 1:
    apart = conadv.sam(plain_loss, 0.2, **kwargs)
    alone, _ = run(conadv.data_parallel(apart, make_mesh(8)))
    difference = optax.tree.norm(optax.tree.sub(alone, whole))
    assert difference > 1e-3, 'Otherwise this could not tell the two apart.'


def test_with_an_axis_statistics_stay_those_of_a_device():
  # A step that is parallel inside of `sam` has one gradient to perturb by.
  plain = conadv.plain(loss_fn, has_state=True)
  inside = conadv.data_parallel(
    conadv.sam(plain, 0.5, axis='data'), make_mesh(8)
  )
  outside = conadv.sam(conadv.data_parallel(plain, make_mesh(8)), 0.5)
  chex.assert_trees_all_close(*first_calls(inside, outside, size=32), **CLOSE)


def test_micro_batches_are_devices():
  grad_fn = conadv.sam(plain_loss, 0.2, every=2)
  chex.assert_trees_all_close(
    run(conadv.accumulate(grad_fn, 4)),
    run(conadv.data_parallel(grad_fn, make_mesh(4)), parts=4),
    **CLOSE,
  )


@pytest.mark.parametrize('every', [1, 3])
def test_the_steps_between_take_one_gradient(every):
  points = []

  def seen(params, batch):
    jax.debug.callback(lambda x: points.append(x), params['norm']['scale'])
    return plain_loss(params, batch)

  run(conadv.sam(seen, 0.2, every=every), steps=6, size=8)
  jax.effects_barrier()
  assert len(points) == 6 + 6 // every


def flops(grad_fn):
  params, model_state = init_model()
  batch = make_batch(0)
  state = jax.eval_shape(
    lambda: grad_fn.init(
      params,
      [batch] * grad_fn.staleness,
      model_state=model_state,
      key=jax.random.key(0),
    )
  )
  step = jax.jit(
    lambda params, state, batch: grad_fn.value_and_grad(
      params, state, batch, model_state=model_state, key=jax.random.key(0)
    )
  )
  compiled = step.lower(params, state, batch).compile()
  return compiled.cost_analysis()['flops']


@pytest.mark.slow
def test_the_second_pass_attacks_nothing():
  # Its queue is thrown away, and so is the work for it.
  plain = flops(conadv.plain(loss_fn, has_state=True))
  concurrent = flops(make_conadv())
  both = flops(conadv.sam(make_conadv(), 0.1))
  # Attack, clean and adversarial pass; then the latter two once more.
  assert both - concurrent < 2.2 * plain


@pytest.mark.parametrize(
  ('arguments', 'parts'),
  [
    ({'radius': -0.1}, ('`radius`', '-0.1')),
    ({'every': 0}, ('`every`', 'every=0')),
    ({'penalty': 1.2}, ('`penalty`', '1.2', 'penalty=c / radius')),
    ({'penalty': -0.1}, ('`penalty`', '-0.1')),
    ({'penalty': float('nan')}, ('`penalty`', 'nan')),
    ({'reuse_weight': -1.0}, ('`reuse_weight`',)),
    ({'gap_weight': -1.0}, ('`gap_weight`',)),
    ({'adaptive': 'layers'}, ('`adaptive`', "'layer' or 'element'")),
  ],
)
def test_wrong_arguments(arguments, parts):
  grad_fn = conadv.plain(loss_fn)
  with pytest.raises(ValueError) as error:
    conadv.sam(grad_fn, **{'radius': 0.1, **arguments})
  for part in parts:
    assert part in str(error.value)


@pytest.mark.parametrize(
  ('arguments', 'parts'),
  [
    ({'every': 2.0}, ('`every`', 'float')),
    ({'every': True}, ('`every`', 'bool')),
    ({'radius': optax.constant_schedule(0.1)}, ('`radius`', 'schedule(count)')),
    ({'penalty': lambda _: 0.5}, ('`penalty`', 'schedule(count)')),
  ],
)
def test_arguments_of_a_wrong_type(arguments, parts):
  with pytest.raises(TypeError) as error:
    conadv.sam(plain_loss, **{'radius': 0.1, **arguments})
  for part in parts:
    assert part in str(error.value)


def test_an_axis_without_devices_is_an_error():
  grad_fn = conadv.sam(plain_loss, 0.1, axis='data')
  params = make_params()
  with pytest.raises(ValueError, match=r'conadv\.data_parallel'):
    jax.eval_shape(
      grad_fn.value_and_grad,
      params,
      grad_fn.init(params, []),
      make_regression(0),
    )


def test_what_looksam_reuses_is_no_rounding_where_there_is_a_denominator():
  # The gradient is the parameters, so that the one uphill is parallel to it.
  params = jax.random.normal(jax.random.key(0), (1000,)).astype(jnp.bfloat16)
  batch = {'w': jnp.ones(4)}

  def loss(params, batch):
    half = 0.5 * jnp.sum(params.astype(jnp.float32) ** 2)
    return half * jnp.mean(batch['w'])

  grad_fn = conadv.sam(
    conadv.plain(loss, denominator=lambda batch: jnp.sum(batch['w'])),
    0.5,
    every=2,
  )
  grad_fn = conadv.accumulate(grad_fn, 2)
  state = grad_fn.init(params, [])
  for _ in range(2):
    _, grads, state = grad_fn.value_and_grad(params, state, batch)
  chex.assert_trees_all_close(
    grads.astype(jnp.float32), params.astype(jnp.float32), rtol=0.02
  )


@pytest.mark.parametrize(
  'method',
  [conadv.sam, functools.partial(conadv.sparse_sam, refresh_every=1)],
)
def test_no_parameters_have_no_gradient(method):
  grad_fn = method(lambda params, batch: jnp.mean(batch), 0.1)
  key = jax.random.key(0)
  (loss, _), grads, _ = grad_fn.value_and_grad(
    {}, grad_fn.init({}, [], key=key), jnp.ones(3), key=key
  )
  assert (float(loss), grads) == (1.0, {})


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize(
  'options', [{'every': 2}, {'gap_weight': 0.1}], ids=['every', 'gap']
)
def test_devices_of_one_axis_differ_as_their_gradients_do(options, masked):
  rng = np.random.default_rng(0)
  x = np.float32(rng.normal(size=(8, 3)))
  mask, scales = np.ones(8, np.float32), np.float32([[1, 2, 4]])
  if masked:
    mask[[1, 5, 6, 7]] = 0
  loss = conadv.plain(
    lambda w, batch: (
      jnp.sum(batch['mask'][:, None] * scales * (batch['x'] - w[None]) ** 2)
      / jnp.sum(batch['mask'])
    ),
    denominator=lambda batch: jnp.sum(batch['mask']),
  )
  grad_fn = conadv.data_parallel(
    conadv.sam(loss, 0.1, axis='data', **options),
    make_mesh(4),
    second_moment=True,
  )
  w, batch = jnp.ones(3), {'x': x, 'mask': mask}
  state = grad_fn.init(w, [])
  shares = mask.reshape(4, 2).sum(1) / mask.reshape(4, 2).sum(1).mean()
  sums = (
    np.where(mask[:, None] > 0, 2 * scales * (1 - x), 0).reshape(4, 2, 3).sum(1)
  )
  own = sums / np.maximum(mask.reshape(4, 2).sum(1), 1)[:, None]
  mean = (shares[:, None] * own).mean(0)
  for _ in range(2):
    (_, aux), grads, state = grad_fn.value_and_grad(w, state, batch)
    assert np.abs(grads - mean).max() > 0.01
    apart = own + np.asarray(grads - mean)
    np.testing.assert_allclose(
      aux.second_moment, (shares[:, None] * apart**2).mean(0), rtol=1e-4
    )
