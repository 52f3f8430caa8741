"""Folders as people have them, and what is said of those that do not do."""

import os
import re

import pytest

from reference.command import Mistake
from reference.data import layouts

PLAIN = (
  'train/ant/0.jpg',
  'train/ant/1.jpg',
  'train/bee/0.jpg',
  'val/ant/0.jpg',
  'val/bee/0.jpg',
)
KAGGLE = 'ILSVRC/Data/CLS-LOC/'


def make(folder, *names, **contents):
  """Empty files; those that end in '/' are folders."""
  for name in names:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if name.endswith('/'):
      path.mkdir()
    else:
      path.touch()
  for name, text in contents.items():
    (folder / name).write_text(text)
  return folder


def found(folder, **options):
  """The records by split, with paths as seen from the folder."""
  layout = layouts.find(str(folder), **options)
  return layout.classes, *(
    {os.path.relpath(path, folder): layout.classes[label] for path, label in x}
    for x in (layout.train, layout.held_out)
  )


def noted(folder):
  """What is left out, by what it is, as seen from the folder."""
  left_out = layouts.find(str(folder)).left_out
  return {
    what: [os.path.relpath(path, folder) for path in paths]
    for what, paths in left_out.items()
    if paths
  }


def refused(folder, **options):
  """The message; it never advises to delete what the user brought."""
  with pytest.raises(Mistake) as error:
    layouts.find(str(folder), **options)
  message = str(error.value)
  assert not re.search(r'\brm\b|delete|remove', message)
  assert len(message) < 1000
  return message


@pytest.mark.parametrize('held_out', ['val', 'valid', 'validation', 'test'])
def test_labels_are_places_among_the_sorted_folders(tmp_path, held_out):
  names = [
    f'{split}/{name}/{index}.jpg'
    for split in ('train', held_out)
    for name in ('zebra', 'ant', 'Bee')
    for index in (2, 10)
  ]
  layout = layouts.find(str(make(tmp_path, *names)))
  assert layout.classes == ['Bee', 'ant', 'zebra']
  for records, split in ((layout.train, 'train'), (layout.held_out, held_out)):
    assert records == [
      (f'{tmp_path}/{split}/{name}/{index}.jpg', label)
      for label, name in enumerate(['Bee', 'ant', 'zebra'])
      for index in (10, 2)
    ]
  assert noted(tmp_path) == {}


def test_extensions_in_any_case(tmp_path):
  make(tmp_path, *PLAIN)
  kinds = ['a.JPG', 'b.jpeg', 'c.JPEG', 'd.png', 'e.WebP']
  make(tmp_path / 'train' / 'bee', *kinds, 'notes.txt', 'f.gif')
  _, train, _ = found(tmp_path)
  bees = [name for name, label in train.items() if label == 'bee']
  assert bees == [f'train/bee/{name}' for name in ('0.jpg', *kinds)]
  others = ['train/bee/f.gif', 'train/bee/notes.txt']
  assert noted(tmp_path) == {'of another kind': others}
  [note] = layouts.notes(layouts.find(str(tmp_path)).left_out)
  assert note.startswith('Not read, of another kind (2): ')


def test_what_systems_leave_behind_is_no_class_and_no_image(tmp_path):
  make(tmp_path, *PLAIN)
  before = found(tmp_path)
  hidden = [
    'train/.ipynb_checkpoints/0-checkpoint.jpg',
    'train/@eaDir/0.jpg',
    'train/Thumbs.db',
    'val/.ipynb_checkpoints/',
    'train/ant/._0.jpg',
    'train/ant/.ipynb_checkpoints/0-checkpoint.jpg',
    'train/ant/@eaDir/0.jpg/SYNOPHOTO.jpg',
    'val/bee/.hidden.png',
  ]
  make(tmp_path, *hidden, '.DS_Store', '__MACOSX/train/ant/0.jpg')
  assert found(tmp_path) == before
  [(what, paths)] = noted(tmp_path).items()
  assert what == 'hidden or of the system'
  assert len(paths) == len(hidden)
  for name in hidden:
    assert any(name.startswith(path) for path in paths), name


def test_what_lies_beside_the_images_is_named(tmp_path):
  make(tmp_path, *PLAIN, 'train/0.jpg', 'test/0.jpg', 'extra/')
  make(tmp_path, 'train/ant/inner/0.jpg', 'val/1.png')
  assert noted(tmp_path) == {
    'folders beside train and held-out images': ['extra', 'test'],
    'images beside the class folders': ['train/0.jpg', 'val/1.png'],
    'folders inside of a class': ['train/ant/inner'],
  }
  assert len(found(tmp_path)[1]) == 3


