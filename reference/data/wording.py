"""How a message names many things."""

import itertools
from collections.abc import Collection

_SHOWN = 5


def some(names: Collection[str]) -> str:
  """The first five names, and how many there are beside them."""
  shown = ', '.join(itertools.islice(names, _SHOWN))
  more = len(names) - _SHOWN
  return f'{shown} and {more:,} more' if more > 0 else shown
