"""The images of WebDataset's tar files, as `img2dataset` and others write them.

A folder holds `*train*.tar` and `*val*.tar`. In each lie, for every image, two
files of one name: `KEY.jpg` and `KEY.cls`, which holds the number of its class.
"""

from pathlib import Path, PurePosixPath
from typing import NamedTuple

from reference.command import Mistake
from reference.data import image_files, layouts, tar_files
from reference.data.wording import some


class Archives(NamedTuple):
  """The tar files of the two splits, sorted by name."""

  train: list[Path]
  held_out: list[Path]


def find(folder: Path) -> Archives | None:
  """The tar files of a folder, None where a split has none."""
  train = sorted(folder.glob('*train*.tar'))
  archives = Archives(train, sorted({*folder.glob('*val*.tar')} - {*train}))
  return archives if all(archives) else None


def _label(data: bytes, name: str, path: Path) -> int:
  text = data.strip()
  if not text.isdigit():
    raise Mistake(
      'A .cls file must hold the number of a class, from 0. Given '
      f'{text[:40]!r} in {name} of {path}. Likely the labels are in another '
      'form: unpack the images to train/CLASS/ and val/CLASS/.'
    )
  return int(text)


def _list(path: Path, left_out: layouts.LeftOut) -> list[image_files.ImageFile]:
  """The images of a tar file, in their order."""
  images, texts = {}, {}
  for member in tar_files.members(path, 0, path.stat().st_size):
    path_inside = PurePosixPath(member[0])
    # A key ends at the first dot of the name.
    base, _, kind = path_inside.name.partition('.')
    if layouts.is_hidden(path_inside.name):
      left_out.setdefault('hidden or of the system', []).append(member[0])
    elif f'.{kind.lower()}' in layouts.EXTENSIONS:
      images[path_inside.with_name(base)] = member
    elif kind == 'cls':
      texts[path_inside.with_name(base)] = member
    else:
      left_out.setdefault('of another kind', []).append(member[0])
  without = [name for key, (name, _, _) in images.items() if key not in texts]
  if without:
    raise Mistake(
      f'Every image must have a .cls file of its name. In {path} are without: '
      f'{some(without)}. Likely it is of another task, or not whole: '
      f'`tar -tf {path} | head`.'
    )
  unused = [texts[key][0] for key in texts.keys() - images.keys()]
  left_out.setdefault('labels without an image', []).extend(sorted(unused))
  numbers = {}
  with path.open('rb') as file:
    for key, (name, start, size) in texts.items():
      file.seek(start)
      numbers[key] = _label(file.read(size), name, path)
  return [
    image_files.ImageFile(
      f'{path.name}/{name}', str(path), start, size, numbers[key]
    )
    for key, (name, start, size) in images.items()
  ]


def list_images(archives: Archives) -> image_files.Listing:
  """The images of both splits. The names of the classes are their numbers.

  Raises:
    Mistake: when an image has no label, or a class is not trained on.
  """
  left_out: layouts.LeftOut = {}
  train, held_out = (
    [image for path in paths for image in _list(path, left_out)]
    for paths in archives
  )
  trained = {image.label for image in train}
  classes = [str(label) for label in range(1 + max(trained, default=-1))]
  for what, numbers in (
    ('without a training image', set(range(len(classes))) - trained),
    ('held out and not trained on', {x.label for x in held_out} - trained),
  ):
    if numbers or not train:
      raise Mistake(
        'Every class, from 0, must have a training image. Given '
        f'{archives.train[0]} and {len(archives.train) - 1} more; {what}: '
        f'{some([str(x) for x in sorted(numbers)])}. Likely not all files are '
        f'there: `ls {archives.train[0].parent}`.'
      )
  return image_files.Listing(classes, train, held_out, left_out)
