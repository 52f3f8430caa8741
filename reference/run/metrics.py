"""The run's record: a CSV, TensorBoard events and a figure of the curves."""

import contextlib
import csv
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import ml_collections
import tensorboardX
from matplotlib.figure import Figure

from reference.data import named
from reference.run import storage

Row = Mapping[str, float]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7')


class Writer(Protocol):
  """What `run.writer` may make, such as one of `clu.metric_writers`."""

  def write_scalars(self, step: int, scalars: Row) -> None:
    """Takes the metrics of a step."""

  def close(self) -> None:
    """Waits until all is written."""


class _TensorBoard:
  """Event files."""

  def __init__(self, folder: Path, *, last_step: int):
    self._folder = folder
    self._writer = tensorboardX.SummaryWriter(
      str(folder), purge_step=last_step + 1
    )

  def write_scalars(self, step: int, scalars: Row) -> None:
    with storage.explained(self._folder):
      for name, value in scalars.items():
        self._writer.add_scalar(name, value, step)

  def close(self) -> None:
    self._writer.close()


class Record(NamedTuple):
  """Where a run is recorded.

  Attributes:
    path: of the CSV.
    rows: all rows so far, those before a restart among them.
    writers: beside the CSV; None where another process writes.
    check: raises where the folder is another run's by now.
  """

  path: Path
  rows: list[Row]
  writers: Sequence[Writer] | None
  check: Callable[[], None]


def read_rows(path: Path) -> tuple[list[Row], str]:
  """The rows of a metrics CSV, without the fields that are empty.

  Returns:
    Those that can be read, and what is wrong with the others; '' for nothing.
  """
  text = path.read_bytes().decode('utf-8-sig', 'replace')
  lines = text.replace('\0', '').splitlines() or ['']
  # Spreadsheets write other separators.
  separator = max(',;\t', key=lines[0].count)
  try:
    names, *values = csv.reader(lines, delimiter=separator)
  except csv.Error as error:
    return [], str(error)
  if 'step' not in names:
    return [], 'its first line does not name a column `step`'
  rows: list[Row] = []
  for line in values:
    with contextlib.suppress(ValueError):
      pairs = zip(names, line, strict=True)
      row = {name: float(value) for name, value in pairs if value}
      if 'step' in row and 'epoch' in row:
        rows.append(row)
  if separator != ',':
    return rows, f'its fields are separated by {separator!r}'
  if len(rows) < len(values) or '\0' in text:
    return rows, 'some of its lines are no rows'
  return rows, ''


def write_rows(path: Path, rows: Sequence[Row]) -> None:
  """Writes a CSV with a column for every name that occurs in a row.

  The file is replaced as a whole, so that a kill, or a loss of power, leaves
  the old or the new.
  """
  names = list(dict.fromkeys(name for row in rows for name in row))
  unfinished = path.with_suffix('.unfinished')
  with unfinished.open('w', newline='') as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for row in rows:
      writer.writerow({name: f'{value:.9g}' for name, value in row.items()})
    file.flush()
    os.fsync(file.fileno())
  os.replace(unfinished, path)


def _old_rows(path: Path, *, write: bool) -> list[Row]:
  """The rows of before. A damaged file is kept, under another name."""
  if not path.exists():
    return []
  rows, damage = read_rows(path)
  if damage and write:
    names = (
      path.with_name(f'metrics_damaged_{n}.csv') for n in itertools.count(1)
    )
    kept = next(name for name in names if not name.exists())
    path.rename(kept)
    print(
      f'{path} is damaged: {damage}. It is kept as {kept}; the run goes on, '
      f'and its record with the {len(rows)} row(s) that could be read.',
      flush=True,
    )
    if rows:
      write_rows(path, rows)
  return rows


