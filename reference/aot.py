"""What a step needs on a TPU slice, without one: `python -m reference.aot`.

  python -m reference.aot --config=reference/configs/imagenet_96k.py \\
    --config.method=conadv --topology=v3:16x32

compiles the training step on ImageNet, the very one of `reference.main`, for
devices that are not there, and prints the compiler's account of it for one of
them: memory by kind, and whether it fits; FLOPs, time and collectives. Nothing
is run, so that every figure is an estimate, and the compiler's. ResNet-50 takes
some minutes on two cores, and `--all`, which prints the table of the README,
more than an hour; started again, it goes on after the last row in `--table`.

It needs libtpu, which holds the compiler: `pip install '.[reference,tpu]'`.
"""

from pathlib import Path

import jax
from absl import flags

from reference import command
from reference.tools import account

_CONFIG = command.define_config(None)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  'v3:16x32',
  'The slice, GENERATION:CHIPSxCHIPS, or CHIPSxCHIPSxCHIPS for v4 and v5p.',
)
_ALL = flags.DEFINE_bool('all', False, 'Print the table of the README instead.')
_TABLE = flags.DEFINE_string(
  'table', 'runs/aot/table.csv', 'With --all, receives the rows and keeps them.'
)


def main() -> None:
  """Compiles and prints."""
  # Else JAX would look for the TPU whose compiler it finds.
  jax.config.update('jax_platforms', 'cpu')
  if _ALL.value:
    account.print_table(Path(_TABLE.value))
    return
  if _CONFIG.value is None:
    raise command.Mistake(
      'Say what to compile: `--config=reference/configs/imagenet_96k.py`, or '
      '`--all`.'
    )
  account.print_step(_CONFIG.value, _TOPOLOGY.value)


if __name__ == '__main__':
  command.run(main)
