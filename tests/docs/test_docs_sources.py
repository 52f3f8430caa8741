"""The page of sources has every paper that is cited, and calls that exist."""

import re
from pathlib import Path

import pytest

import conadv_optax as conadv
import conadv_optax.flax
from reference.run.methods import METHODS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'sources.md').read_text()
ADDRESS = re.compile(
  r'arxiv\.org/abs/[\d.]*\d|doi\.org/[\w./]*\w|proceedings\.mlr\.press/[\w./]*'
)
CITING = sorted(
  path
  for folder in ('conadv_optax', 'reference', 'docs')
  for pattern in ('*.py', '*.md')
  for path in (ROOT / folder).rglob(pattern)
  if ADDRESS.search(path.read_text())
)


@pytest.mark.parametrize(
  'path', CITING, ids=lambda path: str(path.relative_to(ROOT))
)
def test_a_paper_that_is_cited_is_on_the_page(path):
  missing = set(ADDRESS.findall(path.read_text())) - set(ADDRESS.findall(PAGE))
  assert not missing, f'docs/sources.md lacks a row for {missing}.'


def test_calls_and_methods_exist():
  calls = set(re.findall(r'`(conadv(?:_optax)?\.[.\w]+)', PAGE))
  assert len(calls) > 30
  for call in calls:
    found = conadv
    for name in call.split('.')[1:]:
      found = getattr(found, name)
    assert callable(found), call
  methods = re.findall(r'--config\.method=(\w+)', PAGE)
  assert len(methods) > 10
  assert set(methods) <= set(METHODS)
  for module in re.findall(r'python -m ([\w.]+)', PAGE):
    assert (ROOT / f'{module.replace(".", "/")}.py').exists(), module


def test_a_row_has_three_cells():
  rows = re.findall(r'^\|.*\|$', PAGE, re.M)
  assert len(rows) > 30
  for row in rows:
    assert row.count('|') == 4, row
