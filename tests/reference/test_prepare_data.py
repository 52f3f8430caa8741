"""Every way in which the making of shards may be stopped or refused."""

import fcntl
import io
import itertools
import os
import resource
import shutil
from pathlib import Path

import forked_commands
import numpy as np
import pytest
from PIL import ExifTags, Image
from prepared_images import (
  SHARDS,
  break_two,
  contents,
  expected,
  identity,
  make_jpeg,
  names,
  prepare,
  records,
  write_images,
)

from reference.command import Mistake
from reference.data import image_files, inspection, preparation, sources


@pytest.fixture
def source(tmp_path):
  return write_images(tmp_path / 'images')


@pytest.fixture
def target(tmp_path):
  return tmp_path / 'shards'


KILLED = """
import os, signal, sys
from pathlib import Path
from reference.data import image_files, preparation, shards

def dies_at(call, function):
  calls = 0
  def wrapped(*args):
    nonlocal calls
    calls += 1
    if calls == call:
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*args)
  return wrapped

{patch}
source, target = map(Path, sys.argv[1:])
preparation.prepare(source, target, images_per_shard=4)
"""


@pytest.mark.parametrize(
  ('patch', 'finished', 'checked'),
  [
    # Thirteen reads are those of the check.
    ('image_files.read = dies_at(5, image_files.read)', 0, False),
    ('os.replace = dies_at(1, os.replace)', 0, False),
    ('image_files.read = dies_at(14, image_files.read)', 0, True),
    ('image_files.read = dies_at(20, image_files.read)', 1, True),
    ('os.replace = dies_at(4, os.replace)', 2, True),
  ],
)
def test_killed_and_resumed(
  patch, finished, checked, source, target, tmp_path, monkeypatch
):
  code = KILLED.format(patch=patch)
  result = forked_commands.run('-c', code, source, target)
  assert result.returncode == -9, result.stderr
  whole = [path for path in target.iterdir() if path.suffix == '.array_record']
  assert len(whole) == finished
  before = identity(target)

  prepare(source, tmp_path / 'undisturbed')
  if checked:
    # What was decoded once is not decoded again.
    monkeypatch.setattr(inspection, 'find_unreadable', None)
  prepare(source, target)
  assert contents(target) == contents(tmp_path / 'undisturbed')
  after = identity(target)
  for path in whole:
    assert after[path.name] == before[path.name]


def test_a_stopped_one_leaves_whole_shards_alone(source, target, monkeypatch):
  with monkeypatch.context() as patch:
    written = itertools.count()

    def read(image, read=image_files.read):
      # Thirteen for the check, then the second of the second shard.
      if next(written) == 18:
        raise KeyboardInterrupt
      return read(image)

    patch.setattr(image_files, 'read', read)
    with pytest.raises(KeyboardInterrupt):
      prepare(source, target)
  assert names(target) == ['manifest.json', SHARDS[1]]
  prepare(source, target)
  assert records(target, 'train') == expected('train')


def test_a_complete_folder_is_left_alone(source, target):
  prepare(source, target)
  before = identity(target)
  prepare(source, target)
  assert identity(target) == before


def test_a_shard_that_was_cut_short_is_written_anew(source, target):
  prepare(source, target)
  before = identity(target)
  path = target / SHARDS[2]
  whole = path.read_bytes()
  path.write_bytes(whole[:100])
  prepare(source, target)
  assert path.read_bytes() == whole
  after = identity(target)
  del before[path.name], after[path.name]
  assert after == before


def test_a_damaged_manifest_is_explained(source, target):
  prepare(source, target)
  path = target / 'manifest.json'
  path.write_bytes(path.read_bytes()[:50])
  for read in (
    lambda: prepare(source, target),
    lambda: sources.array_record(str(target)),
  ):
    with pytest.raises(ValueError, match=f'{path} is not.*--target={target}_2'):
      read()


