"""The README's example runs, and its commands are the ones that CI runs."""

import pathlib
import re

import jax
import pytest

README = (pathlib.Path(__file__).parents[2] / 'README.md').read_text()


def blocks(language):
  return re.findall(rf'^```{language}\n(.*?)^```', README, re.M | re.S)


@pytest.mark.slow
def test_example_runs_and_its_claims_hold():
  (example,) = blocks('python')
  assert 'chex.assert' in example
  # The settings that users have; Optax's Adam does not hold under strict ones.
  with jax.numpy_dtype_promotion('standard'):
    exec(compile(example, 'README.md', 'exec'), {})


def test_two_commands_do_all_the_setup():
  run, test, _ = blocks('sh')
  assert len(run.splitlines()) == len(test.splitlines()) == 1
  assert run.strip().endswith('-m reference.main')
  assert test.strip().endswith('pytest')
