"""Breaks the code in one place at a time and asks whether a test fails.

  .venv/bin/python tests/support/mutants.py --count=120 --out=mutants.csv
  .venv/bin/python tests/support/mutants.py --again=mutants.csv --out=again.csv

The first command draws the places, the second breaks the same ones again, after
the tests were changed. All tests run once, to learn which of them reach which
line; a mutant then meets those that reach its own. It needs pytest-cov, and
works in copies of the tracked files.
"""

import argparse
import ast
import collections
import concurrent.futures
import csv
import os
import queue
import random
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import coverage

_ROOT = Path(__file__).parents[2]
_PACKAGES = ('conadv_optax', 'reference')
# Of the tests that reach a line: those of so many seconds.
_SECONDS = 60.0
# A mutant may not end.
_PATIENCE = 240.0

_OTHER: dict[type[ast.AST], str] = {
  ast.Lt: '<=',
  ast.LtE: '<',
  ast.Gt: '>=',
  ast.GtE: '>',
  ast.Eq: '!=',
  ast.NotEq: '==',
  ast.Is: 'is not',
  ast.IsNot: 'is',
  ast.In: 'not in',
  ast.NotIn: 'in',
  ast.Add: '-',
  ast.Sub: '+',
  ast.Mult: '/',
  ast.Div: '*',
  ast.FloorDiv: '*',
  ast.Mod: '*',
  ast.Pow: '*',
  ast.And: 'or',
  ast.Or: 'and',
}


class Mutant(NamedTuple):
  """One place that is broken.

  Attributes:
    file: its path in the repository.
    line: its number.
    column: where it begins in the line, in bytes.
    context: the line, by which it is found again.
    source: the text that is replaced.
    replacement: the text that replaces it.
  """

  file: str
  line: int
  column: int
  context: str
  source: str
  replacement: str


def _replacements(node: ast.AST) -> Iterator[tuple[ast.AST, str]]:
  """What takes the place of a node, or of a part of it."""
  match node:
    case ast.Compare(left=left, ops=[op], comparators=[right]):
      yield node, f'{ast.unparse(left)} {_OTHER[type(op)]} {ast.unparse(right)}'
    case ast.BinOp(left=left, op=op, right=right) if type(op) in _OTHER:
      other = (
        f'(({ast.unparse(left)}) {_OTHER[type(op)]} ({ast.unparse(right)}))'
      )
      yield node, other
    case ast.BoolOp(op=op, values=values):
      other = f' {_OTHER[type(op)]} '.join(
        f'({ast.unparse(x)})' for x in values
      )
      yield node, f'({other})'
    case ast.UnaryOp(op=ast.USub() | ast.Not(), operand=operand):
      yield node, f'({ast.unparse(operand)})'
    case ast.If(test=test) | ast.IfExp(test=test):
      yield test, f'(not ({ast.unparse(test)}))'
    case ast.Constant(value=bool() as value):
      yield node, str(not value)
    case ast.Constant(value=int() | float() as value):
      yield node, repr(value + 1)
    case ast.Expr(value=ast.Call()):
      yield node, 'pass'
    case ast.Call(keywords=keywords):
      # An option that is not passed on.
      for left_out in keywords:
        if left_out.arg:
          rest = [x for x in keywords if x is not left_out]
          yield node, ast.unparse(ast.Call(node.func, node.args, rest))


def _walk(node: ast.AST) -> Iterator[ast.AST]:
  """All that computes: no messages, types and imports."""
  for name, value in ast.iter_fields(node):
    if name in ('annotation', 'returns', 'decorator_list', 'bases'):
      continue
    for child in value if isinstance(value, list) else [value]:
      if isinstance(child, ast.AST) and not isinstance(
        child,
        ast.Raise | ast.JoinedStr | ast.Assert | ast.Import | ast.ImportFrom,
      ):
        yield child
        yield from _walk(child)


def _find(file: str, text: str) -> Iterator[Mutant]:
  lines = text.splitlines()
  for node in _walk(ast.parse(text)):
    for part, replacement in _replacements(node):
      assert isinstance(part, ast.expr | ast.stmt)
      source = ast.get_source_segment(text, part)
      assert source is not None
      place = (part.lineno, part.col_offset, lines[part.lineno - 1])
      yield Mutant(file, *place, source, replacement)


def _broken(text: str, mutant: Mutant) -> str:
  """The text of a file with a mutant in it.

  Raises:
    ValueError: when the file no longer has what the mutant replaces.
  """
  lines = text.splitlines(keepends=True)
  for number in sorted(
    range(len(lines)), key=lambda number: abs(number + 1 - mutant.line)
  ):
    if lines[number].rstrip('\n') == mutant.context:
      column = len(lines[number].encode()[: mutant.column].decode())
      start = sum(map(len, lines[:number])) + column
      if text.startswith(mutant.source, start):
        end = start + len(mutant.source)
        return text[:start] + mutant.replacement + text[end:]
  raise ValueError(f'{mutant.file} no longer has {mutant.context.strip()!r}.')


