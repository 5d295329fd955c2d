"""Going through the rows of a decoder on its mesh, a block at a time.

The rows are split over "latent"; the devices of "data", which hold the same
rows, share them out.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from sae_jax import errors, progress
from sae_jax import mesh as mesh_lib

# What a block has of scores, of which a program holds a few.
_BLOCK_BYTES = 2**27
_MOST_ROWS = 1024
# Of a call: seconds of two cores, so that it can be stopped and shows how far
# it is, and more work on a TPU than it takes to send the rows round.
_CALL_BLOCKS = 16

# The partition of what a program gives for `Blocks.rows`.
SHARES = PartitionSpec(('latent', 'data'))


@dataclasses.dataclass(frozen=True)
class Blocks:
  """How the devices go through the rows; static under jit.

  Attributes:
    mesh: of the rows.
    n_own: rows of a shard of the latents.
    rows: rows of a block.
    per_call: blocks of a device in a call.
    calls: calls until all rows are done.
  """

  mesh: Mesh
  n_own: int
  rows: int
  per_call: int
  calls: int

  @property
  def share(self) -> int:
    """Rows of a device, of its shard's."""
    return -(-self.n_own // self.mesh.shape['data'])

  def places(self, call: jax.Array) -> jax.Array:
    """Which rows of its shard this device does in a call, [per_call, rows].

    Past the end the last one, again and again. Inside shard_map.
    """
    first = jax.lax.axis_index('data') * self.share
    first += call * self.per_call * self.rows
    place = first + jnp.arange(self.per_call * self.rows, dtype=jnp.int32)
    place = jnp.minimum(place, self.n_own - 1)
    return place.reshape(self.per_call, self.rows)


def on_mesh(w_ND: jax.Array | np.ndarray) -> jax.Array:
  """Rows on a mesh ("data", "latent"): their own, or else of one device."""
  if isinstance(w_ND, jax.Array) and isinstance(w_ND.sharding, NamedSharding):
    return w_ND
  device = jax.local_devices()[:1]
  mesh = mesh_lib.make_mesh(1, 1, device)
  return jax.device_put(w_ND, mesh_lib.sharding(mesh, 'ND'))


def blocks_of(w_ND: jax.Array, width: int, rows: int = 0) -> Blocks:
  """How to go through rows with float32 scores of so many others at a time.

  Args:
    w_ND: rows on a mesh.
    width: scores of a row that are held at once.
    rows: most rows of a block; 0 for what the memory allows.
  """
  mesh = w_ND.sharding.mesh
  n_own = w_ND.shape[0] // mesh.shape['latent']
  share = -(-n_own // mesh.shape['data'])
  if not rows:
    rows = max(8, min(_MOST_ROWS, _BLOCK_BYTES // (4 * width)))
    rows = 2 ** (rows.bit_length() - 1)
  rows = min(rows, share)
  blocks = -(-share // rows)
  # As even as they can be, and no more calls for it.
  calls = -(-blocks // _CALL_BLOCKS)
  return Blocks(mesh, n_own, rows, -(-blocks // calls), calls)


def run(
  program: Callable[..., Any], blocks: Blocks, name: str, *arrays: Any
) -> Any:
  """Runs `program(blocks, *arrays, call)` until all rows are done.

  Args:
    program: jitted; gives arrays [rows, ...] partitioned by `SHARES`, in each
      device the results for its `Blocks.places`.
    blocks: static.
    name: of what is done, for the progress.
    *arrays: further arguments.

  Returns:
    Its arrays for all rows in order, split over "latent" as the rows are.
  """
  parts = []
  total = blocks.n_own * blocks.mesh.shape['latent']
  with progress.bar(total=total, unit='latent', desc=name) as bar:
    for call in range(blocks.calls):
      parts.append(program(blocks, *arrays, np.int32(call)))
      # One call ahead of what is done.
      jax.block_until_ready(parts[max(0, call - 1)])
      bar.update(total // blocks.calls)
    out = jax.block_until_ready(_joined(blocks, parts))
    bar.update(total - total // blocks.calls * blocks.calls)
  return out


@functools.partial(jax.jit, static_argnums=0)
def _joined(blocks: Blocks, parts: list[Any]) -> Any:
  data, latent = (blocks.mesh.shape[axis] for axis in ('data', 'latent'))

  def join(*calls):
    tail = calls[0].shape[1:]
    split = (latent, data, blocks.per_call * blocks.rows, *tail)
    rows = jnp.concatenate([a.reshape(split) for a in calls], axis=2)
    rows = rows[:, :, : blocks.share]
    rows = rows.reshape(latent, data * blocks.share, *tail)[:, : blocks.n_own]
    rows = rows.reshape(latent * blocks.n_own, *tail)
    latents = mesh_lib.sharding(blocks.mesh, 'N')
    return jax.lax.with_sharding_constraint(rows, latents)

  return jax.tree.map(join, *parts)


def replicated(tree: Any, mesh: Mesh) -> Any:
  """Arrays, whole on each device of a mesh, of any process's devices.

  Args:
    tree: arrays of this process, the same in each; or of a mesh of these
      devices.
    mesh: the mesh.
  """
  everywhere = NamedSharding(mesh, PartitionSpec())

  def put(array):
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
      return jax.jit(lambda a: a, out_shardings=everywhere)(array)
    if everywhere.is_fully_addressable:
      return jax.device_put(array, everywhere)
    array = np.asarray(array)
    return jax.make_array_from_callback(
      array.shape, everywhere, lambda index: array[index]
    )

  return jax.tree.map(put, tree)


def held(array: jax.Array) -> dict[int, list[tuple[int, int]]]:
  """Which rows the devices of each process hold.

  Args:
    array: a global array, the first axis split over "latent".

  Returns:
    Process -> first row and one past the last of each part, in order. Processes
    along "data" hold the same rows.
  """
  parts = {}
  indices = array.sharding.devices_indices_map(array.shape)
  for device, (rows, *_) in indices.items():
    start, stop, _ = rows.indices(array.shape[0])
    parts.setdefault(device.process_index, set()).add((start, stop))
  return {process: sorted(parts[process]) for process in sorted(parts)}


def local(array: jax.Array, first: int, stop: int) -> np.ndarray:
  """Rows first to stop of such an array, which this process's devices hold."""
  shards = {
    shard.index[0].start or 0: shard.data for shard in array.addressable_shards
  }
  parts = [
    _cut(shards[start], max(0, first - start), stop - start)
    for start in sorted(shards)
    if start < stop and first < start + len(shards[start])
  ]
  return np.concatenate(parts) if len(parts) > 1 else parts[0]


def _cut(rows: jax.Array, first: int, stop: int) -> np.ndarray:
  # A slice is compiled for each shape and device: rows that are in the host's
  # memory, or that are all asked for, need none.
  whole = first == 0 and stop >= len(rows)
  if whole or rows.device.platform == 'cpu':
    return np.asarray(rows)[first:stop]
  return np.asarray(rows[first:stop])


def check_finite(rows_NJ: jax.Array, what: str, remedy: str) -> None:
  """Raises UserError, with its number, for a latent that is not finite.

  Args:
    rows_NJ: a row of each latent.
    what: the rows are, in words.
    remedy: of one that is not finite.
  """
  first = int(_first_not_finite(rows_NJ))
  if first < rows_NJ.shape[0]:
    raise errors.UserError(
      f'the {what} of latent {first} are not finite: {remedy}'
    )


@jax.jit
def _first_not_finite(rows_NJ):
  n = rows_NJ.shape[0]
  finite_N = jnp.isfinite(rows_NJ).all(-1)
  return jnp.where(finite_N, n, jnp.arange(n)).min()


def check_decoder(w_dec_ND: jax.Array) -> None:
  """Raises UserError, with its number, for a row that is not finite."""
  remedy = 'training diverged, give another run'
  check_finite(w_dec_ND, 'decoder weights', remedy)
