"""The headings of the FAQ are what the errors say."""

import re
from pathlib import Path

import flax
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import conadv_optax as conadv

PAGE = (Path(__file__).parents[2] / 'docs' / 'faq.md').read_text()
PROSE = re.sub(r'^```.*?^```', '', PAGE, flags=re.M | re.S)
HEADINGS = re.findall(r'^### (.*)$', PROSE, re.M)

# A symptom or a question, not an error.
WITHOUT_ERROR = [
  'The second step compiles again',
  'Adversarial images are far from the clean ones',
  'In float16 a part of the examples is not attacked',
  'The loss of the adversarial branch is lower than that of the main one',
  'Held-out accuracy is at chance, and the training loss is low',
  'Does it work with LayerNorm, or without any norm?',
  'Is the result robust against attacks?',
]

FGSM = conadv.fgsm(0.1)
W, BATCH = jnp.ones(2), {'image': jnp.ones((4, 2))}


def loss_fn(w, batch):
  return jnp.mean((batch['image'] * w[None]) ** 2)


def call(loss_fn=loss_fn, *, w=W, batch=BATCH, attack=FGSM, **kwargs):
  """A step by `wrap`."""
  model_state = kwargs.pop('model_state', None)
  grad_fn = conadv.wrap(loss_fn, attack=attack, **kwargs)
  state = grad_fn.init(w, [batch], model_state=model_state)
  return grad_fn.value_and_grad(w, state, batch, model_state=model_state)


def pixels():
  call(batch={'image': jnp.ones((4, 2), jnp.uint8)})


def another_name():
  call(batch={'images': jnp.ones((4, 2))})


def a_text():
  call(batch={**BATCH, 'path': 'cat.jpg'})


def two_first_batches():
  conadv.wrap(loss_fn, attack=FGSM).init(W, [BATCH, BATCH])


def state_of_another_function():
  conadv.sam(loss_fn, 0.1).value_and_grad(W, optax.sgd(0.1).init(W), BATCH)


def state_of_another_staleness():
  state = conadv.wrap(loss_fn, 1, attack=FGSM).init(W, [BATCH])
  conadv.wrap(loss_fn, 2, attack=FGSM).value_and_grad(W, state, BATCH)


def no_key():
  call(attack=conadv.pgd(0.1))


def has_key_unsaid():
  def loss_fn(w, batch, key):
    return jnp.mean(batch['image'] * jax.random.bernoulli(key, 0.9) * w)

  call(loss_fn)


def smaller_last_batch():
  grad_fn = conadv.wrap(loss_fn, attack=FGSM)
  state = grad_fn.init(W, [BATCH])
  grad_fn.value_and_grad(W, state, {'image': jnp.ones((3, 2))})


def too_few_for_the_devices():
  mesh = jax.make_mesh((8,), ('data',))
  grad_fn = conadv.data_parallel(loss_fn, mesh)
  grad_fn.value_and_grad(W, grad_fn.init(W, []), BATCH)


def too_few_for_the_micro_batches():
  grad_fn = conadv.accumulate(loss_fn, 8)
  grad_fn.value_and_grad(W, grad_fn.init(W, []), BATCH)


def no_mean():
  call(lambda w, batch: batch['image'] * w[None])


def has_aux_unsaid():
  call(lambda w, batch: (loss_fn(w, batch), {}))


class Norm(nn.Module):
  axis_name: str | None = None

  @nn.compact
  def __call__(self, x):
    return nn.BatchNorm(False, axis_name=self.axis_name)(x)


VARIABLES = Norm().init(jax.random.key(0), BATCH['image'])


def norm_loss(params, batch_stats, batch, axis_name=None, whole=False):
  y, updates = Norm(axis_name).apply(
    {'params': params, 'batch_stats': batch_stats},
    batch['image'],
    mutable=['batch_stats'],
  )
  return jnp.mean(y**2), updates if whole else updates['batch_stats']


def call_norm(loss_fn=norm_loss, stats=VARIABLES['batch_stats']):
  call(loss_fn, w=VARIABLES['params'], model_state=stats, has_state=True)


def a_whole_collection():
  call_norm(lambda *args: norm_loss(*args, whole=True))


def a_frozen_dict():
  call_norm(stats=flax.core.freeze(VARIABLES['batch_stats']))


def no_model_state():
  call_norm(stats=None)


