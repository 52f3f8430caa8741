"""A transformer on text, with noise at its embedding in the manner of ScaLA.

References:
  Zhang et al., `ScaLA: Accelerating Adaptation of Pre-Trained Transformer-Based
  Language Models via Efficient Large-Batch Adversarial Noise
  <https://arxiv.org/abs/2201.12469>`_, 2022
"""

import functools
import itertools
import math
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


@functools.cache
def read_lines() -> tuple[Batch, Batch, Batch]:
  """Lines to train on, a tenth to choose by, and a tenth to report.

  The parts are the same in every run: were they drawn by its seed, a run could
  report lines that another has trained on and chosen by.

  Returns:
    Three batches: 'tokens', int32 (lines, LENGTH), 0 where a line has ended;
    and 'label', int32 (lines,), the module.
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
  order = np.random.default_rng(0).permutation(len(lines))
  count = len(lines)
  test, validation, train = np.split(order, [count // 10, count // 5])
  return (
    rows_of(batch, train),
    rows_of(batch, validation),
    rows_of(batch, test),
  )


def rows_of(batch: Batch, rows: np.ndarray) -> Batch:
  """Those lines of a batch."""
  return {name: x[rows] for name, x in batch.items()}


class Transformer(nn.Module):
  """A classifier, which knows nothing of noise."""

  dropout: float = 0.1

  @nn.compact
  def __call__(self, tokens: jax.Array, *, train: bool) -> jax.Array:
    """Logits (lines, modules) of tokens (lines, LENGTH)."""
    is_word = tokens > 0
    x = nn.Embed(WORDS, WIDTH, name='words')(tokens)
    x += nn.Embed(LENGTH, WIDTH)(jnp.arange(LENGTH))[None]
    y = nn.MultiHeadDotProductAttention(4)(
      nn.LayerNorm()(x), mask=nn.make_attention_mask(is_word, is_word)
    )
    x += nn.Dropout(self.dropout, deterministic=not train)(y)
    y = nn.Dense(WIDTH)(nn.relu(nn.Dense(4 * WIDTH)(nn.LayerNorm()(x))))
    x += nn.Dropout(self.dropout, deterministic=not train)(y)
    x = jnp.mean(nn.LayerNorm()(x), axis=1, where=is_word[..., None])
    return nn.Dense(len(MODULES))(x)


def logits_of(
  model: nn.Module, params: Any, batch: Batch, key: jax.Array | None
) -> jax.Array:
  """The model's logits, with the batch's noise where there is any."""

  def add_noise(call: Callable, args: Any, kwargs: Any, context: Any) -> Any:
    output = call(*args, **kwargs)
    is_words = context.module.name == 'words'
    if is_words and context.method_name == '__call__':
      output += batch.get('noise', 0.0)
    return output

  with nn.intercept_methods(add_noise):
    logits: Any = model.apply(
      {'params': params},
      batch['tokens'],
      train=key is not None,
      rngs=None if key is None else {'dropout': key},
    )
  return logits


def loss_fn(
  model: nn.Module, params: Any, batch: Batch, *, key: Any = None
) -> jax.Array:
  """The mean cross entropy; with a key the model drops out."""
  return jnp.mean(
    optax.softmax_cross_entropy_with_integer_labels(
      logits_of(model, params, batch, key), batch['label']
    )
  )


@functools.partial(jax.jit, static_argnums=0)
def evaluate(
  model: nn.Module, params: Any, batch: Batch
) -> tuple[jax.Array, jax.Array]:
  """Loss and accuracy."""
  predicted = jnp.argmax(logits_of(model, params, batch, None), axis=1)
  return loss_fn(model, params, batch), jnp.mean(predicted == batch['label'])


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


class Run(NamedTuple):
  """What a run depends on, beside the seed.

  Attributes:
    batch_size: lines a step.
    epochs: passes over the lines.
    rate: LAMB's peak.
    epsilon: radius of the noise of a line, in units of the embedding; 0 is no
      noise.
    start: the share of the run before the noise sets in.
    staleness: steps by which the noise is older than its batch's training.
    ascent: whether the noise climbs the loss; else it is drawn and left so.
    dropout: of the model.
  """

  batch_size: int
  epochs: int
  rate: float
  epsilon: float = 0.5
  start: float = 0.3
  staleness: int = 0
  ascent: bool = True
  dropout: float = 0.1


class Phase(NamedTuple):
  """A part of a run.

  Attributes:
    staleness: how many batches `init` takes.
    init: `(params, batches, key)` to the gradient's state.
    step: `(params, opt_state, state, batch, key, rate)` to the next three.
    numbers: of its steps.
  """

  staleness: int
  init: Callable[..., Any]
  step: Callable[..., Any]
  numbers: range


class Program(NamedTuple):
  """The compiled functions of all runs that differ in seed and rate.

  Attributes:
    init: `(key, batch)` to parameters and the optimizer's state.
    phases: what is trained by, one after the other.
  """

  init: Callable[..., Any]
  phases: list[Phase]


@functools.cache
def make_program(run: Run, steps: int) -> Program:
  """The program of a run of so many steps, whatever its rate."""
  model = Transformer(dropout=run.dropout)
  of_model = functools.partial(loss_fn, model)
  attack = conadv.pgd(
    run.epsilon, step_size=run.epsilon if run.ascent else 0.0, norm='l2'
  )
  noisy = conadv.wrap(
    of_model, run.staleness, attack=attack, inputs=NOISE, has_key=True
  )

  def make_optimizer(rate: Any) -> optax.GradientTransformation:
    # The schedule's own peak may not be traced.
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, steps // 10, steps)
    return optax.chain(
      optax.lamb(schedule, weight_decay=0.01), optax.scale(rate)
    )

  @jax.jit
  def init(key: jax.Array, batch: Batch) -> Any:
    params = model.init(key, batch['tokens'][:1], train=False)['params']
    return params, make_optimizer(0.0).init(params)

  def make_phase(grad_fn: conadv.GradientFunction, numbers: range) -> Phase:
    def init(params: Any, first: list[Batch], key: Any) -> Any:
      return grad_fn.init(params, first, key=key)

    def step(
      params: Any, opt_state: Any, state: Any, batch: Batch, key: Any, rate: Any
    ) -> Any:
      _, grads, state = grad_fn.value_and_grad(params, state, batch, key=key)
      tx = make_optimizer(rate)
      updates, opt_state = tx.update(grads, opt_state, params)
      return optax.apply_updates(params, updates), opt_state, state

    return Phase(grad_fn.staleness, jax.jit(init), jax.jit(step), numbers)

  begin = math.ceil(run.start * steps) if run.epsilon else steps
  return Program(
    init,
    [
      make_phase(grad_fn, numbers)
      for grad_fn, numbers in (
        (conadv.plain(of_model, has_key=True), range(begin)),
        (noisy, range(begin, steps)),
      )
      if numbers
    ],
  )


def train(data: Batch, run: Run, *, seed: int) -> Any:
  """Parameters after a run."""
  size = len(data['label'])
  if run.batch_size > size:
    raise command.Mistake(
      f'A batch is a part of the {size} lines that are trained on. Given '
      f'--batch_size={run.batch_size}. Write `--batch_size={size}` for all.'
    )
  steps = run.epochs * (size // run.batch_size)
  program = make_program(run._replace(rate=0.0), steps)
  key = jax.random.key(seed)
  batches = batches_of(data, run.batch_size, seed)
  params, opt_state = program.init(key, data)
  for phase in program.phases:
    first = list(itertools.islice(batches, phase.staleness))
    state = phase.init(params, first, key)
    for number in phase.numbers:
      params, opt_state, state = phase.step(
        params,
        opt_state,
        state,
        next(batches),
        jax.random.fold_in(key, number),
        run.rate,
      )
  return params


def measure(run: Run, *, seed: int, final: bool) -> dict[str, Any]:
  """A row of the table: a run, and what it knows of lines it has not seen."""
  data, validation, test = read_lines()
  params = train(data, run, seed=seed)
  model = Transformer()
  loss, accuracy = evaluate(model, params, test if final else validation)
  return {
    'kind': 'final' if final else 'trial',
    **run._asdict(),
    'seed': seed,
    'train_loss': float(evaluate(model, params, data)[0]),
    'loss': float(loss),
    'accuracy': float(accuracy),
  }
