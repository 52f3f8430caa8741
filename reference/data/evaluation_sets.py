"""Images to evaluate a model on, labelled by the classes that it knows.

A set may have a part of the classes, as ImageNet-A has, and may lie in folders
of classes alone, as ImageNet-C and ImageNet-Sketch do. ImageNet-V2's folders
are numbers, which count the classes in their order.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ml_collections
import numpy as np

from reference.command import Mistake
from reference.data import jpeg, layouts, shards, sources
from reference.data.wording import some


class EvaluationSet(NamedTuple):
  """Held-out images, and of which classes they are.

  Attributes:
    source: without training images; its classes are those of the model.
    labels: those that the images have, sorted.
    notes: what a reader of the results should know.
  """

  source: sources.Source
  labels: list[int]
  notes: list[str]


def _read_as(
  record: Any,
  *,
  read: Callable[[Any], tuple[np.ndarray, int]],
  places: Sequence[int],
) -> tuple[np.ndarray, int]:
  image, label = read(record)
  return image, places[label]


def _places(
  names: Sequence[str], classes: Sequence[str], folder: str
) -> tuple[list[int], list[str]]:
  """The place of each name among the classes, and what is to be said of it."""
  numbers = {name: label for label, name in enumerate(classes)}
  unknown = [name for name in names if name not in numbers]
  if not unknown:
    return [numbers[name] for name in names], []
  # Not where it knows one: numbers that are names are no places.
  if unknown == list(names) and all(
    name.isdecimal() and int(name) < len(classes) for name in names
  ):
    note = (
      f'The class folders of {folder} are numbers: 0 stands for the first '
      f'class of the model, {classes[0]}, and so on.'
    )
    return [int(name) for name in names], [note]
  raise Mistake(
    f'All images must be of the {len(classes):,} classes that the model knows. '
    f'Given {folder}; it does not know {some(unknown)}, but for example '
    f'{some(list(classes))}. Likely the folders have other names for the same '
    'classes: rename them, or link to them under the names of the training '
    f'set, `ln -s {folder}/{unknown[0]} /another/folder/{classes[0]}`.'
  )


def _check_channels(
  source: sources.Source, config: ml_collections.ConfigDict
) -> None:
  """The model takes as many channels as the images have."""
  wanted = len(config.mean)
  for record in source.held_out:
    # Which cannot be read is told when all are.
    with contextlib.suppress(jpeg.BadImageError):
      found = source.read(record)[0].shape[-1]
      if found != wanted:
        raise Mistake(
          'A model takes images of as many channels as its `data.mean` has '
          f'values, {wanted}. Given {found}: files are read as RGB. Likely the '
          'model was trained on grey arrays: leave out `--data`, which takes '
          'the held-out images of its run.'
        )
      return


def _open(folder: str, config: ml_collections.ConfigDict) -> sources.Source:
  if not folder:
    there = config.get('folder', '')
    if there and not Path(there).expanduser().is_dir():
      raise Mistake(
        f'By default the held-out images of the run are taken. They lay in '
        f'{there}, which is not here. Likely they lie elsewhere now: '
        '`--data=/path/to/images`.'
      )
    return sources.open_source(config)
  path = Path(folder).expanduser()
  if not path.is_dir():
    raise Mistake(
      f'`--data` is a folder. Given {folder!r}, which is none. Likely '
      f'misspelt, or packed: `ls -l {folder}`.'
    )
  if shards.read_manifest(path) is not None:
    return sources.array_record(str(path))
  if any(path.glob('*-idx3-ubyte.gz')):
    return sources.idx_folder(str(path))
  if layouts.root_of(str(path)) is not None:
    return sources.jpeg_folder(str(path))
  return sources.class_folders(str(path))


def open_set(
  folder: str, classes: Sequence[str], config: ml_collections.ConfigDict
) -> EvaluationSet:
  """The held-out images of a folder or of shards.

  Args:
    folder: shards, a folder that training takes too, or one that holds
      CLASS/*.jpg and no more; '' for the images of the config.
    classes: of the model, by label.
    config: the `data` part of the run's config.

  Raises:
    Mistake: when the folder is of no such form, or an image is of a class that
      the model does not know.
  """
  source = _open(folder, config)
  _check_channels(source, config)
  places, notes = _places(source.classes, classes, folder)
  # Records of one's own, and those of shards, do not tell their labels.
  is_own = not folder and ':' in config.source
  labels = (
    {label for _, label in source.held_out}
    if isinstance(source.held_out, list) and not is_own
    else range(len(places))
  )
  return EvaluationSet(
    source._replace(
      train=[],
      classes=tuple(classes),
      read=functools.partial(_read_as, read=source.read, places=places),
    ),
    sorted(places[label] for label in labels),
    notes,
  )
