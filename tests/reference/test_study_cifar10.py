"""Grid B from JPEGs to rows, at a tiny size."""

import jax
import numpy as np
import pytest
from PIL import Image

from reference.configs import study_cifar10
from reference.study import grid


@pytest.fixture
def folder(tmp_path):
  rng = np.random.default_rng(0)
  for split, count in (('train', 20), ('test', 6)):
    for name in ('cat', 'dog'):
      target = tmp_path / 'images' / split / name
      target.mkdir(parents=True)
      for number in range(count):
        level = 60 if name == 'cat' else 190
        pixels = rng.normal(level, 20, (16, 16, 3)).clip(0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(
          target / f'{number}.jpg', quality=95
        )
  return tmp_path / 'images'


@pytest.mark.slow
def test_its_methods_run_from_jpegs_to_rows(tmp_path, folder, monkeypatch):
  [device, *_] = jax.devices()
  monkeypatch.setattr(jax, 'devices', lambda: [device])
  config = study_cifar10.get_config()
  config.update_from_flattened_dict(
    {
      'data.folder': str(folder),
      'data.size': 8,
      'epochs': 2.0,
      'lars.warmup_epochs': 0.5,
      'study.train_images': 32,
      'study.validation_images': 8,
      'study.batch_sizes': (16,),
      'study.peaks': ((4.0,),),
      'study.seeds': 1,
      'study.variants': ('vanilla', 'batch_augment'),
      'study.robust_images': 12,
    }
  )
  config.model = {'build': 'digit_steps:Small'}
  config.study.ablations = {}
  rows = grid.run(config, tmp_path / 'study', command='')
  assert {row['variant'] for row in rows} == {'vanilla', 'batch_augment'}
  for row in rows:
    assert row['kind'] == 'final'
    assert row['steps'] == 4
    assert row['train_images'] == 32
    assert row['robust_images'] == 12
    assert row['accuracy'] in [i / 12 for i in range(13)]
    assert np.isfinite(row['top_eigenvalue'])
    assert len(row['accuracy_by_epoch'].split()) == 1
  crops = {row['variant']: row['augmentation'] for row in rows}
  assert crops == {'vanilla': 'pad', 'batch_augment': 'resize'}
