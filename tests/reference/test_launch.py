"""The launch script: what it prints, and what the hosts do with it."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / 'reference' / 'launch_tpu_pod.sh'
SLICE = ('--name=pod', '--zone=europe-west4-a')
WORKDIR = '--workdir=/mnt/my runs/1'
ARCHIVE = 'conadv_optax.tar.gz'

# Hosts are folders here: a command runs in that of the worker, or in each.
GCLOUD = """#!/usr/bin/env bash
(printf '%s\\0' gcloud "$@"; printf '\\1') >> "$HOSTS/log"
for last; do
  case $last in --worker=*) worker=${last#*=} ;; --command=*) line=${last#*=} ;;
  esac
done
case "$3 $4" in
  'queued-resources describe')
    # A line for every time that one asks; the last one stays.
    test -s "$HOSTS/state" || exit 1
    head -n 1 "$HOSTS/state" | grep -v NONE || exit 1
    test "$(wc -l < "$HOSTS/state")" = 1 || sed -i 1d "$HOSTS/state" ;;
  'queued-resources list') test ! -e "$HOSTS/no_answer" ;;
  'queued-resources create') cp "$HOSTS/granted" "$HOSTS/state" ;;
  'queued-resources delete') rm "$HOSTS/state" ;;
  'tpu-vm scp') test ! -e "$HOSTS/no_answer" || exit 1
    for host in 0 1; do cp "$5" "$HOSTS/$host/${6#*:}"; done ;;
  'tpu-vm ssh')
    # The statuses of a connection that fails, a line for each call.
    if test -s "$HOSTS/connections"; then
      status=$(head -n 1 "$HOSTS/connections")
      sed -i 1d "$HOSTS/connections"
      test "$status" = 0 || exit "$status"
    fi
    [[ $worker == all ]] && worker='0 1'
    for host in $worker; do (cd "$HOSTS/$host" && bash -c "$line") || exit; done
esac
"""
# Stands for the interpreter of a host; writes its arguments, and waits.
PYTHON = """#!/usr/bin/env bash
here=$(dirname "$0")/../..
printf '%s\\n' "$PWD" "$@" > "$here"/arguments
trap 'echo saved; exit 143' TERM
echo training
for _ in {1..200}; do
  sleep 0.05
  test -s "$here"/go_on || continue
  exit "$(cat "$here"/go_on)"
done
"""
UV = """#!/bin/sh
printf '%s\\n' "$*" >> uv
"""
# Waiting takes no time here where it is for a slice, else no longer than what
# is waited for.
SLEEP = """#!/bin/sh
test "$1" -ge 30 2>/dev/null && exit
test "$1" = 1 || exec /bin/sleep "$1"
before=$(ls train.*)
for _ in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do
  test -s train.status && exit
  test "$(ls train.*)" = "$before" || exit
  /bin/sleep 0.05
