"""Devices: the mesh ("data", "latent") and where every array lies on it."""

import dataclasses

from absl import logging
import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sae_jax.config import UserError

AXES = ('data', 'latent')


@dataclasses.dataclass(frozen=True)
class ShardingRules:
  """Which mesh axis splits which letter of an array's name."""

  B: str | None = 'data'
  N: str | None = 'latent'
  D: str | None = None

  def spec(self, letters: str) -> PartitionSpec:
    """The partition of an array whose name ends in these letters."""
    return PartitionSpec(*(getattr(self, letter) for letter in letters))


RULES = ShardingRules()


def sharding(mesh: Mesh, letters: str) -> NamedSharding:
  """The sharding of an array whose name ends in these letters."""
  return NamedSharding(mesh, RULES.spec(letters))


def make_mesh(data: int = 0, latent: int = 1) -> Mesh:
  """A mesh with axes ("data", "latent").

  Args:
    data: shards of the batch; 0 takes all devices that latent leaves.
    latent: shards of the latents.

  Raises:
    UserError: if the product is not the number of devices.
  """
  devices = jax.device_count()
  if latent < 1 or devices % latent:
    raise UserError(
      f'mesh_latent {latent} does not divide the {devices} devices'
    )
  data = data or devices // latent
  if data * latent != devices:
    raise UserError(
      f'mesh {data}x{latent} needs {data * latent} devices, there are '
      f'{devices}: use mesh_data {devices // latent}'
    )
  return jax.make_mesh((data, latent), AXES, axis_types=(AxisType.Auto,) * 2)


def check_divides(name: str, value: int, mesh: Mesh, axis: str) -> None:
  """Raises UserError with the next value that the mesh axis divides."""
  size = mesh.shape[axis]
  if value % size:
    better = -(-value // size) * size
    raise UserError(
      f'{name} {value} must be a multiple of the {axis} axis ({size}): '
      f'use {better}'
    )


def log_devices(workdir: str) -> None:
  """Logs what this process is: its index, its devices and the workdir."""
  logging.info(
    'process %d of %d, %d local of %d %s devices, workdir %s',
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
    jax.default_backend(),
    workdir,
  )