def test_a_disk_that_gets_full_is_told_and_loses_nothing(source, target):
  """The limit makes the system refuse to write, as a full disk does."""
  (source / 'val' / 'n10' / '0.JPEG').write_bytes(make_jpeg(0, (700, 700)))
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, hard))
  try:
    with pytest.raises(OSError, match='File too large') as error:
      prepare(source, target)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert SHARDS[0] in str(error.value)
  assert 'run the same command again' in str(error.value)
  assert names(target) == ['manifest.json', *SHARDS[1:]]
  before = identity(target)
  del before['manifest.json']
  prepare(source, target)
  assert identity(target).items() >= before.items()
  assert [label for label, _ in records(target, 'held_out')] == [0, 1, 2]


def test_too_little_space_is_told_before_anything_is_decoded(
  source, target, monkeypatch
):
  used = shutil.disk_usage(source)
  monkeypatch.setattr(
    shutil, 'disk_usage', lambda path: used._replace(free=1000)
  )
  monkeypatch.setattr(inspection, 'find_unreadable', None)
  with pytest.raises(ValueError, match=r'must fit on the disk.*--target='):
    prepare(source, target)
  assert names(target) == []


def test_all_unreadable_images_are_named_before_anything_is_written(
  source, target
):
  break_two(source)
  with pytest.raises(ValueError, match='2 of 13 are not') as error:
    prepare(source, target)
  assert '  train/n02/1.JPEG: Premature end' in str(error.value)
  assert '  val/n10/0.JPEG: Premature end' in str(error.value)
  assert '--on_bad_image=skip' in str(error.value)
  assert names(target) == []


def test_unreadable_images_are_left_out_and_counted(source, target):
  break_two(source)
  manifest = prepare(source, target, on_bad_image='skip')
  assert set(manifest.skipped) == {'train/n02/1.JPEG', 'val/n10/0.JPEG'}
  assert manifest.counts == {'train': [4, 4, 1], 'held_out': [2]}
  rest = expected('train')
  del rest[4]
  assert records(target, 'train') == rest
  opened = sources.array_record(str(target))
  assert opened.num_classes == 3
  assert opened.fingerprint != sources.jpeg_folder(str(source)).fingerprint


def test_what_real_data_sets_hold_is_kept_and_damage_counted(source, target):
  """CMYK, grey, one pixel, a PNG by another name; an empty and a cut file."""
  pixels = np.random.default_rng(0).integers(256, size=(9, 7, 3), dtype='uint8')
  image = Image.fromarray(pixels)

  def encode(image, kind='JPEG'):
    file = io.BytesIO()
    image.save(file, kind)
    return file.getvalue()

  added = {
    'a_cmyk.JPEG': encode(image.convert('CMYK')),
    'b_empty.JPEG': b'',
    'c_grey.JPEG': encode(image.convert('L')),
    'd_cut.JPEG': encode(image)[:-30],
    'e_pixel.JPEG': encode(image.resize((1, 1))),
    'f_png.JPEG': encode(image, 'PNG'),
  }
  for name, data in added.items():
    (source / 'train' / 'n10' / name).write_bytes(data)
  manifest = prepare(source, target, on_bad_image='skip')
  damaged = {'b_empty.JPEG', 'd_cut.JPEG'}
  assert set(manifest.skipped) == {f'train/n10/{name}' for name in damaged}
  kept = [(2, data) for name, data in added.items() if name not in damaged]
  assert records(target, 'train') == expected('train') + kept
  opened = sources.array_record(str(target))
  shapes = [opened.read(number)[0].shape for number in opened.train[-4:]]
  assert shapes == [(9, 7, 3), (9, 7, 3), (1, 1, 3), (9, 7, 3)]


