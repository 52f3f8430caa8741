"""Evaluates a trained model: `python -m reference.evaluate`."""

import math
from pathlib import Path

import jax
from absl import flags

from reference import command
from reference.data import evaluation_sets
from reference.run import trained
from reference.tools import examination, examples, predictions, tables

_WORKDIR = flags.DEFINE_string('workdir', None, 'The work folder of a run.')
_MODEL = flags.DEFINE_string(
  'model', None, 'In place of --workdir: a folder that reference.export wrote.'
)
_DATA = flags.DEFINE_list(
  'data',
  [],
  'Folders of images or shards, with commas between; by default the held-out '
  'images of the run.',
)
_STEP = flags.DEFINE_integer(
  'step', None, 'Of which kept checkpoint, by default the newest.'
)
_BRANCH = flags.DEFINE_string(
  'branch', 'main', 'Whose norm layers; others than main are in work folders.'
)
_EPSILON = flags.DEFINE_float(
  'epsilon', 0.0, 'Radius of the attack, for pixels from 0 to 1; 0 for none.'
)
_STEPS = flags.DEFINE_integer(
  'steps', 20, 'Steps of the attack.', lower_bound=1
)
_BATCH_SIZE = flags.DEFINE_integer(
  'batch_size', 256, 'Images at once, over all devices.', lower_bound=1
)
_WORST = flags.DEFINE_integer(
  'worst', 10, 'How many of the worst classes are printed.', lower_bound=0
)
_OUT = flags.DEFINE_string(
  'out', 'runs/evaluation', 'Receives the CSVs and the figures.'
)


def _load() -> trained.Trained:
  if (_WORKDIR.value is None) == (_MODEL.value is None):
    raise command.Mistake(
      'One model is evaluated: `--workdir=` of a run, or `--model=` of an '
      f'export. Given --workdir={_WORKDIR.value} and --model={_MODEL.value}.'
    )
  path = Path(_WORKDIR.value or _MODEL.value or '').expanduser()
  return trained.load(path, step=_STEP.value, branch=_BRANCH.value)


def _describe(row: tables.Row) -> dict[str, str]:
  epsilon, steps = row['epsilon'], row['steps']
  return {
    'images': f'{row["images"]:,}',
    'attack': f'PGD-{steps}, {epsilon:.4g}' if epsilon else 'none',
    'classes': f'{row["classes"]:,}',
    'top-1': f'{row["top_1"]:.2%}',
    'top-5': f'{row["top_5"]:.2%}' if 'top_5' in row else '',
    'loss': f'{row["loss"]:.4f}',
    'calibration error': f'{row["calibration_error"]:.2%}',
  }


def _describe_class(row: tables.Row) -> dict[str, str]:
  return {
    'class': str(row['class']),
    'name': str(row['name']) if row['name'] != row['class'] else '',
    'images': f'{row["images"]:,}',
    'right': f'{row["right"]:.2%}',
    'taken for': str(row['taken_for']),
  }


def main() -> None:
  """Loads the model, and evaluates it on one set after the other."""
  adversary = predictions.make_adversary(_EPSILON.value, _STEPS.value)
  model, out = _load(), Path(_OUT.value).expanduser()
  devices = jax.device_count()
  rows: list[tables.Row] = []
  of_classes: list[tables.Row] = []
  for number, folder in enumerate(_DATA.value or [''], 1):
    images = evaluation_sets.open_set(folder, model.classes, model.config.data)
    found = examination.examine(
      model,
      images,
      # The rest of the last batch does not count.
      batch_size=math.ceil(_BATCH_SIZE.value / devices) * devices,
      adversary=adversary,
    )
    about: tables.Row = {
      'data': folder or 'held out',
      'branch': _BRANCH.value,
    }
    rows += [about | row for row in found.rows]
    of_classes += [about | row for row in found.classes]
    examples.draw(out / f'examples_{number}.png', found.sections)
    print(f'\n{about["data"]}', *images.notes, sep='\n', end='\n\n')
    tables.print_markdown([_describe(row) for row in found.rows])
    if worst := [x for x in found.classes if x['taken_for']][: _WORST.value]:
      print('\nThe worst classes, without an attack\n')
      tables.print_markdown([_describe_class(row) for row in worst])
    # After each set, so that a stop loses no more than one.
    tables.write_csv(out / 'evaluation.csv', rows)
    tables.write_csv(out / 'classes.csv', of_classes)
  print(
    f'\n  measures  {out}/evaluation.csv\n  classes   {out}/classes.csv\n'
    f'  examples  {out}/examples_*.png'
  )


if __name__ == '__main__':
  command.run(main)
