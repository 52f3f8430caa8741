"""A bar on a terminal, and no bar in a log."""

import io
import sys

from reference.run import progress

ROW = {
  'step': 20.0,
  'epoch': 2.0,
  'loss_main': 0.5,
  'held_out_accuracy': 0.9725,
  'images_per_second': 1234.56,
}


class Terminal(io.StringIO):
  def isatty(self):
    return True


def shown(monkeypatch, out, err):
  monkeypatch.setattr(sys, 'stdout', out)
  monkeypatch.setattr(sys, 'stderr', err)
  with progress.make_bar(done=10, steps=30, batch_size=8) as bar:
    bar.update(80)
    progress.tell(bar, ROW, steps=30)
  return out.getvalue(), err.getvalue()


def test_a_terminal_has_a_bar(monkeypatch):
  out, err = shown(monkeypatch, Terminal(), Terminal())
  assert out.strip().startswith('step 20, epoch 2.0, clean loss 0.500')
  assert 'left' not in out
  assert '160/240' in err
  assert 'clean loss 0.500' in err


def test_a_log_has_a_line_with_what_is_left(monkeypatch):
  for out, err in ((io.StringIO(), Terminal()), (Terminal(), io.StringIO())):
    said, bar = shown(monkeypatch, out, err)
    assert bar == ''
    assert said.endswith(
      ' step 20, epoch 2.0, clean loss 0.500, held-out accuracy 97.25%, '
      '10 steps left, 1235 images/s\n'
    )
