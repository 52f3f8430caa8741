"""WebDataset's tar files: the shards of what they hold, and what is refused."""

import re

import pytest
from prepared_images import make_jpeg, make_tar, prepare, records

from reference.command import Mistake


def label(number):
  return f'{number}\n'.encode()


TRAIN = {
  'a/0.jpg': make_jpeg(0),
  'a/0.cls': label(1),
  'a/0.json': b'{}',
  'a/1.cls': label(0),
  'a/1.JPEG': make_jpeg(1),
  'b/0.jpg': make_jpeg(2),
  'b/0.cls': label(2),
  'b/._0.jpg': b'',
}
MORE = {'2.png': make_jpeg(3), '2.cls': label(0), '3.cls': label(0)}
HELD_OUT = {'0.jpg': make_jpeg(4), '0.cls': label(2)}


def write(folder, **archives):
  folder.mkdir()
  for name, files in archives.items():
    (folder / f'{name.replace("_", "-")}.tar').write_bytes(make_tar(files))
  return folder


def test_shards_hold_every_image_and_its_label(tmp_path, capsys):
  source = write(
    tmp_path / 'source', in_train_00=TRAIN, in_train_01=MORE, in_val_00=HELD_OUT
  )
  manifest = prepare(source, tmp_path / 'shards')
  assert manifest.classes == ['0', '1', '2']
  assert records(tmp_path / 'shards', 'train') == [
    (1, make_jpeg(0)),
    (0, make_jpeg(1)),
    (2, make_jpeg(2)),
    (0, make_jpeg(3)),
  ]
  assert records(tmp_path / 'shards', 'held_out') == [(2, make_jpeg(4))]
  shown = capsys.readouterr().out
  assert 'Not read, of another kind (1): a/0.json' in shown
  assert 'Not read, hidden or of the system (1): b/._0.jpg' in shown
  assert 'Not read, labels without an image (1): 3.cls' in shown


@pytest.mark.parametrize(
  ('train', 'held_out', 'message'),
  [
    (TRAIN | {'4.jpg': b''}, HELD_OUT, r'train\.tar are without: 4\.jpg'),
    (TRAIN | {'0.cls': b'cat'}, HELD_OUT, r"Given b'cat' in 0\.cls"),
    (TRAIN | {'a/0.cls': label(4)}, HELD_OUT, 'without a training image: 1, 3'),
    (TRAIN, HELD_OUT | {'0.cls': label(3)}, 'held out and not trained on: 3'),
    ({}, HELD_OUT, 'must have a training image'),
  ],
)
def test_what_is_refused(tmp_path, train, held_out, message):
  source = write(tmp_path / 'source', train=train, val=held_out)
  with pytest.raises(Mistake) as error:
    prepare(source, tmp_path / 'shards')
  assert re.search(message, str(error.value))


def test_a_file_that_broke_off_is_named(tmp_path):
  source = write(tmp_path / 'source', train=TRAIN, val=HELD_OUT)
  path = source / 'train.tar'
  path.write_bytes(path.read_bytes()[:2048])
  with pytest.raises(Mistake, match=f'must be whole .* {path} is not'):
    prepare(source, tmp_path / 'shards')
