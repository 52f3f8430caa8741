"""Every block of Python on the site runs, and each asserts what it claims."""

import ast
import re
from pathlib import Path

import jax
import pytest

import conadv_optax as conadv
import conadv_optax.flax

DOCS = Path(__file__).parents[2] / 'docs'
PAGES = sorted(
  page for page in DOCS.rglob('*.md') if '_build' not in page.parts
)


def blocks(page):
  """The fenced Python of a page, with the line at which each begins."""
  text = page.read_text()
  return [
    (text[: found.start(1)].count('\n'), found[1])
    for found in re.finditer(r'^```python\n(.*?)^```', text, re.M | re.S)
  ]


WITH_BLOCKS = [page for page in PAGES if blocks(page)]


def name(page):
  return page.relative_to(DOCS).as_posix()


def asserts(statement):
  """Whether a statement calls a chex assertion."""
  return (
    isinstance(statement, ast.Expr)
    and isinstance(statement.value, ast.Call)
    and ast.unparse(statement.value.func).startswith('chex.assert_')
  )


def test_the_pages_that_a_reader_needs_have_examples():
  found = {name(page) for page in WITH_BLOCKS}
  assert {
    'checkpointing.md',
    'composing.md',
    'dual_bn.md',
    'faq.md',
    'how_to_choose.md',
    'index.md',
    'method.md',
    'quickstart.md',
    'recipes.md',
    'text.md',
  } <= found


@pytest.mark.slow
@pytest.mark.parametrize('page', WITH_BLOCKS, ids=name)
def test_blocks_run_in_order_and_end_in_an_assertion(page):
  namespace = {'__name__': name(page)}
  # The settings that users have, not the strict ones of the other tests.
  with (
    jax.numpy_dtype_promotion('standard'),
    jax.numpy_rank_promotion('allow'),
  ):
    for line, code in blocks(page):
      last = ast.parse(code).body[-1]
      assert asserts(last), f'{name(page)}:{line}: ends without an assertion'
      # Newlines before it, so that a traceback names the line of the page.
      exec(compile('\n' * line + code, str(page), 'exec'), namespace)


@pytest.mark.parametrize('page', PAGES, ids=name)
def test_no_block_is_hidden_from_the_tests(page):
  fences = re.findall(r'^ *(?:```+|~~~+) *(\S+)', page.read_text(), re.M)
  known = {
    'python',
    'sh',
    'text',
    '{toctree}',
    '{include}',
    '{image}',
    '{eval-rst}',
  }
  assert set(fences) <= known
  assert not re.search(r'^ +```python', page.read_text(), re.M)


@pytest.mark.parametrize('page', sorted((DOCS / 'api').glob('*.md')), ids=name)
def test_a_page_of_the_api_is_a_package(page):
  homes = conadv, conadv.dual_bn, conadv.hessian, conadv_optax.flax
  for entry in re.findall(r'^\.\. auto\w+:: (\w+)$', page.read_text(), re.M):
    [found] = [getattr(home, entry) for home in homes if hasattr(home, entry)]
    library, *rest = found.__module__.split('.')
    # What all packages stand on is told where it is used.
    if library == 'conadv_optax' and rest[0] != 'core':
      assert rest[0] == page.stem, entry
