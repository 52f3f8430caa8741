"""Which images lie in a folder, of which class, and which are held out.

These forms are read:

    train/CLASS/*.jpg          train/CLASS/images/*.jpg, as in Tiny ImageNet
    val/CLASS/*.jpg            or valid/, validation/, test/
    val/*.jpg                  or val/images/*.jpg, with a file of labels
    ILSVRC/Data/CLS-LOC/...    the same three, as Kaggle packs ImageNet

A class's label is its place among the sorted names of the folders in train/.
"""

import collections
import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from reference.command import Mistake
from reference.data import class_names, labels
from reference.data.wording import some

EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp')
_HELD_OUT = ('val', 'valid', 'validation', 'test')
_KAGGLE = 'ILSVRC/Data/CLS-LOC'
# Tiny ImageNet's folder between a class and its images.
_LEVEL = 'images'
# What systems and programs leave behind; names with a dot are hidden anyhow.
_SYSTEM = {
  '@eaDir',
  '#recycle',
  '#snapshot',
  '$RECYCLE.BIN',
  'System Volume Information',
  'Thumbs.db',
  'ehthumbs.db',
  'desktop.ini',
  '__MACOSX',
  '__pycache__',
  'lost+found',
}

Records = list[tuple[str, int]]
LeftOut = dict[str, list[str]]


class Layout(NamedTuple):
  """The images of a folder.

  Attributes:
    classes: a label is a place in this list.
    train: path and label of each training image.
    held_out: the same of the images that training never sees.
    left_out: paths of what is not read, by what it is.
    label_file: what says of which classes the held-out images are, where their
      folders do not.
    names: of the classes, by label, where a file says them; else empty.
  """

  classes: list[str]
  train: Records
  held_out: Records
  left_out: LeftOut
  label_file: Path | None = None
  names: Sequence[str] = ()


class _Level(NamedTuple):
  """What lies directly in a folder: sorted names, and what is left out."""

  folders: list[str]
  images: list[str]
  left_out: LeftOut


def is_hidden(name: str) -> bool:
  """Whether an entry is no part of a data set, by its name."""
  return name.startswith('.') or name in _SYSTEM


def notes(left_out: LeftOut) -> list[str]:
  """What is left out, in words."""
  return [
    f'Not read, {what} ({len(paths):,}): {some(paths)}.'
    for what, paths in left_out.items()
    if paths
  ]


def _merge(left_out: LeftOut, more: LeftOut) -> None:
  for what, paths in more.items():
    left_out.setdefault(what, []).extend(paths)


def _look(folder: str) -> _Level:
  folders, images, left_out = [], [], collections.defaultdict(list)
  try:
    with os.scandir(folder) as entries:
      for entry in entries:
        if is_hidden(entry.name):
          left_out['hidden or of the system'].append(entry.path)
        elif entry.is_symlink() and not os.path.exists(entry.path):
          if entry.name.lower().endswith(EXTENSIONS):
            # As any other image that cannot be opened.
            images.append(entry.name)
          else:
            left_out['links that lead nowhere'].append(entry.path)
        elif entry.is_dir():
          folders.append(entry.name)
        elif entry.name.lower().endswith(EXTENSIONS) and entry.is_file():
          images.append(entry.name)
        else:
          left_out['of another kind'].append(entry.path)
  except OSError as error:
    raise Mistake(
      f'All folders of images must be readable. {folder} is not: {error}. '
      f'Likely it is not yours to read: `ls -ld {folder}`.'
    ) from error
  for paths in left_out.values():
    paths.sort()
  return _Level(sorted(folders), sorted(images), left_out)


def _class_folders(folder: str, left_out: LeftOut) -> list[str]:
  """The names of a split's class folders."""
  level = _look(folder)
  if lost := level.left_out.get('links that lead nowhere'):
    # A class less would shift the labels of those after it.
    raise Mistake(
      f'Class folders must be there. Given links that lead nowhere: '
      f'{some(lost)}. Likely a disk is not mounted: `ls -l {lost[0]}`.'
    )
  _merge(left_out, level.left_out)
  beside = [os.path.join(folder, name) for name in level.images]
  _merge(left_out, {'images beside the class folders': beside})
  return level.folders


