"""The kernel that sorts rows for their top k: no races, fit for chips."""

import functools

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax.ops.top_k import api, kernel
from sae_jax.tpu import aot
from sae_jax.tpu.chips import CHIPS
from tests.support.top_k_checks import stable_top_k


@functools.partial(jax.jit, static_argnames=('k', 'block'))
def run(x_BN, k, block):
  return kernel.top_k(x_BN, k, block=block, interpret=True)


@pytest.mark.parametrize('batch, n, k', [(130, 40, 40), (2, 5, 1), (1, 300, 9)])
def test_other_shapes(batch, n, k):
  x_BN = np.random.default_rng(1).integers(0, 9, (batch, n)).astype(np.float32)
  for got, want in zip(run(x_BN, k, block=64), stable_top_k(x_BN, k)):
    np.testing.assert_array_equal(got, want)


def test_no_memory_is_raced_for_or_read_unwritten():
  x_BN = np.random.default_rng(0).integers(-2, 3, (3, 150)).astype(np.float32)
  vals, idx = kernel.top_k(
    x_BN,
    7,
    block=32,
    interpret=pltpu.InterpretParams(
      detect_races=True,
      uninitialized_memory='nan',
      out_of_bounds_reads='raise',
    ),
  )
  want_vals, want_idx = stable_top_k(x_BN, 7)
  np.testing.assert_array_equal(vals, want_vals)
  np.testing.assert_array_equal(idx, want_idx)
  assert not interpret_pallas_call.races.races_found


# What a batch that is done again, and the winners of many shards, are ranked
# by. The last is wide enough for buckets first.
@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize(
  'batch, n, k',
  [
    pytest.param(64, 4096, 32, marks=pytest.mark.chips),
    (512, 4096, 256),
    (64, 131_072, 64),
  ],
)
def test_it_compiles_for_every_chip(chip, batch, n, k):
  mesh = aot.one_chip(chip)
  x_BN = jax.ShapeDtypeStruct(
    (batch, n), jnp.float32, sharding=NamedSharding(mesh, P())
  )
  with jax.set_mesh(mesh):
    run = jax.jit(functools.partial(api.top_k, k=k, kernels=True))
    lowered = run.lower(x_BN)
    lowered.compile()
  assert 'tpu_custom_call' in lowered.as_text()
