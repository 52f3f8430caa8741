"""How the cost of a step grows with batch, staleness and devices.

  python -m reference.benchmarks.growth

The points of all sweeps take turns, on a CPU; every ratio is to the first point
of its sweep and row, in the same round. The batch is the same for every number
of devices, which share it, and the CPU's cores too: time that grows there is
what the program on several devices does more than that on one. Printed and
saved as `growth.csv` and a figure in `--out`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

import conadv_optax as conadv
from reference import command
from reference.benchmarks import figures, measure
from reference.benchmarks.by_hand import plain
from reference.benchmarks.measure import Figures, Net
from reference.benchmarks.steps import Row, library
from reference.tools import tables

_NET = flags.DEFINE_enum('net', 'resnet18', list(measure.NETS), 'The model.')
_ROUNDS = flags.DEFINE_integer(
  'rounds', 3, 'Timed calls of each order.', lower_bound=1
)
_ORDERS = flags.DEFINE_integer(
  'orders', 1, 'Orders of the arguments.', lower_bound=1
)
_BATCH = flags.DEFINE_integer(
  'batch', 8, 'Images, where they do not vary.', lower_bound=1
)
_SWEEPS = command.define_names(
  'sweeps', ['batch', 'staleness', 'devices'], 'Which are measured.'
)
_OUT = flags.DEFINE_string('out', 'runs/growth', 'Receives CSV and figures.')

CONADV = Row(library(staleness=1))
# Of each sweep and row: the point's size, its row, and its number of images
# where this is not that of the flag.
Point = tuple[int, Row, int | None]
SWEEPS: dict[tuple[str, str], list[Point]] = {
  **{
    ('batch', name): [(size, row, size) for size in (4, 8, 16, 32)]
    for name, row in {'plain': Row(plain), 'ConAdv': CONADV}.items()
  },
  ('staleness', 'ConAdv'): [
    (tau, Row(library(staleness=tau)), None) for tau in (1, 2, 4, 8)
  ],
  ('staleness', 'reuse'): [
    (tau, Row(library(staleness=tau, reuse_gradient=True)), None)
    for tau in (1, 2, 4, 8)
  ],
  ('devices', 'ConAdv'): [
    (n, Row(library(conadv.data_parallel), mesh=(n, 1)), None)
    for n in (1, 2, 4, 8)
  ],
}


def run(
  net: Net, names: Sequence[str], *, rounds: int, orders: int
) -> list[Figures]:
  """Measures every point of the sweeps of these names."""
  sweeps = {sweep: x for sweep, x in SWEEPS.items() if sweep[0] in names}
  tasks = {}
  for sweep, points in sweeps.items():
    for size, row, images in points:
      own = net._replace(batch_size=images or net.batch_size)
      tasks[str((*sweep, size))] = measure.make_task(row, own, jax.devices())
  programs = measure.compile_in_turns(tasks, orders)
  seconds = measure.run_in_turns(tasks, programs, rounds)
  results: list[Figures] = []
  for sweep, points in sweeps.items():
    keys = [str((*sweep, size)) for size, _, _ in points]
    base: Any = None
    for (size, _, _), key in zip(points, keys, strict=True):
      needs: Any = measure.count(programs[key][0].compiled)
      base = base or needs
      results.append(
        {
          'sweep': sweep[0],
          'row': sweep[1],
          'size': size,
          **measure.spread('seconds', seconds[key]),
          **measure.spread('seconds_ratio', seconds[key] / seconds[keys[0]]),
          **needs,
          'flops_ratio': needs['flops'] / base['flops'],
          'memory_bytes_ratio': needs['memory_bytes'] / base['memory_bytes'],
          'compile_seconds': float(
            np.median([x.compile_seconds for x in programs[key]])
          ),
          'jax': jax.__version__,
        }
      )
  return results


def print_table(results: Sequence[Figures]) -> None:
  """The table, in Markdown."""
  tables.print_markdown(
    [
      {
        'varied': str(row['sweep']),
        'row': str(row['row']),
        'to': f'{row["size"]}',
        'ms': measure.between(row, 'seconds', scale=1e3, digits=0),
        '/ first': measure.between(row, 'seconds_ratio', digits=2),
        'FLOPs / first': measure.between(row, 'flops_ratio', digits=2),
        'MiB': measure.between(row, 'memory_bytes', scale=2**-20, digits=0),
        'MiB / first': measure.between(row, 'memory_bytes_ratio', digits=2),
      }
      for row in results
    ]
  )


def main() -> None:
  """Measures, prints, writes."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_num_cpu_devices', 8)
  net = measure.NETS[_NET.value]._replace(batch_size=_BATCH.value)
  results = run(net, _SWEEPS.value, rounds=_ROUNDS.value, orders=_ORDERS.value)
  out = Path(_OUT.value)
  tables.write_csv(out / 'growth.csv', results)
  print_table(results)
  figures.draw_growth(out / 'growth', results)


if __name__ == '__main__':
  command.run(main)
