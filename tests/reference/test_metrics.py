"""The CSV over restarts, and the figure."""

import csv
import os
import sys
from pathlib import Path
from unittest import mock

import pytest

from reference.configs import digits
from reference.run import metrics


def row(step, **values):
  return {'step': step, 'epoch': step / 10, **values}


def read(path):
  with path.open(newline='') as file:
    return list(csv.DictReader(file))


@pytest.fixture
def record(tmp_path):
  record = metrics.open_record(tmp_path, last_step=0)
  yield record
  metrics.close(record)


def test_every_row_is_in_the_file_at_once(record):
  metrics.add(record, row(1, loss=0.5))
  assert read(record.path) == [{'step': '1', 'epoch': '0.1', 'loss': '0.5'}]
  metrics.add(record, row(2, loss=0.25, held_out_accuracy=1 / 3))
  first, second = read(record.path)
  assert first['held_out_accuracy'] == ''
  assert float(second['held_out_accuracy']) == pytest.approx(1 / 3, rel=1e-7)


def test_a_record_of_another_run_by_now_is_left_alone(tmp_path):
  def check():
    if is_lost:
      raise ValueError('it is not yours')

  record = metrics.open_record(tmp_path, last_step=0, check=check)
  is_lost = False
  metrics.add(record, row(1, loss=0.5))
  before = record.path.read_text()
  is_lost = True
  with pytest.raises(ValueError, match='not yours'):
    metrics.add(record, row(2, loss=0.25))
  assert record.path.read_text() == before


def test_a_restart_drops_the_rows_after_its_checkpoint(record, tmp_path):
  for step in (2, 4, 6):
    metrics.add(record, row(step, loss=1 / step, skipped=0))
  resumed = metrics.open_record(tmp_path, last_step=4)
  metrics.add(resumed, row(6, loss=0.125, skipped=0))
  metrics.close(resumed)
  rows = read(record.path)
  assert [float(row['step']) for row in rows] == [2, 4, 6]
  assert float(rows[-1]['loss']) == 0.125
  assert float(rows[0]['loss']) == 0.5


def test_a_line_for_the_console_names_the_branches():
  line = metrics.describe(
    row(20, loss_adversarial=0.75, loss_main=0.5, held_out_accuracy=0.9725)
  )
  assert line == (
    'step 20, epoch 2.0, clean loss 0.500, adversarial loss 0.750, '
    'held-out accuracy 97.25%'
  )


@pytest.mark.parametrize('branches', [['main'], ['main', 'adversarial']])
def test_draws_a_png(tmp_path, branches):
  values = {f'loss_{name}': 1.0 for name in branches}
  values |= {f'accuracy_{name}': 0.5 for name in branches}
  rows = [row(step, **values) for step in range(1, 5)]
  rows[-1] |= {'held_out_accuracy': 0.9}
  metrics.draw(tmp_path / 'curves.png', rows)
  assert (tmp_path / 'curves.png').read_bytes().startswith(b'\x89PNG')


