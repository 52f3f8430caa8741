"""ImageNet's two tar files: the shards of the folder, and what is refused."""

import io
import tarfile
from pathlib import PurePath

import pytest
from prepared_images import (
  CLASSES,
  SHARDS,
  contents,
  expected,
  make_images,
  make_jpeg,
  make_tar,
  prepare,
  records,
)

from reference.data import inspection, sources, tar_files


@pytest.fixture
def target(tmp_path):
  return tmp_path / 'shards'


def link(kind, to):
  member = tarfile.TarInfo()
  member.type, member.linkname = kind, to
  return member


def make_files():
  """The training classes' files, the held-out files and their labels."""
  train = {name: {} for name in CLASSES}
  held_out = {}
  for name, data in make_images().items():
    split, class_name, file = name.split('/')
    if split == 'train':
      train[class_name][f'{class_name}_{file}'] = data
    else:
      held_out[f'val_{class_name}.JPEG'] = data
  return train, held_out, list(CLASSES)


def write_tars(folder, train, held_out, labels, *, outer=(), compressed=False):
  folder.mkdir(exist_ok=True)
  # Classes need not be in order.
  inner = {
    f'{name}.tar': x if isinstance(x, bytes) else make_tar(x)
    for name, x in reversed(train.items())
  }
  (folder / tar_files.TRAIN_TAR).write_bytes(
    make_tar({**inner, **dict(outer)}, compressed=compressed)
  )
  (folder / tar_files.HELD_OUT_TAR).write_bytes(make_tar(held_out))
  path = folder / 'labels.txt'
  path.write_text(''.join(f'{label}\n' for label in labels))
  return {'held_out_labels': path}


@pytest.fixture
def tars(tmp_path):
  return tmp_path / 'tars'


def test_tar_files_give_the_shards_of_the_folder(tars, target):
  train, held_out, labels = make_files()
  held_out = dict(reversed(held_out.items()))
  manifest = prepare(tars, target, **write_tars(tars, train, held_out, labels))
  assert manifest.classes == list(CLASSES)
  assert records(target, 'train') == expected('train')
  assert records(target, 'held_out') == expected('val')
  # As a folder of the same files has it.
  names = [
    [
      (PurePath(name).name, CLASSES.index(class_name))
      for class_name, files in split.items()
      for name in files
    ]
    for split in (train, {x: [f'val_{x}.JPEG'] for x in CLASSES})
  ]
  assert manifest.fingerprint == sources.fingerprint(CLASSES, *names)


def test_what_is_no_image_is_named(tars, target, capsys):
  train, held_out, labels = make_files()
  train['n02'] |= {'._n02_0.JPEG': b'', 'n02.xml': b''}
  held_out |= {'.DS_Store': b''}
  options = write_tars(tars, train, held_out, labels, outer={'list.txt': b''})
  prepare(tars, target, **options)
  assert records(target, 'train') == expected('train')
  shown = capsys.readouterr().out
  assert (
    'Not read, hidden or of the system (2): ._n02_0.JPEG, .DS_Store' in shown
  )
  assert 'Not read, of another kind (1): n02.xml' in shown
  assert 'Not read, beside the classes (1): list.txt' in shown


def test_labels_that_lie_beside_the_tar_files(tars, target, capsys):
  given = write_tars(tars, *make_files())['held_out_labels']
  given.rename(tars / 'LOC_val_solution.csv')
  (tars / 'LOC_synset_mapping.txt').write_text('n01 tench\nn02 goldfish\n')
  assert prepare(tars, target).names == ['tench', 'goldfish', 'n10']
  assert records(target, 'held_out') == expected('val')
  shown = capsys.readouterr().out
  assert f'held_out: labels of {tars}/LOC_val_solution.csv.' in shown


def test_held_out_labels_follow_the_names(tars, target):
  train, held_out, _ = make_files()
  labels = ['n10', 'n01', 'n02']
  prepare(tars, target, **write_tars(tars, train, held_out, labels))
  found = [label for label, _ in records(target, 'held_out')]
  assert found == [2, 0, 1]


BAD_MEMBERS = {
  '../out.JPEG': b'',
  'a/../../out.JPEG': b'',
  '/etc/out.JPEG': b'',
  'symbolic.JPEG': link(tarfile.SYMTYPE, '/etc/passwd'),
  'hard.JPEG': link(tarfile.LNKTYPE, '../out'),
  'device.JPEG': link(tarfile.CHRTYPE, ''),
}


