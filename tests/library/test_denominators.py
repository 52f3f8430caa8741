"""Means over a mask: any groups give the gradient of the whole batch."""

import chex
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from error_checks import assert_says
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType
from meshes import make_mesh

import conadv_optax as conadv

BATCH, TOKENS, FEATURES, EPSILON, RATE = 12, 4, 3, 0.1, 0.1
WEIGHTS = {'main': 0.3, 'adversarial': 0.7}


def loss_fn(w, batch):
  """The mean over real tokens; 0 / 0 where there is none."""
  error = (batch['x'] @ w - batch['y']) * batch['mask']
  return jnp.sum(error**2) / jnp.sum(batch['mask'])


def denominator(batch):
  return jnp.sum(batch['mask'])


class Naive:
  """One branch in NumPy, in float64."""

  def __init__(self, w, batch, part=slice(None)):
    x, y, mask = (np.float64(batch[k])[part] for k in ('x', 'y', 'mask'))
    error = (x @ w - y) * mask
    self.weight = mask.sum()
    self.total = (error**2).sum()
    self.gradient = 2 * np.einsum('bt,btf->f', error, x)
    self.moved = x + EPSILON * np.sign(error[..., None] * w)


def naive_steps(batches, tau, *, parts=(slice(None),), reuse=False):
  """Parameters and loss after each step of ConAdv on the whole batch."""
  w, history = START.astype(np.float64), []

  def attack(w, batch):
    moved = np.array(batch['x'], np.float64)
    for part in parts:
      moved[part] = Naive(w, batch, part).moved
    return {**batch, 'x': moved}

  waiting = [(batch, attack(w, batch)) for batch in batches[:tau]]
  for batch in batches[tau:]:
    waiting.append((batch, attack(w, batch)))
    clean, hit = waiting.pop(0)
    main = Naive(w, batch if reuse else clean)
    hits = [Naive(w, hit, part) for part in parts]
    seen = sum(h.weight for h in hits)
    gradient = WEIGHTS['main'] * main.gradient / main.weight
    gradient += WEIGHTS['adversarial'] * sum(h.gradient for h in hits) / seen
    loss = WEIGHTS['main'] * main.total / main.weight
    loss += WEIGHTS['adversarial'] * sum(h.total for h in hits) / seen
    w = w - RATE * gradient
    history.append((w, loss))
  return history


rng = np.random.default_rng(0)
START = rng.normal(size=FEATURES).astype(np.float32)
BATCHES = [
  {
    'x': rng.normal(size=(BATCH, TOKENS, FEATURES)).astype(np.float32),
    'y': rng.normal(size=(BATCH, TOKENS)).astype(np.float32),
  }
  for _ in range(4)
]


GROUPS = {
  'one': lambda fn: fn,
  'micro-batches': lambda fn: conadv.accumulate(fn, 4),
  'as many as examples': lambda fn: conadv.accumulate(fn, BATCH),
  'devices': lambda fn: conadv.data_parallel(fn, make_mesh(4)),
  'explicit': lambda fn: conadv.data_parallel(
    fn, make_mesh(4, kind=AxisType.Explicit)
  ),
  'two axes': lambda fn: conadv.data_parallel(
    fn, make_mesh(2, 2, names=('data', 'fsdp')), axis=('data', 'fsdp')
  ),
  'both': lambda fn: conadv.data_parallel(
    conadv.accumulate(fn, 3), make_mesh(4)
  ),
  'the other way round': lambda fn: conadv.accumulate(
    conadv.data_parallel(fn, make_mesh(4)), 3
  ),
  'roles': lambda fn: conadv.concurrent(fn, make_mesh(2, 3)),
  'sam within': lambda fn: conadv.accumulate(conadv.sam(fn, 0.0), 4),
  'extrapolated': lambda fn: conadv.data_parallel(
    conadv.extrapolate(fn, 0.0), make_mesh(4)
  ),
}