def _class_images(folder: str, left_out: LeftOut) -> list[str]:
  """The paths of a class's images."""
  level = _look(folder)
  if level.folders == [_LEVEL] and not level.images:
    _merge(left_out, level.left_out)
    folder = os.path.join(folder, _LEVEL)
    level = _look(folder)
  if not level.images:
    others = level.left_out.get('of another kind', [])
    if level.folders:
      likely = (
        f'only folders: {some(level.folders)}. Likely there is a level too '
        f'many: `mv {folder}/{level.folders[0]}/* {folder}/`'
      )
    elif others:
      likely = (
        f'only {some([os.path.basename(path) for path in others])}. Likely '
        'these are of a kind that is not read: `mogrify -format png` of '
        'ImageMagick writes PNGs beside them'
      )
    else:
      likely = (
        'nothing. Likely the unpacking broke off; if it is no class, move it: '
        f'`mv {folder} /another/place/`'
      )
    raise Mistake(
      f'Every class folder must hold an image, {", ".join(EXTENSIONS)}. Given '
      f'{folder}, which holds {likely}.'
    )
  _merge(left_out, level.left_out)
  inside = [os.path.join(folder, name) for name in level.folders]
  _merge(left_out, {'folders inside of a class': inside})
  return [os.path.join(folder, name) for name in level.images]


def _records(
  folder: str, names: Sequence[str], classes: Sequence[str], left_out: LeftOut
) -> Records:
  """The images of the class folders of these names."""
  numbers = {name: label for label, name in enumerate(classes)}
  return [
    (path, numbers[name])
    for name in names
    for path in _class_images(os.path.join(folder, name), left_out)
  ]


def _flat(
  folder: str,
  classes: Sequence[str],
  left_out: LeftOut,
  *,
  label_file: Path | None,
  places: Sequence[Path],
) -> tuple[Records, Path]:
  """The held-out images of a folder without class folders, and their labels."""
  level = _look(folder)
  where, images = os.path.join(folder, *level.folders), level.images
  if level.folders:
    inner = _look(where)
    beside = [os.path.join(folder, name) for name in images]
    _merge(left_out, {f'images beside {_LEVEL}/': beside})
    _merge(left_out, inner.left_out)
    images = inner.images
  file = label_file or labels.find([Path(folder), *places])
  if not images or file is None:
    raise Mistake(
      'Held-out images must lie in a folder for each class, as those of '
      f'training do, or have a file of labels. Given {where}, which holds '
      f'{len(images):,} images and no class folders; labels: {file}. Give '
      'them to prepare_data, `--held_out_labels=/path/to/labels.csv`, a line '
      'such as `name.JPEG,CLASS` for each image, or copy those of the data set '
      f'to {folder}, such as LOC_val_solution.csv.'
    )
  others = level.left_out.get('of another kind', [])
  level.left_out['of another kind'] = [x for x in others if x != str(file)]
  _merge(left_out, level.left_out)
  found = labels.of_images(file, images, classes)
  _merge(left_out, {f'lines of {file} without an image': found.unused})
  paths = (os.path.join(where, name) for name in images)
  return list(zip(paths, found.labels, strict=True)), file


def _in_classes(
  folder: str, train: str, classes: Sequence[str], left_out: LeftOut
) -> Records:
  """The held-out images of class folders, which need not be there for all."""
  names = _class_folders(folder, left_out)
  strange = sorted(set(names) - set(classes))
  if strange:
    raise Mistake(
      'Held-out classes must be among the training classes. Given '
      f'{len(strange):,} in {folder} that are not: {some(strange)}. Likely the '
      'unpacking of the training images broke off or a folder is misspelt: '
      f'`diff <(ls {train}) <(ls {folder})`.'
    )
  return _records(folder, names, classes, left_out)


def root_of(folder: str) -> str | None:
  """The folder that holds train/, the given one or Kaggle's in it, or None."""
  roots = (folder, os.path.join(folder, _KAGGLE))
  return next(
    (root for root in roots if os.path.isdir(os.path.join(root, 'train'))), None
  )


