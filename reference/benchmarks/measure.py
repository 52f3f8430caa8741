"""Compiling steps, letting them take turns, and counting what they need."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import conadv_optax as conadv
from reference.benchmarks.steps import Row
from reference.run import models

# What is measured of a program, by column.
Figures = dict[str, float | str]


class Net(NamedTuple):
  """A model and its images.

  Attributes:
    name: in `NETS`.
    model: of the reference pipeline.
    batch_size: images in the batch of a step.
    image_size: their side in pixels.
  """

  name: str
  model: models.ResNet
  batch_size: int
  image_size: int


NETS = {
  'resnet18': Net(
    'resnet18',
    # Not with the stem for ImageNet: at 64 pixels it leaves 2 x 2 at the end,
    # and such convolutions take fifty times their arithmetic on a CPU.
    models.ResNet(1000, (2, 2, 2, 2), 64, 'basic', 'small', jnp.float32),
    # Small, so that the command takes minutes; 3 and 4 devices can share it.
    batch_size=12,
    image_size=64,
  ),
  'resnet50': Net(
    'resnet50',
    models.ResNet(
      1000, (3, 4, 6, 3), 64, 'bottleneck', 'imagenet', jnp.bfloat16
    ),
    batch_size=256,
    image_size=224,
  ),
  # For the tests.
  'tiny': Net(
    'tiny',
    models.ResNet(10, (1,), 4, 'basic', 'small', jnp.float32),
    batch_size=24,
    image_size=8,
  ),
}


class Program(NamedTuple):
  """A step, compiled for one order of its arguments.

  Attributes:
    compiled: takes the leaves of the carry in this order, and a batch.
    order: of the leaves.
    compile_seconds: from the Python function on.
  """

  compiled: jax.stages.Compiled
  order: np.ndarray
  compile_seconds: float


class Task(NamedTuple):
  """A row on its devices: a step, and what it takes.

  Attributes:
    step: of a carry and a batch.
    carry: shapes, dtypes and shardings.
    batch: likewise.
  """

  step: Any
  carry: Any
  batch: Any


def make_task(row: Row, net: Net, devices: Sequence[Any]) -> Task:
  """The step of a row on the first of these devices, which need not be there.

  The carry is the same on all, but for the queue, which is split.
  """
  size = int(np.prod(row.mesh))
  mesh = Mesh(
    np.array(devices[:size]).reshape(row.mesh),
    ('data', 'role'),
    axis_types=(AxisType.Auto, AxisType.Auto),
  )
  step = row.make(net.model, mesh)
  images = round(row.share * net.batch_size)

  def describe(shape: tuple[int, ...], dtype: Any, spec: P) -> Any:
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  side = net.image_size
  batch = {
    'image': describe((images, side, side, 3), jnp.float32, P('data')),
    'label': describe((images,), jnp.int32, P('data')),
  }

  def place(part: Any) -> Any:
    is_state = isinstance(part, conadv.ConAdvState)
    spec = P(None, ('data', 'role')) if is_state and size > 1 else P()
    queue, slot = (part.queue, part.slot) if is_state else (part, None)
    queue = jax.tree.map(lambda x: describe(x.shape, x.dtype, spec), queue)
    slot = jax.tree.map(lambda x: describe(x.shape, x.dtype, P()), slot)
    return conadv.ConAdvState(slot, queue) if is_state else queue

  carry = jax.tree.map(
    place,
    jax.eval_shape(step.init, jax.random.key(0), batch),
    is_leaf=lambda x: isinstance(x, conadv.ConAdvState),
  )
  return Task(step.step, carry, batch)


def compile_task(task: Task, seed: int) -> Program:
  """Compiles a step with the carry donated, as a training loop does.

  The order of a program's arguments alone moves its time on a CPU by a few
  percent, as buffers come to lie elsewhere. So each seed has another.
  """
  leaves, treedef = jax.tree.flatten(task.carry)
  order = np.random.default_rng(seed).permutation(len(leaves))
  place = np.argsort(order)

  def ordered(shuffled: list[jax.Array], batch: Any) -> Any:
    carry = jax.tree.unflatten(treedef, [shuffled[i] for i in place])
    carry, loss = task.step(carry, batch)
    new = jax.tree.leaves(carry)
    return [new[i] for i in order], loss

  own = [leaves[i] for i in order]
  start = time.perf_counter()
  compiled = (
    jax.jit(
      ordered,
      donate_argnums=0,
      out_shardings=([x.sharding for x in own], None),
    )
    .lower(own, task.batch)
    .compile()
  )
  return Program(compiled, order, time.perf_counter() - start)


def count(compiled: jax.stages.Compiled) -> Figures:
  """What the compiler says that a program needs, on each of its devices."""
  memory: Any = compiled.memory_analysis()
  cost: Any = compiled.cost_analysis()
  return {
    'flops': cost['flops'],
    'temporary_bytes': memory.temp_size_in_bytes,
    'memory_bytes': memory.argument_size_in_bytes
    + memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes,
  }


def compile_in_turns(
  tasks: Mapping[str, Task], orders: int
) -> dict[str, list[Program]]:
  """Every task in every order, one order after the other."""
  programs: dict[str, list[Program]] = {name: [] for name in tasks}
  rng = np.random.default_rng(0)
  for seed in range(orders):
    for name in rng.permutation(list(tasks)):
      programs[name].append(compile_task(tasks[name], seed))
  return programs


def run_in_turns(
  tasks: Mapping[str, Task],
  programs: Mapping[str, list[Program]],
  rounds: int,
) -> dict[str, np.ndarray]:
  """Seconds of each call; the first round warms up and is not counted.

  Each round has an order of its own, so that no program always follows the
  same one, and the entries of one place belong to the same round.
  """
  rng = np.random.default_rng(0)
  seconds: dict[str, list[float]] = {name: [] for name in tasks}
  for which in range(len(next(iter(programs.values())))):
    carries, batches = {}, {}
    for name, task in tasks.items():
      carries[name], batches[name] = _fill(task, programs[name][which])
    for turn in range(rounds + 1):
      for name in rng.permutation(list(tasks)):
        start = time.perf_counter()
        carries[name], loss = jax.block_until_ready(
          programs[name][which].compiled(carries[name], batches[name])
        )
        if turn > 0:
          seconds[name].append(time.perf_counter() - start)
        assert np.isfinite(loss), name
  return {name: np.array(times) for name, times in seconds.items()}


def _fill(task: Task, program: Program) -> tuple[list[jax.Array], Any]:
  """The carry's leaves in a program's order, and a batch, on its devices.

  Noise, because the time of a step does not depend on what it computes with.
  """
  rng = np.random.default_rng(0)

  def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
    if jnp.issubdtype(x.dtype, jnp.floating):
      # Positive, as variances are.
      values = rng.random(x.shape, np.float32) / 10
    else:
      values = np.zeros(x.shape)
    return jax.device_put(values.astype(x.dtype), x.sharding)

  leaves = jax.tree.leaves(task.carry)
  carry = [jnp.copy(fill(leaves[i])) for i in program.order]
  return carry, jax.tree.map(fill, task.batch)


def spread(name: str, values: np.ndarray) -> Figures:
  """Median and quartiles, as three columns."""
  low, middle, high = np.percentile(values, [25, 50, 75])
  return {name: middle, f'{name}_low': low, f'{name}_high': high}


def between(
  row: Mapping[str, Any], column: str, *, digits: int, scale: float = 1
) -> str:
  """The median, with quartiles where there are any; nothing if it lacks."""
  if column not in row:
    return ''
  text = f'{scale * row[column]:.{digits}f}'
  if f'{column}_low' in row:
    low, high = scale * row[f'{column}_low'], scale * row[f'{column}_high']
    text += f' ({low:.{digits}f}-{high:.{digits}f})'
  return text
