"""How far a run is: a bar on a terminal, lines with the time elsewhere."""

import datetime
import sys

import tqdm

from reference.run import hosts, metrics


def make_bar(*, done: int, steps: int, batch_size: int) -> tqdm.tqdm:
  """A bar over images, which shows nothing in a log or on other hosts."""
  terminal = sys.stdout.isatty() and sys.stderr.isatty()
  return tqdm.tqdm(
    total=steps * batch_size,
    initial=done * batch_size,
    unit='img',
    unit_scale=True,
    dynamic_ncols=True,
    mininterval=1.0,
    disable=not (terminal and hosts.is_first()),
  )


def tell(bar: tqdm.tqdm, row: metrics.Row, *, steps: int) -> None:
  """Shows a row of the metrics.

  Args:
    bar: of `make_bar`.
    row: of the record.
    steps: of the whole run.
  """
  text = metrics.describe(row)
  if not bar.disable:
    bar.set_postfix_str(text.partition(', ')[2])
    if 'held_out_accuracy' in row:
      bar.write(text)
  elif hosts.is_first():
    now = datetime.datetime.now().astimezone().isoformat(' ', 'seconds')
    # Flushed, as a kill would take what is in the buffer.
    print(
      f'{now} {text}, {steps - row["step"]:.0f} steps left, '
      f'{row["images_per_second"]:.4g} images/s',
      flush=True,
    )
