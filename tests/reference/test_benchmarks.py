"""The commands that measure cost: what they count, against counts by hand.

No time is asserted, only that there is one.
"""

import math
from xml.etree import ElementTree

import forked_commands
import pytest

from reference.benchmarks import schedule, steps
from reference.tools import tables

FIGURES = ('seconds', 'flops', 'memory_bytes', 'compile_seconds')


# The commands define the same flags.
COMMAND = """
from reference import command
from reference.benchmarks import measure, {command}
{before}
command.run({command}.main)
"""


def run(command, folder, *arguments, before=''):
  """What a command prints, on a tiny net."""
  result = forked_commands.run(
    '-c',
    COMMAND.format(command=command, before=before),
    '--net=tiny',
    '--rounds=1',
    '--orders=1',
    f'--out={folder}',
    *arguments,
  )
  assert result.returncode == 0, result.stderr
  return result.stdout


def check_figure(folder, name):
  for theme in ('light', 'dark'):
    root = ElementTree.parse(folder / f'{name}-{theme}.svg').getroot()
    assert root.tag.endswith('svg')


# So many that little but the layers' arithmetic counts.
IMAGES = 240


def dense(hidden):
  """Layers that are compiled sooner than convolutions."""
  return f"""
import flax.linen as nn
import jax.numpy as jnp

class Dense(nn.Module):
  num_classes: int = 32

  @nn.compact
  def __call__(self, x, *, train):
    x = x.reshape(x.shape[0], -1)
    # Smaller images have as many zeros behind them.
    x = jnp.pad(x, ((0, 0), (0, 8 * 8 * 3 - x.shape[1])))
    x = nn.Dense(16, name='stem')(x)
    x = nn.relu(nn.BatchNorm(use_running_average=not train)(x))
    return nn.Dense(self.num_classes, name='head')(nn.Dense({hidden})(x))

measure.NETS['tiny'] = measure.Net('tiny', Dense(), {IMAGES}, 8)
"""


@pytest.fixture(scope='module')
def cost(tmp_path_factory):
  folder = tmp_path_factory.mktemp('cost')
  printed = run('cost', folder, before=dense(256))
  rows = tables.read_csv(folder / 'cost_cpu.csv')
  return folder, printed, {row['row']: row for row in rows}


@pytest.mark.slow
def test_every_row_is_there_with_all_its_figures(cost):
  folder, printed, rows = cost
  assert list(rows) == list(steps.ROWS)
  for name, row in rows.items():
    assert f'\n| {name} | ' in printed
    # A loop counts once, which is no count of the step.
    own = set(FIGURES) - ({'flops'} if name == 'accumulate' else set())
    assert ('flops' in row) == (name != 'accumulate')
    for figure in own:
      # An update alone may need no memory of its own.
      assert math.isfinite(row[figure]), (name, figure)
      assert row[figure] > 0, (name, figure)
    assert row['seconds_low'] <= row['seconds'] <= row['seconds_high']
    beside = steps.ROWS[name].beside
    assert ('seconds_beside' in row) == (beside != 'plain')
    if beside != 'plain':
      assert f'\n| {name} / {beside} | ' in printed
      if 'flops' in rows[beside]:
        assert row['flops_beside'] == row['flops'] / rows[beside]['flops']
  check_figure(folder, 'cost_cpu')