def make_writer(
  config: ml_collections.ConfigDict, workdir: Path
) -> list[Writer]:
  """What the function that `run.writer` names makes of config and folder.

  Raises:
    Mistake: when there is no such function.
  """
  if not (name := config.run.get('writer')):
    return []
  return [named.load(name, 'run.writer')(config, workdir=workdir)]


def open_record(
  workdir: Path,
  *,
  last_step: int,
  write: bool = True,
  writers: Sequence[Writer] = (),
  check: Callable[[], None] = lambda: None,
) -> Record:
  """The record of a run that resumes after a step; later rows are dropped.

  Args:
    workdir: of the run.
    last_step: of the checkpoint.
    write: whether this process writes.
    writers: beside the CSV and TensorBoard.
    check: raises where the work folder is another run's by now.
  """
  path = workdir / 'metrics.csv'
  rows = _old_rows(path, write=write)
  if write:
    events = _TensorBoard(workdir / 'tensorboard', last_step=last_step)
    writers = [events, *writers]
  return Record(
    path,
    [row for row in rows if row['step'] <= last_step],
    writers if write else None,
    check,
  )


def close(record: Record) -> None:
  """Waits until the writers have written all."""
  for writer in record.writers or ():
    writer.close()


def add(record: Record, row: Row) -> None:
  """Appends a row, which has a 'step', to the CSV and tells the writers."""
  record.rows.append(row)
  if record.writers is None:
    return
  record.check()
  with storage.explained(record.path.parent):
    write_rows(record.path, record.rows)
  scalars = {name: value for name, value in row.items() if name != 'step'}
  for writer in record.writers:
    writer.write_scalars(int(row['step']), scalars)


def branches(row: Row) -> list[str]:
  """The branches whose losses a row holds, main first."""
  names = [
    name.removeprefix('loss_') for name in row if name.startswith('loss_')
  ]
  return sorted(names, key=lambda name: (name != 'main', name))


def describe(row: Row) -> str:
  """A row as a line for the console."""
  words = [f'step {row["step"]:.0f}', f'epoch {row["epoch"]:.1f}']
  words += [
    f'{_label(branch)} loss {row["loss_" + branch]:.3f}'
    for branch in branches(row)
  ]
  if 'noise_scale' in row:
    words.append(f'noise scale {row["noise_scale"]:.0f}')
  if 'held_out_accuracy' in row:
    words.append(f'held-out accuracy {row["held_out_accuracy"]:.2%}')
  return ', '.join(words)


def _label(branch: str) -> str:
  return 'clean' if branch == 'main' else branch


def draw(path: Path, rows: Sequence[Row]) -> None:
  """Draws loss and accuracy by branch, and held out, over epochs."""

  def curve(name: str, scale: float) -> tuple[list[float], list[float]]:
    points = [(row['epoch'], scale * row[name]) for row in rows if name in row]
    return [x for x, _ in points], [y for _, y in points]

  figure = Figure(figsize=(9, 3.6), layout='constrained')
  losses, accuracies = figure.subplots(1, 2)
  # Of any row, as a branch may set in late.
  every = {name: x for row in rows for name, x in row.items()}
  for branch, color in zip(branches(every), _COLORS, strict=False):
    label = f'{_label(branch)}, training'
    losses.plot(*curve(f'loss_{branch}', 1), color=color, label=label)
    accuracies.plot(
      *curve(f'accuracy_{branch}', 100), color=color, label=label, alpha=0.6
    )
  accuracies.plot(
    *curve('held_out_accuracy', 100),
    color='black',
    marker='.',
    label='held out',
  )
  losses.set(
    xlabel='epoch', ylabel='loss', ylim=(0, None), title='Training loss'
  )
  accuracies.set(
    xlabel='epoch',
    ylabel='accuracy (%)',
    ylim=(0, 102),
    title=f'Held-out accuracy {rows[-1]["held_out_accuracy"]:.2%}',
  )
  for axes in (losses, accuracies):
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    axes.spines[['top', 'right']].set_visible(False)
  figure.savefig(path, dpi=150)