done
"""
TAIL = """#!/bin/sh
exec /usr/bin/tail --sleep-interval=0.05 "$@"
"""


def launch(*arguments, hosts=Path('/nowhere')):
  path = f'{hosts}/bin:/usr/bin:/bin'
  return subprocess.run(
    ['bash', str(SCRIPT), *arguments],
    env={**os.environ, 'HOSTS': str(hosts), 'PATH': path},
    capture_output=True,
    text=True,
    timeout=60,
  )


def commands(*arguments):
  """What a dry run prints, as lists of words."""
  command, *others = arguments
  result = launch(command, '--dry-run', *others)
  assert result.returncode == 0, result.stderr
  assert result.stdout == ''
  return split(result.stderr)


def split(shown):
  lines = [line[2:] for line in shown.splitlines() if line.startswith('+ ')]
  # Bash prints control characters as $'..', which shlex does not know.
  script = '\n'.join(f"printf '%s\\0' {line}; printf '\\1'" for line in lines)
  return words(
    subprocess.run(
      ['bash', '-c', script], capture_output=True, text=True, check=True
    ).stdout
  )


def words(text):
  return [line.split('\0')[:-1] for line in text.split('\1')[:-1]]


def without_archive(lines):
  """What differs between two runs is the folder of the archive."""
  return [
    [word for word in x if not word.endswith('/' + ARCHIVE)] for x in lines
  ]


def gcloud(hosts):
  """All that gcloud was asked for."""
  return words((hosts / 'log').read_text())


def about_the_slice(hosts):
  return [line[4] for line in gcloud(hosts) if line[3] == 'queued-resources']


@pytest.fixture
def hosts(tmp_path):
  """Two hosts that have their interpreter, and gcloud to reach them."""

  def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)

  program(tmp_path / 'bin' / 'gcloud', GCLOUD)
  program(tmp_path / 'bin' / 'sleep', SLEEP)
  program(tmp_path / 'bin' / 'tail', TAIL)
  (tmp_path / 'granted').write_text('ACTIVE\n')
  program(tmp_path / 'bin' / 'python3', UV)
  for host in '01':
    program(tmp_path / host / '.venv' / 'bin' / 'python', PYTHON)
  yield tmp_path
  for host in '01':
    pid = tmp_path / host / 'train.pid'
    if pid.exists():
      with contextlib.suppress(ProcessLookupError):
        os.kill(int(pid.read_text()), signal.SIGKILL)


def wait_for(path):
  until = time.monotonic() + 30
  while not path.exists() or not path.read_text():
    assert time.monotonic() < until, path
    time.sleep(0.02)
  return path.read_text()


def test_bash_can_read_it():
  subprocess.run(['bash', '-n', str(SCRIPT)], check=True)
  assert os.access(SCRIPT, os.X_OK)
  assert 'Usage:' in launch('help').stdout


def test_create_asks_for_a_queued_resource():
  described, listed, deleted, created = commands(
    'create', *SLICE, '--type=v3-1024', '--spot', '--project=my project'
  )
  queued = ['gcloud', 'compute', 'tpus', 'queued-resources']
  place = ['--zone=europe-west4-a', '--project=my project']
  assert described == [
    *queued, 'describe', 'pod', *place, '--format=value(state.state)'
  ]  # fmt: skip
  assert listed == [*queued, 'list', *place]
  assert deleted == [*queued, 'delete', 'pod', *place, '--force', '--quiet']
  assert created == [
    *queued,
    'create',
    'pod',
    *place,
    '--node-id=pod',
    '--accelerator-type=v3-1024',
    '--runtime-version=tpu-ubuntu2204-base',
    '--spot',
  ]


@pytest.mark.parametrize(
  ('options', 'runtime'),
  [
    (['--type=v6e-256'], 'v2-alpha-tpuv6e'),
    (['--type=v5p-512'], 'v2-alpha-tpuv5'),
    (['--type=v5litepod-256'], 'v2-alpha-tpuv5-lite'),
    (['--type=v4-512'], 'tpu-ubuntu2204-base'),
    (['--type=v9-8', '--runtime=new'], 'new'),
  ],
)
def test_the_software_follows_from_the_type(options, runtime):
  created = commands('create', *SLICE, *options)[-1]
  assert f'--runtime-version={runtime}' in created
  assert '--spot' not in created


def test_the_other_commands():
  delete = commands('delete', *SLICE)
  assert [line[4:] for line in delete] == [
    ['delete', 'pod', '--zone=europe-west4-a', '--force', '--quiet']
  ]
  for command, worker in (('follow', '0'), ('stop', 'all')):
    [line] = commands(command, *SLICE)
    assert line[2:8] == [
      'tpus', 'tpu-vm', 'ssh', 'pod', SLICE[1], f'--worker={worker}'
    ]  # fmt: skip
  archive, scp, ssh = commands('copy', *SLICE, "--setup=echo 'it is' > x")
  assert archive[0] == 'tar'
  assert {'conadv_optax', 'reference', 'pyproject.toml'} <= set(archive)
  assert scp[4:6] == ['scp', archive[4]]
  assert scp[-1] == ssh[7] == '--worker=all'
  assert "\necho 'it is' > x\n" in ssh[-1]


def test_a_run_is_all_of_them_in_turn():
  together = commands('run', *SLICE, '--type=v4-8', '--', WORKDIR)
  apart = [
    *commands('create', *SLICE, '--type=v4-8'),
    *commands('copy', *SLICE),
    *commands('start', *SLICE, '--', WORKDIR)[-1:],
    *commands('follow', *SLICE),
  ]
  [asks_whether_one_runs] = [
    line for line in together if '--worker=0' in line and line != apart[-1]
  ]
  together.remove(asks_whether_one_runs)
  assert without_archive(together) == without_archive(apart)


def snippet(beginning):
  """A shell command of the README, with its values."""
  readme = (ROOT / 'reference' / 'README.md').read_text()
  [block] = [
    block.partition('```')[0]
    for block in readme.split('```sh\n')[1:]
    if block.startswith(beginning)
  ]
  return block


# Refuses to mount what is mounted, as mount does. A host has its own folder.
SUDO = """#!/bin/sh
case $1 in
  mkdir) mkdir -p mnt ;;
  mount) test ! -e mnt/mounted && touch mnt/mounted ;;
  chown) test -e mnt/mounted ;;