@pytest.mark.parametrize('place', ['outer', 'class', 'held_out'])
@pytest.mark.parametrize('name', BAD_MEMBERS)
def test_tar_members_that_lead_out_are_refused(name, place, tars, target):
  train, held_out, labels = make_files()
  bad = {name: BAD_MEMBERS[name]}
  if place == 'class':
    train['n02'] |= bad
  elif place == 'held_out':
    held_out |= bad
  options = write_tars(
    tars, train, held_out, labels, outer=bad if place == 'outer' else ()
  )
  with pytest.raises(ValueError, match='none outside of its folder') as error:
    prepare(tars, target, **options)
  assert repr(name) in str(error.value)
  assert not target.exists()
  assert not list(tars.parent.glob('**/*out*'))


@pytest.mark.parametrize('file', [tar_files.TRAIN_TAR, tar_files.HELD_OUT_TAR])
def test_a_tar_file_that_broke_off_is_named(file, tars, target):
  options = write_tars(tars, *make_files())
  data = (tars / file).read_bytes()
  with tarfile.open(tars / file) as archive:
    last = archive.getmembers()[-1]
  # What follows the last image is padding.
  for size in range(0, last.offset_data + last.size + 512, 512):
    (tars / file).write_bytes(data[:size])
    with pytest.raises(ValueError, match=f'must be whole.*{file}'):
      prepare(tars, target, **options)
  assert not target.exists()


def test_a_tar_file_with_a_damaged_header_is_named(tars, target):
  options = write_tars(tars, *make_files())
  path = tars / tar_files.HELD_OUT_TAR
  with tarfile.open(path) as archive:
    second = archive.getmembers()[1].offset
  data = path.read_bytes()
  path.write_bytes(data[:second] + b'x' * 512 + data[second + 512 :])
  with pytest.raises(ValueError, match=f'must be whole.*no member .*{second}'):
    prepare(tars, target, **options)


@pytest.mark.parametrize('position', ['first', 'last'])
def test_a_class_that_broke_off_before_it_was_packed(position, tars, target):
  train, held_out, labels = make_files()
  whole = make_tar({f'{index}.JPEG': make_jpeg(index) for index in range(2)})
  with tarfile.open(fileobj=io.BytesIO(whole)) as archive:
    last = archive.getmembers()[-1]
  for size in range(512, last.offset_data + last.size + 512, 512):
    cut = {'n99': whole[:size]}
    # `write_tars` packs the last class first.
    classes = train | cut if position == 'first' else cut | train
    options = write_tars(tars, classes, held_out, labels)
    with pytest.raises(ValueError, match='must be whole'):
      prepare(tars, target, **options)


def test_a_class_without_images_is_named(tars, target):
  train, held_out, labels = make_files()
  train['n02'] = {'readme.txt': b'none'}
  with pytest.raises(ValueError, match=r'n02\.tar in .* holds no \.jpg'):
    prepare(tars, target, **write_tars(tars, train, held_out, labels))


def test_a_training_file_without_classes_is_explained(tars, target):
  _, held_out, _ = make_files()
  options = write_tars(tars, {}, held_out, [], outer={'a.txt': b'none'})
  with pytest.raises(ValueError, match='a tar file for each class'):
    prepare(tars, target, **options)


def test_a_compressed_tar_file_is_explained(tars, target):
  options = write_tars(tars, *make_files(), compressed=True)
  with pytest.raises(ValueError, match='must be whole and not compressed'):
    prepare(tars, target, **options)


@pytest.mark.parametrize(
  ('labels', 'message'),
  [
    (['n01', 'n02'], '2 lines in .* for 3 images'),
    (['n01', 'n02', 'n10', 'n10'], '4 lines in .* for 3 images'),
    (['n01', 'n02', 'n03'], 'not among the training classes: n03'),
    (['490', '361', '171'], 'numbers of the development kit'),
  ],
)
def test_held_out_labels_that_do_not_match(labels, message, tars, target):
  train, held_out, _ = make_files()
  with pytest.raises(ValueError, match=message):
    prepare(tars, target, **write_tars(tars, train, held_out, labels))


def test_tar_files_without_labels_are_explained(tars, target):
  write_tars(tars, *make_files())
  with pytest.raises(ValueError, match='add `--held_out_labels='):
    prepare(tars, target)


def test_tar_files_are_checked_and_resumed(tars, target, monkeypatch):
  train, held_out, labels = make_files()
  train['n02']['n02_1.JPEG'] = train['n02']['n02_1.JPEG'][:-50]
  options = write_tars(tars, train, held_out, labels) | {'on_bad_image': 'skip'}
  with pytest.raises(ValueError, match=r'train/n02/n02_1\.JPEG: Premature end'):
    prepare(tars, target, held_out_labels=options['held_out_labels'])
  prepare(tars, target, **options)
  whole = contents(target)
  (target / SHARDS[2]).unlink()
  monkeypatch.setattr(inspection, 'find_unreadable', None)
  prepare(tars, target, **options)
  assert contents(target) == whole
