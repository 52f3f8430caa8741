"""What the images of a data set are, before anything is written."""

import collections
import contextlib
import io
import os
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path

import tqdm
from PIL import ExifTags, Image

from reference.data import image_files, jpeg, layouts, shards
from reference.data.wording import some

# Images that wait for a thread take memory.
_AT_ONCE = 4096

Images = Sequence[image_files.ImageFile]


def _orientation(data: bytes) -> int:
  """How an image says that it is turned; 1 where it says nothing."""
  # A part of the file that only turns pictures may be damaged in many ways.
  with contextlib.suppress(Exception), Image.open(io.BytesIO(data)) as image:
    return image.getexif().get(ExifTags.Base.Orientation, 1)
  return 1


def _look(image: image_files.ImageFile) -> tuple[str | None, bool]:
  """Why an image cannot be decoded, None where it can; whether it is turned."""
  try:
    data = image_files.read(image)
    jpeg.decode(data, image.name)
  except jpeg.BadImageError as error:
    return error.reason, False
  return None, _orientation(data) != 1


def _kinds(images: Images) -> str:
  """How many of which kind, '' where all are JPEGs by their names."""
  kinds = collections.Counter(
    Path(image.name).suffix.lower().removeprefix('.').replace('jpeg', 'jpg')
    for image in images
  )
  if set(kinds) <= {'jpg'}:
    return ''
  return f' ({", ".join(f"{n:,} {kind}" for kind, n in kinds.most_common())})'


def describe(listing: image_files.Listing) -> str:
  """Counts in words, in which a class that is cut short can be seen."""
  lines = [f'{len(listing.classes)} classes.']
  for split in shards.SPLITS:
    images = getattr(listing, split)
    counts = collections.Counter(x.label for x in images)
    labels = range(len(listing.classes))
    least, most = (
      choose(labels, key=counts.__getitem__) for choose in (min, max)
    )
    lines.append(
      f'{split}: {len(images):,} images{_kinds(images)}, {counts[least]:,} '
      f'({listing.classes[least]}) to {counts[most]:,} '
      f'({listing.classes[most]}) a class.'
    )
    without = [listing.classes[x] for x in labels if not counts[x]]
    if without:
      lines.append(f'{split}: no image of {some(without)}.')
  if listing.names:
    pairs = list(zip(listing.classes, listing.names, strict=True))
    lines.append(f'names: {pairs[0][0]} is {pairs[0][1]}, and so on.')
    if nameless := [key for key, name in pairs if key == name]:
      lines.append(f'names: none of {some(nameless)}.')
  if listing.label_file is not None:
    lines.append(f'held_out: labels of {listing.label_file}.')
  return '\n'.join([*lines, *layouts.notes(listing.left_out)])


def find_unreadable(images: Images) -> dict[str, str]:
  """Decodes every image; names the damaged ones, with the reason.

  Those that are turned by a note in the file alone are counted and shown.
  """
  unreadable, turned = {}, []
  with (
    futures.ThreadPoolExecutor(os.cpu_count()) as threads,
    tqdm.tqdm(total=len(images), desc='check', unit='img') as bar,
  ):
    for start in range(0, len(images), _AT_ONCE):
      part = images[start : start + _AT_ONCE]
      for image, (reason, is_turned) in zip(
        part, threads.map(_look, part), strict=True
      ):
        if reason is not None:
          unreadable[image.name] = reason
        if is_turned:
          turned.append(image.name)
        bar.update()
  if turned:
    print(
      f'{len(turned):,} images have an orientation in their EXIF, which is not '
      f'followed: {some(turned)}.'
    )
  return unreadable