def test_a_folder_or_a_link_under_the_name_of_an_image(tmp_path):
  make(tmp_path, *PLAIN, 'train/ant/x.jpeg/')
  (tmp_path / 'train/bee/link.jpg').symlink_to(tmp_path / 'train/ant/0.jpg')
  (tmp_path / 'train/bee/lost.jpg').symlink_to(tmp_path / 'nowhere.jpg')
  (tmp_path / 'train/bee/ring.jpg').symlink_to(tmp_path / 'train/bee/ring.jpg')
  (tmp_path / 'train/bee/lost.txt').symlink_to(tmp_path / 'nowhere.txt')
  _, train, _ = found(tmp_path)
  # What cannot be opened is met by `on_bad_image`, as any other damage.
  bees = [name for name, label in train.items() if label == 'bee']
  names = ('0', 'link', 'lost', 'ring')
  assert bees == [f'train/bee/{name}.jpg' for name in names]
  assert noted(tmp_path) == {
    'folders inside of a class': ['train/ant/x.jpeg'],
    'links that lead nowhere': ['train/bee/lost.txt'],
  }


def test_a_class_that_leads_nowhere_is_refused(tmp_path):
  make(tmp_path, *PLAIN)
  (tmp_path / 'train' / 'cat').symlink_to(tmp_path / 'disk' / 'cat')
  assert re.search(r'lead nowhere: .*train/cat\.', refused(tmp_path))


def test_held_out_images_that_lead_nowhere_are_not_replaced(tmp_path):
  make(tmp_path, *PLAIN, 'test/ant/0.jpg')
  (tmp_path / 'val').rename(tmp_path / 'moved')
  (tmp_path / 'val').symlink_to(tmp_path / 'disk' / 'val')
  assert re.search(r'leads nowhere, .*/val\.', refused(tmp_path))


def test_held_out_classes_may_be_a_part(tmp_path):
  make(tmp_path, *PLAIN, 'train/cow/0.jpg', 'test/bee/0.jpg', 'test/cow/1.jpg')
  for name in ('ant', 'bee'):
    (tmp_path / 'val' / name / '0.jpg').unlink()
    (tmp_path / 'val' / name).rmdir()
  (tmp_path / 'val').rmdir()
  classes, _, held_out = found(tmp_path)
  assert classes == ['ant', 'bee', 'cow']
  assert held_out == {'test/bee/0.jpg': 'bee', 'test/cow/1.jpg': 'cow'}
  labels = [label for _, label in layouts.find(str(tmp_path)).held_out]
  assert labels == [1, 2]


def test_held_out_classes_that_are_not_trained_on_are_cut_to_five(tmp_path):
  make(tmp_path, *PLAIN, *(f'val/n{i:08d}/0.jpg' for i in range(1000)))
  message = refused(tmp_path)
  assert 'Given 1,000 in' in message
  assert 'n00000003, n00000004 and 995 more' in message


def test_a_level_between_a_class_and_its_images(tmp_path):
  make(
    tmp_path,
    'train/n01/images/n01_0.JPEG',
    'train/n01/n01_boxes.txt',
    'train/n02/images/n02_0.JPEG',
    'train/n02/images/.n02_1.JPEG',
    'val/images/val_0.JPEG',
    'val/images/val_1.JPEG',
    'test/images/test_0.JPEG',
    'wnids.txt',
  )
  (tmp_path / 'val' / 'val_annotations.txt').write_text(
    'val_0.JPEG\tn02\t0\t32\t44\t62\nval_1.JPEG\tn01\t52\t55\t57\t59\n'
  )
  assert found(tmp_path) == (
    ['n01', 'n02'],
    {
      'train/n01/images/n01_0.JPEG': 'n01',
      'train/n02/images/n02_0.JPEG': 'n02',
    },
    {'val/images/val_0.JPEG': 'n02', 'val/images/val_1.JPEG': 'n01'},
  )
  assert noted(tmp_path) == {
    'folders beside train and held-out images': ['test'],
    'hidden or of the system': ['train/n02/images/.n02_1.JPEG'],
    'of another kind': ['train/n01/n01_boxes.txt'],
  }


@pytest.mark.parametrize('given', ['.', KAGGLE])
def test_imagenet_as_kaggle_packs_it(tmp_path, given):
  images = ('train/n01/a.JPEG', 'train/n02/b.JPEG', 'val/v_1.JPEG')
  make(
    tmp_path,
    *(KAGGLE + name for name in (*images, 'val/v_2.JPEG', 'test/t_1.JPEG')),
    'ILSVRC/Annotations/CLS-LOC/',
    LOC_val_solution='',
  )
  (tmp_path / 'LOC_synset_mapping.txt').write_text(
    'n01 tench, Tinca tinca\nn02 goldfish\n'
  )
  (tmp_path / 'LOC_val_solution.csv').write_text(
    'ImageId,PredictionString\nv_2,n01 85 1 499 272 \nv_1,n02 1 2 3 4 n02 5 6\n'
    'v_3,n01 0 0 1 1\n'
  )
  folder = tmp_path / given
  layout = layouts.find(str(folder))
  assert layout.names == ['tench, Tinca tinca', 'goldfish']
  paths = [os.path.relpath(x, tmp_path / KAGGLE) for x, _ in layout.train]
  assert paths == list(images[:2])
  held_out = [(os.path.basename(x), label) for x, label in layout.held_out]
  assert held_out == [('v_1.JPEG', 1), ('v_2.JPEG', 0)]
  notes = layouts.notes(layout.left_out)
  assert any('lines of' in x and x.endswith(': v_3.') for x in notes)
  assert any(x.endswith('CLS-LOC/test.') for x in notes)


