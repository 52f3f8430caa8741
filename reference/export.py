"""Takes a model out of a run: `python -m reference.export`."""

from pathlib import Path

from absl import flags

from reference import command
from reference.run import exports, trained

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'The work folder of the run.', required=True
)
_OUT = flags.DEFINE_string(
  'out', None, 'Receives the model; a new folder.', required=True
)
_STEP = flags.DEFINE_integer(
  'step', None, 'Of the checkpoint, by default the newest.'
)
_LAYOUT = flags.DEFINE_enum(
  'layout',
  trained.FLAX,
  exports.LAYOUTS,
  "Names and order of axes: Flax's, or those of torchvision's ResNets.",
)


def main() -> None:
  """Reads the main branch of a checkpoint, and writes it."""
  out = Path(_OUT.value).expanduser()
  exports.check_empty(out)
  workdir = Path(_WORKDIR.value).expanduser()
  model = trained.load(workdir, step=_STEP.value)
  exported = exports.write(model, out, layout=_LAYOUT.value)
  print(
    f'Step {model.step} of {workdir}: {exported.parameters:,} '
    f'parameters, {len(model.classes):,} classes.'
  )
  for path, what in exported.files.items():
    print(f'  {path}  {what}')


if __name__ == '__main__':
  command.run(main)
