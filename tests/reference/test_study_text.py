"""The text example: its lines, its padding, and when the noise sets in."""

import chex
import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

from reference import command, scala
from reference.study import text


@pytest.fixture(scope='module')
def lines():
  return text.read_lines()


def test_lines_are_of_one_module_and_in_one_part(lines):
  parts = [set(map(tuple, part['tokens'].tolist())) for part in lines]
  sizes = [len(part['label']) for part in lines]
  assert [len(part) for part in parts] == sizes  # None twice.
  assert len(set.union(*parts)) == sum(sizes)
  np.testing.assert_allclose(sizes, np.dot(sum(sizes), [0.8, 0.1, 0.1]), atol=2)
  for part in lines:
    assert set(part['label']) == set(range(len(text.MODULES)))
    is_word = part['tokens'] > 0
    assert (np.diff(is_word.astype(int), axis=1) <= 0).all()
    assert part['tokens'].max() < text.WORDS


def test_every_seed_reports_the_same_lines(lines, monkeypatch):
  seen = []

  def see(model, params, data):
    seen.append(data)
    return 0.0, 0.0

  monkeypatch.setattr(text, 'train', lambda data, run, *, seed: see(0, 0, data))
  monkeypatch.setattr(text, 'evaluate', see)
  run = text.Run(batch_size=32, epochs=1, rate=0.02)
  for seed in (0, 1):
    for final in (False, True):
      text.measure(run, seed=seed, final=final)
  # A run sees what it trains on, what judges it, and what it trained on.
  for data, part in zip(seen, [0, 1, 0, 0, 2, 0] * 2, strict=True):
    chex.assert_trees_all_equal(data, lines[part])


@pytest.mark.slow
def test_padding_is_not_seen(lines):
  batch = text.rows_of(lines[0], np.arange(4))
  model = text.Transformer()
  init = jax.jit(model.init, static_argnames='train')
  params = init(jax.random.key(0), batch['tokens'], train=False)['params']
  # Not constant, which LayerNorm would take out.
  noise = np.random.default_rng(0).normal(
    size=(*batch['tokens'].shape, text.WIDTH)
  )
  is_word = batch['tokens'][..., None] > 0
  logits_of = jax.jit(lambda *x: text.logits_of(model, *x, None))
  clean, at_padding, at_words = (
    logits_of(params, {**batch, 'noise': np.float32(noise * where)})
    for where in (0.0, 1.0 - is_word, 1.0 * is_word)
  )
  assert not is_word.all()
  np.testing.assert_allclose(at_padding, clean, atol=1e-5)
  assert np.abs(at_words - clean).max() > 0.01
  # In training a tenth drops out.
  dropped = jax.jit(text.logits_of, static_argnums=0)(
    model, params, batch, jax.random.key(1)
  )
  assert 1e-3 < np.abs(dropped - clean).max() < 1


class Small(nn.Module):
  """Its words are embedded under the same name."""

  dropout: float = 0.1

  @nn.compact
  def __call__(self, tokens, *, train):
    x = nn.Embed(text.WORDS, text.WIDTH, name='words')(tokens).mean(axis=1)
    x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
    return nn.Dense(len(text.MODULES))(x)


@pytest.mark.slow
def test_noise_sets_in_after_its_share_of_the_run(lines, monkeypatch):
  monkeypatch.setattr(text, 'Transformer', Small)
  text.make_program.cache_clear()
  data = text.rows_of(lines[0], np.arange(64))
  run = text.Run(batch_size=32, epochs=3, rate=0.02)
  with jax.numpy_dtype_promotion('standard'):
    plain, never, half, drawn, stale, still, tiny = (
      text.train(data, run._replace(**fields), seed=0)
      for fields in (
        {'epsilon': 0.0},
        {'start': 1.0},
        {'start': 0.5},
        {'start': 0.5, 'ascent': False},
        # Its first batch waits, and is not trained on before.
        {'start': 0.5, 'staleness': 1},
        {'epsilon': 0.0, 'dropout': 0.0},
        {'start': 0.5, 'epsilon': 1e-6, 'dropout': 0.0},
      )
    )
  text.make_program.cache_clear()
  chex.assert_trees_all_equal(never, plain)
  # As many steps, whoever takes them.
  chex.assert_trees_all_close(tiny, still, atol=1e-3)
  words = [x['words']['embedding'] for x in (half, plain, drawn, stale)]
  for other in words[1:]:
    assert np.abs(words[0] - other).max() > 1e-4


