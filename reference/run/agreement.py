"""What a run and the checkpoint that it resumes from must agree in.

Some of it may change on purpose. Then the next checkpoints say what did, and at
which step.
"""

import shlex
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from reference import command
from reference.data import sources
from reference.data.wording import some
from reference.run import methods

# What may be accepted, and the fields of the config that it covers.
SCHEDULE, DEVICES, DATA = 'schedule', 'devices', 'data'
_SCHEDULE_FIELDS = (
  'epochs',
  'lars.peak',
  'lars.warmup_epochs',
  'lars.power',
  'lars.end',
)
# These say where the images lie; the fingerprint says which they are.
_PLACES = ('data.folder',)
# Images that can be read are read the same.
_FREE = ('data.on_bad_image',)
_ABSENT = 'nothing'


class About(NamedTuple):
  """What a checkpoint holds beside the state.

  Attributes:
    config: the fields that must agree, by name.
    dataset: the classes, the numbers of images, and the fingerprint; None in
      checkpoints of before it was kept.
    changes: what was accepted so far: the step, and [before, after] by name.
    init_from: which model the run began with: its path, its step, and notes of
      what it was not taken over; None where all parameters were drawn.
    names: of the classes, by label, as people call them; empty where nothing
      says. They need not agree.
  """

  config: dict[str, Any]
  dataset: dict[str, Any] | None
  changes: list[dict[str, Any]]
  init_from: dict[str, Any] | None = None
  names: Sequence[str] = ()


def describe(source: sources.Source) -> dict[str, Any]:
  """Which images a source has, as JSON has it."""
  return {
    'classes': list(source.classes),
    'images': len(source.train),
    'held_out_images': len(source.held_out),
    'fingerprint': source.fingerprint,
  }


