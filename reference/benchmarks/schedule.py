"""What runs when: the compiler's own schedule of a program for TPUs.

The compiled program lists its operations in the order in which a core runs
them, each with the cycles that the compiler expects and with the name of what
it came from.
"""

import itertools
import re
from collections.abc import Sequence

_COMPUTATION = re.compile(r'^(?:ENTRY )?%(\S+) .*\{$')
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_NAME = re.compile(r'op_name="([^"]*)"')
_WHILE = re.compile(r' while\(.* condition=%([\w.-]+), body=%([\w.-]+)')
# What a loop from 0 counts up to.
_TRIPS = re.compile(r' constant\((\d+)\)')
_BRANCHES = re.compile(r' conditional\(.* branch_computations=\{([^}]*)\}')

# A pass of the net and its millions of cycles, in the order of execution.
Schedule = list[tuple[str, float]]


def read(text: str) -> list[Schedule]:
  """The schedule of each role: one, or two where devices branch.

  Args:
    text: of a program for TPUs, as the compiler prints it.

  Returns:
    Runs of operations of one kind: 'attack forward', 'attack backward' and its
    last part, 'attack pixels', 'training forward', 'training backward', and
    'other', which lies between and after them.
  """
  computations: dict[str, list[str]] = {}
  entry = lines = None
  for line in text.splitlines():
    if found := _COMPUTATION.match(line):
      lines = computations[found[1]] = []
      if line.startswith('ENTRY'):
        entry = found[1]
    elif line == '}':
      lines = None
    elif lines is not None:
      lines.append(line)
  assert entry is not None
  roles = [0]
  for line in computations[entry]:
    if branches := _branches(line):
      roles = list(range(len(branches)))
  return [_merge(_operations(computations, entry, role)) for role in roles]


def to_text(roles: Sequence[Schedule]) -> str:
  """Schedules as a cell of a CSV."""
  return '|'.join(
    ';'.join(f'{kind}:{cycles:.4f}' for kind, cycles in schedule)
    for schedule in roles
  )


def from_text(text: str) -> list[Schedule]:
  """The inverse of `to_text`."""
  return [
    [
      (kind, float(cycles))
      for kind, cycles in (run.split(':') for run in role.split(';'))
    ]
    for role in text.split('|')
  ]


def _branches(line: str) -> list[str]:
  if found := _BRANCHES.search(line):
    return [name.strip().removeprefix('%') for name in found[1].split(',')]
  return []


def _operations(
  computations: dict[str, list[str]], name: str, role: int
) -> Schedule:
  """Kind and cycles of every operation, those of loops and branches too."""
  operations: Schedule = []
  for line in computations[name]:
    if branches := _branches(line):
      taken = branches[min(role, len(branches) - 1)]
      operations += _operations(computations, taken, role)
    elif found := _WHILE.search(line):
      condition, body = found.groups()
      [trips] = _TRIPS.findall('\n'.join(computations[condition]))
      operations += int(trips) * _operations(computations, body, role)
    elif cycles := _CYCLES.search(line):
      named = _NAME.search(line)
      kind = _kind(named[1] if named else '')
      operations.append((kind, int(cycles[1]) / 1e6))
  return operations


def _kind(name: str) -> str:
  if 'jvp(' not in name:
    return 'other'
  part = 'attack' if '/attack/' in name else 'training'
  # That of a function with a rule of its own is 'transpose(attack)/jvp('.
  if 'transpose(' not in name:
    return f'{part} forward'
  # Of the first layer an attack needs the one gradient that training does not.
  is_pixels = part == 'attack' and '/stem/' in name
  return 'attack pixels' if is_pixels else f'{part} backward'


def _merge(operations: Schedule) -> Schedule:
  """Joins neighbours of one kind, and small others with what is before them."""
  merged: Schedule = []
  total = sum(cycles for _, cycles in operations)
  for kind, group in itertools.groupby(operations, lambda x: x[0]):
    cycles = sum(cycles for _, cycles in group)
    if merged and (cycles < total / 200 or kind == merged[-1][0]):
      merged[-1] = merged[-1][0], merged[-1][1] + cycles
    else:
      merged.append((kind, cycles))
  return merged
