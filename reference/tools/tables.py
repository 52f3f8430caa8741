"""Tables, as CSV and as Markdown."""

import csv
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

Row = dict[str, float | str]


def print_markdown(rows: Sequence[Mapping[str, str]]) -> None:
  """A table without the columns that are empty in every row."""
  names = [x for x in rows[0] if any(row[x] for row in rows)] if rows else []
  if names:
    print(f'| {" | ".join(names)} |\n|{"---|" * len(names)}')
  for row in rows:
    print(f'| {" | ".join(row[name] for name in names)} |')


def mean_text(numbers: Sequence[float], digits: int) -> str:
  """Mean and sample standard deviation, as 87.42 ± 0.15; of one, itself."""
  mean = f'{statistics.fmean(numbers):.{digits}f}'
  if len(numbers) == 1:
    return mean
  return f'{mean} ± {statistics.stdev(numbers):.{digits}f}'


def standard_error(numbers: Sequence[float]) -> float:
  """That of the mean of two or more."""
  return statistics.stdev(numbers) / math.sqrt(len(numbers))


def write_csv(path: Path, rows: Sequence[Row]) -> None:
  """A column for each name that occurs; what a row lacks stays empty."""
  path.parent.mkdir(parents=True, exist_ok=True)
  names = list(dict.fromkeys(name for row in rows for name in row))
  with path.open('w', newline='') as file:
    writer = csv.DictWriter(file, names)
    writer.writeheader()
    writer.writerows(rows)


def to_number(text: str) -> float | str:
  """A cell of a CSV: a number where it is one."""
  try:
    return float(text)
  except ValueError:
    return text


def read_csv(path: Path) -> list[Row]:
  """The rows of `write_csv`, numbers as numbers."""

  with path.open(newline='') as file:
    return [
      {name: to_number(text) for name, text in row.items() if text}
      for row in csv.DictReader(file)
    ]
