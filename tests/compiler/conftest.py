"""Chips to compile for."""

import pytest

from sae_jax.plan import meshes
from sae_jax.tpu import slices as slices_lib


@pytest.fixture(scope='module')
def v5e():
  """Four chips to compile for."""
  return slices_lib.find('v5e:2x2')


@pytest.fixture(scope='module')
def line(v5e):
  """A mesh of them, all along the latents."""
  return meshes.make_mesh(v5e, 1, 4)
