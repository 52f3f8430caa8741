"""What a step costs, beside the plain step of the same run.

  python -m reference.benchmarks.cost
  python -m reference.benchmarks.cost --tpu=v3:2x2,v5e:2x2

The first lets every row of `steps.py` take turns on the devices that are here:
a ResNet-18 on images of 64 pixels on a CPU, and on a GPU a ResNet-50 on images
of 224 pixels in bfloat16. The second runs nothing: it compiles ResNet-50 for
TPUs and takes the compiler's account, which needs libtpu and some minutes for
each row; rows that the CSV has already are kept, so that it can be stopped.

Both print a table, and write `cost_HARDWARE.csv` and figures to `--out`. Times
are medians with quartiles, and ratios are those of calls of the same round.
FLOPs and memory are the compiler's, of one device. Here several devices share
the batch of one, as they share the machine; on TPUs each has as many images as
the one device of the other rows.
Where weight gradients cost more than the rest, as on a CPU, ConAdv is nearer to
2 plain steps than to 2.67, which is its arithmetic: its attack needs none.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from reference import command
from reference.benchmarks import figures, measure, schedule
from reference.benchmarks.measure import Figures, Net
from reference.benchmarks.steps import ROWS
from reference.tools import slices, tables

_NET = flags.DEFINE_enum(
  'net', None, list(measure.NETS), 'By default that of the hardware.'
)
_BATCH = flags.DEFINE_integer(
  'batch', None, "Images; by default the net's.", lower_bound=1
)
_ROUNDS = flags.DEFINE_integer(
  'rounds', 2, 'Timed calls of each order.', lower_bound=1
)
_ORDERS = flags.DEFINE_integer(
  'orders', 2, 'Orders of the arguments.', lower_bound=1
)
_TPU = flags.DEFINE_list('tpu', [], 'Slices to compile for, such as v3:2x2.')
_ROWS = command.define_names('rows', ROWS, 'Of the table, beside plain.')
_OUT = flags.DEFINE_string('out', 'runs/cost', 'Receives CSV and figures.')

# Of bfloat16, as the makers state it: https://docs.cloud.google.com/tpu/docs/v3
# for a chip of two cores, each a device; https://docs.cloud.google.com/tpu/docs
# /v5e; https://www.nvidia.com/en-us/data-center/h100 and h200, without
# sparsity; https://www.nvidia.com/en-us/data-center/a100.
PEAK_FLOPS = {
  'TPU v3': 123e12 / 2,
  'TPU v5 lite': 197e12,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
  'NVIDIA A100-SXM4-80GB': 312e12,
}
# Columns of which ratios are given.
COMPARED = (
  'seconds',
  'flops',
  'megacycles',
  'memory_bytes',
  'temporary_bytes',
  'compile_seconds',
)


def choose_net(default: str) -> Net:
  """The net of the flags, or that of the hardware."""
  net = measure.NETS[_NET.value or default]
  return net._replace(batch_size=_BATCH.value or net.batch_size)


def chosen_rows() -> list[str]:
  """The rows of the flag, after the one that they are compared with."""
  return list(dict.fromkeys(['plain', *_ROWS.value]))


def images_of(name: str, net: Net) -> int:
  """In the batch of a row, where that of the others is the net's."""
  return round(ROWS[name].share * net.batch_size)


def _count(name: str, compiled: jax.stages.Compiled) -> Figures:
  needs = measure.count(compiled)
  if ROWS[name].loops:
    del needs['flops']
  return needs


def run_here(net: Net) -> list[Figures]:
  """Measures every row for which there are enough devices."""
  devices = jax.devices()
  tasks = {
    name: measure.make_task(ROWS[name], net, devices)
    for name in chosen_rows()
    if np.prod(ROWS[name].mesh) <= len(devices)
  }
  programs = measure.compile_in_turns(tasks, _ORDERS.value)
  seconds = measure.run_in_turns(tasks, programs, _ROUNDS.value)
  results = []
  for name in tasks:
    compile_seconds = np.array([x.compile_seconds for x in programs[name]])
    results.append(
      {
        'row': name,
        **measure.spread('seconds', seconds[name]),
        **measure.spread('seconds_ratio', seconds[name] / seconds['plain']),
        **_count(name, programs[name][0].compiled),
        'compile_seconds': float(np.median(compile_seconds)),
      }
    )
    beside = ROWS[name].beside
    if beside != 'plain' and beside in tasks:
      pairs = seconds[name] / seconds[beside]
      results[-1] |= measure.spread('seconds_beside', pairs)
  complete(results, net, devices[0])
  return results


