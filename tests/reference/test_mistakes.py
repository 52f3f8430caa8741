"""Every row of docs/mistakes.md: what is given, and what is said then."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from PIL import Image
from prepared_images import make_jpeg, make_tar, write_images

from reference.command import Mistake
from reference.configs import digits, imagenet_4k, jpeg_folder
from reference.data import (
  evaluation_sets,
  input_pipeline,
  preparation,
  sources,
)
from reference.run import (
  agreement,
  checks,
  exports,
  hosts,
  lock,
  methods,
  metrics,
  parts,
  storage,
  trained,
)
from reference.tools import predictions

PAGE = Path(__file__).parents[2] / 'docs' / 'mistakes.md'


def changed(config, changes):
  of_run = config.get_config()
  of_run.update_from_flattened_dict(changes)
  return of_run


def values(config=digits, **changes):
  """Checks a config, as a run does before it compiles anything."""
  changes = {name.replace('__', '.'): value for name, value in changes.items()}

  def case(folder):
    of_run = changed(config, changes)
    mesh = Mesh(np.array(jax.devices()[:1]), ('data',))
    checks.check_choices(of_run)
    checks.check_numbers(of_run)
    checks.check_channels(of_run)
    checks.check_batch(of_run.batch_size, 4, accumulate=of_run.accumulate)
    checks.check_groups(of_run, mesh)
    parts.make_optimizer(of_run, images=1437)
    metrics.make_writer(of_run, folder)
    model = parts.make_model(of_run, num_classes=10)
    methods.make_gradient(model, of_run, mesh)

  return case


def images(spoil):
  """Opens a folder of images that something was done to."""

  def case(folder):
    spoil(write_images(folder / 'images'))
    sources.jpeg_folder(str(folder / 'images'))

  return case


def flat(text, name='labels.txt'):
  """Held-out images without class folders, and a file of their labels."""

  def case(folder):
    root = write_images(folder / 'images')
    for number, path in enumerate(sorted(root.glob('val/*/*'))):
      path.rename(root / 'val' / f'{number}.JPEG')
      path.parent.rmdir()
    if text is None:
      sources.jpeg_folder(str(root))
    path = folder / name
    path.write_bytes(text)
    preparation.prepare(root, folder / 'shards', held_out_labels=path)

  return case


def prepared(spoil):
  """Prepares a folder of images that something was done to."""

  def case(folder):
    root = write_images(folder / 'images')
    spoil(root)
    preparation.prepare(root, folder / 'shards')

  return case


def damage(content):
  def spoil(root):
    (root / 'train' / 'n01' / '0.JPEG').write_bytes(content)

  return spoil


def gif(folder):
  path = folder / 'a.gif'
  Image.new('RGB', (9, 9)).save(path)
  root = write_images(folder / 'images')
  path.rename(root / 'train' / 'n01' / '0.JPEG')
  preparation.prepare(root, folder / 'shards')


def tar(folder):
  folder = folder / 'images'
  folder.mkdir()
  whole = make_tar({'n01.tar': make_tar({'a.JPEG': make_jpeg(0)})})
  (folder / 'ILSVRC2012_img_train.tar').write_bytes(whole[:700])
  (folder / 'ILSVRC2012_img_val.tar').write_bytes(whole)
  path = folder / 'labels.txt'
  path.write_text('n01')
  preparation.prepare(folder, folder / 'shards', held_out_labels=path)


def full_target(folder):
  root = write_images(folder / 'images')
  (folder / 'shards').mkdir()
  (folder / 'shards' / 'thesis.pdf').touch()
  preparation.prepare(root, folder / 'shards')


def broken_manifest(folder):
  preparation.prepare(write_images(folder / 'images'), folder / 'shards')
  path = folder / 'shards' / 'manifest.json'
  path.write_bytes(path.read_bytes()[:100])
  sources.array_record(str(folder / 'shards'))


def lost_shard(folder):
  preparation.prepare(write_images(folder / 'images'), folder / 'shards')
  next((folder / 'shards').glob('train-*')).unlink()
  sources.array_record(str(folder / 'shards'))


def without_folder(open_it):
  return lambda folder: open_it(str(folder / 'imgaes'))


def resumed(**changes):
  """Goes on from a checkpoint of another config."""
  config = {'processes': 1, 'devices': 8, 'epochs': 30.0, 'method': 'conadv'}
  stored = agreement.About(config, None, [])
  return lambda folder: agreement.check_config(
    folder / 'runs', 90, stored, config | changes, ()
  )


def renamed_classes(folder):
  before = {
    'classes': ['cat', 'dog'],
    'images': 60,
    'held_out_images': 20,
    'fingerprint': 'f0',
  }
  stored = agreement.About({}, before, [])
  now = before | {'classes': ['cat', 'wolf'], 'fingerprint': 'f1'}
  agreement.check_dataset(folder / 'runs', 90, stored, now, ())


def second_run(folder):
  # This process stands for the first run.
  owner = {
    'host': 'worker-3',
    'process': os.getpid(),
    'since': '2026-01-02T03:04:05+00:00',
    'started': lock._started(os.getpid()),
    'place': lock._place(),
  }
  (folder / 'lock_other.json').write_text(json.dumps(owner))
  with lock.hold(folder):
    pass


def file_for_folder(folder):
  (folder / 'runs').touch()
  storage.check_shared(folder / 'runs' / '1')


def refused_write(number):
  def case(folder):
    with storage.explained(folder / 'checkpoints'):
      raise OSError(number, os.strerror(number))

  return case


def export_over(folder):
  (folder / 'model').mkdir()
  (folder / 'model' / 'notes.txt').touch()
  exports.check_empty(folder / 'model')


def half_an_export(folder):
  (folder / trained.DESCRIPTION).write_text('{')
  trained.load(folder)


def started(**flags):
  given = dict.fromkeys(('coordinator', 'num_processes', 'process_id'))
  given = {'distributed': False, **given, **flags}
  return lambda folder: hosts.start(**given)


def other_classes(folder):
  root = write_images(folder / 'images')
  evaluation_sets.open_set(
    str(root / 'val'), ('cat', 'dog'), jpeg_folder.get_config().data
  )


def of_many_hosts(folder):
  config = changed(digits, {'batch_size': 130})
  input_pipeline.train_batches(
    sources.digits(), config, skipped={}, host=0, hosts=4
  )


def too_high_levels(folder):
  config = changed(digits, {'data.folder': '', 'data.level_factor': 10.0})
  input_pipeline.train_batches(sources.digits(), config, skipped={})


def classes(folder):
  config = changed(imagenet_4k, {'data.folder': '/mnt/images'})
  checks.check_classes(config, 999)


CASES = {
  # The config.
  '`--config.batch_size=0`': values(batch_size=0),
  '`--config.batch_size=-128`': values(batch_size=-128),
  '`--config.batch_size=130`, on 4 devices': values(batch_size=130),
  '`--config.batch_size=130`, on 4 hosts': of_many_hosts,
  '`--config.accumulate=0`': values(accumulate=0),
  '`--config.epochs=0`': values(epochs=0.0),
  '`--config.epochs=-1`': values(epochs=-1.0),
  '`--config.epochs=0.01`': values(epochs=0.01),
  '`--config.lars.warmup_epochs=-1`': values(lars__warmup_epochs=-1.0),
  '`--config.lars.peak=-1`': values(lars__peak=-1.0),
  '`--config.lars.momentum=1`': values(lars__momentum=1.0),
  '`--config.seed=-1`': values(seed=-1),
  '`--config.label_smoothing=10`': values(label_smoothing=10.0),
  '`--config.attack.start_from_clean=20`': values(
    attack__start_from_clean=20.0
  ),
  '`--config.data.crop=centre`': values(data__crop='centre'),
  '`--config.method=autoaugment`, of grey images': values(method='autoaugment'),
  '`--config.method=vrgd`, on one device': values(method='vrgd'),
  '`--config.data.size=0`': values(data__size=0),
  '`--config.data.std=(0.0,)`': values(data__std=(0.0,)),
  '`--config.data.mean=(0.5, 0.5, 0.5)`, of grey images': values(
    data__mean=(0.5, 0.5, 0.5)
  ),
  '`--config.data.mean=(0.5,)`, of RGB images': values(
    jpeg_folder, data__mean=(0.5,)
  ),
  '`--config.model.dtype=bf16`': values(model__dtype='bf16'),
  '`--config.model.stage_sizes=()`': values(model__stage_sizes=()),
  '`--config.model.build=vit`': values(model__build='vit'),
  '`--config.model.build=my_modles:vit`': values(model__build='my_modles:vit'),
  '`--config.run.log_every=0`': values(run__log_every=0),
  '`--config.run.keep=0`': values(run__keep=0),
  '`--config.run.writer=wandb`': values(run__writer='wandb'),
  '`--coordinator` without its number': started(coordinator='10.0.0.1:1234'),
  '`--distributed` and `--process_id=1`': started(
    distributed=True, process_id=1
  ),
  # Images.
  'a folder that is not there': without_folder(sources.jpeg_folder),
  'a folder without `train/`': images(
    lambda root: (root / 'train').rename(root / 'pictures')
  ),
  'a folder without `val/`': images(
    lambda root: (root / 'val').rename(root / 'pictures')
  ),
  'images that are in no class folder': images(
    lambda root: (
      [
        path.rename(root / 'train' / f'{path.parent.name}_{path.name}')
        for path in (root / 'train').glob('*/*')
      ]
      and [path.rmdir() for path in (root / 'train').glob('n*[0-9]')]
    )
  ),
  'a class folder without images': images(
    lambda root: (root / 'train' / 'n03').mkdir()
  ),
  'a held-out class that training lacks': images(
    lambda root: shutil.rmtree(root / 'train' / 'n02')
  ),
  'a folder with 999 of 1,000 classes': classes,
  'held-out images without labels': flat(None),
  'two labels for three images': flat(b'n01\nn02\n'),
  'a label of no class': flat(b'n01\nn02\nn99\n'),
  'labels as numbers, without `meta.mat`': flat(
    b'1\n2\n3\n', 'ILSVRC2012_validation_ground_truth.txt'
  ),
  'a spreadsheet of labels': flat(b'PK\x03\x04\xff\xfe\x80', 'labels.xlsx'),
  'an empty file under the name of a JPEG': prepared(damage(b'')),
  'a JPEG that was cut short': prepared(damage(make_jpeg(0)[:-100])),
  'a web page under the name of a JPEG': prepared(damage(b'<html>Not found')),
  'a GIF under the name of a JPEG': gif,
  'a tar file that was cut short': tar,
  'shards into a folder that holds files': full_target,
  'a folder of shards without a manifest': without_folder(sources.array_record),
  'a manifest that was cut short': broken_manifest,
  'a shard that is missing': lost_shard,
  'a folder without idx files': without_folder(sources.idx_folder),
  '`--config.data.level_factor=10`': too_high_levels,
  # The work folder.
  'another method than before': resumed(method='advprop'),
  'more epochs than before': resumed(epochs=60.0),
  'fewer devices than before': resumed(devices=4),
  'a class that was renamed since': renamed_classes,
  'a second run in the folder': second_run,
  'a file where a folder should be': file_for_folder,
  'a full disk': refused_write(errno.ENOSPC),
  'a disk that is mounted read-only': refused_write(errno.EROFS),
  # Models in use.
  'a work folder without a run': lambda folder: trained.load(folder / 'run'),
  'an export into a folder that holds files': export_over,
  'an export that was cut short': half_an_export,
  '`--epsilon=8`': lambda folder: predictions.make_adversary(8.0, 20),
  '`--steps=0`': lambda folder: predictions.make_adversary(0.1, 0),
  'images of other classes': other_classes,
}


def say(given, folder):
  """The first line of the message, with what a colon leads to, as a cell."""
  with pytest.raises(Mistake) as error:
    CASES[given](folder)
  lines = iter(str(error.value).splitlines())
  line = next(lines)
  while line.endswith(':'):
    line += f' {next(lines).strip()}'
  line = line.replace(str(folder), '/mnt').replace(str(os.getpid()), '4711')
  # In a cell, code alone has no escapes.
  code = re.split(r'(`[^`]*`)', line)
  code[::2] = [re.sub(r'([*<_\\])', r'\\\1', text) for text in code[::2]]
  return ''.join(code).replace('|', r'\|')


def rows():
  return dict(re.findall(r'^\| (.*?) \| (.*) \|$', PAGE.read_text(), re.M)[1:])


def test_the_page_has_every_case():
  assert list(rows()) == list(CASES)
  assert len(CASES) >= 40


@pytest.mark.parametrize('given', CASES)
def test_what_is_said(given, tmp_path):
  assert say(given, tmp_path) == rows()[given]
