"""LARS as others write it, in NumPy, against the arguments that the docs give.

Each function is one step of a package on one leaf: from the weights, the
momentum, the gradient and the rate to the new weights and momentum.
"""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import conadv_optax as conadv

PAGE = Path(__file__).parents[2] / 'docs' / 'how_to_choose.md'
# The last is above 1, where clipping shows.
RATES = np.array([0.1, 0.5, 2.0, 3.0])
DECAY, MOMENTUM, TRUST, EPS = 0.03, 0.9, 0.2, 1e-8
size = np.linalg.norm


def sgd(w, v, d, rate, nesterov=False):
  """PyTorch's: the rate stands outside of the momentum."""
  v = MOMENTUM * v + d
  return w - rate * (d + MOMENTUM * v if nesterov else v), v


def timm(w, v, g, rate, *, trust_clip=False, **kwargs):
  ratio = 1.0
  if size(w) > 0 and size(g) > 0:
    ratio = TRUST * size(w) / (size(g) + size(w) * DECAY + EPS)
  if trust_clip:
    ratio = min(ratio / rate, 1.0)
  return sgd(w, v, (g + DECAY * w) * ratio, rate, **kwargs)


def lightly(w, v, g, rate, **kwargs):
  d = g
  if size(w) != 0 and size(g) != 0:
    ratio = TRUST * size(w) / (size(g) + size(w) * DECAY + EPS)
    d = (g + DECAY * w) * ratio
  return sgd(w, v, d, rate, **kwargs)


def pytorch_optimizer(w, v, g, rate, **kwargs):
  d = g
  if w.ndim > 1:
    below = size(g) + DECAY * size(w)
    ratio = TRUST * size(w) / below if size(w) > 0 and below > 0 else 1.0
    d = (g + DECAY * w) * ratio
  return sgd(w, v, d, rate, **kwargs)


def apex(w, v, g, rate, *, clip=True):
  d = g
  if size(w) != 0 and size(g) != 0:
    ratio = TRUST * size(w) / (size(g) + size(w) * DECAY + EPS)
    d = (g + DECAY * w) * (min(ratio / rate, 1.0) if clip else ratio)
  return sgd(w, v, d, rate)


def simclr(w, v, g, rate, *, is_matrix=True, classic=True, nesterov=False):
  ratio, d = 1.0, g + DECAY * w if is_matrix else g

  def trust(x):
    return TRUST * size(w) / size(x) if size(w) > 0 and size(x) > 0 else 1.0

  if classic:
    if is_matrix:
      ratio = trust(d)
    v = MOMENTUM * v + rate * ratio * d
    return w - (MOMENTUM * v + rate * ratio * d if nesterov else v), v
  v = MOMENTUM * v + d
  return w - rate * trust(v) * v, v


def simclr_by_rank(w, v, g, rate, **kwargs):
  return simclr(w, v, g, rate, is_matrix=w.ndim > 1, **kwargs)


def clipped(step):
  return lambda *arguments: step(*arguments, trust_clip=True)


# By row of the table: the steps, and whether a gradient of zero is as here.
ROWS = {
  'timm 1.0, `Lars`': (timm, True),
  'timm 1.0, `Lars` with `trust_clip`': (clipped(timm), True),
  'torch_optimizer 0.3, `LARS`': (lightly, False),
  'lightly 1.6, `LARS`': (lightly, False),
  'pytorch_optimizer 4.1, `LARS`': (pytorch_optimizer, False),
  'Apex, `LARC` of SGD': (apex, False),
  'Apex, `LARC` with `clip=False`': (
    lambda *arguments: apex(*arguments, clip=False),
    False,
  ),
  # Without an epsilon and with all leaves in it, Optax's is SimCLR's.
  'Optax, `lars`': (simclr, True),
  'SimCLR, `LARSOptimizer`': (simclr_by_rank, True),
}
TABLE = dict(
  re.findall(
    r'^\| (.+?) \| `([^`]*)` \| [^|]+ \|$', PAGE.read_text(), re.MULTILINE
  )
)


def make_params():
  rng = np.random.default_rng(0)
  return {'kernel': rng.normal(size=(4, 3)), 'bias': rng.normal(size=3)}


def make_grads(t, is_zero=False):
  rng = np.random.default_rng(1 + t)
  kernel = 0.1 * rng.normal(size=(4, 3))
  return {'kernel': kernel * (not is_zero), 'bias': rng.normal(size=3)}


def ours(tx, params, gradients):
  params = jax.tree.map(jnp.float32, params)
  state = tx.init(params)
  for grads in gradients:
    updates, state = tx.update(jax.tree.map(jnp.float32, grads), state, params)
    params = optax.apply_updates(params, updates)
  return params


