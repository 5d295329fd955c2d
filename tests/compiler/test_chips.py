"""The table of chips against what Pallas knows of them."""

import jax
from jax.experimental.pallas import tpu as pltpu
import pytest

from sae_jax.ops import chip as chip_lib
from sae_jax.tpu import aot
from sae_jax.tpu.chips import CHIPS


@pytest.mark.parametrize('name', CHIPS)
def test_vectors_cores_and_vmem_are_as_pallas_knows_them(name):
  with jax.set_mesh(aot.one_chip(name)):
    info = pltpu.get_tpu_info()
    assert (chip_lib.SUBLANES, chip_lib.LANES) == (8, 128)
    assert (info.num_sublanes, info.num_lanes) == (8, 128)
    assert CHIPS[name].vmem_bytes == info.vmem_capacity_bytes
    assert chip_lib.vmem_bytes() == CHIPS[name].vmem_bytes
    assert chip_lib.cores() == (2 if name in ('v4', 'v5p') else 1)
    assert not chip_lib.interpret()
  # Control: outside of the mesh it is this machine that is asked about.
  assert chip_lib.interpret() and chip_lib.cores() == 1
