"""The mesh ("data", "latent") of devices and the sharding of every array."""

from collections.abc import Sequence
import dataclasses
import re
from typing import Any, TypeVar

from absl import logging
import jax
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from sae_jax import errors

AXES = ('data', 'latent')
_Struct = TypeVar('_Struct')


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


def make_mesh(
  data: int = 0, latent: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
  """A mesh with axes ("data", "latent").

  If there are several slices, the data axis goes across them: links between
  slices are slow, and the latents exchange values for every token.

  Args:
    data: number of shards of the batch; 0 for all devices that latent leaves.
    latent: number of shards of the latents.
    devices: devices to use; None for all.

  Raises:
    UserError: if the product is not the number of devices, or the latents of
      a shard would lie on two slices.
  """
  devices = jax.devices() if devices is None else devices
  count = len(devices)
  if latent < 1 or count % latent:
    raise errors.UserError(
      f'mesh_latent {latent} does not divide the {count} devices'
    )
  data = data or count // latent
  if data * latent != count:
    raise errors.UserError(
      f'mesh {data}x{latent} needs {data * latent} devices, there are '
      f'{count}: use mesh_data {count // latent}'
    )
  auto = (AxisType.Auto,) * 2
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if slices == 1:
    # A mesh axis may take a part of a physical one: 4 x 64 of 16 x 16 chips.
    grid = mesh_utils.create_device_mesh(
      (data, latent), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, AXES, axis_types=auto)
  if data % slices:
    raise errors.UserError(
      f'mesh_data {data} must be a multiple of the {slices} slices: use '
      f'mesh_latent {count // slices} or a divisor of it'
    )
  grid = mesh_utils.create_hybrid_device_mesh(
    (data // slices, latent), (slices, 1), devices
  )
  return Mesh(grid, AXES, axis_types=auto)


def one_device() -> Mesh:
  """A mesh of this process's first device alone."""
  return make_mesh(1, 1, jax.local_devices()[:1])


def check_divides(
  name: str,
  value: int,
  mesh: Mesh | AbstractMesh,
  axis: str,
  micro_batches: int = 1,
) -> None:
  """Raises UserError, with the nearest value that fits, unless shards are even.

  Args:
    name: the option.
    value: its value.
    mesh: the mesh.
    axis: the axis over which it is sharded.
    micro_batches: parts into which each shard is cut.
  """
  parts = mesh.shape[axis] * micro_batches
  if value % parts:
    times = f' times micro_batches ({micro_batches})' * (micro_batches > 1)
    near = max(1, (value + parts // 2) // parts) * parts
    raise errors.UserError(
      f'{name} {value} must be a multiple of the {axis} axis '
      f'({mesh.shape[axis]}){times}: use --{name}={near}'
    )


def start_processes(
  coordinator: str, num_processes: int = 0, process_id: int = -1
) -> None:
  """Joins this process with the others of the run. Call it before using JAX.

  Args:
    coordinator: '' for a run of one process, 'auto' where JAX finds the others
      by itself (TPU slices, GKE, Slurm), or the first process's host:port.
    num_processes: number of processes, with host:port.
    process_id: number of this process, from 0, with host:port.

  Raises:
    UserError: if the numbers do not fit, or 'auto' finds no cluster.
  """
  if not coordinator:
    return
  if coordinator == 'auto':
    try:
      jax.distributed.initialize()
    except ValueError as error:
      raise errors.UserError(
        f'coordinator auto found no cluster ({error}): give host:port with '
        'num_processes and process_id'
      ) from error
    return
  if not 0 <= process_id < num_processes:
    raise errors.UserError(
      f'process_id {process_id} must be between 0 and num_processes '
      f'{num_processes} - 1'
    )
  jax.distributed.initialize(coordinator, num_processes, process_id)


def log_devices(workdir: str) -> None:
  """Logs this process's index, its devices and the workdir."""
  logging.info(
    'process %d of %d, %d local of %d %s devices, workdir %s',
    jax.process_index(),
    jax.process_count(),
    jax.local_device_count(),
    jax.device_count(),
    jax.default_backend(),
    workdir,
  )


def letters(name: str) -> str:
  """The axes that a name ends in, `'ND'` of `w_dec_ND`; '' of a scalar's."""
  axes = re.search(r'_([A-Z]+)$', name)
  return axes.group(1) if axes else ''


def _leaf_letters(path: tuple[Any, ...]) -> str:
  key = path[-1]
  return letters(str(getattr(key, 'name', getattr(key, 'key', key))))


def specs(tree: Any) -> Any:
  """Partitions of a tree's arrays, from the names of their fields or keys."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: RULES.spec(_leaf_letters(path)), tree
  )


def shardings(tree: Any, mesh: Mesh) -> Any:
  """Shardings of a tree's arrays, from the names of their fields or keys."""
  return jax.tree_util.tree_map_with_path(
    lambda path, _: sharding(mesh, _leaf_letters(path)), tree
  )


def specs_of(kind: type[_Struct]) -> _Struct:
  """Partitions of a dataclass of arrays, from the names of its fields."""
  return kind(
    **{
      field.name: specs_of(field.type)
      if dataclasses.is_dataclass(field.type)
      else RULES.spec(letters(field.name))
      for field in dataclasses.fields(kind)
    }
  )
