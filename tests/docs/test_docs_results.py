"""The tables of the results page are those that its CSVs give."""

import statistics
from pathlib import Path

import pytest

from reference import scala
from reference.study import report, results, reused_loss
from reference.tools.tables import read_csv

DOCS = Path(__file__).parents[2] / 'docs'
PAGE = (DOCS / 'results.md').read_text()


def tables(text):
  """Blocks of lines of Markdown that are a table."""
  blocks = [block.strip() for block in text.split('\n\n')]
  return [block for block in blocks if block.startswith('|')]


@pytest.mark.parametrize(
  'path', sorted(DOCS.glob('study_*.csv')), ids=lambda path: path.stem
)
def test_the_tables_of_a_study(path):
  found = tables(report.report(results.read(path)))
  assert found
  for table in found:
    assert table in PAGE


def test_the_gains_over_ten_seeds():
  rows = [
    *results.read(DOCS / 'study_methods.csv'),
    *results.read(DOCS / 'study_late.csv'),
  ]
  groups = results.finals(rows)
  names = (
    'conadv',
    'fast_advprop_35',
    'fast_advprop_35_late',
    'fast_advprop_50_late',
    'fast_advprop_10',
  )
  gains = [
    results.differences(groups[name, 500], groups['vanilla', 500])
    for name in names
  ]
  assert {len(x) for x in gains} == {10}
  cells = [
    f'{100 * statistics.fmean(x):.2f} ± {report.error_text(x)}' for x in gains
  ]
  assert f'| {" | ".join(cells)} |' in PAGE


def test_the_tables_of_sharpness():
  groups = results.finals(results.read(DOCS / 'sharpness.csv'))
  assert report.sharpness_table(groups) in PAGE
  assert report.comparison_table(groups) in PAGE


def test_the_table_of_the_reused_gradient(capsys):
  reused_loss.print_table(read_csv(DOCS / 'reused_loss.csv'))
  [table] = tables(capsys.readouterr().out)
  assert table in PAGE


def test_the_table_of_text(capsys):
  scala.print_table(read_csv(DOCS / 'text_runs.csv'))
  [table] = tables(capsys.readouterr().out)
  assert table in (DOCS / 'text.md').read_text()