@pytest.mark.slow
def test_flops_are_those_of_the_passes(cost):
  rows = cost[2]
  # Multiply-adds of the first layer and of all else.
  stem, rest = 8 * 8 * 3 * 16, 16 * 256 + 256 * 32
  # Forward, gradients to weights, and to inputs, of which training needs those
  # of the images only where it passes them on.
  train = 2 * stem + 3 * rest
  train_and_inputs = 3 * (stem + rest)
  attack = 2 * (stem + rest)
  part = int(0.2 * IMAGES) / IMAGES
  by_hand = {
    'two views': 2 * train,
    'attack pass alone': attack,
    'AdvProp by hand': 2 * train + attack,
    'AdvProp': 2 * train + attack,
    'ConAdv by hand': 2 * train + attack,
    'ConAdv': 2 * train + attack,
    'ConAdv staleness 4': 2 * train + attack,
    # This net takes smaller images for as large ones.
    'half attack': 2 * train + attack,
    'half': 2 * train + attack,
    'half fraction 0.35': train + 0.35 * (train + attack),
    'quarter': 2 * train + attack,
    'reuse': train_and_inputs + train,
    'fraction 0.2': train + part * (train + attack),
    'reuse + fraction 0.2': train_and_inputs + part * train,
    'optax.contrib.sam': 2 * train,
    'sam': 2 * train,
    'extrapolate': train,
    'fast_advprop': (1 - part) * train + part * (train_and_inputs + train),
    'fast_advprop fraction 0.35': 0.65 * train
    + 0.35 * (train_and_inputs + train),
    'accumulate unrolled': train,
    'plain data_parallel': train / 4,
    'scale_by_gsnr': train / 4,
    # A device of four trains on a quarter and attacks it; a trainer of three
    # trains on a third, or on a quarter, and does no more.
    'data_parallel': (2 * train + attack) / 4,
    'concurrent equal work': 2 * train / 3,
    'concurrent equal share': 2 * train / 4,
  }
  for name, expected in by_hand.items():
    ratio = rows[name]['flops_ratio']
    # Norm layers, activations and the optimizer count too, of which each device
    # has the whole, and XLA saves what two passes have in common.
    tolerance = 0.04 if steps.ROWS[name].mesh == (1, 1) else 0.12
    assert ratio == pytest.approx(expected / train, rel=tolerance), name


# The first and the last point of each sweep.
ENDS = """
growth.SWEEPS = {
  name: [points[0], points[-1]] for name, points in growth.SWEEPS.items()
}
"""


@pytest.fixture(scope='module')
def growth(tmp_path_factory):
  folder = tmp_path_factory.mktemp('growth')
  printed = run(
    'growth',
    folder,
    '--batch=96',
    '--sweeps=staleness,devices',
    # Beside so much, what is read from a queue takes no memory of its own.
    before=dense(1024) + ENDS,
  )
  assert '| staleness | reuse | 8 | ' in printed
  check_figure(folder, 'growth')
  rows = tables.read_csv(folder / 'growth.csv')
  return {(row['sweep'], row['row'], row['size']): row for row in rows}


@pytest.mark.slow
def test_a_queue_costs_batches_and_copies_and_no_arithmetic(growth):
  image, label = 96 * 8 * 8 * 3 * 4, 96 * 4
  for row, entry in (('ConAdv', 2 * image + label), ('reuse', image + label)):
    first, longer = (growth['staleness', row, size] for size in (1, 8))
    assert longer['flops_ratio'] == pytest.approx(1, rel=1e-3)
    more, temporary = (
      longer[kind] - first[kind] for kind in ('memory_bytes', 'temporary_bytes')
    )
    assert more - temporary == 7 * entry
    assert temporary < entry


@pytest.mark.slow
def test_devices_share_the_arithmetic(growth):
  one, eight = (growth['devices', 'ConAdv', n]['flops'] for n in (1, 8))
  # Each updates all weights.
  assert one / 8 < eight < 0.14 * one


def operation(name, cycles):
  """An operation as the compiler prints it, with what it came from."""
  return (
    f'  %x.{cycles} = f32[] fusion(%p), '
    f'metadata={{op_name="jit(step)/{name}"}}, '
    f'backend_config={{"estimated_cycles":"{cycles}000000"}}'
  )


# An attacker attacks twice, a trainer trains once.
PROGRAM = f"""\
HloModule jit_step, is_scheduled=true

%body (p: f32[]) -> f32[] {{
{operation('attack/jvp(Net)/c', 3)}
{operation('attack/transpose(jvp(Net))/c', 4)}
{operation('attack/transpose(attack)/jvp(Net)/stem/c', 5)}
}}

%condition (p: f32[]) -> pred[] {{
  %n = s32[] constant(2)
  ROOT %c = pred[] compare(%i, %n), direction=LT
}}

%attacks (p: f32[]) -> f32[] {{
  ROOT %w = f32[] while(%p), condition=%condition, body=%body
}}

%trains (p: f32[]) -> f32[] {{
{operation('jvp(Net)/c', 9)}
{operation('transpose(jvp(Net))/stem/c', 6)}
}}

ENTRY %main (p: f32[]) -> f32[] {{
{operation('mul', 1)}
  %d = f32[] conditional(%q, %p), branch_computations={{%attacks, %trains}}
{operation('sub', 2)}
}}
"""


