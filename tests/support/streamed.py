"""Rows that are computed from the text of a store, beside the store's own."""

import jax

from sae_jax import mesh as mesh_lib
from sae_jax.feed import text_rows
from tests.support import toy


def opened(store, url, shape=(1, 1), batch_rows=96, **changes):
  """Rows of a store's text, computed on the first devices.

  Args:
    store: an opened store of the toy.
    url: folder of the text.
    shape: of the mesh.
    batch_rows: see `text_rows.Recipe.open`.
    **changes: fields of the harvest's config that are others.
  """
  n_devices = shape[0] * shape[1]
  mesh = mesh_lib.make_mesh(*shape, devices=jax.devices()[:n_devices])
  recipe = text_rows.recipe(store.about, **changes)
  return recipe.open(str(url), store.site, toy.subject(), mesh, batch_rows)