def estimate(net: Net, topology: str, path: Path) -> list[Figures]:
  """Compiles every row for a TPU, and saves it at once."""
  devices = slices.open_topology(topology)
  nets = {
    name: net._replace(batch_size=net.batch_size * math.prod(row.mesh))
    for name, row in ROWS.items()
  }
  images = {name: images_of(name, own) for name, own in nets.items()}
  known = tables.read_csv(path) if path.exists() else []
  about = {'net': net.name, 'jax': jax.__version__}
  done = {x['row']: x for x in known}
  for name, row in done.items():
    if (
      row['images'] != images.get(str(name)) or not about.items() <= row.items()
    ):
      raise command.Mistake(
        'All rows of a table are of one net, batch and JAX, as they are '
        f'compared. Given {path}, whose row {name!r} is of {row["net"]}, '
        f'{row["images"]:g} images and JAX {row["jax"]}, not of {net.name}, '
        f'{images.get(str(name))} and {jax.__version__}. Take another folder: '
        '`--out=/another/folder`.'
      )
  for name in chosen_rows():
    if name in done:
      continue
    task = measure.make_task(ROWS[name], nets[name], devices)
    program = measure.compile_task(task, seed=0)
    cost: Any = program.compiled.cost_analysis()
    roles = schedule.read(program.compiled.as_text() or '')
    seconds = cost['optimal_seconds']
    done[name] = {
      'row': name,
      'images': images[name],
      # Negative where the compiler has none, as for v5e.
      **({'seconds': seconds} if seconds > 0 and not ROWS[name].loops else {}),
      # A step is over when the last device is done.
      'megacycles': max(sum(x for _, x in role) for role in roles),
      **_count(name, program.compiled),
      'compile_seconds': program.compile_seconds,
      'schedule': schedule.to_text(roles),
    }
    results = [done[name] for name in ROWS if name in done]
    complete(results, net, devices[0])
    tables.write_csv(path, results)
    print(f'{name}: {done[name]["megacycles"]:.0f} Mcycles', flush=True)
  return [done[name] for name in ROWS if name in done]


def complete(results: Sequence[Figures], net: Net, device: Any) -> None:
  """Adds what follows from the other columns."""
  by_name: dict[Any, Any] = {x['row']: x for x in results}
  plain = by_name['plain']
  for name, row in by_name.items():
    row.setdefault('images', images_of(name, net))
    row['hardware'] = device.device_kind
    row['net'], row['jax'] = net.name, jax.__version__
    if 'seconds' in row:
      row['images_per_second'] = row['images'] / row['seconds']
    # A small program may need no memory of its own.
    columns = [x for x in COMPARED if x in row and plain.get(x)]
    for column in columns:
      row.setdefault(f'{column}_ratio', row[column] / plain[column])
    other = by_name.get(ROWS[name].beside)
    if other and other is not plain:
      for column in other.keys() & columns:
        row.setdefault(f'{column}_beside', row[column] / other[column])
    if {'seconds', 'flops'} <= row.keys() and device.device_kind in PEAK_FLOPS:
      peak = PEAK_FLOPS[device.device_kind]
      row['fraction_of_peak'] = row['flops'] / row['seconds'] / peak


def print_table(results: Sequence[Figures]) -> None:
  """Two tables in Markdown: beside the plain step, and beside each other."""
  rows: Sequence[dict[str, Any]] = results
  print(
    f'{rows[0]["net"]}, jax {rows[0]["jax"]}, {rows[0]["hardware"]}, batches '
    f'of {rows[0]["images"]:.0f} images\n'
  )
  tables.print_markdown(
    [
      {
        '': row['row'],
        'ms': measure.between(
          row, 'seconds', scale=1e3, digits=int(row.get('seconds', 1) < 0.1)
        ),
        '/ plain': measure.between(row, 'seconds_ratio', digits=2),
        'FLOPs / plain': measure.between(row, 'flops_ratio', digits=2),
        'Mcycles': measure.between(row, 'megacycles', digits=0),
        'Mcycles / plain': measure.between(row, 'megacycles_ratio', digits=2),
        'MiB': measure.between(row, 'memory_bytes', scale=2**-20, digits=0),
        'MiB / plain': measure.between(row, 'memory_bytes_ratio', digits=2),
        'compile, s': measure.between(row, 'compile_seconds', digits=1),
        'images/s': measure.between(row, 'images_per_second', digits=0),
        'of peak': measure.between(row, 'fraction_of_peak', digits=2),
      }
      for row in rows
    ]
  )
  print()
  tables.print_markdown(
    [
      {
        '': f'{row["row"]} / {ROWS[row["row"]].beside}',
        'time': measure.between(row, 'seconds_beside', digits=3),
        'FLOPs': measure.between(row, 'flops_beside', digits=3),
        'Mcycles': measure.between(row, 'megacycles_beside', digits=3),
        'memory': measure.between(row, 'memory_bytes_beside', digits=3),
        'compile': measure.between(row, 'compile_seconds_beside', digits=2),
      }
      for row in rows
      if 'compile_seconds_beside' in row
    ]
  )


def main() -> None:
  """Measures or compiles, prints, writes."""
  out = Path(_OUT.value)
  if not _TPU.value:
    jax.config.update('jax_num_cpu_devices', 4)
    kind = jax.default_backend()
    results = run_here(choose_net('resnet18' if kind == 'cpu' else 'resnet50'))
    tables.write_csv(out / f'cost_{kind}.csv', results)
    print_table(results)
    figures.draw_cost(out / f'cost_{kind}', results)
  for topology in _TPU.value:
    # Else JAX would look for the TPU whose compiler it finds.
    jax.config.update('jax_platforms', 'cpu')
    name = f'cost_{topology.replace(":", "_")}'
    # The share of a core in the largest published run, and of a chip.
    net = choose_net('resnet50')._replace(batch_size=_BATCH.value or 96)
    results = estimate(net, topology, out / f'{name}.csv')
    print_table(results)
    figures.draw_cost(out / name, results)
    figures.draw_schedule(out / name.replace('cost', 'schedule'), results)


if __name__ == '__main__':
  command.run(main)