def test_classes_without_a_name_keep_that_of_their_folder(tmp_path):
  make(tmp_path, *PLAIN)
  assert layouts.find(str(tmp_path)).names == []
  words = tmp_path / 'words.txt'
  for of_others in ('a note\nof mine\n', 'n01\tcat\nbee\t\n', ''):
    words.write_text(of_others)
    assert layouts.find(str(tmp_path)).names == []
  words.write_bytes(b'\xef\xbb\xbfbee\thoney bee, Apis\r\n\xff\n')
  layout = layouts.find(str(tmp_path))
  assert layout.names == ['ant', 'honey bee, Apis']
  assert layout.classes == ['ant', 'bee']


def test_flat_images_and_labels_that_are_given(tmp_path):
  make(tmp_path, *PLAIN[:3], 'val/b.jpg', 'val/a.jpg')
  labels = tmp_path / 'labels.txt'
  labels.write_text('bee\nant\n')
  _, _, held_out = found(tmp_path, label_file=labels)
  assert held_out == {'val/a.jpg': 'bee', 'val/b.jpg': 'ant'}
  message = refused(tmp_path)
  assert '2 images and no class folders' in message
  assert '--held_out_labels=' in message


def test_labels_beside_class_folders_are_refused(tmp_path):
  labels = make(tmp_path, *PLAIN, 'labels.txt') / 'labels.txt'
  message = refused(tmp_path, label_file=labels)
  assert 'without class folders' in message


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (('ant/0.jpg',), 'in which no train/ is.*one level off'),
    (('data/train/ant/0.jpg',), 'config.data.folder={}/data`'),
    (('manifest.json',), 'holds shards: `--config.data.source=array_record`'),
    (('train/ant/0.jpg',), 'in which no val/, valid/, validation/, test/ is'),
    (('train/', 'val/'), 'a folder for each class.*holds no folder'),
    ((*PLAIN, 'train/cow/'), 'train/cow, which holds nothing.*`mv '),
    ((*PLAIN, 'val/ant2/'), 'among the training classes'),
    ((*PLAIN, 'train/cow/a.bmp'), r'holds only a\.bmp.*mogrify'),
    ((*PLAIN, 'train/cow/x/a.jpg'), 'only folders: x.*a level too many'),
    ((*PLAIN, 'train/cow/images/'), 'train/cow/images, which holds nothing'),
    ((*PLAIN[:3], 'val/'), '0 images and no class folders'),
  ],
)
def test_what_is_no_folder_of_images(tmp_path, names, message):
  make(tmp_path, *names)
  message = message.replace('{}', re.escape(str(tmp_path)))
  assert re.search(message, refused(tmp_path))


def test_the_folder_above_is_named_for_one_too_deep(tmp_path):
  make(tmp_path, *PLAIN)
  assert f'folder={tmp_path}`' in refused(tmp_path / 'train')
  assert 'misspelt or its disk is not mounted' in refused(tmp_path / 'nowhere')
  assert 'it was not given' in refused('')


def test_a_folder_of_classes_alone(tmp_path):
  make(tmp_path, 'bee/0.jpg', 'ant/images/1.png', 'ant/a.txt', '.x/', '2.jpg')
  layout = layouts.find_classes(str(tmp_path))
  assert layout.classes == ['ant', 'bee']
  assert layout.train == []
  assert layout.held_out == [
    (f'{tmp_path}/ant/images/1.png', 0),
    (f'{tmp_path}/bee/0.jpg', 1),
  ]
  assert {what: len(x) for what, x in layout.left_out.items() if x} == {
    'hidden or of the system': 1,
    'images beside the class folders': 1,
    'of another kind': 1,
  }
  with pytest.raises(Mistake, match='holds no folder'):
    layouts.find_classes(str(tmp_path / 'bee'))


def test_flat_images_alone_are_found_by_the_folder_above(tmp_path):
  make(tmp_path, *PLAIN[:3], 'val/0.jpg', 'test/images/0.jpg')
  for name, found in (('val/', 'no folder'), ('test', 'images/ alone')):
    message = f'holds {found}. .*labels are in a file.*data={tmp_path}`'
    with pytest.raises(Mistake, match=message):
      layouts.find_classes(f'{tmp_path}/{name}')
