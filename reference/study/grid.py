"""The grid of a study: its cells, and running those that have no row yet.

Every cell runs the main job's step. First each variant is tried with the same
number of peak learning rates at each batch size, judged by the validation
images; then with other values of a number of its own, at the best of them. At
last it runs with the best of all and every seed, measured on the test images. A
cell's row is written to the CSV when it is done, and a cell that has its row is
not run again: after a stop or a kill the same command goes on.
"""

import csv
import dataclasses
import hashlib
import json
import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_collections
import tqdm

from reference.command import Mistake
from reference.configs import methods
from reference.run import checkpoint
from reference.run import methods as run_methods
from reference.study import cell as study_cell
from reference.study import record


class Cell(NamedTuple):
  """A run of the grid.

  Attributes:
    variant: a name in `study.overrides`.
    batch_size: images a step.
    peak: the largest learning rate.
    seed: of model, order and attack.
    final: whether it is measured on the test images, or is a trial.
    setting: a field and its value, as 'methods.sam.radius=0.2'; or '', where
      `study.overrides` says all.
  """

  variant: str
  batch_size: int
  peak: float
  seed: int
  final: bool
  setting: str = ''


def _images_of(config: ml_collections.ConfigDict) -> list[Any]:
  """Which images a study loads, once for all cells."""
  return [config.data.get(name) for name in ('source', 'folder', 'size')]


def cell_config(
  config: ml_collections.ConfigDict, cell: Cell
) -> ml_collections.ConfigDict:
  """The config of one run, which `reference.main` takes too."""
  config = config.copy_and_resolve_references()
  known = config.study.overrides
  if cell.variant not in known:
    raise Mistake(
      '`study.variants` are names in `study.overrides`: '
      f'{", ".join(sorted(known))}. Given {cell.variant!r}. Likely misspelt, '
      'of another config (`--config=`), or names without quotes: write '
      "`--config.study.variants=\"('vanilla','conadv')\"`."
    )
  shared = _images_of(config)
  config.update(known[cell.variant])
  config.batch_size, config.seed = cell.batch_size, cell.seed
  config.lars.peak = float(cell.peak)
  if cell.setting:
    field, _, value = cell.setting.partition('=')
    config.update_from_flattened_dict({field: json.loads(value)})
  if _images_of(config) != shared:
    raise Mistake(
      'A study loads its images once. Given '
      f'{cell.variant!r}, whose data.source, data.folder or data.size is '
      'another. Likely it is a study of its own: '
      f'`--config.study.variants="({cell.variant!r},)"` with '
      '`--config.data.size=`.'
    )
  return config


def identify(config: ml_collections.ConfigDict, cell: Cell) -> str:
  """A short name of all that a cell's result depends on."""
  grid = (
    'batch_sizes',
    'peaks',
    'seeds',
    'variants',
    'settings',
    'ablations',
    'at_once',
  )
  left_out = ('run.', 'study.overrides.', *(f'study.{name}' for name in grid))
  # What joined the others later makes no other cell of this one.
  later = {'plain_epochs': 0.0, 'methods': methods.make_section()}
  defaults = checkpoint.fields(ml_collections.ConfigDict(later))
  fields = {
    name: value
    for name, value in checkpoint.fields(cell_config(config, cell)).items()
    if not name.startswith(left_out) and defaults.get(name) != value
  }
  text = json.dumps([fields, cell.final], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:12]


def _check_grid(config: ml_collections.ConfigDict) -> None:
  """Refuses a grid that cannot be gone through."""
  study = config.study
  if len(study.batch_sizes) != len(study.peaks):
    raise Mistake(
      '`study.peaks` has the peaks of each batch size. Given '
      f'{len(study.peaks)} for study.batch_sizes={tuple(study.batch_sizes)}. '
      'Likely the batches alone were narrowed: '
      f'`--config.study.peaks="({tuple(study.peaks[-1])},)"`.'
    )
  for name in ('seeds', 'at_once', 'evaluate_every', 'train_images'):
    if study[name] < 1:
      raise Mistake(
        f'`study.{name}` is a number of things, 1 or more. Given '
        f'{study[name]}. Likely mistyped: `--config.study.{name}=1`.'
      )


