"""Trains a model: `python -m reference.main`."""

from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

from reference import train

_CONFIG = config_flags.DEFINE_config_file(
  'config',
  str(Path(__file__).parent / 'configs' / 'digits.py'),
  'The config file; --config.FIELD=VALUE overrides a field of it.',
)
_WORKDIR = flags.DEFINE_string(
  'workdir',
  None,
  'The work folder: checkpoints, metrics and figure. A run resumes from what '
  'it holds. By default runs/NAME_METHOD, as the config has them.',
)


def main(argv: list[str]) -> None:
  """Parses nothing but the flags."""
  if len(argv) > 1:
    raise app.UsageError(
      f'Everything is a flag; given {argv[1:]}. Likely the dashes are missing: '
      '`--config.method=conadv`.'
    )
  if not flags.FLAGS['verbosity'].present:
    # At absl's default Orbax tells of every file.
    logging.set_verbosity(logging.WARNING)
  config = _CONFIG.value
  default = f'runs/{config.name}_{config.method}'
  train.train(config, Path(_WORKDIR.value or default))


if __name__ == '__main__':
  app.run(main)