def test_a_schedule_is_read_in_the_order_of_execution():
  attacker, trainer = schedule.read(PROGRAM)
  turn = [
    ('attack forward', 3.0),
    ('attack backward', 4.0),
    ('attack pixels', 5.0),
  ]
  assert attacker == [('other', 1.0), *turn, *turn, ('other', 2.0)]
  assert trainer == [
    ('other', 1.0),
    ('training forward', 9.0),
    ('training backward', 6.0),
    ('other', 2.0),
  ]
  text = schedule.to_text([attacker, trainer])
  assert schedule.from_text(text) == [attacker, trainer]


@pytest.mark.slow
def test_for_a_tpu_trainers_do_not_attack_and_attackers_do_not_train(tmp_path):
  pytest.importorskip('libtpu')
  names = 'plain', 'concurrent equal share'
  rows = f'--rows={",".join(names)}'
  run('cost', tmp_path, '--tpu=v3:2x2', rows, before=dense(256))
  path = tmp_path / 'cost_v3_2x2.csv'
  plain, team = tables.read_csv(path)
  assert (plain['row'], team['row']) == names
  assert plain['hardware'] == 'TPU v3'
  [alone] = schedule.from_text(plain['schedule'])
  assert {'training forward', 'training backward'} <= {x for x, _ in alone}
  parts = [
    {kind.split()[0] for kind, _ in role} - {'other'}
    for role in schedule.from_text(team['schedule'])
  ]
  assert sorted(map(sorted, parts)) == [['attack'], ['training']]
  check_figure(tmp_path, 'cost_v3_2x2')
  check_figure(tmp_path, 'schedule_v3_2x2')


# Of a compiler that states no time.
WITHOUT_SECONDS = """
import types
from pathlib import Path
from reference.tools import tables

rows = [
  {{
    'row': name,
    'images': 96,
    'megacycles': megacycles,
    'flops': 1e9,
    'memory_bytes': 2.0**20,
    'schedule': 'other:1',
  }}
  for name, megacycles in (('plain', 100.0), ('ConAdv', 250.0))
]
device = types.SimpleNamespace(device_kind='TPU v5 lite')
cost.complete(rows, measure.NETS['tiny'], device)
rows[1] |= {changed}
tables.write_csv(Path({path!r}), rows)
"""


def test_what_the_csv_has_is_not_compiled_again(tmp_path):
  pytest.importorskip('libtpu')
  path = str(tmp_path / 'cost_v5e_2x2.csv')
  printed = run(
    'cost',
    tmp_path,
    '--tpu=v5e:2x2',
    '--rows=plain',
    before=WITHOUT_SECONDS.format(path=path, changed={}),
  )
  header, _, plain, conadv, after = printed.splitlines()[2:7]
  assert header == (
    '|  | FLOPs / plain | Mcycles | Mcycles / plain | MiB | MiB / plain |'
  )
  assert plain == '| plain | 1.00 | 100 | 1.00 | 1 | 1.00 |'
  assert conadv == '| ConAdv | 1.00 | 250 | 2.50 | 1 | 1.00 |'
  assert after == ''
  check_figure(tmp_path, 'cost_v5e_2x2')


@pytest.mark.parametrize(
  'changed', [{'net': 'resnet18'}, {'jax': '0.4.1'}, {'images': 48}]
)
def test_rows_of_another_run_are_neither_compared_nor_lost(tmp_path, changed):
  pytest.importorskip('libtpu')
  path = tmp_path / 'cost_v5e_2x2.csv'
  with pytest.raises(AssertionError, match=r"row 'ConAdv' is of .*--out="):
    run(
      'cost',
      tmp_path,
      '--tpu=v5e:2x2',
      '--rows=plain',
      before=WITHOUT_SECONDS.format(path=str(path), changed=changed),
    )
  assert [row['row'] for row in tables.read_csv(path)] == ['plain', 'ConAdv']
