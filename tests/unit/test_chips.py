"""The table of chips, figure by figure."""

import dataclasses
import types

import jax
import pytest

from sae_jax.ops import chip as chip_lib
from sae_jax.ops import dispatch
from sae_jax.ops.adam_rows import tiles as adam_tiles
from sae_jax.ops.encode_topk import tiles as encode_tiles
from sae_jax.tpu import target
from sae_jax.tpu.chips import CHIPS

# FLOP/s; GiB of HBM; bytes a second of HBM, links and network; dimensions of
# the torus; most chips; MiB of VMEM; GHz; topology; megacore.
WRITTEN = {
  'v4': (
    *(2.75e14, 30.75, 1.228e12, 2.68e11, 6.25e9, 3, 4096),
    *(16, 1.05, 'v4:2x2x1', True),
  ),
  'v5e': (
    *(1.97e14, 15.75, 8.19e11, 2e11, 3.125e9, 2, 256),
    *(128, 1.5, 'v5e:2x2', False),
  ),
  'v5p': (
    *(4.59e14, 95.73, 2.765e12, 6e11, 6.25e9, 3, 6144),
    *(64, 1.75, 'v5p:2x2x1', False),
  ),
  'v6e': (
    *(9.18e14, 31.24, 1.64e12, 4e11, 1.25e10, 2, 256),
    *(128, 1.75, 'v6e:2x2', False),
  ),
  'tpu7x': (
    *(2.307e15, 189.48, 7.38e12, 6e11, 1.25e10, 3, 9216),
    *(64, 2.2, 'tpu7x:2x2x1', False),
  ),
}


def test_figures_are_those_written_here():
  table = {name: dataclasses.astuple(chip) for name, chip in CHIPS.items()}
  assert table == WRITTEN
  # Control: two figures of one chip in each other's place are seen.
  swapped = dataclasses.replace(
    CHIPS['v5p'], hbm_bandwidth=CHIPS['v5p'].ici_bandwidth
  )
  assert dataclasses.astuple(swapped) != WRITTEN['v5p']


def test_interpreted_kernels_are_laid_out_for_the_chips_they_name(monkeypatch):
  assert chip_lib.interpret()
  assert chip_lib.vmem_bytes() == 2**24
  assert chip_lib.vmem_bytes() == min(c.vmem_bytes for c in CHIPS.values())
  assert chip_lib.vmem_bytes(interpreted_as='v5p') == 2**26
  step = adam_tiles.Tile(block=128, group=64, vmem_bytes=9_175_040)
  assert adam_tiles.choose(2**17, 768, 9) == step
  shape = 4096, 4096, 131_072, 64, None
  want = encode_tiles.Tiles(
    tokens=256, bins=912, depth=1, kept=3, group=1, rows=48, lanes=256,
    unrolled=1,
  )  # fmt: skip
  assert encode_tiles.choose(*shape) == want
  # Control: what fits a v5p does not fit every chip.
  monkeypatch.setattr(encode_tiles, '_TEST_CHIP', 'v4')
  assert encode_tiles.choose(*shape) != want


@pytest.mark.parametrize(
  ('version', 'chosen'), [((0, 7, 2), 'gather'), ((0, 10, 2), 'pallas')]
)
def test_kernels_are_chosen_where_jax_compiles_them(
  version, chosen, monkeypatch
):
  monkeypatch.setattr(target, 'platform', lambda: 'tpu')
  monkeypatch.setattr(jax, '__version_info__', version)
  assert dispatch.choose(2**16, 32, None, 768) == chosen


@pytest.mark.parametrize(
  ('kind', 'platform'),
  [('TPU v5 lite', 'tpu'), ('cpu', 'cpu'), ('A100', jax.default_backend())],
)
def test_a_device_that_has_its_kind_alone_has_a_platform(
  kind, platform, monkeypatch
):
  mesh = types.SimpleNamespace(
    abstract_device=types.SimpleNamespace(device_kind=kind)
  )
  monkeypatch.setattr(jax.sharding, 'get_abstract_mesh', lambda: mesh)
  assert target.platform() == platform
  mesh.abstract_device.platform = 'other'
  assert target.platform() == 'other'
