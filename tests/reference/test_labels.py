"""Files of labels as data sets and programs write them."""

import io
import re
import tarfile

import numpy as np
import pytest
from scipy import io as matlab

from reference.command import Mistake
from reference.data import labels

CLASSES = ['n01', 'n02', 'n10', 'great white shark']
NAMES = ['a.JPEG', 'b.JPEG', 'c.JPEG']
NUMBERS = 'ILSVRC2012_validation_ground_truth.txt'


def read(path, text, encoding='utf-8', names=NAMES, classes=CLASSES):
  path.write_bytes(text.encode(encoding))
  return labels.of_images(path, names, classes)


TEXTS = {
  'a list': 'n02\nn10\nn01\n',
  'without an end of line': 'n02\nn10\nn01',
  'of Windows': 'n02\r\nn10\r\nn01\r\n\r\n',
  'a column with a title': 'class\nn02\nn10\nn01\n',
  'quoted': '"n02"\n"n10"\n"n01"\n',
  'a table': 'c.JPEG n01\na.JPEG n02\nb.JPEG n10\n',
  'without extensions': 'c,n01\na,n02\nb,n10\n',
  'with a title': 'name;class\nc.JPEG;n01\na.JPEG;n02\nb.JPEG;n10\n',
  'quoted cells': '"name","class"\n"c","n01"\n"a","n02"\n"b","n10"\n',
  'with boxes': 'c\tn01\t0\t32\na\tn02\t1\t1\nb\tn10\t2\t3\n',
  'of Kaggle': 'ImageId,PredictionString\na,n02 1 2 3 4 n02 5 6 7 8\n'
  'b,n10 1 2 3 4\nc,n01 1 2 3 4 \n',
}


@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
@pytest.mark.parametrize('form', TEXTS)
def test_labels_are_read(tmp_path, form, encoding):
  found = read(tmp_path / 'labels', TEXTS[form], encoding)
  assert found.labels == [1, 2, 0]
  assert found.unused == []


@pytest.mark.parametrize('text', ['{}\nn01\n', 'a,{}\nb,n01\n', 'b n01\na {}'])
def test_names_of_several_words(tmp_path, text):
  text = text.format('great white shark')
  found = read(tmp_path / 'labels', text, names=NAMES[:2])
  assert found.labels == [3, 0]


def test_numbers_that_are_names(tmp_path):
  found = read(tmp_path / 'labels', '9\n0\n', 'utf-8', NAMES[:2], ['0', '9'])
  assert found.labels == [1, 0]


def test_lines_without_an_image_are_told(tmp_path):
  text = 'name,class\n' + ''.join(f'{x},n01\n' for x in 'abcdefgh')
  found = read(tmp_path / 'labels', text)
  assert found.labels == [0, 0, 0]
  assert found.unused == list('defgh')


def make_meta():
  """Classes in an order of their own, and one that has others under it."""
  kind = [('ILSVRC2012_ID', 'O'), ('WNID', 'O'), ('num_children', 'O')]
  rows = [(1, 'n10', 0), (2, 'n01', 0), (3, 'n02', 0), (1001, 'n00', 3)]
  synsets = np.array(rows, kind)[:, None]
  file = io.BytesIO()
  matlab.savemat(file, {'synsets': synsets})
  return file.getvalue()


@pytest.mark.parametrize('packed', [False, True])
def test_the_numbers_of_the_development_kit(tmp_path, packed):
  files = {NUMBERS: b'3\n1\n2\n', 'meta.mat': make_meta()}
  if packed:
    path = tmp_path / 'ILSVRC2012_devkit_t12.tar.gz'
    with tarfile.open(path, 'w:gz') as kit:
      for name, data in files.items():
        member = tarfile.TarInfo(f'ILSVRC2012_devkit_t12/data/{name}')
        member.size = len(data)
        kit.addfile(member, io.BytesIO(data))
  else:
    path = tmp_path / 'ILSVRC2012_devkit_t12' / 'data' / NUMBERS
    path.parent.mkdir(parents=True)
    for name, data in files.items():
      path.with_name(name).write_bytes(data)
  assert labels.find([tmp_path / 'elsewhere', tmp_path]) == path
  assert labels.of_images(path, NAMES, CLASSES).labels == [1, 2, 0]


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    ('3\n1\n2\n', 'numbers of the development kit.*meta.mat'),
    ('n02\nn10\n', '2 lines in .* for 3 images'),
    ('n02\nn10\nn01\nn01\nn01\n', '5 lines in .* for 3 images'),
    ('', '0 lines in .* for 3 images'),
    ('n02\nn10\nn03\n', 'not among the training classes: n03'),
    ('a,n02\nb,n10\nc,n03\n', 'not among the training classes: n03'),
    ('a,n02\nb,n10\nd,n01\n', r'Without: c\.JPEG'),
    ('n01,a\nn02,b\nn10,c\n', 'first column is not the name'),
  ],
)
def test_labels_that_do_not_fit(tmp_path, text, message):
  path = tmp_path / 'labels.csv'
  with pytest.raises(Mistake, match=message) as error:
    read(path, text)
  assert str(path) in str(error.value)


def test_a_thousand_images_without_a_line_are_cut_to_five(tmp_path):
  names = [f'{i}.JPEG' for i in range(1000)]
  with pytest.raises(Mistake, match=r'4\.JPEG and 994 more\.') as error:
    read(tmp_path / 'labels', '999,n01\n', names=names)
  assert len(str(error.value)) < 500


@pytest.mark.parametrize(
  ('name', 'data', 'message'),
  [
    ('labels.xlsx', b'PK\x03\x04\xff\xfe\xfa', 'table of a spreadsheet'),
    ('kit.tar.gz', b'not packed', 'download broke off'),
    ('nowhere/labels.txt', None, 'path is wrong'),
  ],
)
def test_what_is_no_file_of_labels(tmp_path, name, data, message):
  path = tmp_path / name
  if data is not None:
    path.write_bytes(data)
  with pytest.raises(Mistake, match=message) as error:
    labels.of_images(path, NAMES, CLASSES)
  assert re.search(re.escape(str(path)), str(error.value))
