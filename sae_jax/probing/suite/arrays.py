"""Arrays between the hosts and the mesh, in batches of one size."""

from collections.abc import Iterator
import functools

import jax
from jax.sharding import Mesh
import numpy as np

from sae_jax import mesh as mesh_lib


def batches(size: int, count: int, mesh: Mesh) -> Iterator[tuple[int, int]]:
  """First and past the last of batches of about a size; see `on_data`."""
  size += -size % mesh.shape['data']
  for start in range(0, count, size):
    yield start, min(start + size, count)


def on_data(of_BX: np.ndarray, size: int, mesh: Mesh) -> jax.Array:
  """An array that all processes have, split over the data shards.

  Args:
    of_BX: at most `size` rows, up to which the last one is repeated.
    size: a multiple of the shards, or made one.
    mesh: axes ("data", "latent").
  """
  size += -size % mesh.shape['data']
  short = [(0, size - len(of_BX)), *[(0, 0)] * (of_BX.ndim - 1)]
  whole = np.pad(of_BX, short, mode='edge')
  return jax.make_array_from_callback(
    whole.shape, mesh_lib.sharding(mesh, 'B'), lambda index: whole[index]
  )


def whole(tree, mesh: Mesh):
  """Inside jit: arrays that every process can read."""
  return jax.lax.with_sharding_constraint(tree, mesh_lib.sharding(mesh, ''))


def fetched(array: jax.Array, mesh: Mesh) -> np.ndarray:
  """An array on the host of every process, however it is split."""
  return to_host(jax.jit(functools.partial(whole, mesh=mesh))(array))


def to_host(array: jax.Array, count: int | None = None) -> np.ndarray:
  """An array of `whole` on the host; the first `count` of its rows."""
  return np.asarray(array.addressable_data(0))[:count]