def a_module():
  call(w=nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def branched_in_flax():
  trees = conadv.dual_bn.split(VARIABLES['params'], VARIABLES['batch_stats'])
  Norm().apply(dict(zip(('params', 'batch_stats'), trees, strict=True)), W)


def branched_in_haiku():
  net = hk.transform_with_state(
    lambda x: hk.BatchNorm(True, True, 0.9)(x, is_training=True)
  )
  trees = net.init(None, BATCH['image'])
  net.apply(*conadv.dual_bn.split(*trees), None, BATCH['image'])


def merged_without_a_copy():
  norm = nnx.BatchNorm(2, rngs=nnx.Rngs(0))
  graphdef, params, stats = nnx.split(norm, nnx.Param, nnx.BatchStat)

  def loss_fn(params, stats, batch):
    norm = nnx.merge(graphdef, params, stats)
    loss = jnp.mean(norm(batch['image']) ** 2)
    return loss, nnx.state(norm, nnx.BatchStat)

  call(loss_fn, w=params, model_state=stats, has_state=True)


def dropout_left_over():
  dropout = nnx.Dropout(0.1, rngs=nnx.Rngs(0))
  nnx.split(dropout, nnx.Param, nnx.BatchStat)


def no_norm_layer():
  conadv.dual_bn.split({'dense': {'kernel': W}}, {})


def synchronised_on_one_device():
  call_norm(lambda *args: norm_loss(*args, axis_name='data'))


def a_schedule():
  conadv.pgd(optax.linear_schedule(0.0, 0.1, 100))


def another_shape():
  call(attack=conadv.Attack(lambda key, gradient_fn, x: x[:1], draws=False))


def a_mask_for_a_schedule():
  tx = optax.inject_hyperparams(conadv.lars)(
    learning_rate=0.1, weight_decay=0.0, mask=conadv.exclude_norm_and_bias
  )
  tx.init({'kernel': W})


ERRORS = {
  'The perturbed leaf must be floating': [pixels],
  '`inputs` must name one leaf of the batch': [another_name],
  'Every leaf of a batch is an array of numbers': [a_text],
  '`init` wants the first 1 batches': [two_first_batches],
  'A state goes back to the gradient function that made it': [
    state_of_another_function
  ],
  'The state holds as many batches as the staleness': [
    state_of_another_staleness
  ],
  'Random numbers are drawn here': [no_key],
  "loss_fn() missing 1 required positional argument: 'key'": [has_key_unsaid],
  'A later batch must have the shapes and dtypes of the first': [
    smaller_last_batch
  ],
  '... the batch must be a multiple of the 8...': [
    too_few_for_the_devices,
    too_few_for_the_micro_batches,
  ],
  '`loss_fn` must return a floating scalar, the mean over the batch': [no_mean],
  'With has_state=False, has_aux=False, `loss_fn` must return the loss alone': [
    has_aux_unsaid
  ],
  'The model state that `loss_fn` returns must have the structure...': [
    a_whole_collection,
    a_frozen_dict,
  ],
  '`has_state=True` says that `loss_fn` takes a model state. Given none': [
    no_model_state
  ],
  'The parameters and the model state are trees of arrays. Given an NNX '
  'module': [a_module],
  'The first argument passed to an apply function should be a dictionary '
  'of...': [branched_in_flax],
  'params argument does not appear valid. It should be a mapping': [
    branched_in_haiku
  ],
  'Cannot mutate BatchStat from a different trace level': [
    merged_without_a_copy
  ],
  'Non-exhaustive filters, got a non-empty remainder': [dropout_left_over],
  'A norm layer is recognised by an entry of `model_state`...': [no_norm_layer],
  'Found an unbound axis name: data': [synchronised_on_one_device],
  '`epsilon` is a number or an array, which may be traced. Given a function': [
    a_schedule
  ],
  'An attack must return adversarial inputs of the shape and dtype of the '
  'inputs': [another_shape],
  'A mask is a function of the parameters. Given a single integer': [
    a_mask_for_a_schedule
  ],
}


def pattern(heading):
  """Of the messages that a heading stands for, with any numbers and dots."""
  parts = heading.split('...')
  return '.*'.join(
    re.sub(r'\d+', r'\\d+', re.escape(part.strip())) for part in parts
  )


def test_every_heading_is_an_error_or_said_to_be_none():
  assert [*ERRORS, *WITHOUT_ERROR] == HEADINGS


def test_errors_stand_under_errors():
  errors, others = re.split('^## What a run shows$', PAGE, flags=re.M)
  assert all(f'### {heading}\n' in errors for heading in ERRORS)
  assert all(f'### {heading}\n' in others for heading in WITHOUT_ERROR)


@pytest.mark.parametrize(
  ('heading', 'fail'),
  [(heading, fail) for heading, fails in ERRORS.items() for fail in fails],
  ids=lambda value: getattr(value, '__name__', ''),
)
def test_a_heading_is_what_the_error_says(heading, fail):
  with pytest.raises(Exception) as error:
    fail()
  assert re.search(pattern(heading), str(error.value).strip('"'), re.S)