def test_a_branch_that_sets_in_late_has_a_curve(tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(
    metrics.Figure, 'savefig', lambda figure, *_, **__: drawn.append(figure)
  )
  rows = [row(step, loss_main=1.0, accuracy_main=0.5) for step in (10, 20, 30)]
  rows[-1] |= {'loss_adversarial': 2.0, 'accuracy_adversarial': 0.25}
  rows[-1] |= {'held_out_accuracy': 0.9}
  metrics.draw(tmp_path / 'curves.png', rows)
  [figure] = drawn
  losses, _ = figure.axes
  found = {x.get_label(): len(x.get_xdata()) for x in losses.lines}
  assert found == {'clean, training': 3, 'adversarial, training': 1}


GOOD = b'step,epoch,loss\n1,0.1,0.5\n2,0.2,0.25\n'


@pytest.mark.parametrize(
  ('content', 'steps', 'damage'),
  [
    (GOOD, [1, 2], ''),
    (b'\xef\xbb\xbf' + GOOD, [1, 2], ''),
    (GOOD + b'\0' * 4096, [1, 2], 'some of its lines are no rows'),
    (GOOD[:-12] + b'\0' * 4096, [1], 'some of its lines are no rows'),
    (GOOD[:-7], [1], 'some of its lines are no rows'),
    (GOOD.replace(b',', b';'), [1, 2], "separated by ';'"),
    (b'\0' * 4096, [], 'does not name a column `step`'),
    (b'x' * 200_000, [], 'larger than field limit'),
    (b'', [], 'does not name a column `step`'),
    (GOOD.decode().encode('utf-16'), [], 'does not name a column `step`'),
  ],
  ids=[
    'whole',
    'mark',
    'tail',
    'end',
    'cut',
    'semicolons',
    'zeros',
    'long',
    'empty',
    'utf-16',
  ],
)
def test_a_damaged_record_is_kept_and_the_run_goes_on(
  content, steps, damage, tmp_path, capsys
):
  path = tmp_path / 'metrics.csv'
  path.write_bytes(content)
  for number in (1, 2):
    record = metrics.open_record(tmp_path, last_step=2)
    metrics.add(record, row(3, loss=0.125))
    metrics.close(record)
    assert [float(x['step']) for x in read(path)] == [*steps, 3]
    kept = tmp_path / 'metrics_damaged_1.csv'
    assert kept.exists() == bool(damage)
    out = capsys.readouterr().out
    if damage and number == 1:
      assert damage in out
      assert str(kept) in out
      assert kept.read_bytes() == content
    else:
      assert out == ''


def test_what_was_set_aside_stays(tmp_path):
  for number, content in enumerate((b'a', b'b'), 1):
    (tmp_path / 'metrics.csv').write_bytes(content)
    metrics.close(metrics.open_record(tmp_path, last_step=0))
    kept = tmp_path / f'metrics_damaged_{number}.csv'
    assert kept.read_bytes() == content


def test_the_file_is_on_the_disk_before_it_takes_the_place_of_the_old(
  record, monkeypatch
):
  done = []
  monkeypatch.setattr(os, 'fsync', lambda number: done.append('fsync'))
  replace = os.replace

  def follow(*names):
    done.append('replace')
    replace(*names)

  monkeypatch.setattr(os, 'replace', follow)
  metrics.add(record, row(1))
  assert done == ['fsync', 'replace']


# Stands for Weights & Biases.
FAKE = """
class Fake:
  def __init__(self, config, workdir):
    self.said = [config.name, workdir.name]
  def write_scalars(self, step, scalars):
    self.said.append((step, dict(scalars)))
  def close(self):
    self.said.append('closed')
"""


def test_a_writer_of_ones_own(tmp_path, monkeypatch):
  (tmp_path / 'my_fake_metrics.py').write_text(FAKE)
  monkeypatch.syspath_prepend(tmp_path)
  config = digits.get_config()
  assert metrics.make_writer(config, tmp_path) == []
  config.run.writer = 'my_fake_metrics:Fake'
  [fake] = metrics.make_writer(config, tmp_path)
  record = metrics.open_record(tmp_path, last_step=0, writers=[fake])
  metrics.add(record, row(20, loss=0.5))
  metrics.close(record)
  assert fake.said == [
    'digits', tmp_path.name, (20, {'epoch': 2.0, 'loss': 0.5}), 'closed'
  ]  # fmt: skip
  # It may write anywhere, so an error of its own is no fault of the folder.
  fake.write_scalars = lambda *_: Path('/no/such/file').read_text()
  with pytest.raises(FileNotFoundError):
    metrics.add(record, row(40, loss=0.4))
  config.run.writer = 'my_fake_metrics:Fack'
  with pytest.raises(
    ValueError, match=r'config\.run\.writer=my_fake_metrics:Fake'
  ):
    metrics.make_writer(config, tmp_path)


def test_the_writer_of_the_readme(tmp_path, monkeypatch):
  wandb = mock.Mock()
  monkeypatch.setitem(sys.modules, 'wandb', wandb)
  readme = Path(metrics.__file__).parents[1] / 'README.md'
  [block] = [
    block.partition('```')[0]
    for block in readme.read_text().split('```python\n')
    if block.startswith('import wandb')
  ]
  (tmp_path / 'my_wandb.py').write_text(block)
  monkeypatch.syspath_prepend(tmp_path)
  config = digits.get_config()
  config.run.writer = 'my_wandb:WandB'
  record = metrics.open_record(
    tmp_path, last_step=0, writers=metrics.make_writer(config, tmp_path)
  )
  metrics.add(record, row(20, loss=0.5))
  metrics.close(record)
  assert wandb.init.call_args.kwargs['id'] == tmp_path.name
  assert wandb.init.call_args.kwargs['config']['epochs'] == 30.0
  run = wandb.init.return_value
  run.log.assert_called_once_with({'epoch': 2.0, 'loss': 0.5}, step=20)
  run.finish.assert_called_once_with()
