"""The CSV over restarts, and the figure."""

import csv

import pytest

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
  record.writer.close()


def test_every_row_is_in_the_file_at_once(record):
  metrics.add(record, row(1, loss=0.5))
  assert read(record.path) == [{'step': '1', 'epoch': '0.1', 'loss': '0.5'}]
  metrics.add(record, row(2, loss=0.25, held_out_accuracy=1 / 3))
  first, second = read(record.path)
  assert first['held_out_accuracy'] == ''
  assert float(second['held_out_accuracy']) == pytest.approx(1 / 3, rel=1e-7)


def test_a_restart_drops_the_rows_after_its_checkpoint(record, tmp_path):
  for step in (2, 4, 6):
    metrics.add(record, row(step, loss=1 / step, skipped=0))
  resumed = metrics.open_record(tmp_path, last_step=4)
  metrics.add(resumed, row(6, loss=0.125, skipped=0))
  resumed.writer.close()
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
