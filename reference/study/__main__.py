"""Does it help? A grid of methods, batch sizes and seeds.

    python -m reference.study --workdir=runs/study \\
      --config=reference/configs/study_fashion_mnist.py
    python -m reference.study.report --csv=runs/study/study.csv --out=runs/study

After a stop or a kill the same command goes on.
"""

import sys
from pathlib import Path

from absl import flags

from reference import command
from reference.study import grid

_CONFIG = command.define_config(
  Path(__file__).parents[1] / 'configs' / 'study_fashion_mnist.py'
)
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Receives study.csv. By default runs/NAME.'
)


def main() -> None:
  """Parses nothing but the flags."""
  command = ' '.join(['python -m reference.study', *sys.argv[1:]])
  workdir = Path(_WORKDIR.value or f'runs/{_CONFIG.value.name}')
  grid.run(_CONFIG.value, workdir, command=command)
  print(
    f'All cells are done: {workdir}/study.csv. Tables and figures: `python -m '
    f'reference.study.report --csv={workdir}/study.csv --out={workdir}`.'
  )


if __name__ == '__main__':
  command.run(main)
