"""Consecutive rows of a store on a mesh."""

import functools

import jax
from jax.sharding import Mesh

from sae_jax import mesh as mesh_lib
from sae_jax import store


def read_rows(
  data: store.Store, start: int, size: int, mesh: Mesh
) -> jax.Array:
  """Rows start to start + size on the devices, [size, D] float32.

  Each process reads the rows that its own devices hold.
  """
  # Devices along the latent axis hold the same rows: they are read once.
  read = functools.cache(
    lambda first, stop: data.read_rows(start + first, start + stop)
  )
  return jax.make_array_from_callback(
    (size, data.manifest.d_model),
    mesh_lib.sharding(mesh, 'BD'),
    lambda index: read(*index[0].indices(size)[:2]),
  )
