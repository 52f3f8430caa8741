"""Shards against the files they are made from, read and damaged."""

import itertools
import re

import ml_collections
import numpy as np
import pytest
from prepared_images import (
  CLASSES,
  SHARDS,
  expected,
  make_jpeg,
  names,
  prepare,
  records,
  write_images,
)

from reference.data import input_pipeline, jpeg, shards, sources


@pytest.fixture
def source(tmp_path):
  return write_images(tmp_path / 'images')


@pytest.fixture
def target(tmp_path):
  return tmp_path / 'shards'


def test_shards_hold_every_file_and_its_label(source, target, capsys):
  manifest = prepare(source, target)
  assert names(target) == sorted([*SHARDS, 'manifest.json'])
  assert records(target, 'train') == expected('train')
  assert records(target, 'held_out') == expected('val')
  assert manifest.counts == {'train': [4, 4, 2], 'held_out': [3]}
  assert manifest.classes == list(CLASSES)
  assert manifest.skipped == {}
  shown = capsys.readouterr().err
  assert 'check: 100%' in shown
  assert 'write: 100%' in shown
  assert '13/13' in shown


def make_config():
  return ml_collections.ConfigDict(
    {
      'seed': 3,
      'batch_size': 4,
      'data': {
        'size': 8,
        'crop': 'random_resized',
        'flip': True,
        'eval_crop': 'center',
        'mean': (0.5, 0.5, 0.5),
        'on_bad_image': 'skip',
      },
      'run': {'threads': 2, 'workers': 0},
    }
  )


def test_batches_are_those_of_the_folder(source, target):
  """The order, the crops and the pixels."""
  prepare(source, target)
  config = make_config()
  taken, fingerprints = [], set()
  for name, folder in (('jpeg_folder', source), ('array_record', target)):
    opened = sources.open_source(
      ml_collections.ConfigDict({'source': name, 'folder': str(folder)})
    )
    assert opened.classes == CLASSES
    fingerprints.add(opened.fingerprint)
    batches = input_pipeline.train_batches(opened, config, skipped={})
    train = list(itertools.islice(batches, 6))
    batches.close()
    taken.append(
      train
      + list(
        input_pipeline.held_out_batches(
          opened, config, batch_size=config.batch_size, skipped={}
        )
      )
    )
  assert len(fingerprints) == 1
  for a, b in zip(*taken, strict=True):
    assert a.keys() == b.keys()
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def test_shards_that_are_missing_or_damaged_are_named(source, target):
  prepare(source, target)
  path = target / SHARDS[2]
  data = path.read_bytes()
  # ArrayRecord's index is at the end.
  for state, damage in (
    ('is not there', path.unlink),
    ('holds 0 of 4', lambda: path.write_bytes(b'')),
    ('holds 0 of 4', lambda: path.write_bytes(data[: len(data) // 2])),
    ('holds 3 of 4', lambda: shards.write_shard(path, [b'0'] * 3)),
  ):
    damage()
    with pytest.raises(ValueError, match=re.escape(f'{path} {state}')):
      sources.array_record(str(target))
  path.unlink()
  prepare(source, target)
  assert path.read_bytes() == data
  assert len(sources.array_record(str(target)).train) == 10


def test_a_folder_without_manifest_is_explained(source):
  with pytest.raises(ValueError, match=f'prepare_data --source={source}'):
    sources.array_record(str(source))
  with pytest.raises(ValueError, match='is no folder'):
    sources.array_record(f'{source}/nowhere')


def test_a_damaged_record_is_named_by_its_place(source, target):
  prepare(source, target)
  path = target / SHARDS[2]
  data = [shards.pack(make_jpeg(0), 1) for _ in range(4)]
  shards.write_shard(path, [*data[:3], data[3][:-50]])
  opened = sources.array_record(str(target))
  assert opened.read(opened.train[6])[1] == 1
  with pytest.raises(jpeg.BadImageError) as error:
    opened.read(opened.train[7])
  assert error.value.path == f'{path}[3]'


def test_a_flipped_byte_is_named_and_can_be_skipped(source, target):
  prepare(source, target)
  path = target / SHARDS[2]
  before = sources.array_record(str(target))
  _, damaged = expected('train')[6]
  data = bytearray(path.read_bytes())
  data[data.index(damaged) + len(damaged) // 2] ^= 1
  path.write_bytes(data)

  opened = sources.array_record(str(target))
  name = f'{path}[2]'
  with pytest.raises(jpeg.BadImageError, match=re.escape(name)) as error:
    opened.read(opened.train[6])
  assert error.value.reason.startswith('a damaged record: Corrupted')
  # Those around it are as they were.
  for number in (5, 7):
    pixels, label = opened.read(opened.train[number])
    same, same_label = before.read(before.train[number])
    np.testing.assert_array_equal(pixels, same)
    assert label == same_label

  skipped = {}
  batches = input_pipeline.train_batches(opened, make_config(), skipped=skipped)
  for _ in range(6):
    next(batches)
  batches.close()
  assert list(skipped) == [name]