def trials(config: ml_collections.ConfigDict) -> list[Cell]:
  """Every peak of every variant at every batch size, once.

  Where there is one peak alone there is nothing to choose.
  """
  return [
    Cell(variant, batch_size, peak, 0, final=False)
    for batch_size, peaks in zip(
      config.study.batch_sizes, config.study.peaks, strict=True
    )
    # Cells that are run at once are of different programs: none waits for the
    # other's compilation.
    for peak in peaks
    for variant in config.study.variants
    if len(peaks) > 1
  ]


def best(
  config: ml_collections.ConfigDict, accuracies: dict[Cell, float]
) -> list[Cell]:
  """The best trial of every variant at every batch size.

  Args:
    config: of the study.
    accuracies: of the trials, on the validation images.
  """
  study = config.study
  return [
    max(
      (x for x in accuracies if x[:2] == (variant, batch_size)),
      key=lambda cell: accuracies[cell],
      default=Cell(variant, batch_size, peaks[0], 0, final=False),
    )
    for batch_size, peaks in zip(study.batch_sizes, study.peaks, strict=True)
    for variant in study.variants
  ]


def more_trials(
  config: ml_collections.ConfigDict, accuracies: dict[Cell, float]
) -> list[Cell]:
  """Other values of each variant's own number, at its best peak.

  Args:
    config: of the study.
    accuracies: of the trials of peaks, on the validation images.
  """
  return [
    cell._replace(setting=f'{field}={json.dumps(value)}')
    for cell in best(config, accuracies)
    # Where there was nothing to choose, there is not now.
    if cell in accuracies and cell.variant in config.study.settings
    for field, *values in [config.study.settings[cell.variant]]
    for value in values
  ]


def finals(
  config: ml_collections.ConfigDict, accuracies: dict[Cell, float]
) -> list[Cell]:
  """Every variant as its best trial, seed by seed.

  An ablation runs at the largest batch, tuned as what it is one of.

  Args:
    config: of the study.
    accuracies: of the trials, on the validation images.
  """
  study = config.study
  chosen = best(config, accuracies)
  largest = max(study.batch_sizes)
  chosen += [
    _ablation(config, ablation, cell)
    for ablation, parent in study.ablations.items()
    for cell in chosen
    if cell[:2] == (parent, largest)
  ]
  return [
    cell._replace(seed=seed, final=True)
    for seed in range(study.seeds)
    for cell in chosen
  ]


def _ablation(
  config: ml_collections.ConfigDict, name: str, parent: Cell
) -> Cell:
  """Its parent's cell, setting and all but for what it changes itself."""
  changed = ml_collections.ConfigDict(config.study.overrides[name])
  field, _, _ = parent.setting.partition('=')
  setting = '' if field in checkpoint.fields(changed) else parent.setting
  return parent._replace(variant=name, setting=setting)


def attack_columns(config: ml_collections.ConfigDict) -> record.Row:
  """What the row of a cell says of its attack."""
  if config.method == 'fast_advprop':
    own = config.methods.fast_advprop
    return {
      'epsilon': own.epsilon,
      'targets': 'none',
      'adversarial_fraction': own.adversarial_fraction,
    }
  return {
    'epsilon': config.attack.epsilon,
    # A reused gradient leads away from the true label.
    'targets': 'none'
    if config.method == 'conadv_reuse'
    else config.methods.conadv.targets,
    'adversarial_fraction': config.methods.conadv.adversarial_fraction,
  }


def row_of(
  config: ml_collections.ConfigDict, cell: Cell, result: record.Row
) -> record.Row:
  """The row of a cell, but for where it ran: what it is, and what came out."""
  of_cell = cell_config(config, cell)
  conadv = of_cell.methods.conadv
  row = {
    'cell': identify(config, cell),
    'study': config.name,
    'kind': 'final' if cell.final else 'trial',
    **cell._asdict(),
    'method': of_cell.method,
    **attack_columns(of_cell),
    'every': conadv.every,
    'adversarial_downscale': conadv.adversarial_downscale,
    'attack_downscale': conadv.attack_downscale,
    'dtype': of_cell.model.get('dtype', ''),
    'copies': run_methods.copies(of_cell),
    'micro_batches': of_cell.accumulate,
    'augmentation': of_cell.data.crop,
    'epochs': of_cell.epochs,
    'plain_epochs': of_cell.get('plain_epochs', 0.0),
    **result,
  }
  del row['final']
  return row