class _Reached:
  """Which tests reach which line, and how long each of them takes."""

  def __init__(self, folder: Path):
    """Runs all tests of a folder once."""
    times = folder / 'times.xml'
    _run(
      folder,
      *(f'--cov={package}' for package in _PACKAGES),
      *('--cov-context=test', '--cov-report=', f'--junitxml={times}'),
    ).communicate()
    self._folder = folder
    self._data = coverage.CoverageData(str(folder / '.coverage'))
    self._data.read()
    self._seconds = {
      '::'.join(
        [
          case.attrib['classname'].replace('.', '/') + '.py',
          case.attrib['name'],
        ]
      ): float(case.attrib['time'])
      for case in ET.parse(times).iter('testcase')
    }

  def tests(self, mutant: Mutant) -> list[str]:
    """Tests that reach a mutant: one of each function, then the quickest."""
    contexts = self._data.contexts_by_lineno(str(self._folder / mutant.file))
    names = {
      context.rpartition('|')[0]
      for line in range(
        mutant.line, mutant.line + mutant.source.count('\n') + 1
      )
      for context in contexts.get(line, [])
    }
    known = sorted(
      names & self._seconds.keys(), key=lambda x: (self._seconds[x], x)
    )
    cases: collections.Counter[str] = collections.Counter()
    ranked = []
    for name in known:
      function = name.partition('[')[0]
      ranked.append((cases[function], name))
      cases[function] += 1
    chosen: list[str] = []
    total = 0.0
    for _, name in sorted(ranked, key=lambda x: x[0]):
      total += self._seconds[name]
      if chosen and total > _SECONDS:
        break
      chosen.append(name)
    return chosen


def _run(folder: Path, *arguments: str) -> subprocess.Popen[str]:
  return subprocess.Popen(
    [
      sys.executable,
      '-m',
      'pytest',
      '-q',
      '-p',
      'no:cacheprovider',
      *arguments,
    ],
    cwd=folder,
    # Found before an installation of the project elsewhere.
    env={**os.environ, 'PYTHONPATH': str(folder)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    start_new_session=True,
  )


def _meet(folder: Path, mutant: Mutant, tests: list[str]) -> str:
  """The first test that fails with a mutant; '' if none does."""
  path = folder / mutant.file
  whole = path.read_text()
  path.write_text(_broken(whole, mutant))
  process = _run(folder, '-x', '-n0', '--tb=no', *tests)
  try:
    out, _ = process.communicate(timeout=_PATIENCE)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, 9)
    process.communicate()
    return 'does not end'
  finally:
    path.write_text(whole)
  if process.returncode == 0:
    return ''
  failed = [x for x in out.splitlines() if x.startswith(('FAILED', 'ERROR'))]
  return failed[0].partition(' - ')[0] if failed else out[-200:]


def _draw(count: int, seed: int, reached: _Reached, root: Path) -> list[Mutant]:
  """Mutants that a test reaches, as many a package, at most one a line."""
  rng = random.Random(seed)
  chosen: dict[tuple[str, int], Mutant] = {}
  for number, package in enumerate(_PACKAGES, start=1):
    found = [
      mutant
      for path in sorted((root / package).rglob('*.py'))
      for mutant in _find(str(path.relative_to(root)), path.read_text())
    ]
    rng.shuffle(found)
    for mutant in found:
      if len(chosen) == count * number // len(_PACKAGES):
        break
      if reached.tests(mutant):
        chosen.setdefault((mutant.file, mutant.line), mutant)
  return sorted(chosen.values())


def _load(path: Path) -> list[Mutant]:
  with path.open(newline='') as file:
    return [
      Mutant(
        *(row['file'], int(row['line']), int(row['column'])),
        *(row['context'], row['source'], row['replacement']),
      )
      for row in csv.DictReader(file)
    ]


def main() -> None:
  """Prints and writes a line for each mutant."""
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument('--count', type=int, default=120)
  parser.add_argument('--seed', type=int, default=0)
  parser.add_argument('--again', type=Path)
  parser.add_argument('--out', type=Path, required=True)
  options = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    whole = folder / 'whole'
    tracked = subprocess.check_output(['git', 'ls-files', '-z'], cwd=_ROOT)
    for file in filter(None, tracked.decode().split('\0')):
      (whole / file).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy(_ROOT / file, whole / file)
    reached = _Reached(whole)
    mutants = (
      _load(options.again)
      if options.again
      else _draw(options.count, options.seed, reached, whole)
    )
    jobs = os.cpu_count() or 1
    free: queue.Queue[Path] = queue.Queue()
    for job in range(jobs):
      free.put(Path(shutil.copytree(whole, folder / str(job))))

    def meet(mutant: Mutant) -> str:
      copy = free.get()
      try:
        return _meet(copy, mutant, reached.tests(mutant))
      finally:
        free.put(copy)

    with (
      concurrent.futures.ThreadPoolExecutor(jobs) as pool,
      options.out.open('w', newline='') as file,
    ):
      writer = csv.writer(file)
      writer.writerow([*Mutant._fields, 'failed'])
      for mutant, failed in zip(mutants, pool.map(meet, mutants), strict=True):
        writer.writerow([*mutant, failed])
        file.flush()
        print(
          f'{mutant.file}:{mutant.line}: {failed or "survives"}', flush=True
        )


if __name__ == '__main__':
  main()
