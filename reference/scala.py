"""Text at a large batch, noise at its embedding: `python -m reference.scala`.

A small transformer learns which module of Python's library a line is from. It
is trained by LAMB, with noise and without, in the manner of ScaLA: the noise is
light, takes one step of ascent, and sets in after a part of the run.

References:
  Zhang et al., `ScaLA: Accelerating Adaptation of Pre-Trained Transformer-Based
  Language Models via Efficient Large-Batch Adversarial Noise
  <https://arxiv.org/abs/2201.12469>`_, 2022
"""

from absl import flags

from reference import command
from reference.study import text

_BATCH = flags.DEFINE_integer(
  'batch_size', 1024, 'Lines a step.', lower_bound=1
)
_EPOCHS = flags.DEFINE_integer(
  'epochs', 15, 'Passes over the lines.', lower_bound=1
)
_RATE = flags.DEFINE_float('rate', 0.02, "LAMB's peak.")
_EPSILON = flags.DEFINE_multi_float(
  'epsilon',
  [0.0, 0.5],
  'Radius of the noise of a line, in units of the embedding; 0 is no noise.',
  lower_bound=0.0,
)
_START = flags.DEFINE_float(
  'start',
  0.3,
  'The share of the run before the noise sets in.',
  lower_bound=0.0,
  upper_bound=1.0,
)
_ASCENT = flags.DEFINE_bool(
  'ascent', True, 'Whether the noise climbs the loss; else it is drawn.'
)
_SEEDS = flags.DEFINE_integer(
  'seeds', 3, 'How many runs of each.', lower_bound=1
)


def main(argv: list[str]) -> None:
  """Prints a row for each epsilon."""
  del argv
  run = text.Run(
    _BATCH.value, _EPOCHS.value, _RATE.value, _START.value, _ASCENT.value
  )
  print('| epsilon | loss, trained on | loss, held out | accuracy, held out |')
  print('|---|---|---|---|')
  for epsilon in _EPSILON.value:
    print(text.row_of(run, epsilon=epsilon, seeds=_SEEDS.value), flush=True)


if __name__ == '__main__':
  command.run(main)