def test_what_cannot_be_opened_is_as_what_cannot_be_read(source, target):
  bad = source / 'train' / 'n02'
  (bad / 'gone.jpg').symlink_to(source / 'nowhere.jpg')
  (bad / 'page.jpg').write_text('<html>404</html>')
  (bad / 'x.jpeg').mkdir()
  with pytest.raises(Mistake, match='2 of 15 are not') as error:
    prepare(source, target)
  message = str(error.value)
  assert 'train/n02/gone.jpg: it cannot be read, No such file' in message
  assert 'train/n02/page.jpg: not a JPEG but a page of HTML' in message
  prepare(source, target, on_bad_image='skip')
  assert records(target, 'train') == expected('train')


def test_the_summary_names_what_is_and_what_is_not_read(source, target, capsys):
  image = Image.fromarray(np.zeros((5, 6, 3), np.uint8))
  exif = Image.Exif()
  for name, orientation in (('9.png', 1), ('9.webp', 6), ('a.jpg', 8)):
    exif[ExifTags.Base.Orientation] = orientation
    image.save(source / 'train' / 'n02' / name, exif=exif)
  (source / 'train' / 'n02' / '.DS_Store').touch()
  shutil.rmtree(source / 'val' / 'n02')
  prepare(source, target)
  shown = capsys.readouterr().out
  for line in (
    'train: 13 images (11 jpg, 1 png, 1 webp), 2 (n10) to 8 (n02) a class.',
    'held_out: 2 images, 0 (n02) to 1 (n01) a class.',
    'held_out: no image of n02.',
    f'Not read, hidden or of the system (1): {source}/train/n02/.DS_Store.',
    '2 images have an orientation in their EXIF, which is not followed: '
    'train/n02/9.webp, train/n02/a.jpg.',
  ):
    assert f'{line}\n' in shown
  opened = sources.array_record(str(target))
  assert opened.read(opened.train[-4])[0].shape == (5, 6, 3)


def test_names_of_classes_are_kept_and_may_come_later(source, target, capsys):
  assert prepare(source, target).names == []
  before = identity(target)
  fingerprint = sources.array_record(str(target)).fingerprint
  (source / 'words.txt').write_text('n01\ttench\nn10\tcock\nn11\then\n')
  prepare(source, target)
  after = identity(target)
  assert after.pop('manifest.json') != before.pop('manifest.json')
  assert after == before
  shown = capsys.readouterr().out
  assert 'names: n01 is tench, and so on.\nnames: none of n02.\n' in shown
  for opened in (
    sources.array_record(str(target)),
    sources.jpeg_folder(str(source)),
  ):
    assert opened.names == ['tench', 'n02', 'cock']
    assert opened.classes == ('n01', 'n02', 'n10')
    assert opened.fingerprint == fingerprint
  # Without the file they stay.
  (source / 'words.txt').unlink()
  assert prepare(source, target).names == ['tench', 'n02', 'cock']


def test_smaller_images(source, target):
  (source / 'train' / 'n01' / '0.JPEG').write_bytes(make_jpeg(0, (40, 60)))
  (source / 'val' / 'n01' / '0.JPEG').write_bytes(make_jpeg(1, (60, 40)))
  smaller = preparation.Smaller(20, 90)
  manifest = prepare(source, target, smaller=smaller)
  (label, large), *rest = records(target, 'train')
  assert label == 0
  assert Image.open(io.BytesIO(large)).size == (30, 20)
  assert rest == expected('train')[1:]
  tall = records(target, 'held_out')[0][1]
  assert Image.open(io.BytesIO(tall)).size == (20, 30)
  # Other pixels under the same names are not the same images.
  assert manifest.fingerprint != sources.jpeg_folder(str(source)).fingerprint

  for other in (None, preparation.Smaller(20, 91)):
    with pytest.raises(Mistake, match='begun with short side 20, quality 90'):
      prepare(source, target, smaller=other)
  before = contents(target)
  (target / SHARDS[1]).unlink()
  prepare(source, target, smaller=smaller)
  assert contents(target) == before