def _root(folder: str) -> str:
  if (root := root_of(folder)) is not None:
    return root
  given = Path(folder)
  near = [given.parent, *(sorted(given.iterdir()) if given.is_dir() else [])]
  likely = [path for path in near if (path / 'train').is_dir()]
  state = 'in which no train/ is' if given.is_dir() else 'which is no folder'
  if not folder:
    advice = 'it was not given: `--config.data.folder=/path/to/images`'
  elif not given.is_dir():
    advice = f'it is misspelt or its disk is not mounted: `ls -d {given}`'
  elif (given / 'manifest.json').exists():
    advice = 'it holds shards: `--config.data.source=array_record`'
  else:
    path = likely[0] if likely else '/path/to/the/folder/that/holds/train'
    advice = (
      f'the path is one level off: `--config.data.folder={path}`, or '
      '`--source=` of prepare_data'
    )
  raise Mistake(
    'A folder of images must hold train/CLASS/*.jpg, and val/ or test/ of the '
    f'same form. Given {folder!r}, {state}. Likely {advice}.'
  )


def find_classes(folder: str) -> Layout:
  """The images of a folder of class folders alone, all of them held out.

  Raises:
    Mistake: when it holds no class folder, or one without an image.
  """
  left_out: LeftOut = {}
  classes = _class_folders(folder, left_out)
  above = os.path.dirname(os.path.abspath(folder))
  is_part = root_of(above) == above
  if not classes or (classes == [_LEVEL] and is_part):
    likely = (
      'its labels are in a file, which is read with the folder that holds '
      f'train/ too: `--data={above}`'
      if is_part
      else f'the path is one level off: `ls {folder}/..`'
    )
    raise Mistake(
      'Images must lie in a folder for each class, CLASS/*.jpg. Given '
      f'{folder}, which holds {"images/ alone" if classes else "no folder"}. '
      f'Likely {likely}.'
    )
  records = _records(folder, classes, classes, left_out)
  return Layout(classes, [], records, left_out)


def find(folder: str, label_file: Path | None = None) -> Layout:
  """The images of a folder.

  Args:
    folder: of one of the forms above.
    label_file: for held-out images without class folders; None takes one that
      lies with them under the name that its data set gives it.

  Raises:
    Mistake: when the folder is of no such form, a class has no image, or one is
      held out that is not trained on.
  """
  root = _root(folder)
  top = _look(root)
  lost = top.left_out.get('links that lead nowhere', [])
  for path in lost:
    if os.path.basename(path) in _HELD_OUT:
      # Another of them would be held out in its place.
      raise Mistake(
        'The folder of held-out images must be there. Given a link that leads '
        f'nowhere, {path}. Likely a disk is not mounted: `ls -l {path}`.'
      )
  splits = [name for name in _HELD_OUT if name in top.folders]
  if not splits:
    raise Mistake(
      'A folder of images must hold val/ or test/ beside train/. Given '
      f'{root!r}, in which no {"/, ".join(_HELD_OUT)}/ is. Likely the held-out '
      'images lie elsewhere: `ln -s /path/to/the/held/out/images '
      f'{root}/val`.'
    )
  train, held_out = (os.path.join(root, name) for name in ('train', splits[0]))
  left_out: LeftOut = {
    'folders beside train and held-out images': [
      os.path.join(root, name)
      for name in top.folders
      if name not in ('train', splits[0])
    ]
  }
  classes = _class_folders(train, left_out)
  if not classes:
    raise Mistake(
      'Images must lie in a folder for each class, train/CLASS/*.jpg. Given '
      f'{train}, which holds no folder. Move the images of each class: `mkdir '
      f'{train}/cat && mv {train}/cat*.jpg {train}/cat/`.'
    )
  records = _records(train, classes, classes, left_out)
  # Kaggle's files of labels and of names lie beside ILSVRC/.
  above = [Path(root).parents[2]] if Path(root).match(_KAGGLE) else []
  places = [Path(root), *above]
  found = _look(held_out).folders
  if found and not (found == [_LEVEL] and _LEVEL not in classes):
    if label_file is not None:
      raise Mistake(
        'Labels are for held-out images without class folders. Given '
        f'{label_file} and {held_out}, which holds {some(found)}. Leave out '
        '`--held_out_labels`.'
      )
    held_out_records = _in_classes(held_out, train, classes, left_out)
  else:
    held_out_records, label_file = _flat(
      held_out,
      classes,
      left_out,
      label_file=label_file,
      places=places,
    )
  return Layout(
    classes,
    records,
    held_out_records,
    left_out,
    label_file,
    class_names.find(places, classes),
  )