def _changed(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
  return {
    name: [then.get(name, _ABSENT), now.get(name, _ABSENT)]
    for name in sorted(then.keys() | now.keys())
    if then.get(name, _ABSENT) != now.get(name, _ABSENT)
  }


def _with_later_fields(
  stored: dict[str, Any], config: dict[str, Any]
) -> dict[str, Any]:
  """A stored config, with what its run did where it had no field for that."""
  later = {
    'attack.label_smoothing': stored.get('label_smoothing'),
    'methods.conadv.adversarial_downscale': 1,
    'methods.conadv.attack_downscale': 1,
    'methods.conadv.every': 1,
    'methods.conadv.shared_norm': False,
    'model.build': '',
    'model.padding': 'same',
    'plain_epochs': 0.0,
  }
  # A method that came later is not the run's.
  sections = {name.split('.')[1] for name in stored if 'methods.' in name}
  methods = {
    name: value
    for name, value in config.items()
    if name.startswith('methods.') and name.split('.')[1] not in sections
  }
  return {
    **{name: later[name] for name in later if name in config},
    **(methods if sections else {}),
    **stored,
  }


def _changed_fields(
  stored: About, config: dict[str, Any]
) -> dict[str, list[Any]]:
  changed = _changed(_with_later_fields(stored.config, config), config)
  if stored.dataset is not None:
    for name in _PLACES:
      changed.pop(name, None)
  if DEVICES not in stored.config:
    # Checkpoints of before do not say.
    changed.pop(DEVICES, None)
  return changed


def go_on(stored: About, now: About, step: int) -> About:
  """What is said of a run that resumes: what it is now, and all that changed.

  Args:
    stored: of the checkpoint that it resumes from.
    now: of the run.
    step: of the checkpoint.
  """
  changed = _changed_fields(stored, now.config)
  if stored.dataset is not None and now.dataset is not None:
    changed |= _changed(stored.dataset, now.dataset)
  change = [{'step': step, **changed}] if changed else []
  return now._replace(
    changes=stored.changes + change, init_from=stored.init_from
  )


def lines(about: About) -> list[str]:
  """What a run began with, and a line for every change that it went through."""
  told = []
  if about.init_from is not None:
    path, number = about.init_from['path'], about.init_from['step']
    told += [f'It began with {path}, step {number}.', *about.init_from['notes']]
  for change in about.changes:
    # Class names may be a thousand.
    changed = [
      name if name == 'classes' else f'{name} {values[0]} -> {values[1]}'
      for name, values in change.items()
      if name != 'step'
    ]
    told.append(f'From step {change["step"]} on: {", ".join(changed)}.')
  return told


def check_config(
  workdir: Path,
  step: int,
  stored: About,
  config: dict[str, Any],
  accept: Collection[str],
) -> None:
  """Refuses to resume with another config, processes or devices.

  Args:
    workdir: of the run.
    step: of the checkpoint.
    stored: what it says.
    config: the fields of this run.
    accept: which changes are on purpose.

  Raises:
    Mistake: naming every field that is not accepted, and how to go on.
  """
  changed = _changed_fields(stored, config)
  method = methods.METHODS[config['method']]
  if DEVICES in accept and DEVICES in changed and method.keeps_groups:
    then, now = changed[DEVICES]
    raise command.Mistake(
      f'`{config["method"]}` keeps a state for each device, so its run goes on '
      f'with as many. Given {now}; {workdir} holds step {step} of {then}. Take '
      'as many, or begin another run with its model: '
      f'`--workdir={workdir}_2 --init_from={workdir}`.'
    )
  accepted = [
    *_FREE,
    *(_SCHEDULE_FIELDS if SCHEDULE in accept else ()),
    *((DEVICES,) if DEVICES in accept else ()),
  ]
  refused = {
    name: values for name, values in changed.items() if name not in accepted
  }
  if not refused:
    return
  if refused.keys() == {DEVICES}:
    advice = (
      'Each device has batch statistics of its own, so with another number of '
      'them the run is another one. Take as many; or, if it is on purpose, '
      '`--accept=devices`.'
    )
  elif refused.keys() <= set(_SCHEDULE_FIELDS):
    advice = (
      'To go on from there with that schedule on purpose, `--extend`. '
      'Otherwise likely a field was changed and the folder was not: take '
      f'another, `--workdir={workdir}_2`.'
    )
  else:
    values = [
      f'`--config.{name}={shlex.quote(str(then))}`'
      for name, (then, _) in refused.items()
      if name not in ('processes', DEVICES) and then != _ABSENT
    ]
    advice = (
      'Likely a field was changed and the folder was not: take another, '
      f'`--workdir={workdir}_2`'
      + (f'; to resume that run, {some(values)}' if values else '')
      + '.'
    )
    if SCHEDULE in accept:
      advice = (
        f'`--extend` changes {", ".join(_SCHEDULE_FIELDS)} alone. {advice}'
      )
  lines = [
    f'  {name}: given {now!r}, stored {then!r}'
    for name, (then, now) in refused.items()
  ]
  raise command.Mistake(
    'A work folder belongs to one config, and resumes its run. '
    f'{workdir} holds step {step} of another:\n' + '\n'.join([*lines, advice])
  )


def check_init_from(
  workdir: Path, step: int, stored: About, path: Path
) -> None:
  """Refuses to resume a run that began with another model.

  Args:
    workdir: of the run.
    step: of the checkpoint.
    stored: what it says.
    path: of the model that this run is to begin with.

  Raises:
    Mistake: saying how to go on.
  """
  then = stored.init_from and stored.init_from['path']
  if then != str(path.absolute()):
    raise command.Mistake(
      f'A run takes the parameters of another once, as it begins. {workdir} '
      f'holds step {step} of one that began with '
      f'{then or "parameters that were drawn"}; given `--init_from={path}`. To '
      'resume it, leave the flag out. To begin with that model, take another '
      f'folder: `--workdir={workdir}_2`.'
    )


def _describe_changes(then: dict[str, Any], now: dict[str, Any]) -> list[str]:
  """A line for everything that differs between two sets of images."""
  before, after = then['classes'], now['classes']
  removed = [repr(name) for name in before if name not in set(after)]
  added = [repr(name) for name in after if name not in set(before)]
  lines = []
  if removed:
    lines.append(f'classes that are gone, {len(removed)}: {some(removed)}')
  if added:
    lines.append(f'classes that are new, {len(added)}: {some(added)}')
  if before != after and not (removed or added):
    lines.append('the order of the classes, and so their labels')
  for name, label in (
    ('images', 'training images'),
    ('held_out_images', 'held-out images'),
  ):
    if then[name] != now[name]:
      difference = now[name] - then[name]
      word = 'more' if difference > 0 else 'fewer'
      lines.append(
        f'{label}: {abs(difference)} {word}, {now[name]} for {then[name]}'
      )
  return lines or ['the names of images or their labels']


def check_dataset(
  workdir: Path,
  step: int,
  stored: About,
  dataset: dict[str, Any],
  accept: Collection[str],
) -> None:
  """Refuses to resume with other images.

  Args:
    workdir: of the run.
    step: of the checkpoint.
    stored: what it says.
    dataset: the images of this run.
    accept: which changes are on purpose.

  Raises:
    Mistake: saying what differs, and how to go on.
  """
  if stored.dataset is None or stored.dataset == dataset:
    return
  same_head = len(stored.dataset['classes']) == len(dataset['classes'])
  if DATA in accept and same_head:
    return
  if same_head:
    advice = (
      'Likely files or folders were added, renamed or removed since: put them '
      'back. If it is on purpose, `--accept=data`: from there on the images '
      'come in another order, and a class has the label of its place.'
    )
  else:
    advice = (
      'Another number of classes is another model. Likely a class folder was '
      'added or removed since: put it back; or train on these images in '
      f'another folder, `--workdir={workdir}_2`.'
    )
  raise command.Mistake(
    f'The images must be those that step {step} in {workdir} was trained on. '
    'These differ in:\n'
    + '\n'.join(
      f'  {line}' for line in _describe_changes(stored.dataset, dataset)
    )
    + f'\n{advice}'
  )
