"""Meshes of either kind, and batches in the order of their groups."""

import math

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

CLOSE = {'rtol': 5e-5, 'atol': 5e-6}
KINDS = [AxisType.Auto, AxisType.Explicit]
BATCH, FEATURES = 32, 4


def make_mesh(*shape, names=('data', 'role'), kind=AxisType.Auto):
  devices, names = jax.devices()[: math.prod(shape)], names[: len(shape)]
  return jax.make_mesh(shape, names, (kind,) * len(shape), devices=devices)


def on(mesh, tree, *spec):
  return jax.device_put(tree, NamedSharding(mesh, P(*spec)))


def make_batches(num, size=BATCH):
  rng = np.random.default_rng(0)
  return [
    {
      'image': rng.normal(size=(size, FEATURES)).astype(np.float32),
      'y': rng.normal(size=(size,)).astype(np.float32),
    }
    for _ in range(num)
  ]


def dealt(batch, devices, micro_batches=1):
  """The batch in the order in which one device finds the same groups."""
  return jax.tree.map(
    lambda x: (
      x.reshape(devices, -1, micro_batches, *x.shape[1:])
      .swapaxes(0, 1)
      .reshape(x.shape)
    ),
    batch,
  )
