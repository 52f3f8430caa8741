"""What classes are called, whose folders bear numbers such as n01440764.

Read are

    n01440764 tench, Tinca tinca    Kaggle's LOC_synset_mapping.txt
    n01443537<TAB>goldfish          Tiny ImageNet's words.txt
"""

import contextlib
from collections.abc import Iterable, Sequence
from pathlib import Path

_USUAL = ('LOC_synset_mapping.txt', 'words.txt')


def find(folders: Iterable[Path], classes: Sequence[str]) -> list[str]:
  """The names of classes, by label.

  Args:
    folders: where a file of names may lie.
    classes: their folders' names, which stand where the file has none.

  Returns:
    [] where there is no file, or one that names none of the classes.
  """
  known = set(classes)
  for path in (folder / name for folder in folders for name in _USUAL):
    found: dict[str, str] = {}
    # It only says more, and a file of that name may be anything.
    with contextlib.suppress(OSError):
      for line in path.read_text('utf-8-sig', errors='replace').splitlines():
        key, _, name = line.partition('\t' if '\t' in line else ' ')
        if key in known and name.strip():
          found[key] = name.strip()
    if found:
      return [found.get(key, key) for key in classes]
  return []
