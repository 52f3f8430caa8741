"""Devices of TPU slices that are not there, which the compiler takes."""

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh

from reference.command import Mistake

# What the compiler lets a program have, by its own error for one too large. Of
# v3 a device is a core, with half of a chip's 32 GiB of HBM; of the others it
# is a chip, with 32 GiB, 16 GB, 95 GB and 32 GB:
# https://docs.cloud.google.com/tpu/docs/v3, and v4, v5e, v5p, v6e.
HBM_GIB = {
  'TPU v3': 15.48,
  'TPU v4': 30.75,
  'TPU v5 lite': 15.75,
  'TPU v5': 95.74,
  'TPU v6 lite': 31.25,
}


def open_topology(name: str) -> list[jax.Device]:
  """The devices of a slice, none of which need be there.

  Args:
    name: of the slice, 'v3:16x32' for 16 x 32 chips of two cores.

  Raises:
    ImportError: without libtpu.
    Mistake: for a slice that does not exist.
  """
  if importlib.util.find_spec('libtpu') is None:
    raise ImportError(
      'The compiler for TPUs is in libtpu, which is not installed. Run `pip '
      "install '.[reference,tpu]'`."
    )
  # No question to a metadata server that only TPU hosts have; and another
  # process may compile too, as no device is taken.
  os.environ['TPU_SKIP_MDS_QUERY'] = '1'
  os.environ['ALLOW_MULTIPLE_LIBTPU_LOAD'] = '1'
  # JAX drives a v4 chip as one device, and a v3 chip as two.
  options: dict[str, Any] = {}
  if name.startswith('v4'):
    options['chip_config_name'] = 'megacore'
  if set(name.partition(':')[2].split('x')) == {'1'}:
    # A chip alone is not a part of a host's four.
    options['chips_per_host_bounds'] = (1, 1, 1)
  examples = (
    'Take for example --topology=v3:2x2 (4 chips, 8 cores), v3:16x32 (512 '
    'chips, 1,024 cores), v4:4x8x8, v5e:1x1, v5e:16x16, v5p:4x4x8 or v6e:16x16.'
  )
  try:
    devices: Sequence[Any] = topologies.get_topology_desc(
      platform='tpu', topology_name=name, **options
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise Mistake(
      '`topology` must name a slice by its generation and its chips along each '
      f'axis. Given {name!r}: {error}. {examples}'
    ) from error
  kind = devices[0].device_kind
  if kind not in HBM_GIB:
    raise Mistake(
      '`topology` must be of a kind whose memory is known here, '
      f'{", ".join(HBM_GIB)}. Given {name!r}, of {kind}. {examples}'
    )
  return list(devices)


def make_mesh(topology: str, batch_size: int) -> Mesh:
  """The devices of a slice along one axis, as `parts.make_mesh`.

  Raises:
    Mistake: when the batch does not divide evenly over them.
  """
  devices = open_topology(topology)
  if batch_size % len(devices):
    nearest = max(1, round(batch_size / len(devices))) * len(devices)
    raise Mistake(
      'Every device takes the same share of a batch, so `batch_size` must be a '
      f'multiple of the number of devices. Given {batch_size} on the '
      f'{len(devices)} devices of {topology}. Take another slice, or the '
      f'nearest batch: `--config.batch_size={nearest}`.'
    )
  return Mesh(np.array(devices), ('data',), axis_types=(AxisType.Auto,))