def compiled(kind, groups):
  grad_fn = GROUPS[groups](
    conadv.wrap(
      loss_fn,
      attack=conadv.fgsm(EPSILON),
      inputs='x',
      weights=WEIGHTS,
      denominator=denominator,
      **kind,
    )
  )

  @jax.jit
  def run(batches):
    w, tau = jnp.asarray(START), grad_fn.staleness

    def step(carry, batch):
      w, state = carry
      (loss, aux), grads, state = grad_fn.value_and_grad(w, state, batch)
      w -= RATE * grads
      parts = sum(WEIGHTS[name] * x for name, x in aux.losses.items())
      return (w, state), (w, loss, parts)

    rest = jax.tree.map(lambda *x: jnp.stack(x), *batches[tau:])
    return jax.lax.scan(step, (w, grad_fn.init(w, batches[:tau])), rest)[1]

  return run


# A whole group of padding, of the first four, is no rare draw.
MASKS = hnp.arrays(
  np.float32, (len(BATCHES), BATCH, TOKENS), elements=st.sampled_from([0, 1])
).map(lambda mask: mask * (np.arange(BATCH) % 4 > mask[0, 0, 0])[:, None])


def check(run, naive, masks, *, rtol=2e-4):
  masks[:, 3] = 1  # Something is real in every batch.
  batches = [
    {**batch, 'mask': mask} for batch, mask in zip(BATCHES, masks, strict=True)
  ]
  w, loss, parts = run(batches)
  expected_w, expected_loss = zip(*naive(batches), strict=True)
  np.testing.assert_allclose(w, expected_w, rtol=rtol, atol=2e-5)
  np.testing.assert_allclose(loss, expected_loss, rtol=rtol)
  np.testing.assert_allclose(parts, expected_loss, rtol=rtol)


# Micro-batches and devices alone have a test of every staleness.
@pytest.mark.parametrize(
  'groups',
  [name for name in GROUPS if name not in ('micro-batches', 'devices')],
)
def test_groups_give_the_gradient_of_the_whole_batch(groups):
  run = compiled({'staleness': 1}, groups)

  @settings(max_examples=15, deadline=None)
  @given(MASKS)
  def holds(masks):
    check(run, lambda batches: naive_steps(batches, 1), masks)

  holds()


@pytest.mark.parametrize('groups', ['micro-batches', 'devices'])
@pytest.mark.parametrize(
  'kind',
  [
    {'staleness': 0},
    {'staleness': 2},
    {'staleness': 1, 'reuse_gradient': True},
  ],
  ids=str,
)
def test_every_branch_counts_by_its_own_batch(kind, groups):
  run, tau = compiled(kind, groups), kind['staleness']
  reuse = 'reuse_gradient' in kind

  @settings(max_examples=10, deadline=None)
  @given(MASKS)
  def holds(masks):
    check(run, lambda batches: naive_steps(batches, tau, reuse=reuse), masks)

  holds()


def test_a_part_of_each_group_is_attacked():
  run = compiled({'staleness': 1, 'adversarial_fraction': 0.5}, 'devices')
  # Three examples a device, of which one is attacked.
  parts = [slice(i, i + 1) for i in (0, 3, 6, 9)]

  @settings(max_examples=10, deadline=None)
  @given(MASKS)
  def holds(masks):
    masks[:, 0] = 1
    check(run, lambda batches: naive_steps(batches, 1, parts=parts), masks)

  holds()


