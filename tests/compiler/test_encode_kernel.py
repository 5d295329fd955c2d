"""The encoder's kernel: of all shapes, free of races, fit for chips."""

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from sae_jax import errors
from sae_jax.ops import dispatch, sorting_network
from sae_jax.ops.encode_topk import exact, kernel
from sae_jax.ops.encode_topk import tiles as tiles_lib
from sae_jax.tpu import aot
from sae_jax.tpu.chips import CHIPS
from tests.support import chip_shapes
from tests.support.encode_runs import GROUPED, run, TILES
from tests.support.top_k_checks import stable_top_k

# Batch, latents, width, k: ragged tokens, latents that end within a block and
# within a tile of rows, fewer than a block, one active latent, and all.
SHAPES = [
  (130, 301, 128, 5),
  (3, 50, 384, 1),
  (7, 1000, 128, 16),
  (2, 40, 256, 40),
]


@pytest.mark.parametrize('tiles', [TILES, GROUPED], ids=['whole', 'grouped'])
@pytest.mark.parametrize('shape', SHAPES)
def test_products_and_shapes_equal_the_dense_ones(shape, tiles):
  batch, n, d, k = shape
  rng = np.random.default_rng(1)
  x_BD, w_ND = rng.standard_normal((batch, d)), rng.standard_normal((n, d))
  b_N = rng.standard_normal(n)
  vals, idx, _, promised = run(
    *(a.astype(np.float32) for a in (x_BD, w_ND, b_N)),
    np.ones(n, bool),
    k,
    tiles,
  )
  assert promised == 1
  want_vals, want_idx = stable_top_k(x_BD @ w_ND.T + b_N, k)
  np.testing.assert_array_equal(idx, want_idx)
  np.testing.assert_allclose(vals, want_vals, rtol=1e-5, atol=1e-5)


# Runs of 16 are those of a TPU.
@pytest.mark.parametrize('run', [4, 16])
@pytest.mark.parametrize('k, candidates', [(100, 128), (24, 200), (1, 8)])
def test_the_network_sorts_any_number_of_candidates(
  monkeypatch, k, candidates, run
):
  monkeypatch.setattr(sorting_network, '_run', lambda: run)
  vals_RT = np.random.default_rng(2).integers(0, 20, (candidates, 128))
  vals_RT = vals_RT.astype(np.float32)
  steps = 8 * sorting_network.scratch_steps(candidates, k)

  def body(in_ref, vals_ref, idx_ref, scratch_ref, place_ref):
    rows = jax.lax.broadcasted_iota(jnp.int32, (candidates, 128), 0)
    scratch_ref[:candidates] = in_ref[...]
    place_ref[:candidates] = rows
    sorting_network.top_k(
      scratch_ref, place_ref, candidates, k, vals_ref, idx_ref
    )

  vals, idx = pl.pallas_call(
    body,
    out_shape=[
      jax.ShapeDtypeStruct((k, 128), kind) for kind in (jnp.float32, jnp.int32)
    ],
    scratch_shapes=[
      pltpu.VMEM((steps, 128), kind) for kind in (jnp.float32, jnp.int32)
    ],
    interpret=True,
  )(vals_RT)
  want_vals, want_idx = stable_top_k(vals_RT.T, k)
  np.testing.assert_array_equal(vals.T, want_vals)
  np.testing.assert_array_equal(idx.T, want_idx)


def test_no_memory_is_raced_for_or_read_unwritten():
  rng = np.random.default_rng(3)
  x_BD, w_ND = rng.standard_normal((4, 128)), rng.standard_normal((150, 128))
  vals, idx, dropped = kernel.encode_topk(
    x_BD.astype(np.float32),
    w_ND.astype(np.float32),
    np.zeros(150, np.float32),
    3,
    tiles=GROUPED,
    interpret=pltpu.InterpretParams(
      detect_races=True,
      uninitialized_memory='nan',
      out_of_bounds_reads='raise',
    ),
  )
  want_idx = stable_top_k(x_BD @ w_ND.T, 3)[1]
  sure = vals[:, -1] > dropped
  np.testing.assert_array_equal(idx[sure], want_idx[sure])
  assert sure.any()
  assert not interpret_pallas_call.races.races_found


def test_an_approximate_top_k_has_the_recall_it_promises():
  batch, n, k, recall = 512, 1024, 16, 0.9
  rng = np.random.default_rng(6)
  x_BD = rng.standard_normal((batch, 128)).astype(np.float32)
  w_ND = rng.standard_normal((n, 128)).astype(np.float32)
  b_N = np.zeros(n, np.float32)
  x_BD[3, 0] = np.nan

  find = jax.jit(lambda *a: exact.encode_topk(*a, None, k, None, None, recall))
  vals, got, failed, promised = (np.asarray(a) for a in find(x_BD, w_ND, b_N))
  _, want = stable_top_k(x_BD @ w_ND.T, k)
  # What is no number is still seen.
  np.testing.assert_array_equal(failed, np.arange(batch) == 3)
  assert np.isnan(vals[3]).any()
  shares = [len(np.intersect1d(a, b)) / k for a, b in zip(got, want)]
  shares = np.delete(shares, 3)
  assert recall <= promised < 1
  assert abs(shares.mean() - promised) < 5 * shares.std() / np.sqrt(batch)
  # It does less: fewer candidates, or fewer of a bin.
  less, all_of_it = (
    tiles_lib.choose(batch, 128, n, k, None, r) for r in (recall, 1.0)
  )
  assert less.bins * less.kept < all_of_it.bins * all_of_it.kept


@pytest.mark.parametrize('chip', CHIPS)
@pytest.mark.parametrize(
  'shape',
  chip_shapes.named('128k', 'wide', '16m shard', in_ci=('wide', '16m shard')),
)
def test_it_compiles_for_every_chip(chip, shape):
  mesh = aot.one_chip(chip)

  def encode(x_BD, w_ND, b_N):
    chosen = tiles_lib.choose(
      shape.batch, shape.d_model, shape.n_latents, shape.k, jnp.bfloat16
    )
    return kernel.encode_topk(
      x_BD, w_ND, b_N, shape.k, tiles=chosen, dtype=jnp.dtype(jnp.bfloat16)
    )

  args = [
    jax.ShapeDtypeStruct(size, kind, sharding=NamedSharding(mesh, P()))
    for size, kind in (
      ((shape.batch, shape.d_model), jnp.bfloat16),
      ((shape.n_latents, shape.d_model), jnp.bfloat16),
      ((shape.n_latents,), jnp.float32),
    )
  ]
  with jax.set_mesh(mesh):
    compiled = jax.jit(encode).lower(*args).compile()
  # Tokens by columns and results by tokens; no pre-activations, no copy of
  # the encoder.
  turned = 2 * shape.batch * shape.d_model + 16 * shape.batch * shape.k
  temporary = compiled.memory_analysis().temp_size_in_bytes
  assert temporary < 1.1 * turned + 2**21
  assert 4 * shape.batch * shape.n_latents > 10 * temporary


def test_a_k_that_does_not_fit_is_refused():
  with pytest.raises(
    errors.UserError, match=r'k 60000 at d_model 768 needs blocks'
  ):
    tiles_lib.choose(4096, 768, 131_072, 60_000, jnp.bfloat16)


def test_kernels_are_chosen_where_a_tpu_is_compiled_for():
  with jax.set_mesh(aot.one_chip('v5e')):
    assert dispatch.choose(65_536, 32, None, 768) == 'pallas'
    assert dispatch.choose(65_536, 32, None, 576) == 'gather'
    assert dispatch.choose(4096, 32, None, 768) == 'dense'
