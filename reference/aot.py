"""What a step needs on a TPU slice, without one: `python -m reference.aot`.

  python -m reference.aot --config=reference/configs/imagenet_96k.py \
    --config.method=conadv --topology=v3:16x32

compiles the training step on ImageNet, the very one of `reference.main`, for
devices that are not there, and prints the compiler's account of it for one of
them: memory by kind, and whether it fits; FLOPs, time and collectives. Nothing
is run, so that every figure is an estimate, and the compiler's. ResNet-50 takes
some minutes on two cores, and `--all`, which prints the table of the README,
more than an hour; started again, it goes on after the last row in `--table`.

It needs libtpu, which holds the compiler: `pip install '.[reference,tpu]'`.
"""

import csv
import hashlib
import importlib
import importlib.util
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import numpy as np
from absl import app, flags
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh
from ml_collections import config_flags

from reference import checks, hosts, methods, train
from reference.configs import imagenet

_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'The config file; --config.FIELD=VALUE overrides a field.'
)
_TOPOLOGY = flags.DEFINE_string(
  'topology',
  'v3:16x32',
  'The slice, GENERATION:CHIPSxCHIPS, or CHIPSxCHIPSxCHIPS for v4 and v5p.',
)
_ALL = flags.DEFINE_bool('all', False, 'Print the table of the README instead.')
_TABLE = flags.DEFINE_string(
  'table', 'runs/aot/table.csv', 'With --all, receives the rows and keeps them.'
)

# Config, method, batch and slice of programs that differ in more than the
# numbers they compute with: `autoaugment` has that of `vanilla`.
_RUNS = (
  ('imagenet_96k', 'vanilla', 98_304, 'v3:16x32'),
  ('imagenet_96k', 'advprop', 98_304, 'v3:16x32'),
  ('imagenet_96k', 'conadv', 98_304, 'v3:16x32'),
  ('imagenet_96k', 'conadv_reuse', 98_304, 'v3:16x32'),
  ('imagenet_96k', 'conadv_autoaugment', 98_304, 'v3:16x32'),
  # Other slices.
  ('imagenet_96k', 'conadv', 98_304, 'v3:8x16'),
  ('imagenet_96k', 'conadv', 98_304, 'v4:4x8x8'),
  ('imagenet_96k', 'conadv', 98_304, 'v5e:16x16'),
  ('imagenet_96k', 'conadv', 98_304, 'v5p:4x4x8'),
  # The same share of a core on fewer and on more of them.
  ('imagenet_96k', 'conadv', 768, 'v3:2x2'),
  ('imagenet_96k', 'conadv', 196_608, 'v3:32x32'),
  # The smaller batches, each on its pod: 64 images on each core.
  ('imagenet_4k', 'conadv', 4_096, 'v3:4x8'),
  ('imagenet_8k', 'conadv', 8_192, 'v3:8x8'),
  ('imagenet_16k', 'conadv', 16_384, 'v3:8x16'),
  ('imagenet_32k', 'conadv', 32_768, 'v3:16x16'),
  ('imagenet_64k', 'conadv', 65_536, 'v3:16x32'),
)

_GIB = 2**30
# What the compiler lets a program have, by its own error for one too large. Of
# v3 a device is a core, with half of a chip's 32 GiB of HBM; of the others it
# is a chip, with 32 GiB, 16 GB, 95 GB and 32 GB:
# https://docs.cloud.google.com/tpu/docs/v3, and v4, v5e, v5p, v6e.
HBM_GIB = {
  'TPU v3': 15.48,
  'TPU v4': 30.75,
  'TPU v5 lite': 15.75,
  'TPU v5': 95.74,
  'TPU v6 lite': 31.25,
}
_ARRAY = re.compile(r'\b(pred|[a-z]+\d+)\w*\[([\d,]*)\]')
# An asynchronous one is told by its end, whose type is that of the result.
_COLLECTIVE = re.compile(
  r'^\s*(?:ROOT )?\S+ = (.+?) (all-reduce|all-gather|reduce-scatter|all-to-all|'
  r'collective-permute)(?:-done)?\(',
  re.MULTILINE,
)


class Account(NamedTuple):
  """The compiler's account of a step, for one device.

  Attributes:
    arguments: bytes of the state and the device's share of the batch.
    outputs: bytes of the next state and the metrics.
    aliased: bytes of the outputs that lie where arguments lay.
    temporaries: bytes of what lives within the step, activations most of all.
    code: bytes of the program.
    host: bytes in the memory of the host, where `queue_memory=host` has the
      waiting images.
    flops: floating point operations.
    seconds: estimated; None where the compiler has no estimate, as for v4.
    collectives: how many of a kind, and the bytes of their results.
  """

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int
  host: int
  flops: float
  seconds: float | None
  collectives: dict[str, tuple[int, int]]

  @property
  def memory(self) -> int:
    """Bytes of the device in all."""
    new_outputs = self.outputs - self.aliased
    return self.arguments + new_outputs + self.temporaries + self.code