@pytest.mark.parametrize('groups', ['micro-batches', 'devices', 'both'])
def test_fast_advprop_counts_by_what_went_in(groups):
  grad_fn = GROUPS[groups](
    conadv.fast_advprop(
      loss_fn,
      attack=conadv.fgsm(EPSILON),
      inputs='x',
      adversarial_fraction=0.5,
      attack_weight=0.25,
      denominator=denominator,
    )
  )
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  batch['mask'][:8, 1:] = 0
  batch['mask'][2:6] = 0
  if groups == 'both':  # Micro-batches of one example cannot be parted.
    with pytest.raises(ValueError, match='two examples or more'):
      grad_fn.value_and_grad(START, grad_fn.init(START, []), batch)
    return
  # The first of the three examples of a group is attacked: of each device's
  # part, or of micro-batch k, which begins with example k.
  firsts = [0, 1, 2, 3] if groups == 'micro-batches' else [0, 3, 6, 9]
  attacked = np.isin(np.arange(BATCH), firsts)
  (loss, _), grads, _ = jax.jit(grad_fn.value_and_grad)(
    START, grad_fn.init(START, []), batch
  )
  w = START.astype(np.float64)
  rest, first = (Naive(w, batch, part) for part in (~attacked, attacked))
  moved = {**batch, 'x': np.where(attacked[:, None, None], 0, batch['x'])}
  moved['x'][attacked] = first.moved
  hit = Naive(w, moved, attacked)
  seen = rest.weight + first.weight
  expected = rest.gradient + 0.25 * first.gradient + 0.75 * hit.gradient
  total = rest.total + 0.25 * first.total + 0.75 * hit.total
  np.testing.assert_allclose(grads, expected / seen, rtol=1e-4)
  np.testing.assert_allclose(loss, total / seen, rtol=1e-4)


def with_statistics(w, mean, batch):
  """A running mean over real tokens, and outputs of the user's own."""
  real = jnp.sum(batch['mask'])
  new = jnp.einsum('bt,btf->f', batch['mask'], batch['x']) / real
  aux = {'rate': jnp.sum(batch['mask'] * batch['y']) / real, 'tokens': real}
  aux['tokens'] = aux['tokens'].astype(jnp.int32)
  return loss_fn(w, batch), (0.5 * mean + 0.5 * new, aux)


@pytest.mark.parametrize('groups', ['micro-batches', 'devices', 'roles'])
def test_statistics_and_metrics_are_averaged_likewise(groups):
  staleness = 1 if groups == 'roles' else 0
  wrapped = conadv.wrap(
    with_statistics,
    staleness,
    attack=conadv.fgsm(EPSILON),
    inputs='x',
    denominator=denominator,
    has_state=True,
    has_aux=True,
  )
  grad_fn = GROUPS[groups](wrapped)
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  batch['mask'][:5] = 0
  batch['mask'][7, 1:] = 0
  mean = jnp.ones(FEATURES)

  @jax.jit
  def run(batch):
    state = grad_fn.init(START, [batch] * staleness, model_state=mean)
    return grad_fn.value_and_grad(START, state, batch, model_state=mean)[0][1]

  aux, mask = run(batch), np.float64(batch['mask'])
  new = np.einsum('bt,btf->f', mask, batch['x']) / mask.sum()
  np.testing.assert_allclose(aux.model_state, 0.5 + 0.5 * new, rtol=1e-5)
  rate = (mask * batch['y']).sum() / mask.sum()
  np.testing.assert_allclose(aux.aux['main']['rate'], rate, rtol=1e-5)
  assert int(aux.aux['main']['tokens']) == mask.sum()
  chex.assert_tree_all_finite(aux)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('groups', 'dtype'),
  [
    ('micro-batches', jnp.bfloat16),
    ('devices', jnp.float16),
    ('both', jnp.bfloat16),
    ('both', jnp.float32),
  ],
)
def test_gradients_keep_the_dtype_of_the_parameters(groups, dtype):
  def loss(w, batch):
    error = batch['x'].astype(dtype) @ w * batch['mask'].astype(dtype)
    return jnp.sum(error.astype(jnp.float32)) / denominator(batch)

  grad_fn = GROUPS[groups](conadv.plain(loss, denominator=denominator))
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  batch['mask'][:7] = 0
  w = jnp.asarray(START, dtype)
  _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  assert grads.dtype == dtype
  expected = np.einsum('bt,btf->f', batch['mask'], batch['x'])
  np.testing.assert_allclose(
    np.float64(grads),
    expected / batch['mask'].sum(),
    rtol=20 * float(jnp.finfo(dtype).eps),
    atol=20 * float(jnp.finfo(dtype).eps),
  )


