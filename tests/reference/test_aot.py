"""The compiler's account of a step, against counts by hand."""

import json
import re
import types

import forked_commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from digit_steps import Small
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference.configs import imagenet_96k
from reference.run import methods, parts
from reference.tools import account, slices

SHARE = 256
CORES = 8


def number(name, text):
  [found] = re.findall(rf'^  {name} +([\d,.]+)', text, re.MULTILINE)
  return float(found.replace(',', ''))


@pytest.mark.slow
def test_a_small_step_on_v3_is_counted_right():
  result = forked_commands.run(
    '-m',
    'reference.aot',
    '--topology=v3:2x2',
    '--config=reference/configs/imagenet_96k.py',
    # As the compiler takes longer the more there is to compute.
    '--config.model.stem=small',
    '--config.model.stage_sizes=(1,)',
    '--config.model.block=plain',
    '--config.model.filters=8',
    '--config.data.size=16',
    f'--config.batch_size={SHARE * CORES}',
  )
  assert result.returncode == 0, result.stderr
  out = result.stdout
  assert '2,048 images a step, 256 on each of 8 devices (TPU v3)' in out
  assert 'fits into the 15.48 GiB' in out

  # 3x3 from 3 channels and from 8; 1,000 classes.
  weights = 9 * 3 * 8 + 9 * 8 * 8 + 9 * 1000
  channels = 8 + 8
  # Scale and bias, mean and variance, for each of two branches.
  params, stats = weights + 2 * 2 * channels, 2 * 2 * channels
  # With three losses and two counts of right answers.
  assert number('all-reduce', out) == 4 * (params + stats + 3 + 2)

  image = 16 * 16 * 3
  # The waiting image is uint8, and its adversarial copy float32.
  queue = SHARE * (image + 4 * image + 4)
  state = 4 * (2 * params + stats) + queue
  batch = SHARE * (image + 4)
  # The compiler pads small arrays.
  assert state + batch <= number('arguments', out) < 1.2 * (state + batch)
  assert state <= number('aliased', out) < 1.2 * state
  assert number('aliased', out) <= number('outputs', out) < 1.2 * state
  assert number('in all', out) == (
    number('arguments', out)
    + number('outputs', out)
    - number('aliased', out)
    + number('temporaries', out)
    + number('code', out)
  )

  # An image's multiply-adds in a forward pass.
  stem = 16 * 16 * 9 * 3 * 8
  rest = 16 * 16 * 9 * 8 * 8 + 8 * 1000
  # Three passes and their input gradients, two weight gradients; training
  # needs no gradient of the image.
  by_hand = 2 * SHARE * (8 * rest + 6 * stem)
  assert by_hand < number('FLOPs', out) < 1.5 * by_hand


SCRIPT = """
import json, re
import jax, jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec as P
from reference.tools import slices

jax.config.update('jax_platforms', 'cpu')
errors = []
given = ('v3:2x2', 700), ('v12:2x2', 8), ('v3:2x3', 8), ('v2:2x2', 8)
for topology, batch_size in given:
  try:
    slices.make_mesh(topology, batch_size)
  except ValueError as error:
    errors.append(str(error))
memory = {}
for topology in ('v3:2x2', 'v4:2x2x1', 'v5e:2x2', 'v5p:2x2x1', 'v6e:2x2'):
  mesh = slices.make_mesh(topology, 8)
  x = jax.ShapeDtypeStruct((2**20, 2**18), jnp.float32,
                           sharding=NamedSharding(mesh, P('data')))
  try:
    jax.jit(lambda x: x + 1).lower(x).compile()
  except jax.errors.JaxRuntimeError as error:
    kind = mesh.devices.flat[0].device_kind
    limit = re.search(r'available HBM \\(([\\d.]+)G\\)', str(error))[1]
    memory[kind] = mesh.size, float(limit)
chips = 'v3:1x1', 'v4:1x1x1', 'v5e:1x1', 'v5p:1x1x1', 'v6e:1x1'
alone = [slices.make_mesh(chip, 2).size for chip in chips]
print(json.dumps([errors, memory, alone]))
"""


