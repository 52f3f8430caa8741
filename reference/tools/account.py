"""The compiler's account of a training step on a TPU slice."""

import csv
import hashlib
import importlib
import json
import math
import re
from pathlib import Path
from typing import NamedTuple

import jax
import ml_collections
from jax.sharding import Mesh

from reference.command import Mistake
from reference.configs import imagenet
from reference.run import checks, hosts, methods, parts
from reference.tools import slices

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


def compile_step(
  config: ml_collections.ConfigDict, mesh: Mesh
) -> jax.stages.Compiled:
  """The training step on ImageNet, compiled for the devices of a mesh.

  Raises:
    Mistake: when the compiler finds that it does not fit.
  """
  model = parts.make_model(config, num_classes=imagenet.CLASSES)
  tx, schedule, _ = parts.make_optimizer(
    config,
    images=imagenet.TRAIN_IMAGES,
    groups=methods.groups(config, mesh),
  )
  grad_fn = methods.make_gradient(model, config, mesh)
  state = parts.describe_state(config, model, tx, grad_fn, mesh)
  try:
    return parts.make_step(config, tx, schedule, grad_fn, state, mesh)
  except jax.errors.JaxRuntimeError as error:
    if 'RESOURCE_EXHAUSTED' not in str(error):
      raise
    raise Mistake(
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


def read(compiled: jax.stages.Compiled) -> Account:
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
  limit = slices.HBM_GIB[kind]
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


def print_step(config: ml_collections.ConfigDict, topology: str) -> None:
  """Compiles the step of a config and prints its account.

  Raises:
    Mistake: for a config or a slice that cannot be, or do not fit.
  """
  checks.check_choices(config)
  checks.check_numbers(config)
  mesh = slices.make_mesh(topology, config.batch_size)
  checks.check_batch(config.batch_size, mesh.size, accumulate=config.accumulate)
  checks.check_on(config, mesh)
  print_account(config, topology, mesh, read(compile_step(config, mesh)))


def _software() -> str:
  """Tells one compiler and code from another."""
  software = json.dumps(hosts.software())
  return hashlib.sha256(software.encode()).hexdigest()[:12]


def table_row(
  config: ml_collections.ConfigDict, topology: str, mesh: Mesh, needs: Account
) -> dict[str, str]:
  """The account of a step as a line of the table, by column."""
  limit = slices.HBM_GIB[mesh.devices.flat[0].device_kind]
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
      mesh = slices.make_mesh(topology, batch_size)
      needs = read(compile_step(config, mesh))
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
