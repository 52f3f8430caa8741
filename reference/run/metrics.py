"""The run's record: a CSV, TensorBoard events and a figure of the curves."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import tensorboardX
from matplotlib.figure import Figure

Row = Mapping[str, float]

# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLORS = ('#0072B2', '#D55E00', '#009E73', '#CC79A7')


class Record(NamedTuple):
  """Where a run is recorded.

  Attributes:
    path: of the CSV.
    rows: all rows so far, those before a restart among them.
    writer: of the TensorBoard events; None where another process writes.
  """

  path: Path
  rows: list[Row]
  writer: tensorboardX.SummaryWriter | None


def read_rows(path: Path) -> list[Row]:
  """The rows of a metrics CSV, without the fields that are empty."""
  with path.open(newline='') as file:
    return [
      {name: float(value) for name, value in row.items() if value}
      for row in csv.DictReader(file)
    ]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
  """Writes a CSV with a column for every name that occurs in a row.

  The file is replaced as a whole, so that a kill leaves the old or the new.
  """
  names = list(dict.fromkeys(name for row in rows for name in row))
  unfinished = path.with_suffix('.unfinished')
  with unfinished.open('w', newline='') as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    for row in rows:
      writer.writerow({name: f'{value:.9g}' for name, value in row.items()})
  os.replace(unfinished, path)


def open_record(workdir: Path, *, last_step: int, write: bool = True) -> Record:
  """The record of a run that resumes after a step; later rows are dropped."""
  path = workdir / 'metrics.csv'
  rows = read_rows(path) if path.exists() else []
  return Record(
    path,
    [row for row in rows if row['step'] <= last_step],
    tensorboardX.SummaryWriter(
      str(workdir / 'tensorboard'), purge_step=last_step + 1
    )
    if write
    else None,
  )


def add(record: Record, row: Row) -> None:
  """Appends a row, which has a 'step', to the CSV and the events."""
  record.rows.append(row)
  if record.writer is None:
    return
  write_rows(record.path, record.rows)
  for name, value in row.items():
    if name != 'step':
      record.writer.add_scalar(name, value, int(row['step']))


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
  for branch, color in zip(branches(rows[0]), _COLORS, strict=False):
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
