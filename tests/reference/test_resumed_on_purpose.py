"""A run that goes on with another schedule, or on other images."""

import json

import pytest
from prepared_images import write_images
from run_folders import read_csv, steps_saved
from tiny_runs import BATCH, tiny

import conadv_optax as conadv
from reference import command
from reference.configs import jpeg_folder
from reference.run import agreement, train


def changes(workdir, step):
  path = workdir / 'checkpoints' / str(step) / 'changes' / 'metadata'
  return json.loads(path.read_text())


@pytest.mark.slow
def test_a_run_is_lengthened_on_purpose_alone(tmp_path, capsys):
  short, longer = (tiny('vanilla', steps=steps) for steps in (3, 6))
  train.train(short, tmp_path)
  with pytest.raises(command.Mistake, match=r'epochs: given.*(?s:.*)--extend'):
    train.train(longer, tmp_path)
  capsys.readouterr()
  train.train(longer, tmp_path, accept=(agreement.SCHEDULE,))
  epochs = f'epochs {short.epochs} -> {longer.epochs}'
  out = capsys.readouterr().out
  assert f'3 of 6 steps done.\nFrom step 3 on: {epochs}.' in out
  assert steps_saved(tmp_path) == [4, 6]
  for step in (4, 6):
    assert changes(tmp_path, step) == [
      {'step': 3, 'epochs': [short.epochs, longer.epochs]}
    ]
  rows = read_csv(tmp_path)
  assert [float(row['step']) for row in rows] == [1, 2, 3, 4, 5, 6]
  assert [row['changes'] for row in rows] == ['', '', '', '1', '1', '1']
  for row, steps in zip(rows, [3] * 3 + [6] * 3, strict=True):
    rate = conadv.polynomial_warmup(8.0, 1, steps, power=2.0, end=1e-4)
    assert float(row['learning_rate']) == pytest.approx(
      float(rate(int(row['step']) - 1)), rel=1e-5
    )
  # And it is a run of that config from there on.
  train.train(longer, tmp_path)


@pytest.mark.slow
def test_other_images_are_refused_and_the_same_elsewhere_are_not(
  tmp_path, capsys
):
  images, workdir = tmp_path / 'images', tmp_path / 'work'
  write_images(images)
  config = jpeg_folder.get_config()
  config.update_from_flattened_dict(
    {
      'data.folder': str(images),
      'data.size': 8,
      'data.on_bad_image': 'skip',
      'method': 'vanilla',
      'batch_size': BATCH,
      'epochs': 0.5,
      'lars.warmup_epochs': 0.1,
      'model.stage_sizes': (1,),
      'model.filters': 4,
    }
  )
  train.train(config, workdir)
  moved = images.rename(tmp_path / 'moved')
  config.data.folder = f'{moved}/'
  train.train(config, workdir)
  assert 'The run is complete' in capsys.readouterr().out

  for split in ('train', 'val'):
    folder = moved / split
    first = min(folder.iterdir())
    first.rename(folder / 'zebra')
  with pytest.raises(command.Mistake) as error:
    train.train(config, workdir)
  assert "new, 1: 'zebra'" in str(error.value)
  assert '--accept=data' in str(error.value)
  train.train(config, workdir, accept=(agreement.DATA,))
  assert 'From step 1 on: classes' in capsys.readouterr().out