@dataclasses.dataclass(frozen=True)
class _Programs:
  """The compiled programs of a study, each made by the first that asks.

  Attributes:
    data: of the study.
    found: the programs so far, by all that they are compiled for.
    measures: those so far, by all of a model that they depend on.
    asking: held while one looks what there is.
  """

  data: study_cell.Data
  found: dict[Any, Future[study_cell.Program]] = dataclasses.field(
    default_factory=dict
  )
  measures: dict[str, study_cell.Measures] = dataclasses.field(
    default_factory=dict
  )
  asking: threading.Lock = dataclasses.field(default_factory=threading.Lock)

  def measures_of(
    self, config: ml_collections.ConfigDict
  ) -> study_cell.Measures:
    """Those of a cell's own model, which a variant may change."""
    name = str((config.model.to_dict(), config.data.mean, config.data.std))
    with self.asking:
      if name not in self.measures:
        made = study_cell.make_measures(config, self.data.num_classes)
        self.measures[name] = made
      return self.measures[name]

  def of(
    self, config: ml_collections.ConfigDict, device: jax.Device
  ) -> study_cell.Program:
    static = tuple(
      (name, str(value))
      for name, value in checkpoint.fields(config).items()
      if name not in ('seed', *study_cell.TRACED)
    )
    with self.asking:
      is_first = (static, device) not in self.found
      program = self.found.setdefault((static, device), Future())
    # Others go on meanwhile, and compile programs of their own.
    if is_first:
      try:
        program.set_result(study_cell.make_program(config, self.data, device))
      except BaseException as error:
        program.set_exception(error)
    return program.result()


def run(
  config: ml_collections.ConfigDict, workdir: Path, *, command: str
) -> list[record.Row]:
  """Runs what has no row yet, and returns all rows.

  Args:
    config: of the study.
    workdir: receives study.csv.
    command: that repeats it, for the CSV.

  Raises:
    Mistake: for a config that cannot run, or a CSV of other columns.
  """
  _check_grid(config)
  workdir.mkdir(parents=True, exist_ok=True)
  path = workdir / 'study.csv'
  rows = record.read_rows(path)
  record.write_rows(path, rows)
  data = study_cell.load(config)
  devices = jax.devices()
  about = {
    'train_images': len(data.train.labels),
    'command': command,
    **record.describe_machine(devices),
  }
  programs, writing = _Programs(data), threading.Lock()
  free: queue.SimpleQueue[jax.Device] = queue.SimpleQueue()
  for _ in range(config.study.at_once):
    for device in devices:
      free.put(device)

  def run_cell(cell: Cell) -> None:
    of_cell = cell_config(config, cell)
    device = free.get()
    try:
      result = study_cell.run(
        of_cell,
        programs.of(of_cell, device),
        programs.measures_of(of_cell),
        data,
        final=cell.final,
      )
    finally:
      free.put(device)
    row = row_of(config, cell, result) | about
    with writing:
      rows.append(row)
      with path.open('a', newline='') as file:
        csv.DictWriter(file, record.FIELDS, lineterminator='\n').writerow(row)
      bar.write(record.describe(row))
      bar.update()

  def run_all(cells: Sequence[Cell]) -> None:
    # An ablation may be the same as its parent, but for the name.
    done = {(row['cell'], row['variant']) for row in rows}
    left = [x for x in cells if (identify(config, x), x.variant) not in done]
    bar.update(len(cells) - len(left))
    with ThreadPoolExecutor(free.qsize()) as pool:
      futures = [pool.submit(run_cell, cell) for cell in left]
      try:
        for future in futures:
          future.result()
      except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise

  def try_all(cells: Sequence[Cell]) -> dict[Cell, float]:
    run_all(cells)
    found = {row['cell']: row for row in rows}
    return {
      cell: float(found[identify(config, cell)].get('accuracy') or 0)
      for cell in cells
    }

  tried = trials(config)
  total = sum(
    len(x)
    for x in (
      tried,
      more_trials(config, dict.fromkeys(tried, 0.0)),
      finals(config, {}),
    )
  )
  with tqdm.tqdm(total=total, unit='cell', dynamic_ncols=True) as bar:
    accuracies = try_all(tried)
    accuracies |= try_all(more_trials(config, accuracies))
    run_all(finals(config, accuracies))
  return rows