def open_topology(name: str) -> list[jax.Device]:
  """The devices of a slice, none of which need be there.

  Args:
    name: of the slice, 'v3:16x32' for 16 x 32 chips of two cores.

  Raises:
    ImportError: without libtpu.
    ValueError: for a slice that does not exist.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      'The compiler for TPUs is in libtpu, which is not installed. Run `pip '
      "install '.[reference,tpu]'`."
    )
  # No question to a metadata server that only TPU hosts have; and another
  # process may compile too, as no device is taken.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  # JAX drives a v4 chip as one device, and a v3 chip as two.
  options: dict[str, Any] = {}
  if name.startswith('v4'):
    options['chip_config_name'] = 'megacore'
  if set(name.partition(':')[2].split('x')) == {'1'}:
    # A chip alone is not a part of a host's four.
    options['chips_per_host_bounds'] = (1, 1, 1)
  examples = (
    'Take for example --topology=v3:2x2 (4 chips, 8 cores), v3:16x32 (512 '
    'chips, 1,024 cores), v4:4x8x8, v5e:1x1, v5e:16x16, v5p:4x4x8 or v6e:16x16.'
  )
  try:
    devices: Sequence[Any] = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(
      '`topology` must name a slice by its generation and its chips along each '
      f'axis. Given {name!r}: {error}. {examples}'
    ) from error
  kind = devices[0].device_kind
  if kind not in HBM_GIB:
    raise ValueError(
      '`topology` must be of a kind whose memory is known here, '
      f'{", ".join(HBM_GIB)}. Given {name!r}, of {kind}. {examples}'
    )
  return list(devices)


def make_mesh(topology: str, batch_size: int) -> Mesh:
  """The devices of a slice along one axis, as `train.make_mesh`.

  Raises:
    ValueError: when the batch does not divide evenly over them.
  """
  devices = open_topology(topology)
  if batch_size % len(devices):
    nearest = max(1, round(batch_size / len(devices))) * len(devices)
    raise ValueError(
      'Every device takes the same share of a batch, so `batch_size` must be a '
      f'multiple of the number of devices. Given {batch_size} on the '
      f'{len(devices)} devices of {topology}. Take another slice, or the '
      f'nearest batch: `--config.batch_size={nearest}`.'
    )
  return Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))


def compile_step(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> jax.stages.Compiled:
  """The training step on ImageNet, compiled for the devices of a mesh.

  Raises:
    ValueError: when the compiler finds that it does not fit.
  """
  model = train.make_model(config, num_classes=imagenet.CLASSES)
  tx, schedule, _ = train.make_optimizer(config, images=imagenet.TRAIN_IMAGES)
  grad_fn = methods.make_gradient(model, config, mesh)
  state = train.describe_state(config, model, tx, grad_fn, mesh)
  try:
    return train.make_step(config, tx, schedule, grad_fn, state, mesh)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise ValueError(
      'The step must fit into the memory of a device, and '
      f'{config.batch_size // mesh.size} images on each of {mesh.size} do not: '
      f'{str(error).splitlines()[0]} Take a larger slice, `--topology=`, or '
      'fewer images, `--config.batch_size=`.'
    ) from error


def count_collectives(text: str) -> dict[str, tuple[int, int]]:
  """Number of a compiled program's collectives and bytes of their results.

  Args:
    text: the program in HLO.

  Returns:
    The two by kind, as HLO names it.
  """
  counts: dict[str, tuple[int, int]] = {}
  for result, kind in _COLLECTIVE.findall(text):
    size = 0
    for dtype, shape in _ARRAY.findall(result):
      bits = 8 if dtype == 'pred' else int(re.sub(r'\D', '', dtype))
      size += math.prod(int(n) for n in shape.split(',') if n) * bits // 8
    count, total = counts.get(kind, (0, 0))
    counts[kind] = count + 1, total + size
  return counts


def account(compiled: jax.stages.Compiled) -> Account:
  """The compiler's account of a compiled step."""
  memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
  text = compiled.as_text()
  # Other compilers may give less than TPU's.
  assert memory is not None
  assert cost is not None
  assert text is not None
  # What it has no estimate of is negative.
  seconds = cost['optimal_seconds']
  return Account(
    arguments=memory.argument_size_in_bytes,
    outputs=memory.output_size_in_bytes,
    aliased=memory.alias_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    code=memory.generated_code_size_in_bytes,
    host=memory.host_argument_size_in_bytes
    + memory.host_output_size_in_bytes
    - memory.host_alias_size_in_bytes
    + memory.host_temp_size_in_bytes,
    flops=cost['flops'],
    seconds=seconds if seconds > 0 else None,
    collectives=count_collectives(text),
  )


