"""Files that say of which class each held-out image is.

Read are

    n01751748                     a class a line, the images sorted by name
    val_0.JPEG  n03444034  0 32   a table, in any order: Tiny ImageNet's
    val_0001,n03995372 85 1 499   the same with commas: Kaggle's
    490                           ImageNet's numbers, with their meta.mat
"""

import codecs
import io
import os
import re
import tarfile
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from scipy import io as matlab

from reference.command import Mistake
from reference.data.wording import some

_NUMBERS = 'ILSVRC2012_validation_ground_truth.txt'
_META = 'meta.mat'
_KIT = 'ILSVRC2012_devkit_t12'
# Where labels lie in data sets that many have.
_USUAL = (
  'val_annotations.txt',
  'LOC_val_solution.csv',
  _NUMBERS,
  f'{_KIT}/data/{_NUMBERS}',
  f'{_KIT}.tar.gz',
)


class Labels(NamedTuple):
  """The labels of images, in their order.

  Attributes:
    labels: a place among the classes for each image.
    unused: the file's names of images that are not there.
  """

  labels: list[int]
  unused: list[str]


def find(folders: Iterable[Path]) -> Path | None:
  """A file of labels under a usual name in one of the folders."""
  paths = (folder / name for folder in folders for name in _USUAL)
  return next((path for path in paths if path.exists()), None)


def _decode(path: Path, data: bytes) -> str:
  # Windows marks the beginning of a text, and has two ways to write it.
  is_16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
  try:
    return data.decode('utf-16' if is_16 else 'utf-8-sig')
  except UnicodeDecodeError as error:
    raise Mistake(
      f'A file of labels is text. Given {path}, which is not: {error}. Likely '
      'it is packed or a table of a spreadsheet: save that as CSV.'
    ) from None


def _read(path: Path) -> tuple[str, bytes | None]:
  """The text, and what its numbers mean if it is of the development kit."""
  try:
    if path.name.endswith('.tar.gz'):
      with tarfile.open(path) as kit:
        text, meta = (
          kit.extractfile(f'{_KIT}/data/{name}') for name in (_NUMBERS, _META)
        )
        assert text is not None
        assert meta is not None
        return _decode(path, text.read()), meta.read()
    beside = path.with_name(_META)
    return (
      _decode(path, path.read_bytes()),
      beside.read_bytes() if beside.exists() else None,
    )
  except (OSError, EOFError, KeyError, tarfile.TarError) as error:
    raise Mistake(
      f'The labels of the held-out images must be readable. Given {path}: '
      f'{error}. Likely the path is wrong or its download broke off: '
      f'`ls -l {path}`.'
    ) from error


def _official(meta: bytes) -> dict[str, str]:
  """The class that each number of the development kit stands for."""
  synsets = matlab.loadmat(io.BytesIO(meta), squeeze_me=True)['synsets']
  return {str(x['ILSVRC2012_ID']): str(x['WNID']) for x in synsets}


def _split(line: str) -> tuple[str, str]:
  """The name and the rest of a line of a table, '' where it has one column."""
  mark = re.search(r'[,;\t]', line) or re.search(' ', line)
  end = mark.start() if mark else len(line)
  return line[:end].strip(' "'), line[end + 1 :].strip(' "')


def _class(rest: str, classes: Collection[str]) -> str:
  """The class, which stands before what else there is, such as boxes."""
  return rest if rest in classes else re.split(r'[,;\s]', rest)[0]


def _refuse_unknown(path: Path, unknown: Sequence[str]) -> None:
  if not unknown:
    return
  if all(name.isdecimal() for name in unknown):
    likely = (
      'these are the numbers of the development kit, which count the classes '
      f'in another order: put its {_META} beside the file, or write the names, '
      'such as n01440764'
    )
  else:
    likely = 'a class was not unpacked or a name is misspelt'
  raise Mistake(
    'Every held-out image must be of a class that is trained on. Given '
    f'{path}; not among the training classes: {some(unknown)}. Likely {likely}.'
  )


def of_images(
  path: Path, names: Sequence[str], classes: Sequence[str]
) -> Labels:
  """The label of each image.

  Args:
    path: a file of labels, or the development kit of ImageNet as a tar file.
    names: of the images, sorted.
    classes: of the training images; a label is a place in it.

  Raises:
    Mistake: when an image has no label, or a class is not trained on.
  """
  text, meta = _read(path)
  lines = [x.strip(' \t"') for x in text.splitlines() if x.strip()]
  numbers = {name: label for label, name in enumerate(classes)}
  if (
    meta
    and all(x.isdecimal() for x in lines)
    and not set(lines) <= set(numbers)
  ):
    official = _official(meta)
    lines = [official.get(x, x) for x in lines]

  if any(x in numbers for x in lines) or not any(_split(x)[1] for x in lines):
    if len(lines) == len(names) + 1 and lines[0] not in numbers:
      del lines[0]  # the title of the column
    _refuse_unknown(path, sorted(set(lines) - set(numbers)))
    if len(lines) != len(names):
      raise Mistake(
        'Every held-out image must have a line with its class. Given '
        f'{len(lines):,} lines in {path} for {len(names):,} images. Likely one '
        'of the two is not whole: `wc -l` counts the lines.'
      )
    return Labels([numbers[x] for x in lines], [])

  table = dict(map(_split, lines))
  found = {}
  for name in names:
    key = name if name in table else os.path.splitext(name)[0]
    if key in table:
      found[name] = _class(table.pop(key), numbers)
  missing = [name for name in names if name not in found]
  if missing:
    raise Mistake(
      f'Every held-out image must have a line in {path}, its name and its '
      f'class. Without: {some(missing)}. Likely the file is of other images, '
      'or its first column is not the name.'
    )
  _refuse_unknown(path, sorted(set(found.values()) - set(numbers)))
  # The titles of the columns name no class.
  unused = [x for x, rest in table.items() if _class(rest, numbers) in numbers]
  return Labels([numbers[found[name]] for name in names], unused)
