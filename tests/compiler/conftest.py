"""Chips to compile for, and an interpreter that sees races."""

from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
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


@pytest.fixture
def races():
  """Whether the interpreter of a kernel has met a race, when called."""
  yield lambda: interpret_pallas_call.races.races_found
  pltpu.reset_tpu_interpret_mode_state()