def print_account(
  config: ml_collections.ConfigDict, topology: str, mesh: Mesh, needs: Account
) -> None:
  """Prints the account of a step line by line."""
  kind = mesh.devices.flat[0].device_kind
  share = config.batch_size // mesh.size
  print(
    f'{config.name}, {config.method}, on {topology}: {config.batch_size:,} '
    f'images a step, {share} on each of {mesh.size:,} devices ({kind}).\n'
    'The compiler estimates for each of them; nothing was run:'
  )
  for name, size in (
    ('arguments', needs.arguments),
    ('outputs', needs.outputs),
    ('aliased', needs.aliased),
    ('temporaries', needs.temporaries),
    ('code', needs.code),
    ('in all', needs.memory),
    ('on the host', needs.host),
  ):
    print(f'  {name:<18}{size:>16,} bytes {size / _GIB:>8.3f} GiB')
  limit = HBM_GIB[kind]
  verdict = 'fits' if needs.memory <= limit * _GIB else 'does not fit'
  print(f'  {verdict} into the {limit} GiB that a program may have')
  # The compiler counts the body of a loop once, however often it runs.
  of_one = ' of one micro-batch' if config.accumulate > 1 else ''
  print(f'  {"FLOPs":<18}{needs.flops:>16,.0f}{of_one}')
  for name, (count, size) in needs.collectives.items():
    print(f'  {name:<18}{size:>16,} bytes in {count}')
  if needs.seconds is None or of_one:
    print(f'  {"a step":<18}{"no estimate of its seconds":>16}')
  else:
    rate = config.batch_size / needs.seconds
    print(
      f'  {"a step":<18}{needs.seconds:>16.4f} seconds, {rate:,.0f} images/s '
      'on the slice'
    )


def _software() -> str:
  """Tells one compiler and code from another."""
  software = json.dumps(hosts.software())
  return hashlib.sha256(software.encode()).hexdigest()[:12]


def table_row(
  config: ml_collections.ConfigDict, topology: str, mesh: Mesh, needs: Account
) -> dict[str, str]:
  """The account of a step as a line of the table, by column."""
  limit = HBM_GIB[mesh.devices.flat[0].device_kind]
  reduced = needs.collectives.get('all-reduce', (0, 0))[1]
  seconds = rate = ''
  if needs.seconds is not None:
    seconds = f'{needs.seconds:.3f}'
    rate = f'{config.batch_size / needs.seconds:,.0f}'
  return {
    'method': f'`{config.method}`',
    'batch': f'{config.batch_size:,}',
    'slice': f'`{topology}`',
    'devices': f'{mesh.size:,}',
    'images each': f'{config.batch_size // mesh.size:,}',
    'arguments, GiB': f'{needs.arguments / _GIB:.2f}',
    'temporaries, GiB': f'{needs.temporaries / _GIB:.2f}',
    'in all, GiB': f'{needs.memory / _GIB:.2f} of {limit}',
    'TFLOPs': f'{needs.flops / 1e12:.2f}',
    'all-reduced, MB': f'{reduced / 1e6:.0f}',
    's a step': seconds,
    'images/s': rate,
  }


def print_table(path: Path) -> None:
  """Compiles the runs of the README and prints its table, row by row.

  Args:
    path: of a CSV that receives every row at once; rows that it has already,
      of this code and compiler, are printed as they are.
  """
  known, software = {}, _software()
  if path.exists():
    with path.open(newline='') as file:
      known = {tuple(x.values())[:3]: x for x in csv.DictReader(file)}
  path.parent.mkdir(parents=True, exist_ok=True)
  for index, (name, method, batch_size, topology) in enumerate(_RUNS):
    row = known.get((f'`{method}`', f'{batch_size:,}', f'`{topology}`'))
    if row is None or row.get('software') != software:
      module = importlib.import_module(f'reference.configs.{name}')
      config = module.get_config()
      config.update({'method': method, 'batch_size': batch_size})
      mesh = make_mesh(topology, batch_size)
      needs = account(compile_step(config, mesh))
      # Gigabytes for each program.
      jax.clear_caches()
      row = table_row(config, topology, mesh, needs) | {'software': software}
      is_new = not path.exists()
      with path.open('a', newline='') as file:
        writer = csv.DictWriter(file, list(row))
        if is_new:
          writer.writeheader()
        writer.writerow(row)
    cells = {name: cell for name, cell in row.items() if name != 'software'}
    if index == 0:
      print(f'| {" | ".join(cells)} |\n|{"---|" * len(cells)}')
    print(f'| {" | ".join(cells.values())} |', flush=True)


def main(argv: Sequence[str]) -> None:
  """Compiles and prints."""
  if len(argv) > 1:
    raise app.UsageError(f'Everything is a flag; given {argv[1:]}.')
  # Else JAX would look for the TPU whose compiler it finds.
  jax.config.update('jax_platforms', 'cpu')
  if _ALL.value:
    print_table(Path(_TABLE.value))
    return
  config, topology = _CONFIG.value, _TOPOLOGY.value
  if config is None:
    raise app.UsageError(
      'Say what to compile: `--config=reference/configs/imagenet_96k.py`, or '
      '`--all`.'
    )
  checks.check_choices(config)
  checks.check_numbers(config)
  mesh = make_mesh(topology, config.batch_size)
  checks.check_batch(config.batch_size, mesh.size, accumulate=config.accumulate)
  checks.check_groups(config, mesh)
  checks.check_queue(config, mesh)
  print_account(config, topology, mesh, account(compile_step(config, mesh)))


if __name__ == '__main__':
  app.run(main)
