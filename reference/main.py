"""Trains a model: `python -m reference.main`."""

from pathlib import Path

from absl import flags

from reference import command
from reference.run import agreement, hosts, storage, train

_CONFIG = command.define_config(Path(__file__).parent / 'configs' / 'digits.py')
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'The work folder: checkpoints, metrics and figure. A run resumes from what '
  'it holds. By default runs/NAME_METHOD, as the config has them.',
)
_INIT_FROM = flags.DEFINE_string(
  'init_from',
  None,
  'A work folder or an export: a new run begins with its parameters and '
  'statistics. A run that resumes does not read it again.',
)
_EXTEND = flags.DEFINE_bool(
  'extend',
  False,
  'Go on from the newest checkpoint with other epochs or another schedule.',
)
_ACCEPT = flags.DEFINE_multi_enum(
  'accept',
  [],
  [agreement.DATA, agreement.DEVICES],
  'Go on where the images, or the number of devices, are no longer those of '
  'the checkpoint.',
)

_DISTRIBUTED = flags.DEFINE_bool(
  'distributed',
  False,
  'One process on each of many hosts, which find each other: on a TPU pod, '
  'under Slurm.',
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator',
  None,
  'Where they do not: ADDRESS:PORT of process 0, the same on all.',
)
_NUM_PROCESSES = flags.DEFINE_integer(
  'num_processes', None, 'How many processes there are, with --coordinator.'
)
_PROCESS_ID = flags.DEFINE_integer(
  'process_id', None, 'Which of them this is, from 0, with --coordinator.'
)


def main() -> None:
  """Parses nothing but the flags."""
  if not flags.FLAGS['verbosity'].present:
    storage.tell_once()
  config = _CONFIG.value
  workdir = _WORKDIR.value or f'runs/{config.name}_{config.method}'
  if '://' in workdir:
    raise command.Mistake(
      f'A work folder is a folder. Given --workdir={workdir}. Mount NFS, or a '
      'bucket whose namespace is hierarchical, on every host, '
      '`gcsfuse BUCKET /mnt/runs`, and take `--workdir=/mnt/runs/1`.'
    )
  hosts.start(
    distributed=_DISTRIBUTED.value,
    coordinator=_COORDINATOR.value,
    num_processes=_NUM_PROCESSES.value,
    process_id=_PROCESS_ID.value,
  )
  accept = [*_ACCEPT.value, *([agreement.SCHEDULE] if _EXTEND.value else [])]
  train.train(
    config,
    Path(workdir).expanduser(),
    accept=accept,
    init_from=Path(_INIT_FROM.value).expanduser() if _INIT_FROM.value else None,
  )


if __name__ == '__main__':
  command.run(main)
