"""Rows of a store, in its order, on a mesh."""

import functools

import jax
from jax.sharding import Mesh

from sae_jax import mesh as mesh_lib
from sae_jax import store


def read_rows(
  data: store.Store, start: int, size: int, mesh: Mesh
) -> jax.Array:
  """Rows on the devices; a process reads what its own devices hold."""
  # Devices that differ in their latents alone hold the same rows.
  read = functools.cache(
    lambda first, stop: data.read_rows(start + first, start + stop)
  )
  return jax.make_array_from_callback(
    (size, data.manifest.d_model),
    mesh_lib.sharding(mesh, 'BD'),
    lambda index: read(*index[0].indices(size)[:2]),
  )
