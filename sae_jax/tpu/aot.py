"""Compiling for TPUs on machines without one, by libtpu.

`prepare` must run before anything in this process uses libtpu. A program that
is compiled for `mesh` is the one that a pod would run.
"""

import os
import re
import signal
import threading

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax.tpu.chips import CHIPS

_ENVIRONMENT = {
  # Without this a second process dies on libtpu's lock file.
  'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
  # Without these it looks for the metadata server of a TPU machine.
  'TPU_SKIP_MDS_QUERY': '1',
  'TPU_WORKER_HOSTNAMES': 'localhost',
  'TPU_ACCELERATOR_TYPE': 'v5litepod-4',
  'TPU_STDERR_LOG_LEVEL': '3',
  'TF_CPP_MIN_LOG_LEVEL': '3',
}


def prepare() -> None:
  """Sets up libtpu as a compiler; on a machine with TPUs too."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def devices(topology: str, num_slices: int = 1) -> list[jax.Device]:
  """The devices of a topology such as 'v5p:4x4x4', for compilation alone.

  Raises:
    UserError: if the name is unknown or libtpu is not installed.
  """
  prepare()
  if not re.fullmatch(r'\w+:\d+(x\d+)*', topology):
    raise errors.UserError(
      f'topology {topology!r} is not known: write it as v5p:4x4x4 or v6e:16x16'
    )
  chip, shape = topology.split(':')
  settings = {}
  if chip in CHIPS and CHIPS[chip].megacore:
    settings['chip_config_name'] = 'megacore'
  if num_slices > 1:
    settings['num_slices'] = num_slices
  if set(shape.split('x')) == {'1'}:
    settings['chips_per_host_bounds'] = (1, 1, 1)
  try:
    description = topologies.get_topology_desc(
      platform='tpu', topology_name=topology, **settings
    )
  except Exception as error:
    reason = ' '.join(str(error).split())
    if 'libtpu' in reason:
      raise errors.UserError(
        f'the TPU compiler is missing ({reason}): pip install libtpu'
      ) from error
    raise errors.UserError(
      f'the TPU compiler refuses topology {topology!r}: {reason}'
    ) from error
  finally:
    _keep_sigterm()
  return list(description.devices)


def _keep_sigterm() -> None:
  """Undoes libtpu's handler, which writes a page of addresses at SIGTERM."""
  handler = signal.getsignal(signal.SIGTERM)
  main = threading.current_thread() is threading.main_thread()
  if main and handler is not None:
    signal.signal(signal.SIGTERM, handler)


def mesh(
  topology: str, data: int = 0, latent: int = 1, num_slices: int = 1
) -> Mesh:
  """A mesh of the topology's devices, as `mesh.make_mesh` makes it."""
  return mesh_lib.make_mesh(data, latent, devices(topology, num_slices))


def one_chip(chip: str) -> Mesh:
  """A mesh of one device of a chip in `chips.CHIPS`."""
  return mesh_lib.make_mesh(1, 1, devices(CHIPS[chip].topology)[:1])