@pytest.mark.slow
def test_slices_that_cannot_be_and_the_memory_of_those_that_can():
  result = forked_commands.run('-c', SCRIPT)
  assert result.returncode == 0, result.stderr
  errors, memory, alone = json.loads(result.stdout)
  indivisible, generation, shape, old = errors
  assert '700 on the 8 devices of v3:2x2' in indivisible
  assert '--config.batch_size=704' in indivisible
  for message, given in (
    (generation, 'v12:2x2'),
    (shape, 'v3:2x3'),
    (old, 'v2:2x2'),
  ):
    assert f'Given {given!r}' in message
    assert '--topology=v3:2x2' in message
  # A v3 chip is two devices, a chip of the others one.
  assert {kind: devices for kind, (devices, _) in memory.items()} == {
    kind: 8 if kind == 'TPU v3' else 4 for kind in slices.HBM_GIB
  }
  assert alone == [2, 1, 1, 1, 1]
  # A hundredth is what versions of the compiler differ by.
  for kind, (_, limit) in memory.items():
    assert slices.HBM_GIB[kind] == pytest.approx(limit, abs=0.015)


def test_without_libtpu_it_says_how_to_get_it(monkeypatch):
  monkeypatch.setattr(slices.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(ImportError, match=r"pip install '\.\[reference,tpu\]'"):
    slices.make_mesh('v3:2x2', 8)


def small(method):
  config = imagenet_96k.get_config()
  config.update_from_flattened_dict(
    {
      'method': method,
      'staleness': 2,
      'batch_size': 16,
      'data.size': 8,
    }
  )
  return config


@pytest.mark.slow
@pytest.mark.parametrize(
  'method',
  ['conadv_autoaugment', 'conadv_looksam'],
)
def test_a_state_is_described_where_its_parts_are_made(method):
  config = small(method)
  mesh = parts.make_mesh(config.batch_size)
  model = Small(5)
  tx, _, _ = parts.make_optimizer(config, images=160)
  grad_fn = methods.make_gradient(model, config, mesh)
  described = parts.describe_state(config, model, tx, grad_fn, mesh)
  kinds = conadv.ConAdvState, conadv.PerGroup
  is_kind = lambda x: isinstance(x, kinds)  # noqa: E731
  found = {'queue': [], 'group': [], 'rest': []}
  for part in jax.tree.leaves(described, is_leaf=is_kind):
    if isinstance(part, conadv.ConAdvState):
      found['queue'] += jax.tree.leaves(part.queue)
      found['rest'].append(part.slot)
    else:
      kind = 'group' if is_kind(part) else 'rest'
      found[kind] += jax.tree.leaves(part)
  # Two batches of 16 wait, two images a device, with labels and copies.
  images = [x for x in found['queue'] if x.ndim == 5]
  assert {x.shape for x in images} == {(2, 16, 8, 8, 3)}
  assert {x.dtype.name for x in images} == {'uint8', 'float32'}
  assert {x.shape for x in found['queue']} - {images[0].shape} == {(2, 16)}
  assert {x.sharding.spec for x in found['queue']} == {P(None, 'data')}
  assert {x.sharding.spec for x in found['rest']} == {P()}
  # What LookSAM keeps is each group's own.
  assert bool(found['group']) == (method == 'conadv_looksam')
  for x in found['group']:
    assert (x.shape[0], x.sharding.spec) == (mesh.size, P('data'))


def test_collectives_of_a_compiled_program_are_counted():
  mesh = jax.make_mesh((CORES,), ('data',))

  def local(x, y):
    total = jax.lax.psum(x, 'data')
    return (
      total,
      jax.lax.all_gather(y, 'data'),
      jax.lax.ppermute(y, 'data', [(i, (i + 1) % CORES) for i in range(CORES)]),
    )

  program = jax.jit(
    jax.shard_map(
      local, mesh=mesh, in_specs=P('data'), out_specs=P('data'), check_vma=False
    )
  )
  split = NamedSharding(mesh, P('data'))
  x = jax.ShapeDtypeStruct((CORES * 3, 5), jnp.float32, sharding=split)
  y = jax.ShapeDtypeStruct((CORES * 7,), jnp.int8, sharding=split)
  text = program.lower(x, y).compile().as_text()
  assert account.count_collectives(text) == {
    'all-reduce': (1, 3 * 5 * 4),
    'all-gather': (1, CORES * 7),
    'collective-permute': (1, 7),
  }


def test_an_asynchronous_collective_counts_once():
  text = """
  %start = (bf16[2,4]{1,0}, bf16[8,4]{1,0}) all-gather-start(bf16[2,4]{1,0} %x)
  %done = bf16[8,4]{1,0:T(8,128)} all-gather-done(%start)
  %sum = (f32[3]{0:T(256)}, /*index=1*/pred[2]{0}, f32[]) all-reduce(%a, %b, %c)
  %part = f32[3]{0:T(256)} get-tuple-element(%sum), index=0
  ROOT %more = s32[6]{0} all-reduce(%d), to_apply=%add
  """
  assert account.count_collectives(text) == {
    'all-gather': (1, 8 * 4 * 2),
    'all-reduce': (2, 3 * 4 + 2 + 4 + 6 * 4),
  }


@pytest.mark.parametrize(('told', 'seconds'), [(0.25, 0.25), (-99.7, None)])
def test_an_account_of_the_host_and_of_seconds_that_are_unknown(told, seconds):
  memory = types.SimpleNamespace(
    argument_size_in_bytes=1,
    output_size_in_bytes=1,
    alias_size_in_bytes=1,
    temp_size_in_bytes=1,
    generated_code_size_in_bytes=1,
    # A queue that changes in place, and a copy of a part of it.
    host_argument_size_in_bytes=50,
    host_output_size_in_bytes=50,
    host_alias_size_in_bytes=50,
    host_temp_size_in_bytes=5,
  )
  compiled = types.SimpleNamespace(
    memory_analysis=lambda: memory,
    cost_analysis=lambda: {'flops': 1.0, 'optimal_seconds': told},
    as_text=lambda: 'ENTRY %main () -> f32[] {\n}',
  )
  needs = account.read(compiled)
  assert needs.seconds == seconds
  assert needs.host == 55


@pytest.mark.slow
def test_the_table_has_a_row_for_every_run_and_goes_on(
  monkeypatch, capsys, tmp_path
):
  needs = account.Account(
    arguments=2**30,
    outputs=2**29,
    aliased=2**28,
    temporaries=3 * 2**30,
    code=0,
    host=0,
    flops=2.5e12,
    seconds=0.25,
    collectives={'all-reduce': (2, 100_000_000)},
  )
  device = type('Device', (), {'device_kind': 'TPU v3'})
  monkeypatch.setattr(
    slices,
    'make_mesh',
    lambda topology, batch_size: type(
      'Mesh', (), {'size': 256, 'devices': np.array([device])}
    ),
  )
  left = list(range(5))
  # Broken off after five rows.
  monkeypatch.setattr(account, 'compile_step', lambda config, mesh: left.pop())
  monkeypatch.setattr(account, 'read', lambda compiled: needs)
  path = tmp_path / 'aot' / 'table.csv'
  with pytest.raises(IndexError):
    account.print_table(path)
  begun = capsys.readouterr().out.splitlines()
  assert len(begun) == 2 + 5

  compiled = []
  monkeypatch.setattr(
    account, 'compile_step', lambda config, mesh: compiled.append(config.method)
  )
  account.print_table(path)
  header, rule, first, *rest = capsys.readouterr().out.splitlines()
  assert [header, rule, first, *rest[:4]] == begun
  assert len(compiled) == len(rest) - 4
  assert len({line.count('|') for line in (header, rule, first, *rest)}) == 1
  assert first == (
    '| `vanilla` | 98,304 | `v3:16x32` | 256 | 384 | 1.00 | 3.00 '
    '| 4.25 of 15.48 | 2.50 | 100 | 0.250 | 393,216 |'
  )
  assert len(rest) > 10

  config = imagenet_96k.get_config()
  row = account.table_row(
    config,
    'v4:4x8x8',
    slices.make_mesh('v4:4x8x8', config.batch_size),
    needs._replace(seconds=None),
  )
  assert row['s a step'] == row['images/s'] == ''

  config.accumulate = 4
  mesh = slices.make_mesh('v3:16x16', config.batch_size)
  account.print_account(config, 'v3:16x16', mesh, needs)
  out = capsys.readouterr().out
  assert '2,500,000,000,000 of one micro-batch' in out
  assert 'no estimate of its seconds' in out

  # Another compiler, or the same after a change of the code.
  monkeypatch.setattr(account.hosts, 'software', lambda: {'jax': 'another'})
  compiled.clear()
  account.print_table(path)
  assert len(compiled) == 1 + len(rest)