@pytest.mark.parametrize('groups', [1, 64, 1024])
def test_equal_groups_have_a_second_moment_of_their_square(groups):
  """Whatever their number, so that `scale_by_gsnr` leaves them alone."""
  grad_fn = conadv.accumulate(
    lambda w, x: jnp.mean(x @ w), groups, second_moment=True
  )
  w = jnp.asarray(START)
  x = jnp.tile(jnp.array([[0.1, -1.7, 3e-5]]), (groups, 1))
  (_, aux), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), x)
  np.testing.assert_allclose(
    aux.second_moment, np.square(grads), rtol=4 * 2.0**-23
  )
  tx = conadv.scale_by_gsnr()
  updates, _ = tx.update(grads, tx.init(w), second_moment=aux.second_moment)
  np.testing.assert_array_equal(updates, grads)


def test_a_second_moment_is_a_mean_by_the_same_weights():
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  batch['mask'][:3] = 0  # The first device has padding alone.
  batch['mask'][3:6, 2:] = 0
  grad_fn = conadv.data_parallel(
    conadv.plain(loss_fn, denominator=denominator),
    make_mesh(4),
    second_moment=True,
  )
  (_, aux), grads, _ = grad_fn.value_and_grad(
    START, grad_fn.init(START, []), batch
  )
  w = START.astype(np.float64)
  parts = [Naive(w, batch, slice(i, i + 3)) for i in (3, 6, 9)]
  total = sum(part.weight for part in parts)
  of_groups = [part.gradient / part.weight for part in parts]
  expected = sum(
    part.weight / total * g**2 for part, g in zip(parts, of_groups, strict=True)
  )
  np.testing.assert_allclose(aux.second_moment, expected, rtol=1e-4)
  whole = sum(part.gradient for part in parts) / total
  np.testing.assert_allclose(grads, whole, rtol=1e-4)


@pytest.mark.parametrize(
  'wrong', [lambda batch: batch['mask'], lambda batch: 1j, lambda batch: None]
)
def test_a_denominator_that_is_no_real_scalar(wrong):
  grad_fn = conadv.accumulate(conadv.plain(loss_fn, denominator=wrong), 2)
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  with pytest.raises(TypeError) as error:
    grad_fn.value_and_grad(START, grad_fn.init(START, []), batch)
  assert_says(error, '`denominator(batch)`', "batch['mask'].sum()")


@pytest.mark.parametrize(
  ('groups', 'dtype', 'masked'),
  [
    ('micro-batches', jnp.float64, False),
    ('micro-batches', jnp.float32, True),
    ('devices', jnp.float32, False),
    ('devices', jnp.float64, True),
  ],
)
def test_second_moments_with_64_bits_enabled(groups, dtype, masked):
  with jax.enable_x64(True):
    loss = conadv.plain(
      lambda w, batch: loss_fn(
        w, jax.tree.map(lambda x: x.astype(dtype), batch)
      ),
      denominator=denominator if masked else None,
    )
    grad_fn = {
      'micro-batches': lambda: conadv.accumulate(loss, 4, second_moment=True),
      'devices': lambda: conadv.data_parallel(
        loss, make_mesh(4), second_moment=True
      ),
    }[groups]()
    batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
    w = jnp.asarray(START, dtype)
    (_, aux), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
    assert grads.dtype == aux.second_moment.dtype == dtype
  parts = np.arange(BATCH).reshape(4, 3)
  if groups == 'micro-batches':
    parts = np.arange(BATCH).reshape(3, 4).T
  each = [Naive(START.astype(np.float64), batch, part) for part in parts]
  squares = [(part.gradient / part.weight) ** 2 for part in each]
  np.testing.assert_allclose(
    aux.second_moment, np.mean(squares, axis=0), rtol=1e-4
  )


