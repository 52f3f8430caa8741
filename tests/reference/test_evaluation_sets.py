"""What a model is evaluated on: folders and shards, by the model's classes."""

import collections

import ml_collections
import numpy as np
import pytest
from prepared_images import CLASSES, make_jpeg, prepare, write_images

from reference.command import Mistake
from reference.data import evaluation_sets, jpeg

# The model knows one more, which shifts the labels of all after it.
KNOWN = ('n01', 'n01.5', 'n02', 'n10')
NO_CONFIG = ml_collections.ConfigDict(
  {'source': 'jpeg_folder', 'folder': '', 'mean': (0.5, 0.5, 0.5)}
)


def write(folder, counts):
  """CLASS/*.jpg alone, as many as said."""
  for name, count in counts.items():
    (folder / name).mkdir(parents=True)
    for number in range(count):
      data = make_jpeg(100 * len(name) + number)
      (folder / name / f'{number}.jpg').write_bytes(data)
  return str(folder)


def read_all(images):
  return [images.source.read(record) for record in images.source.held_out]


def labels_of(images):
  return collections.Counter(label for _, label in read_all(images))


@pytest.mark.parametrize('is_prepared', [False, True])
def test_labels_are_those_of_the_model(tmp_path, is_prepared):
  """Of a folder that training takes, and of its shards, what is held out."""
  folder = write_images(tmp_path / 'images')
  expected = []
  for label, name in ((0, 'n01'), (2, 'n02'), (3, 'n10')):
    data = (folder / 'val' / name / '0.JPEG').read_bytes()
    expected.append((jpeg.decode(data, 'by hand'), label))
  if is_prepared:
    prepare(folder, tmp_path / 'shards')
    folder = tmp_path / 'shards'
  images = evaluation_sets.open_set(str(folder), KNOWN, NO_CONFIG)
  found = read_all(images)
  assert len(found) == len(expected) == 3
  for (image, label), (wanted, wanted_label) in zip(
    found, expected, strict=True
  ):
    np.testing.assert_array_equal(image, wanted)
    assert label == wanted_label
  assert images.labels == [0, 2, 3]
  assert (images.source.classes, images.notes) == (KNOWN, [])
  assert not images.source.train


def test_kaggles_folder_is_known_by_its_own_root(tmp_path):
  write_images(tmp_path / 'ILSVRC' / 'Data' / 'CLS-LOC')
  images = evaluation_sets.open_set(str(tmp_path), KNOWN, NO_CONFIG)
  assert labels_of(images).keys() == {0, 2, 3}


def test_a_part_of_the_classes_as_imagenet_a_has(tmp_path):
  folder = write(tmp_path / 'a', {'n10': 2, 'n01': 3})
  images = evaluation_sets.open_set(folder, KNOWN, NO_CONFIG)
  assert labels_of(images) == {0: 3, 3: 2}
  assert images.labels == [0, 3]


def test_numbers_are_places_as_imagenet_v2_has_them(tmp_path):
  """Folders sort as text, 10 before 2, and the classes do not."""
  known = tuple(f'n{number:02}' for number in range(12))
  folder = write(tmp_path / 'v2', {'2': 2, '10': 1, '0': 3})
  images = evaluation_sets.open_set(folder, known, NO_CONFIG)
  assert labels_of(images) == {0: 3, 2: 2, 10: 1}
  assert images.labels == [0, 2, 10]
  [note] = images.notes
  assert '0 stands for the first class of the model, n00' in note


def test_numbers_that_the_model_knows_are_names(tmp_path):
  folder = write(tmp_path / 'digits', {'2': 1, '0': 2})
  images = evaluation_sets.open_set(folder, ('2', '7', '0'), NO_CONFIG)
  assert labels_of(images) == {0: 1, 2: 2}
  assert not images.notes


def test_numbers_of_which_the_model_knows_some_are_no_places(tmp_path):
  """Folders from 0 on, of a model that was trained on those from 1 on."""
  folder = write(tmp_path / 'from_0', {'0': 1, '1': 1, '2': 1})
  with pytest.raises(Mistake, match='does not know 0, but'):
    evaluation_sets.open_set(folder, ('1', '2', '3'), NO_CONFIG)


def test_images_of_the_run_itself():
  config = ml_collections.ConfigDict({'source': 'digits', 'mean': (0.5,)})
  images = evaluation_sets.open_set('', tuple('0123456789'), config)
  assert len(images.source.held_out) == 360
  assert images.labels == list(range(10))


def test_classes_that_the_model_does_not_know(tmp_path):
  folder = write(tmp_path / 'o', {'n01': 1, 'cat': 1, '7': 1})
  with pytest.raises(Mistake, match=r'the 4 classes.*7, cat.*n01, n01\.5.*ln'):
    evaluation_sets.open_set(folder, KNOWN, NO_CONFIG)
  # A number that is no place.
  folder = write(tmp_path / 'v2', {'0': 1, '4': 1})
  with pytest.raises(Mistake, match=r'does not know 0, 4'):
    evaluation_sets.open_set(folder, KNOWN, NO_CONFIG)


def test_files_are_no_grey_images(tmp_path):
  folder = write(tmp_path / 'rgb', {'n01': 2})
  (tmp_path / 'rgb' / 'n01' / '0.jpg').write_bytes(b'damaged')
  config = ml_collections.ConfigDict({**NO_CONFIG, 'mean': (0.5,)})
  with pytest.raises(
    Mistake, match=r'values, 1\. Given 3: .*leave out `--data`'
  ):
    evaluation_sets.open_set(folder, KNOWN, config)


def test_what_is_no_folder(tmp_path):
  with pytest.raises(Mistake, match=r'which is none.*misspelt'):
    evaluation_sets.open_set(str(tmp_path / 'gone'), CLASSES, NO_CONFIG)
  config = ml_collections.ConfigDict(
    {**NO_CONFIG, 'folder': str(tmp_path / 'moved')}
  )
  with pytest.raises(Mistake, match=r'moved, which is not here.*--data='):
    evaluation_sets.open_set('', CLASSES, config)
  with pytest.raises(Mistake, match=r'holds no folder'):
    evaluation_sets.open_set(str(tmp_path), CLASSES, NO_CONFIG)
