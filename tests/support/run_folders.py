"""What a run left in its work folder."""

import csv

import jax
import numpy as np
import orbax.checkpoint as ocp


def read_csv(workdir):
  with (workdir / 'metrics.csv').open(newline='') as file:
    return list(csv.DictReader(file))


def rows_without_speed(workdir):
  rows = read_csv(workdir)
  for row in rows:
    del row['images_per_second']
  return rows


def saved(workdir, number):
  """All that a checkpoint holds, as arrays and plain values."""
  with ocp.CheckpointManager(workdir / 'checkpoints') as manager:
    state = manager.restore(
      number, args=ocp.args.Composite(state=ocp.args.StandardRestore())
    ).state
  folder = workdir / 'checkpoints' / str(number) / 'data'
  [position] = [path.read_text() for path in folder.glob('process_*')]
  return state, position


def steps_saved(workdir):
  return sorted(
    int(path.name)
    for path in (workdir / 'checkpoints').iterdir()
    if path.name.isdigit()
  )


def assert_equal(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
    if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
      a, b = jax.random.key_data(a), jax.random.key_data(b)
    np.testing.assert_array_equal(a, b)
