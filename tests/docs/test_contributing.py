"""The map of the library's packages is that of its imports."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / 'docs' / 'contributing.md').read_text()
# By room: those that it stands on.
ROOMS = {
  room: set(re.findall(r'`(\w+)`', below))
  for room, below in re.findall(
    r'^\| `(\w+)(?:/|\.py)` \|.*\| (.*) \|$', PAGE, re.M
  )
}


def room_of(path):
  return path.relative_to(ROOT / 'conadv_optax').parts[0].removesuffix('.py')


def imported(path):
  """The rooms that a file imports from."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.ImportFrom) and node.module:
      library, *rest = node.module.split('.')
      if library == 'conadv_optax':
        yield from rest[:1] or [name.name for name in node.names]


def below(room):
  """What a room stands on, and what that does."""
  return ROOMS[room].union({room}, *map(below, ROOMS[room]))


def test_every_package_is_on_the_map():
  folders = {path.parent.name for path in ROOT.glob('conadv_optax/*/*.py')}
  assert folders | {'dual_bn', 'flax'} == set(ROOMS)


@pytest.mark.parametrize('room', ROOMS)
def test_a_room_stands_on_what_the_map_says(room):
  found = set()
  for path in (ROOT / 'conadv_optax').rglob('*.py'):
    if room_of(path) == room:
      found |= set(imported(path))
  assert found <= below(room)
  # None is named for nothing.
  assert ROOMS[room] <= found


def test_the_files_that_are_named_are_there():
  named = re.findall(r'`((?:tests|docs|conadv_optax)/[\w/.]+\.\w+)`', PAGE)
  named += [
    f'conadv_optax/{path}'
    for path in re.findall(r'`((?:training|methods)/\w+\.py)`', PAGE)
  ]
  for path in named:
    assert 'NAME' in path or (ROOT / path).exists(), path