@pytest.mark.parametrize('groups', ['micro-batches', 'devices', 'roles'])
def test_a_branch_of_padding_alone_adds_nothing(groups):
  """The attacked examples of every group are padding; the rest are not."""
  grad_fn = GROUPS[groups](
    conadv.wrap(
      loss_fn,
      attack=conadv.fgsm(EPSILON),
      inputs='x',
      adversarial_fraction=0.25,
      weights=WEIGHTS,
      denominator=denominator,
    )
  )
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  firsts = [0, 1, 2, 3] if groups == 'micro-batches' else [0, 3, 6, 9]
  batch['mask'][[*firsts, 11]] = 0
  state = jax.jit(grad_fn.init)(START, [batch])
  _, grads, _ = jax.jit(grad_fn.value_and_grad)(START, state, batch)
  main = Naive(START.astype(np.float64), batch)
  expected = WEIGHTS['main'] * main.gradient / main.weight
  np.testing.assert_allclose(grads, expected, rtol=1e-4)


def test_a_batch_of_padding_alone_is_no_gradient():
  batch = {**BATCHES[0], 'mask': np.zeros((BATCH, TOKENS), np.float32)}
  for groups in ('micro-batches', 'devices', 'both'):
    grad_fn = GROUPS[groups](conadv.plain(loss_fn, denominator=denominator))
    _, grads, _ = grad_fn.value_and_grad(START, grad_fn.init(START, []), batch)
    np.testing.assert_array_equal(grads, 0)


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_padding_alone_is_nothing_without_groups_too(dtype):
  """Of a loss that is 0 / 0 there, and of an average that it moves."""

  def moving(w, average, batch):
    total = jnp.sum(batch['mask'])
    loss = jnp.sum(jnp.square(w * batch['x']) * batch['mask']) / total
    mean = jnp.sum(batch['x'] * batch['mask']) / total
    return loss, (0.5 * (average + mean), {'mean': mean})

  options = {
    'has_state': True,
    'has_aux': True,
    'denominator': lambda batch: jnp.sum(batch['mask']),
  }
  plain = conadv.plain(moving, **options)
  w, average = jnp.asarray(2.0, dtype), jnp.asarray(1.0, dtype)
  batch = {'x': jnp.full(4, 3.0, dtype), 'mask': jnp.zeros(4, dtype)}
  (loss, aux), grads, _ = plain.value_and_grad(
    w, plain.init(w, []), batch, model_state=average
  )
  assert (float(loss), float(grads), float(aux.model_state)) == (0, 0, 1)
  assert {
    grads.dtype,
    aux.model_state.dtype,
    aux.aux['main']['mean'].dtype,
  } == {jnp.dtype(dtype)}
  # The attacked half is padding, the other is not.
  half = conadv.wrap(
    moving,
    0,
    attack=conadv.fgsm(0.0),
    inputs='x',
    adversarial_fraction=0.5,
    weights={'main': 1.0, 'adversarial': 1.0},
    **options,
  )
  batch['mask'] = jnp.asarray([0, 0, 1, 1], dtype)
  (loss, aux), grads, _ = half.value_and_grad(
    w, half.init(w, []), batch, model_state=average
  )
  # (2 * 3)^2 and its derivative, and half of the way from 1 to 3.
  assert (float(loss), float(grads), float(aux.model_state)) == (36, 36, 2)


@pytest.mark.parametrize(
  'inner',
  [
    lambda fn: fn,
    lambda fn: conadv.accumulate(fn, 3, second_moment=True),
  ],
)
def test_padding_alone_has_no_second_moment(inner):
  plain = conadv.plain(loss_fn, denominator=denominator)
  within = inner(plain)
  grad_fn = conadv.data_parallel(
    within, make_mesh(4), second_moment=within is plain
  )
  batch = {**BATCHES[0], 'mask': np.zeros((BATCH, TOKENS), np.float32)}
  (_, aux), grads, _ = grad_fn.value_and_grad(
    START, grad_fn.init(START, []), batch
  )
  np.testing.assert_array_equal(aux.second_moment, np.zeros_like(START))
  tx = conadv.scale_by_gsnr()
  updates, _ = tx.update(
    grads, tx.init(START), START, second_moment=aux.second_moment
  )
  np.testing.assert_array_equal(updates, np.zeros_like(START))