@pytest.mark.slow
def test_runs_of_other_rates_and_seeds_share_a_program(lines, monkeypatch):
  monkeypatch.setattr(text, 'Transformer', Small)
  text.make_program.cache_clear()
  data = text.rows_of(lines[0], np.arange(64))
  run = text.Run(batch_size=32, epochs=4, rate=0.02, epsilon=0.0)
  with jax.numpy_dtype_promotion('standard'):
    found = text.train(data, run, seed=3)
    text.train(data, run._replace(rate=0.1), seed=4)
  assert text.make_program.cache_info().misses == 1

  # By hand, with Optax's schedule of that peak.
  tx = optax.lamb(
    optax.warmup_cosine_decay_schedule(0.0, 0.02, 0, 8), weight_decay=0.01
  )
  key, model = jax.random.key(3), Small()
  batches = text.batches_of(data, 32, 3)
  with jax.numpy_dtype_promotion('standard'):
    params = model.init(key, data['tokens'][:1], train=False)['params']
    state = tx.init(params)
    for number in range(8):
      grads = jax.grad(text.loss_fn, argnums=1)(
        model, params, next(batches), key=jax.random.fold_in(key, number)
      )
      updates, state = tx.update(grads, state, params)
      params = optax.apply_updates(params, updates)
  text.make_program.cache_clear()
  # Adam's first update is a sign, where rounding decides; LAMB's is as long.
  chex.assert_trees_all_close(found, params, atol=1e-3)


def test_a_batch_of_more_lines_than_there_are(lines):
  data = text.rows_of(lines[0], np.arange(64))
  run = text.Run(batch_size=65, epochs=1, rate=0.02)
  with pytest.raises(command.Mistake, match=r'the 64 lines.*--batch_size=65'):
    text.train(data, run, seed=0)


def test_the_best_by_validation_is_reported_and_compared(monkeypatch, capsys):
  measured = []

  def measure(run, *, seed, final):
    measured.append((run, seed, final))
    accuracy = 0.5 - abs(run.rate - 0.02)
    accuracy += 0.1 * (run.epsilon == 0.25) + 0.01 * seed
    if final and run.epsilon:
      accuracy += 0.02 * seed
    return {
      'kind': 'final' if final else 'trial',
      **run._asdict(),
      'seed': seed,
      'train_loss': 0.5,
      'loss': 1.0,
      'accuracy': accuracy,
    }

  monkeypatch.setattr(text, 'measure', measure)
  rows = []
  for noise in ('none', 'scala'):
    rows += scala.runs(noise, 128, epochs=2, rates=(0.01, 0.02, 0.04), seeds=3)
  # Three rates, two values of the own number, three seeds.
  trials, finals = measured[8:13], measured[13:]
  assert [x[1:] for x in trials] == [(0, False)] * 5
  assert [x[1:] for x in finals] == [(0, True), (1, True), (2, True)]
  assert [x[0].rate for x in trials] == [0.01, 0.02, 0.04, 0.02, 0.02]
  assert [x[0].epsilon for x in trials] == [0.5, 0.5, 0.5, 0.25, 1.0]
  assert {(x[0].rate, x[0].epsilon) for x in finals} == {(0.02, 0.25)}
  assert {x[0].dropout for x in measured[5:8]} == {0.1}

  scala.print_table(rows)
  *_, none, noisy = capsys.readouterr().out.splitlines()
  assert none.startswith('| 128 | none | 0.02 | dropout 0.1 | 3 |')
  # 10, 12 and 14 points more.
  error = np.std([10, 12, 14], ddof=1) / np.sqrt(3)
  assert noisy.endswith(f'| +12.0 ± {error:.1f} |')
  assert '| scala | 0.02 | epsilon 0.25 | 3 |' in noisy
