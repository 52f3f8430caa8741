"""The text example: its lines, its padding, and when the noise sets in."""

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

from reference import command
from reference.study import text


@pytest.fixture(scope='module')
def lines():
  return text.read_lines(0)


def test_lines_are_of_one_module_and_in_one_part(lines):
  parts = [set(map(tuple, part['tokens'].tolist())) for part in lines]
  sizes = [len(part['label']) for part in lines]
  assert [len(part) for part in parts] == sizes  # None twice.
  assert not parts[0] & parts[1]
  assert abs(sizes[0] / sum(sizes) - 0.8) < 0.001
  for part in lines:
    assert set(part['label']) == set(range(len(text.MODULES)))
    is_word = part['tokens'] > 0
    assert (np.diff(is_word.astype(int), axis=1) <= 0).all()
    assert part['tokens'].max() < text.WORDS
  again = text.read_lines(0)
  chex.assert_trees_all_equal(lines, again)
  assert set(map(tuple, text.read_lines(1)[1]['tokens'].tolist())) != parts[1]


@pytest.mark.slow
def test_padding_is_not_seen(lines):
  batch = text.rows_of(lines[0], np.arange(4))
  init = jax.jit(text.Transformer().init, static_argnames='train')
  params = init(jax.random.key(0), batch['tokens'], train=False)['params']
  # Not constant, which LayerNorm would take out.
  noise = np.random.default_rng(0).normal(
    size=(*batch['tokens'].shape, text.WIDTH)
  )
  is_word = batch['tokens'][..., None] > 0
  logits_of = jax.jit(lambda *x: text.logits_of(*x, None))
  clean, at_padding, at_words = (
    logits_of(params, {**batch, 'noise': np.float32(noise * where)})
    for where in (0.0, 1.0 - is_word, 1.0 * is_word)
  )
  assert not is_word.all()
  np.testing.assert_allclose(at_padding, clean, atol=1e-5)
  assert np.abs(at_words - clean).max() > 0.01
  # In training a tenth drops out.
  dropped = jax.jit(text.logits_of)(params, batch, jax.random.key(1))
  assert 1e-3 < np.abs(dropped - clean).max() < 1


class Small(nn.Module):
  """Its words are embedded under the same name."""

  @nn.compact
  def __call__(self, tokens, *, train):
    x = nn.Embed(text.WORDS, text.WIDTH, name='words')(tokens).mean(axis=1)
    x = nn.Dropout(0.1, deterministic=not train)(nn.relu(x))
    return nn.Dense(len(text.MODULES))(x)


@pytest.mark.slow
def test_noise_sets_in_after_its_share_of_the_run(lines, monkeypatch):
  monkeypatch.setattr(text, 'Transformer', Small)
  data = text.rows_of(lines[0], np.arange(64))
  run = text.Run(batch_size=32, epochs=3, rate=0.02, start=1.0)
  with jax.numpy_dtype_promotion('standard'):
    plain, never, half, drawn = (
      text.train(data, run._replace(**fields), epsilon=epsilon, seed=0)
      for epsilon, fields in (
        (0.0, {'start': 0.0}),
        (0.5, {'start': 1.0}),
        (0.5, {'start': 0.5}),
        (0.5, {'start': 0.5, 'ascent': False}),
      )
    )
  chex.assert_trees_all_equal(never, plain)
  words, others, draws = (x['words']['embedding'] for x in (half, plain, drawn))
  assert np.abs(words - others).max() > 1e-4
  assert np.abs(words - draws).max() > 1e-4


def test_a_batch_of_more_lines_than_there_are(lines):
  data = text.rows_of(lines[0], np.arange(64))
  run = text.Run(batch_size=65, epochs=1, rate=0.02, start=0.0)
  with pytest.raises(command.Mistake, match=r'the 64 lines.*--batch_size=65'):
    text.train(data, run, epsilon=0.0, seed=0)