def unequal(kind, **arguments):
  """Losses whose branches have other shares, and what a group's share is."""

  def mean(w, batch):
    return jnp.sum(w * batch['mask']) / jnp.sum(batch['mask'])

  options = {
    'attack': conadv.fgsm(0.0),
    'inputs': 'x',
    'adversarial_fraction': 0.25,
    'denominator': lambda batch: jnp.sum(batch['mask']),
  }
  if kind == 'fast_advprop':
    return conadv.fast_advprop(mean, **options)
  arguments = {'weights': {'main': 1.0, 'adversarial': 0.0}, **arguments}
  return conadv.wrap(mean, 0, **options, **arguments)


@pytest.mark.parametrize('kind', ['wrap', 'fast_advprop'])
@pytest.mark.parametrize('groups', ['micro-batches', 'devices'])
def test_groups_that_agree_do_so_whatever_their_branches_share(kind, groups):
  """One group has four examples, the other the one that is attacked."""
  fn = unequal(kind)
  grad_fn = {
    'micro-batches': lambda: conadv.accumulate(fn, 2, second_moment=True),
    'devices': lambda: conadv.data_parallel(
      fn, make_mesh(2), second_moment=True
    ),
  }[groups]()
  mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
  if groups == 'micro-batches':
    mask = mask.reshape(2, 4).T.ravel()
  batch = {'x': np.zeros(8, np.float32), 'mask': mask}
  w = jnp.float32(3.0)
  (_, aux), grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
  # The gradient of each example is 1.
  np.testing.assert_allclose((grads, aux.second_moment), 1.0, rtol=1e-6)


def test_groups_agree_in_a_step_whose_attack_has_no_turn():
  """The main branch then has the weight of both, in a group's share too."""
  fn = unequal('wrap', weights={'main': 1.0, 'adversarial': 1.0}, every=2)
  grad_fn = conadv.accumulate(fn, 2, second_moment=True)
  # Four examples in one group, in the other one, which is the attacked one.
  mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32).reshape(2, 4).T.ravel()
  batch = {'x': np.zeros(8, np.float32), 'mask': mask}
  w = jnp.float32(3.0)
  state = grad_fn.init(w, [])
  for _ in range(2):
    (_, aux), grads, state = grad_fn.value_and_grad(w, state, batch)
    np.testing.assert_allclose(
      (grads, aux.second_moment), (2.0, 4.0), rtol=1e-6
    )


def test_a_denominator_that_is_no_number_shows():
  grad_fn = conadv.plain(loss_fn, denominator=denominator)
  mask = np.ones((BATCH, TOKENS), np.float32)
  mask[0, 0] = np.nan
  (loss, _), grads, _ = grad_fn.value_and_grad(
    START, grad_fn.init(START, []), {**BATCHES[0], 'mask': mask}
  )
  assert np.isnan(loss)
  assert np.isnan(grads).all()


@pytest.mark.parametrize('kind', ['wrap', 'fast_advprop'])
def test_a_group_goes_ahead_as_far_whatever_its_branches_share(kind):
  grad_fn = conadv.data_parallel(
    conadv.extrapolate(unequal(kind), 1.0), make_mesh(2)
  )
  mask = np.array([1, 1, 1, 1, 1, 0, 0, 0], np.float32)
  batch = {'x': np.zeros(8, np.float32), 'mask': mask}
  w = jnp.float32(3.0)
  state = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)[2]
  np.testing.assert_allclose(state.past.value, np.ones(2), rtol=1e-6)


@pytest.mark.parametrize('kind', ['wrap', 'fast_advprop'])
def test_a_group_by_itself_with_64_bits_enabled(kind):
  with jax.enable_x64(True):
    grad_fn = conadv.data_parallel(
      conadv.extrapolate(unequal(kind), 0.0), make_mesh(2)
    )
    batch = {'x': np.zeros(8), 'mask': np.ones(8)}
    w = jnp.float64(3.0)
    _, grads, _ = grad_fn.value_and_grad(w, grad_fn.init(w, []), batch)
    assert (float(grads), grads.dtype) == (1.0, jnp.float64)


