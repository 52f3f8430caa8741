"""The pipeline's packages stand on each other as its README lists them."""

import ast
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / 'reference'
TABLE = (FOLDER / 'README.md').read_text().partition('## Files')[2]
PACKAGES = re.findall(r'^\| \*\*`(\w+)/`\*\*', TABLE, re.M)
FILES = re.findall(r'^\| `([\w/]+\.\w+)`', TABLE, re.M)


def imported(path):
  """The modules of the pipeline that a file imports, as dotted names."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom):
      yield from (f'{node.module}.{name.name}' for name in node.names)
    if isinstance(node, ast.Import):
      yield from (name.name for name in node.names)


def test_the_readme_lists_every_file():
  there = {
    path.relative_to(FOLDER).as_posix()
    for path in (*FOLDER.rglob('*.py'), *FOLDER.glob('*.sh'))
    if path.name != '__init__.py' and path.parent.name != 'configs'
  }
  assert set(FILES) == there
  assert len(FILES) == len(there)
  folders = {path.parent.name for path in FOLDER.glob('*/*.py')}
  assert sorted(PACKAGES) == sorted(folders)


@pytest.mark.parametrize('package', PACKAGES)
def test_a_package_imports_itself_and_what_stands_below_it(package):
  allowed = [*PACKAGES[PACKAGES.index(package) :], 'command']
  for path in (FOLDER / package).glob('*.py'):
    for name in imported(path):
      top, _, rest = name.partition('.')
      if top == 'reference':
        assert rest.split('.')[0] in allowed, f'{path} imports {name}'
