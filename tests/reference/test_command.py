"""How commands end whose flags cannot be read."""

import forked_commands
import pytest


@pytest.mark.slow
def test_an_argument_without_dashes_is_refused():
  result = forked_commands.run('-m', 'reference.main', 'config.method=conadv')
  assert result.returncode == 2
  assert result.stdout == ''
  [line] = result.stderr.splitlines()
  assert '`--config.method=conadv`' in line


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    (['--config.batchsize=3'], 'Did you mean "batch_size"'),
    (['--config.batch_size=0'], '`batch_size` is a number of images'),
    # The library sees to this.
    (
      ['--config.method=sam', '--config.methods.sam.radius=-1.0'],
      'radius=-1.0. It is a distance',
    ),
  ],
)
def test_a_mistake_has_a_traceback_on_demand_alone(flags, message, tmp_path):
  command = ('-m', 'reference.main', *flags, f'--workdir={tmp_path}')
  result = forked_commands.run(*command)
  assert result.returncode == 2
  assert message in result.stderr
  assert len(result.stderr.splitlines()) == 1
  result = forked_commands.run(*command, '--debug')
  assert result.returncode == 1
  assert message in result.stderr.splitlines()[-1]
  assert 'Traceback' in result.stderr


def test_turns_of_the_input_benchmark_are_whole_batches():
  result = forked_commands.run(
    *('-m', 'reference.benchmarks.input', '--images=640', '--batch_size=96')
  )
  assert result.returncode == 2
  assert result.stdout == ''
  assert result.stderr.endswith('Take `--images=960`.\n')


@pytest.mark.parametrize(
  ('command', 'message'),
  [
    (
      'benchmarks.cost --rows=plain,Plain',
      'Plain is none of plain, two views,',
    ),
    ('benchmarks.cost --rounds=0', 'rounds'),
    ('benchmarks.growth --sweeps=batches', 'batches is none of batch, stale'),
    ('scala --noise=conadv,adv', 'adv is none of none, conadv, scala, drawn.'),
    ('scala --batch_size=0', 'batch_size'),
    ('scala --rate=x', 'rate'),
    ('evaluate --worst=-1', 'worst'),
  ],
)
def test_a_flag_is_refused_before_anything_runs(command, message, tmp_path):
  module, *flags = command.split()
  result = forked_commands.run(
    *('-m', f'reference.{module}', *flags, f'--out={tmp_path / "out"}')
  )
  assert result.returncode == 2
  assert result.stdout == ''
  reason, where = result.stderr.splitlines()
  assert message in reason
  assert where == '`--help` names the flags.'
  assert not list(tmp_path.iterdir())