@pytest.mark.parametrize(
  'made',
  [
    lambda mean, **options: conadv.wrap(
      mean, 0, every=2, weights={'main': 0.1, 'adversarial': 0.9}, **options
    ),
    lambda mean, **options: conadv.fast_advprop(
      mean, attack_weight=0.3, **options
    ),
  ],
)
def test_shares_and_weights_keep_64_bits(made):
  """Shares of 3 and 7 of 10, which float32 rounds in the eighth digit."""

  def mean(w, batch):
    return jnp.sum(w * batch['mask']) / jnp.sum(batch['mask'])

  with jax.enable_x64(True):
    fn = made(
      mean,
      attack=conadv.fgsm(0.0),
      inputs='x',
      denominator=lambda batch: jnp.sum(batch['mask']),
    )
    grad_fn = conadv.data_parallel(fn, make_mesh(2))
    mask = np.array([1] * 3 + [0] * 4 + [1] * 7, np.float64)
    w = jnp.float64(3.0)
    _, grads, _ = grad_fn.value_and_grad(
      w, grad_fn.init(w, []), {'x': np.zeros(14), 'mask': mask}
    )
  np.testing.assert_allclose(grads, 1.0, rtol=1e-14)


def test_statistics_of_padding_alone_stay_as_they_are():
  batch = {**BATCHES[0], 'mask': np.zeros((BATCH, TOKENS), np.float32)}
  padded_first = {**batch, 'mask': np.ones((BATCH, TOKENS), np.float32)}
  padded_first['mask'][[0, 1, 2, 3]] = 0
  mean = jnp.full(FEATURES, 5.0)
  both = conadv.dual_bn.Branched(mean, {'adversarial': mean})
  shared = {'has_state': True, 'has_aux': True, 'denominator': denominator}
  plain = conadv.plain(with_statistics, **shared)
  wrapped = conadv.wrap(
    with_statistics,
    0,
    attack=conadv.fgsm(EPSILON),
    inputs='x',
    adversarial_fraction=0.25,
    **shared,
  )

  def state_after(grad_fn, batch, state):
    memory = grad_fn.init(START, [], model_state=state)
    return grad_fn.value_and_grad(START, memory, batch, model_state=state)[0][
      1
    ].model_state

  for groups in ('micro-batches', 'devices'):
    found = state_after(GROUPS[groups](plain), batch, mean)
    np.testing.assert_array_equal(found, mean)
  # What is attacked is padding in every micro-batch, and the rest is not.
  found = state_after(GROUPS['micro-batches'](wrapped), padded_first, both)
  np.testing.assert_array_equal(found.branches['adversarial'], mean)
  seen = padded_first['x'][4:].mean(axis=(0, 1))
  np.testing.assert_allclose(found.main, 2.5 + 0.5 * seen, rtol=1e-5)


@pytest.mark.parametrize('direction', ['current', 'past'])
def test_each_group_goes_ahead_by_its_own_gradient(direction):
  """However few of its tokens are real."""
  ahead = 0.5
  grad_fn = conadv.data_parallel(
    conadv.extrapolate(
      conadv.plain(loss_fn, denominator=denominator), ahead, direction=direction
    ),
    make_mesh(4),
  )
  batch = {**BATCHES[0], 'mask': np.ones((BATCH, TOKENS), np.float32)}
  batch['mask'][[0, 1, 5]] = 0
  batch['mask'][3:5, 1:] = 0
  state = grad_fn.init(START, [])
  for _ in range(1 if direction == 'current' else 2):
    _, grads, state = grad_fn.value_and_grad(START, state, batch)
  w, total = START.astype(np.float64), 0
  parts = [slice(i, i + 3) for i in (0, 3, 6, 9)]
  for part in parts:
    here = Naive(w, batch, part)
    there = Naive(w - ahead * here.gradient / here.weight, batch, part)
    total = total + there.gradient
  np.testing.assert_allclose(grads, total / batch['mask'].sum(), rtol=1e-4)
