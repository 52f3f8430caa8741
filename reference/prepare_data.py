"""Turns images into shards: `python -m reference.prepare_data`.

First it prints how many images each class has, then every image is decoded, so
that damage is known before anything is written; then the shards are written one
after the other. The same command goes on where a stopped one was.
"""

import itertools
import signal
import sys
from pathlib import Path

from absl import flags

from reference import command
from reference.data import preparation, tar_files

_SHOWN = 20

_SOURCE = flags.DEFINE_string(
  'source',
  None,
  'The folder that holds train/CLASS/*.jpg and val/ or test/ of the same form, '
  f'or {tar_files.TRAIN_TAR} and {tar_files.HELD_OUT_TAR}; other forms are '
  'in the README.',
  required=True,
)
_TARGET = flags.DEFINE_string(
  'target', None, 'The folder for the shards.', required=True
)
_HELD_OUT_LABELS = flags.DEFINE_string(
  'held_out_labels',
  None,
  'For held-out images that are not in class folders: a file with the class of '
  'each, the images sorted by name, or a table of names and classes.',
)
_ON_BAD_IMAGE = flags.DEFINE_enum(
  'on_bad_image',
  'stop',
  ['stop', 'skip'],
  'Whether to stop, once all unreadable images are known, or leave them out.',
)
_SHORT_SIDE = flags.DEFINE_integer(
  'short_side',
  None,
  'Writes larger images with so many pixels on their shorter side.',
  lower_bound=1,
)
_QUALITY = flags.DEFINE_integer(
  'quality',
  92,
  'Of the JPEGs that these become.',
  lower_bound=1,
  upper_bound=100,
)


def main() -> None:
  """Parses nothing but the flags."""
  target = Path(_TARGET.value).expanduser()
  labels, short_side = _HELD_OUT_LABELS.value, _SHORT_SIDE.value
  if _QUALITY.present and short_side is None:
    raise command.Mistake(
      'Images that are not made smaller are kept as they are. Given '
      f'`--quality={_QUALITY.value}` alone. Add `--short_side=288`.'
    )
  if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:
    signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    manifest = preparation.prepare(
      Path(_SOURCE.value).expanduser(),
      target,
      held_out_labels=Path(labels).expanduser() if labels else None,
      on_bad_image=_ON_BAD_IMAGE.value,
      smaller=(
        preparation.Smaller(short_side, _QUALITY.value) if short_side else None
      ),
    )
  except KeyboardInterrupt:
    print('Stopped. The same command goes on from here.', file=sys.stderr)
    raise SystemExit(128 + signal.SIGINT) from None
  except OSError as error:
    # A disk that is full, or a folder that may not be written.
    raise command.Mistake(str(error)) from error
  for name, reason in itertools.islice(manifest.skipped.items(), _SHOWN):
    print(f'Skipped {name}: {reason}.')
  more = len(manifest.skipped) - _SHOWN
  if more > 0:
    print(f'Skipped {more:,} more, which manifest.json names.')
  for split, counts in manifest.counts.items():
    shards = 'one shard' if len(counts) == 1 else f'{len(counts):,} shards'
    print(f'{split}: {sum(counts):,} images in {shards}.')
  print(f'{len(manifest.classes)} classes in {target}.')


if __name__ == '__main__':
  command.run(main)