esac
"""
MOUNTPOINT = '#!/bin/sh\ntest -e mnt/mounted\n'


def test_the_run_of_the_readme_starts_again_on_a_slice_that_is_there(hosts):
  for name, text in (('sudo', SUDO), ('mountpoint', MOUNTPOINT)):
    (hosts / 'bin' / name).write_text(text)
    (hosts / 'bin' / name).chmod(0o755)
  command = snippet('reference/launch_tpu_pod.sh run --name=')
  launcher, *arguments = shlex.split(command.replace('\\\n', ''))
  arguments = [word.replace('DATE', '2026-01-31') for word in arguments]
  assert ROOT / launcher == SCRIPT
  assert any(word.startswith('--config.data.folder=/') for word in arguments)
  # The first process ends by itself, with an error; the slice stays.
  for end in ('1', '0'):
    for host in '01':
      (hosts / host / 'go_on').write_text(end)
    result = launch(*arguments, hosts=hosts)
    assert result.returncode == int(end), result.stderr
    assert 'training' in result.stdout
  assert about_the_slice(hosts).count('create') == 1
  assert 'delete' not in about_the_slice(hosts)


@pytest.mark.parametrize(
  'statuses', [(255, 143, 0), (143, 1), (2,), (255, 134), (0,)]
)
def test_the_loop_of_the_readme_goes_on_where_that_helps(statuses, tmp_path):
  (tmp_path / 'reference').mkdir()
  launcher = tmp_path / 'reference' / 'launch_tpu_pod.sh'
  launcher.write_text(
    '#!/bin/sh\necho $1 >> log\n'
    f'set -- {" ".join(map(str, statuses))}\n'
    'shift $(($(grep -c run log) - 1))\nexit $1\n'
  )
  launcher.chmod(0o755)
  subprocess.run(
    ['bash', '-c', 'sleep() { :; }\n' + snippet('until ')],
    cwd=tmp_path,
    timeout=10,
  )
  ran = (tmp_path / 'log').read_text().split()
  assert ran == ['run'] * len(statuses) + ['delete']


def test_every_slice_gets_the_packages_of_the_same_day(hosts):
  day = '--packages-before=2026-01-31'
  assert launch('copy', *SLICE, day, hosts=hosts).returncode == 0
  assert launch('copy', *SLICE, hosts=hosts).returncode == 0
  install = '-m uv pip install --quiet --python=.venv/bin/python'
  for host in '01':
    asked = (hosts / host / 'uv').read_text().splitlines()
    old, new = sorted(
      filter(Path.is_dir, (hosts / host).glob('conadv_optax.*')),
      key=lambda x: x.stat().st_ctime_ns,
    )
    assert [line for line in asked if 'conadv_optax' in line] == [
      f'{install} --exclude-newer=2026-01-31T00:00:00Z -e {old}[reference,tpu]',
      f'{install} -e {new}[reference,tpu]',
    ]
    assert (hosts / host / 'train.code').read_text() == f'{new}\n'
    assert (old / 'reference' / 'main.py').exists()


@pytest.mark.parametrize('day', ['2026-12-31', '2028-02-29', '2000-02-29'])
def test_a_day_is_one_of_the_calendar(day):
  *_, install = commands('copy', *SLICE, f'--packages-before={day}')
  assert f'--exclude-newer={day}T' in install[-1]


def test_nothing_that_lies_on_a_host_is_removed(hosts, monkeypatch):
  # The work folder of somebody, where a copy of the code could lie.
  kept = hosts / '0' / 'conadv_optax' / 'runs' / 'checkpoint'
  kept.parent.mkdir(parents=True)
  kept.write_text('the state of a week')
  temporary = hosts / 'temporary'
  temporary.mkdir()
  monkeypatch.setenv('TMPDIR', str(temporary))
  assert launch('copy', '--dry-run', *SLICE, hosts=hosts).returncode == 0
  assert list(temporary.iterdir()) == []
  assert launch('copy', *SLICE, hosts=hosts).returncode == 0
  assert list(temporary.iterdir()) == []
  assert kept.read_text() == 'the state of a week'


@pytest.mark.slow
def test_what_is_cut_off_is_lost_and_not_failed(hosts):
  # The host went down: its process is gone and has left no status.
  ended = subprocess.Popen(['true'])
  ended.wait()
  (hosts / '0' / 'train.pid').write_text(f'{ended.pid}\n')
  (hosts / '0' / 'train.log').touch()
  assert launch('follow', *SLICE, hosts=hosts).returncode == 255


@pytest.mark.parametrize(
  ('states', 'status'), [('ACTIVE\nSUSPENDED\n', 255), ('ACTIVE\n', 2)]
)
def test_hosts_that_are_not_reached_are_lost_with_their_slice_alone(
  states, status, hosts
):
  (hosts / 'state').write_text(states)
  (hosts / 'no_answer').touch()
  result = launch('run', *SLICE, '--type=v4-16', '--', WORKDIR, hosts=hosts)
  assert result.returncode == status
  assert ('the slice was taken away' in result.stderr) == (status == 255)


def test_a_run_that_fails_as_its_slice_is_taken_away_is_lost(hosts):
  for host in '01':
    (hosts / host / 'go_on').write_text('1')
  (hosts / 'granted').write_text('ACTIVE\nSUSPENDED\n')
  result = launch('run', *SLICE, '--type=v4-16', '--', WORKDIR, hosts=hosts)
  assert result.returncode == 255
  assert 'the slice was taken away' in result.stderr


def test_a_host_that_does_not_answer_may_still_train(hosts):
  (hosts / 'state').write_text('ACTIVE\n')
  for host in '01':
    (hosts / host / 'train.code').write_text(f'{hosts / host}\n')
  assert launch('start', *SLICE, '--', WORKDIR, hosts=hosts).returncode == 0
  pid = wait_for(hosts / '0' / 'train.pid')
  for status in ('255', '1'):
    (hosts / 'connections').write_text(status)
    (hosts / 'log').unlink()
    result = launch('run', *SLICE, '--type=v4-16', '--', WORKDIR, hosts=hosts)
    assert result.returncode == 255
    assert 'does not answer' in result.stderr
    # Nothing was brought to it, or started.
    assert [line[3] for line in gcloud(hosts)].count('tpu-vm') == 1
  assert (hosts / '0' / 'train.pid').read_text() == pid
  os.kill(int(pid), 0)


@pytest.mark.parametrize('connections', ['0\n1\n', '0\n0\n255\n'])
def test_a_slice_that_is_lost_while_it_is_prepared_is_lost(connections, hosts):
  (hosts / 'state').write_text('ACTIVE\nSUSPENDED\n')
  (hosts / 'connections').write_text(connections)
  result = launch('run', *SLICE, '--type=v4-16', '--', WORKDIR, hosts=hosts)
  assert result.returncode == 255
  assert 'the slice was taken away' in result.stderr


def test_a_dry_run_shows_all_that_a_run_does(hosts):
  for host in '01':
    (hosts / host / 'go_on').write_text('0')
  # What is left is deleted, and then there is none: no way is left out.
  (hosts / 'state').write_text('FAILED\n')
  run = (*SLICE, '--type=v4-16', '--', WORKDIR)
  shown = commands('run', *run)
  assert launch('run', *run, hosts=hosts).returncode == 0
  shown = [line for line in without_archive(shown) if line[0] == 'gcloud']
  done = without_archive(gcloud(hosts))
  # The state is asked for more than once.
  assert sorted(map(tuple, shown)) == sorted(set(map(tuple, done)))


def test_a_dry_run_says_when(hosts):
  shown = launch(
    'run', '--dry-run', *SLICE, '--type=v4-16', '--', WORKDIR, hosts=hosts
  ).stderr.splitlines()
  conditions = {
    line: shown[index + 1].split(' pod ')[0].split(' -')[0]
    for index, line in enumerate(shown)
    if line.startswith('# if ')
  }
  queued = '+ gcloud compute tpus queued-resources'
  assert conditions == {
    '# if that fails:': f'{queued} list',
    '# if it was taken away:': f'{queued} delete',
    '# if there is none:': f'{queued} create',
    '# if that exits with 3, as no run is under way, copy and start:': '+ tar',
  }
  assert not (hosts / 'log').exists()


@pytest.mark.parametrize(
  ('states', 'granted', 'done', 'status', 'message'),
  [
    # On its way out: wait for that, then ask anew.
    ('DELETING NONE', 'ACTIVE', ['create'], 0, ''),
    ('SUSPENDING SUSPENDED NONE', 'ACTIVE', ['delete', 'create'], 0, ''),
    # On its way in: not asked for twice.
    ('ACCEPTED PROVISIONING ACTIVE', '', [], 0, ''),
    ('NONE', 'ACCEPTED ACTIVE', ['create'], 0, ''),
    # To describe it fails for good.
    ('NONE', 'NONE', ['create'], 2, 'not granted: it is gone'),
    ('NONE', 'ACCEPTED NONE', ['create'], 2, 'not granted: it is gone'),
    ('NONE', 'ACCEPTED FAILED', ['create'], 2, 'not granted: FAILED'),
    ('NONE', 'ACCEPTED SUSPENDED', ['create'], 255, 'taken away again'),
  ],
)
def test_create_waits_for_what_passes_alone(
  hosts, states, granted, done, status, message
):
  (hosts / 'state').write_text(states.replace(' ', '\n') + '\n')
  (hosts / 'granted').write_text(granted.replace(' ', '\n') + '\n')
  result = launch('create', *SLICE, '--type=v4-16', hosts=hosts)
  assert result.returncode == status, result.stderr
  assert message in result.stderr
  asked = about_the_slice(hosts)
  assert [x for x in asked if x in ('create', 'delete')] == done


def test_no_answer_is_not_taken_for_no_slice(hosts):
  (hosts / 'no_answer').touch()
  result = launch('create', *SLICE, '--type=v4-16', hosts=hosts)
  assert result.returncode == 255
  assert 'gcloud does not say' in result.stderr
  assert about_the_slice(hosts) == ['describe', 'list']


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    (['creat'], 'no command creat'),
    (['create'], 'create needs the name of the slice: --name='),
    (['stop', '--name=pod'], 'stop needs a zone: --zone='),
    (['create', *SLICE], 'create needs the size of the slice: --type='),
    (['create', *SLICE, '--type=v9-8'], 'add --runtime='),
    (['start', *SLICE], 'start needs where to keep the checkpoints'),
    (['run', *SLICE, '--type=v4-8', '--', '--x'], '-- --workdir='),
    (['run', *SLICE, '--name='], 'no option --name='),
    (['copy', *SLICE, '--packages-before=31.1.'], '--packages-before=2026-'),
    (['copy', *SLICE, '--packages-before=2026-13-45'], 'no day'),
    (['copy', *SLICE, '--packages-before=2026-02-29'], 'no day'),
    (['copy', *SLICE, '--packages-before=2100-02-29'], 'no day'),
    (['copy', *SLICE, '--packages-before=2026-04-31'], 'no day'),
    (['copy', *SLICE, '--packages-before=2026-01-00'], 'no day'),
    (['copy', *SLICE, '--packages-before='], 'no day'),
    (['run', *SLICE, '--', '--workdir=runs/1'], 'begins with /'),
    (['start', *SLICE, '--', '--workdir=~/runs/1'], 'begins with /'),
    (['run', *SLICE, '--', WORKDIR, '--dry-run'], '--dry-run comes before --'),
    (['run', *SLICE, WORKDIR], 'Flags of reference.main come after --'),
  ],
)
def test_what_is_missing_is_named(arguments, message, hosts):
  result = launch(*arguments, hosts=hosts)
  assert result.returncode == 2
  assert message in result.stderr
  assert not (hosts / 'log').exists()


def test_a_run_from_nothing_to_its_end(hosts):
  config = "--config.name=it's $HOME"
  for host in '01':
    (hosts / host / 'go_on').write_text('0')
  result = launch(
    'run', *SLICE, '--type=v4-16', '--', WORKDIR, config, hosts=hosts
  )
  assert result.returncode == 0, result.stderr
  assert result.stdout == 'training\n'
  for host in '01':
    folder = Path((hosts / host / 'train.code').read_text().strip())
    assert folder.parent == hosts / host
    assert (folder / 'reference' / 'main.py').exists()
    assert (folder / 'conadv_optax' / '__init__.py').exists()
    assert (hosts / host / 'arguments').read_text().splitlines() == [
      str(folder), '-m', 'reference.main', '--distributed', WORKDIR, config
    ]  # fmt: skip
  # What was printed is what was run.
  shown = [line for line in split(result.stderr) if line[0] == 'gcloud']
  assert shown == gcloud(hosts)


def test_a_run_that_is_stopped_and_goes_on(hosts):
  start = ('start', *SLICE, '--', WORKDIR)
  for host in '01':
    (hosts / host / 'train.code').write_text(f'{hosts / host}\n')
  assert launch(*start, hosts=hosts).returncode == 0
  wait_for(hosts / '1' / 'arguments')
  # Not twice, nor with other code under its feet.
  assert launch(*start, hosts=hosts).returncode == 1
  assert 'stop it first' in launch('copy', *SLICE, hosts=hosts).stdout
  wait_for(hosts / '0' / 'train.log')
  assert launch('stop', *SLICE, hosts=hosts).returncode == 0
  assert wait_for(hosts / '1' / 'train.status') == '143\n'
  followed = launch('follow', *SLICE, hosts=hosts)
  assert followed.returncode == 143
  assert 'saved' in followed.stdout

  # The slice is then taken away; the same command brings all back.
  (hosts / 'state').write_text('SUSPENDED\n')
  for host in '01':
    (hosts / host / 'go_on').write_text('0')
  again = launch('run', *SLICE, '--type=v4-16', '--', WORKDIR, hosts=hosts)
  assert again.returncode == 0, again.stderr
  asked = about_the_slice(hosts)
  assert asked.index('delete') < asked.index('create')