def test_a_split_without_a_readable_image(source, target):
  for path in source.glob('val/*/*'):
    path.write_bytes(b'')
  with pytest.raises(ValueError, match="'held_out' has none"):
    prepare(source, target, on_bad_image='skip')
  assert names(target) == []


def test_differing_class_folders_are_told_before_the_target_is_made(
  source, target
):
  (source / 'val' / 'n03').mkdir()
  with pytest.raises(ValueError, match='Held-out classes must be among'):
    prepare(source, target)
  assert not target.exists()


def test_a_target_that_holds_something_else_is_refused(source, target):
  target.mkdir()
  (target / 'thesis.tex').write_text('all of it')
  with pytest.raises(ValueError, match=r"holds 'thesis\.tex' and no manifest"):
    prepare(source, target)
  assert names(target) == ['thesis.tex']


@pytest.mark.parametrize('name', ['0.JPEG', 'new.jpg'])
def test_a_target_of_other_images_is_refused(name, source, target):
  prepare(source, target)
  before = identity(target)
  (source / 'train' / 'n01' / name).write_bytes(make_jpeg(99, (20, 20)))
  with pytest.raises(ValueError, match='belongs to one set of images'):
    prepare(source, target)
  assert identity(target) == before


def test_two_processes_do_not_share_a_target(source, target):
  target.mkdir()
  folder = os.open(target, os.O_RDONLY)
  try:
    fcntl.flock(folder, fcntl.LOCK_SH)
    with pytest.raises(ValueError, match='Another is at work'):
      prepare(source, target)
  finally:
    os.close(folder)
  prepare(source, target)


def test_a_link_in_the_target_is_not_followed(source, target, tmp_path):
  outside = tmp_path / 'outside'
  outside.write_text('precious')
  target.mkdir()
  for name in [*SHARDS, 'manifest.json']:
    (target / name).with_suffix('.unfinished').symlink_to(outside)
  prepare(source, target)
  assert outside.read_text() == 'precious'
  assert names(target) == sorted([*SHARDS, 'manifest.json'])
  assert not any(path.is_symlink() for path in target.iterdir())


def test_an_image_that_changes_meanwhile(source, target, monkeypatch):
  def find_unreadable(images):
    path = Path(images[5].path)
    path.write_bytes(path.read_bytes()[:-3])
    return {}

  monkeypatch.setattr(inspection, 'find_unreadable', find_unreadable)
  with pytest.raises(ValueError, match=r'train/n02/2\.JPEG: it had \d+ bytes'):
    prepare(source, target)
  assert names(target) == ['manifest.json', SHARDS[1]]


def test_an_image_that_disappears_meanwhile(source, target, monkeypatch):
  monkeypatch.setattr(
    inspection,
    'find_unreadable',
    lambda images: os.unlink(images[0].path) or {},
  )
  with pytest.raises(ValueError, match=r'n01/0\.JPEG: it cannot be read'):
    prepare(source, target)
  assert names(target) == ['manifest.json']


def test_the_command_from_end_to_end(source, target):
  def command(*flags):
    return forked_commands.run(
      '-m', 'reference.prepare_data', *flags, HOME=str(source.parent)
    )

  break_two(source)
  flags = ('--source=~/images', '--target=~/shards')
  result = command(*flags)
  assert result.returncode == 2
  assert result.stderr.splitlines()[-1].startswith('Likely')
  assert '\nImages must be whole. 2 of 13' in result.stderr
  assert 'Traceback' not in result.stderr
  result = command(*flags, '--on_bad_image=skip')
  assert result.returncode == 0, result.stderr
  assert 'Skipped val/n10/0.JPEG: Premature end' in result.stdout
  assert result.stdout.startswith(
    '3 classes.\n'
    'train: 10 images, 2 (n10) to 5 (n02) a class.\n'
    'held_out: 3 images, 1 (n01) to 1 (n01) a class.\n'
  )
  assert 'train: 9 images in one shard.' in result.stdout
  assert f'3 classes in {target}.' in result.stdout
