"""Which steps a row of the record is the mean of."""

import types

import numpy as np
import pytest

from reference.configs import digits
from reference.run import loop, metrics


def test_a_row_has_the_means_over_the_steps_since_the_row_before(tmp_path):
  config = digits.get_config()
  config.epochs = 10.0
  config.run.log_every = 3
  config.run.evaluate_every = config.run.checkpoint_every = 1000
  losses = [8.0, 4.0, 3.0, 2.0, 1.0]
  record = metrics.open_record(tmp_path, last_step=0)

  def step_after(done):
    values = {'loss': losses[done], 'noise_scale': 10.0 * losses[done]}
    if done % 2 == 0:
      values['loss_adversarial'] = losses[done]
    return lambda state, batch: (state, values)

  done = loop.run_steps(
    config,
    types.SimpleNamespace(step=np.int32(0)),
    steps=5,
    step_after=step_after,
    next_batch=dict,
    evaluation=lambda state: {'held_out_accuracy': 1.0},
    after_step=None,
    save=lambda state: None,
    stop=lambda done: False,
    record=record,
    skipped={},
    changes=0,
    workdir=tmp_path,
  )
  metrics.close(record)
  assert done == 5
  rows, _ = metrics.read_rows(record.path)
  shown = ('step', 'epoch', 'loss', 'loss_adversarial', 'noise_scale')
  assert [[row[name] for name in shown] for row in rows] == [
    # The second step has no adversarial loss. An average of its own, the noise
    # scale, is that of the last step.
    pytest.approx([3, 6, 5, 5.5, 30]),
    pytest.approx([5, 10, 1.5, 1, 10]),
  ]
