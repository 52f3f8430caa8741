"""A transformer on text, with noise at its embedding in the manner of ScaLA.

References:
  Zhang et al., `ScaLA: Accelerating Adaptation of Pre-Trained Transformer-Based
  Language Models via Efficient Large-Batch Adversarial Noise
  <https://arxiv.org/abs/2201.12469>`_, 2022
"""

import os
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import conadv_optax as conadv
from reference import command

# In the library of every Python that is supported, a file each.
MODULES = [
  'argparse',
  'configparser',
  'difflib',
  'doctest',
  'inspect',
  'optparse',
  'pickle',
  'subprocess',
  'tarfile',
  'typing',
]
LENGTH, WORDS, WIDTH = 16, 2048, 32

Batch = dict[str, Any]


def read_lines(seed: int) -> tuple[Batch, Batch]:
  """Lines to train on, and a fifth that is held out.

  Returns:
    Two batches: 'tokens', int32 (lines, LENGTH), 0 where a line has ended; and
    'label', int32 (lines,), the module.
  """
  # A line of several modules says nothing of any.
  modules: dict[tuple[int, ...], set[int]] = {}
  for label, name in enumerate(MODULES):
    source = Path(os.__file__).parent / f'{name}.py'
    for line in source.read_text(encoding='utf-8').splitlines():
      words = re.findall(r'\w+|[^\w\s]', line)[:LENGTH]
      tokens = tuple(1 + zlib.crc32(x.encode()) % (WORDS - 1) for x in words)
      if len(tokens) > 2:
        modules.setdefault(tokens, set()).add(label)
  lines = [x for x, labels in modules.items() if len(labels) == 1]
  padded = [(*x, *[0] * (LENGTH - len(x))) for x in lines]
  batch = {
    'tokens': np.array(padded, np.int32),
    'label': np.array([min(modules[x]) for x in lines], np.int32),
  }
  order = np.random.default_rng(seed).permutation(len(lines))
  held_out, train = np.split(order, [len(lines) // 5])
  return rows_of(batch, train), rows_of(batch, held_out)


def rows_of(batch: Batch, rows: np.ndarray) -> Batch:
  """Those lines of a batch."""
  return {name: x[rows] for name, x in batch.items()}


class Transformer(nn.Module):
  """A classifier, which knows nothing of noise."""

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    """Logits (lines, modules) of tokens (lines, LENGTH)."""
    is_word = tokens > 0
    x = nn.Embed(WORDS, WIDTH, name='words')(tokens)
    x += nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))[None]
    y = nn.MultiHeadDotProductAttention(4)(
      nn.LayerNorm()(x), mask=nn.make_attention_mask(is_word, is_word)
    )
    x += nn.Dropout(0.1, deterministic=not train)(y)
    y = nn.relu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x)))
    x += nn.Dropout(0.1, deterministic=not train)(nn.Dense(WIDTH)(y))
    x = jnp.mean(nn.LayerNorm()(x), axis=1, where=is_word[..., None])
    return nn.Dense(len(MODULES))(x)


def logits_of(params: Any, batch: Batch, key: jax.Array | None) -> jax.Array:
  """The model's logits, with the batch's noise where there is any."""

  def add_noise(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    output = call(*args, **kwargs)
    is_words = context.module.name == 'words'
    if is_words and context.method_name == '__call__':
      output += batch.get('noise', 0.0)
    return output

  with nn.intercept_methods(add_noise):
    logits: Any = Transformer().apply(
      {'params': params},
      batch['tokens'],
      train=key is not None,
      rngs=None if key is None else {'dropout': key},
    )
  return logits


def loss_fn(params: Any, batch: Batch, *, key: Any = None) -> jax.Array:
  """The mean cross entropy; with a key the model drops out."""
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits_of(params, batch, key), batch['label']
    )
  )


@jax.jit
def evaluate(params: Any, batch: Batch) -> tuple[jax.Array, jax.Array]:
  """Loss and accuracy."""
  hits = jnp.argmax(logits_of(params, batch, None), axis=1) == batch['label']
  return loss_fn(params, batch), jnp.mean(hits)


def batches_of(data: Batch, size: int, seed: int) -> Iterator[Batch]:
  """Batches without end, each epoch in another order; its rest is left out."""
  rng = np.random.default_rng(seed)
  while True:
    order = rng.permutation(len(data['label']))
    for begin in range(0, len(order) - size + 1, size):
      yield rows_of(data, order[begin : begin + size])


NOISE = conadv.added_leaf(
  'noise',
  lambda batch: jax.ShapeDtypeStruct(
    (*batch['tokens'].shape, WIDTH), jnp.float32
  ),
)


def make_step(grad_fn: conadv.GradientFunction, tx: Any) -> Callable:
  """A compiled step; nothing waits from one to the next."""

  @jax.jit
  def step(params: Any, opt_state: Any, batch: Batch, key: jax.Array) -> Any:
    state = grad_fn.init(params, [])
    _, grads, _ = grad_fn.value_and_grad(params, state, batch, key=key)
    updates, opt_state = tx.update(grads, opt_state, params)
    return optax.apply_updates(params, updates), opt_state

  return step


class Run(NamedTuple):
  """What all runs of a table have in common.

  Attributes:
    batch_size: lines a step.
    epochs: passes over the lines.
    rate: LAMB's peak.
    start: the share of the run before the noise sets in.
    ascent: whether the noise climbs the loss; else it is drawn and left so.
  """

  batch_size: int
  epochs: int
  rate: float
  start: float
  ascent: bool = True


def train(data: Batch, run: Run, *, epsilon: float, seed: int) -> Any:
  """Parameters after a run, without noise where `epsilon` is 0."""
  size = len(data['label'])
  if run.batch_size > size:
    raise command.Mistake(
      f'A batch is a part of the {size} lines that are trained on. Given '
      f'--batch_size={run.batch_size}. Write `--batch_size={size}` for all.'
    )
  steps = run.epochs * (size // run.batch_size)
  tx = optax.lamb(
    optax.warmup_cosine_decay_schedule(0.0, run.rate, steps // 10, steps),
    weight_decay=0.01,
  )
  step_size = epsilon if run.ascent else 0.0
  attack = conadv.pgd(epsilon, step_size=step_size, norm='l2')
  plain = make_step(conadv.plain(loss_fn, has_key=True), tx)
  noisy = make_step(
    conadv.wrap(loss_fn, 0, attack=attack, inputs=NOISE, has_key=True), tx
  )
  key = jax.random.key(seed)
  params = Transformer().init(key, data['tokens'][:1], train=False)['params']
  opt_state = tx.init(params)
  batches = batches_of(data, run.batch_size, seed)
  for number in range(steps):
    step = noisy if epsilon and number >= run.start * steps else plain
    params, opt_state = step(
      params, opt_state, next(batches), jax.random.fold_in(key, number)
    )
  return params


def row_of(run: Run, *, epsilon: float, seeds: int) -> str:
  """A row of the table: means over seeds, lowest and highest accuracy."""
  results = []
  for seed in range(seeds):
    data, held_out = read_lines(seed)
    params = train(data, run, epsilon=epsilon, seed=seed)
    results.append([evaluate(params, data)[0], *evaluate(params, held_out)])
  mean, low, high = (
    summary(np.array(results), axis=0) for summary in (np.mean, np.min, np.max)
  )
  return (
    f'| {epsilon} | {mean[0]:.3f} | {mean[1]:.3f} | '
    f'{mean[2]:.1%} ({low[2]:.1%} to {high[2]:.1%}) |'
  )