def theirs(step, params, gradients):
  momentum = jax.tree.map(np.zeros_like, params)
  for rate, grads in zip(RATES, gradients, strict=False):
    for name, g in grads.items():
      params = {**params}
      params[name], momentum[name] = step(params[name], momentum[name], g, rate)
  return params


def lars(row, **kwargs):
  names = {
    'is_matrix': lambda params: jax.tree.map(lambda w: w.ndim > 1, params)
  }
  return conadv.lars(
    lambda count: jnp.asarray(RATES, jnp.float32)[count],
    weight_decay=DECAY,
    momentum=MOMENTUM,
    trust_coefficient=TRUST,
    **eval(f'dict({TABLE[row]})', names),
    **kwargs,
  )


def test_every_row_is_held_against_a_formula():
  of_lars = {row for row, code in TABLE.items() if 'mask=' in code}
  assert of_lars == set(ROWS)


@pytest.mark.parametrize('row', ROWS)
def test_the_arguments_give_the_steps(row):
  step, _ = ROWS[row]
  gradients = [make_grads(t) for t in range(4)]
  got = ours(lars(row), make_params(), gradients)
  expected = theirs(step, make_params(), gradients)
  for name in got:
    np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize(
  ('row', 'step'),
  [
    ('timm 1.0, `Lars`', timm),
    ('lightly 1.6, `LARS`', lightly),
    ('pytorch_optimizer 4.1, `LARS`', pytorch_optimizer),
    ('SimCLR, `LARSOptimizer`', simclr_by_rank),
  ],
)
def test_nesterov_is_nesterov(row, step):
  gradients = [make_grads(t) for t in range(3)]
  got = ours(lars(row, nesterov=True), make_params(), gradients)
  expected = theirs(
    lambda *arguments: step(*arguments, nesterov=True),
    make_params(),
    gradients,
  )
  for name in got:
    np.testing.assert_allclose(got[name], expected[name], rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize('row', ROWS)
def test_a_gradient_of_zero_is_what_the_table_says(row):
  step, is_alike = ROWS[row]
  w, rate = make_params()['kernel'], RATES[0]
  gradients = [make_grads(0, is_zero=True)]
  got = ours(lars(row), make_params(), gradients)['kernel']
  expected = theirs(step, make_params(), gradients)['kernel']
  said = re.search(
    rf'^\| {re.escape(row)} \|.*\| (.*) \|$', PAGE.read_text(), re.M
  )
  alike = np.allclose(got, expected, rtol=1e-5, atol=1e-7)
  assert alike == is_alike == said[1].startswith('as here')
  decays = {
    'no ratio and no decay': w,
    'a ratio of c / decay': w - rate * TRUST * w,
    'as here: a ratio of c / decay': w - rate * TRUST * w,
    'as here: a ratio of 1': w - rate * DECAY * w,
  }
  if said[1] in decays:
    np.testing.assert_allclose(expected, decays[said[1]], rtol=1e-6)


def test_the_chain_is_simclr_without_its_classic_momentum():
  params = {'kernel': make_params()['kernel']}
  gradients = [{'kernel': make_grads(t)['kernel']} for t in range(4)]
  rates = jnp.asarray(RATES, jnp.float32)
  chain = optax.chain(
    optax.add_decayed_weights(DECAY),
    optax.trace(MOMENTUM),
    optax.scale_by_trust_ratio(trust_coefficient=TRUST),
    optax.scale_by_learning_rate(lambda count: rates[count]),
  )
  expected = theirs(
    lambda *arguments: simclr(*arguments, classic=False), params, gradients
  )
  got = ours(chain, params, gradients)
  np.testing.assert_allclose(got['kernel'], expected['kernel'], rtol=2e-5)
  joint = ours(lars('Optax, `lars`'), params, gradients)
  assert not np.allclose(joint['kernel'], expected['kernel'], rtol=1e-2)


def test_apex_leaves_weights_of_zero_their_gradient():
  """At a rate of 3 `trust_clip` divides it by that."""
  params = {'kernel': np.zeros((2, 2))}
  grads = {'kernel': np.ones((2, 2))}
  tx = conadv.lars(
    3.0,
    weight_decay=DECAY,
    momentum_over='raw',
    eps=EPS,
    mask=True,
    trust_clip=True,
  )
  np.testing.assert_allclose(ours(tx, params, [grads])['kernel'], -1.0)
  w, v = params['kernel'], np.zeros((2, 2))
  np.testing.assert_allclose(apex(w, v, grads['kernel'], 3.0)[0], -3.0)
  clip = timm(w, v, grads['kernel'], 3.0, trust_clip=True)[0]
  np.testing.assert_allclose(clip, -1.0)
