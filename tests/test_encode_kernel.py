"""The encoder's kernel: exact on any input, free of races, fit for chips."""

import dataclasses
import functools

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
from sae_jax.ops import dispatch, shapes, sorting_network
from sae_jax.ops.encode_topk import exact, kernel
from sae_jax.ops.encode_topk import tiles as tiles_lib
from sae_jax.tpu import aot

# Bins of 32 that keep two values each, of 64 latents in a block.
TILES = tiles_lib.Tiles(
  tokens=128,
  bins=32,
  depth=2,
  kept=2,
  group=1,
  rows=64,
  lanes=128,
  unrolled=1,
)
# Each block in four products, two and two in a basic block, for each half of
# the tokens, and of every two neighbours in a bin one alone is offered to it.
GROUPED = dataclasses.replace(
  TILES, tokens=256, depth=4, kept=3, group=2, rows=32, unrolled=2
)


def stable_top_k(x_BN, k):
  idx_BK = np.argsort(-x_BN, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(x_BN, idx_BK, 1), idx_BK


@functools.partial(jax.jit, static_argnames=('k', 'tiles'))
def run(x_BD, w_ND, b_N, mask_N, k, tiles=TILES):
  return exact.encode_topk(x_BD, w_ND, b_N, mask_N, k, None, tiles)[:3]


def through_identity(pre_BN, k, mask_N=None, tiles=TILES):
  """The exact top-k of given pre-activations, and what the kernel gave."""
  n = pre_BN.shape[1]
  width = -(-n // 128) * 128
  w_ND = np.eye(n, width, dtype=np.float32)
  x_BD = np.zeros((len(pre_BN), width), np.float32)
  x_BD[:, :n] = pre_BN
  mask_N = np.ones(n, bool) if mask_N is None else mask_N
  raw = kernel.encode_topk(
    x_BD, w_ND, np.zeros(n, np.float32), k, tiles=tiles, interpret=True
  )
  return run(x_BD, w_ND, np.zeros(n, np.float32), mask_N, k, tiles), raw


N, K = 192, 9
RNG = np.random.default_rng(0)
ADVERSARIAL = {
  'random': RNG.standard_normal((5, N)),
  'all equal': np.ones((5, N)),
  'few values': RNG.integers(0, 3, (5, N)),
  'ascending': np.tile(np.arange(N), (5, 1)),
  'descending': -np.tile(np.arange(N), (5, 1)),
  'winners in one bin': np.where(np.arange(N) % 32 == 7, 50, 0)
  + RNG.standard_normal((5, N)),
  'more in every bin than it keeps': np.where(np.arange(N) % 64 < 32, 50, 0)
  + RNG.standard_normal((5, N)),
  'negative': -1 - RNG.random((5, N)),
}
# Which of them the two values that a bin keeps cannot hold.
BEYOND = ('all equal', 'few values', 'winners in one bin')


@pytest.mark.fast
@pytest.mark.parametrize('name', ADVERSARIAL)
def test_the_top_k_is_that_of_a_stable_sort(name):
  pre_BN = ADVERSARIAL[name].astype(np.float32)
  want_vals, want_idx = stable_top_k(pre_BN, K)
  (vals, idx, failed), raw = through_identity(pre_BN, K)
  np.testing.assert_array_equal(vals, want_vals)
  np.testing.assert_array_equal(idx, want_idx)
  # The kernel alone is wrong where a bin overflows, and says so: without the
  # second look the result would differ.
  wrong = (np.asarray(raw[1]) != want_idx).any(1)
  assert not (wrong & ~np.asarray(failed)).any()
  assert failed.all() if name in BEYOND else not wrong.any()
  if name == 'winners in one bin':
    assert wrong.all()


# By whether two winners meet, of the latents n and n + 8 in a product of 32.
GROUPS = {
  'in no group': ([0, 1, 2, 3], False),
  'in one group': ([0, 8, 1, 2], True),
  'in one bin, in two groups': ([0, 16, 1, 2], False),
  'in a bin that overflows': ([0, 16, 128, 144], True),
}


@pytest.mark.fast
@pytest.mark.parametrize('name', GROUPS)
def test_winners_that_meet_in_a_group_are_found_again(name):
  places, fails = GROUPS[name]
  pre_BN = np.random.default_rng(6).random((3, 256)).astype(np.float32)
  pre_BN[:, places] += 10
  k = len(places)
  want_vals, want_idx = stable_top_k(pre_BN, k)
  (vals, idx, failed), raw = through_identity(pre_BN, k, tiles=GROUPED)
  np.testing.assert_array_equal(vals, want_vals)
  np.testing.assert_array_equal(idx, want_idx)
  assert failed.all() == failed.any() == fails
  assert (np.asarray(raw[1]) != want_idx).any(1).all() == fails


@pytest.mark.fast
def test_groups_are_as_large_as_seldom_have_two_winners():
  rng = np.random.default_rng(7)
  pairs_TK = [rng.choice(4096, 8, replace=False) // 2 for _ in range(20_000)]
  seen = np.mean([len(set(pairs)) < 8 for pairs in pairs_TK])
  want = tiles_lib.grouped_share(4096, 8, 2)
  assert abs(seen - want) < 4 * np.sqrt(want / 20_000)
  # Control: of the same latents in groups of four more would be seen.
  assert tiles_lib.grouped_share(4096, 8, 4) - seen > 9 * np.sqrt(want / 20_000)
  for n, group in ((32_768, 1), (131_072, 2), (1_048_576, 4)):
    assert tiles_lib.choose(4096, 768, n, 32, jnp.bfloat16).group == group


@pytest.mark.fast
def test_values_that_are_no_numbers_come_through():
  pre_BN = ADVERSARIAL['random'].astype(np.float32)
  x_BD = np.zeros((5, 256), np.float32)
  x_BD[:, :N] = pre_BN
  x_BD[2, 3] = np.nan
  w_ND = np.eye(N, 256, dtype=np.float32)
  vals, _, failed = run(x_BD, w_ND, np.zeros(N), np.ones(N, bool), K)
  np.testing.assert_array_equal(failed, np.arange(5) == 2)
  assert np.isnan(vals[2]).any()
  assert np.isfinite(np.delete(vals, 2, 0)).all()
  w_ND[17, 0] = np.nan
  vals, idx, failed = run(x_BD, w_ND, np.zeros(N), np.ones(N, bool), K)
  assert failed.all()
  # As `lax.top_k` has it, NaN comes first.
  assert (idx[:2, 0] == 17).all()
  assert np.isnan(vals[:2, 0]).all()


@pytest.mark.fast
def test_masked_latents_are_left_out():
  pre_BN = ADVERSARIAL['random'].astype(np.float32)
  mask_N = np.zeros(N, bool)
  mask_N[[3, 40, 77, 100]] = True
  (vals, idx, failed), _ = through_identity(pre_BN, K, mask_N)
  want, want_idx = stable_top_k(np.where(mask_N, pre_BN, -np.inf), 4)
  np.testing.assert_array_equal(vals[:, :4], want)
  np.testing.assert_array_equal(idx[:, :4], want_idx)
  assert np.isneginf(vals[:, 4:]).all()
  assert not failed.any()


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
  vals, idx, _ = run(
    *(a.astype(np.float32) for a in (x_BD, w_ND, b_N)),
    np.ones(n, bool),
    k,
    tiles,
  )
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


@pytest.mark.fast
def test_bins_are_enough_for_random_winners():
  rng = np.random.default_rng(4)
  bin_TK = rng.integers(0, 64, (20_000, 16))
  most = [np.bincount(bins, minlength=64).max() for bins in bin_TK]
  seen = (np.array(most) > 2).mean()
  bound = tiles_lib.failing_share(16, 64, 2)
  # A union bound: above what is seen, and not by far.
  assert seen < bound < 1.3 * seen
  chosen = tiles_lib.choose(4096, 768, 131_072, 32, jnp.bfloat16)
  assert tiles_lib.failing_share(32, chosen.bins, chosen.kept) <= 1e-4


@pytest.mark.fast
@pytest.mark.parametrize(
  'n, k, bins, kept', [(512, 16, 32, 1), (512, 16, 16, 2), (96, 12, 16, 3)]
)
def test_expected_recall_is_the_mean_over_random_winners(n, k, bins, kept):
  rng = np.random.default_rng(5)
  held = [
    np.bincount(rng.choice(n, k, replace=False) % bins, minlength=bins)
    for _ in range(20_000)
  ]
  share = np.minimum(held, kept).sum(1) / k
  error = share.std() / np.sqrt(len(share))
  want = tiles_lib.expected_recall(n, k, bins, kept)
  assert abs(share.mean() - want) < 4 * error
  # Controls: other bins, or values kept, would be told apart.
  for other in ((bins, kept + 1), (2 * bins, kept)):
    assert (
      abs(share.mean() - tiles_lib.expected_recall(n, k, *other)) > 9 * error
    )


def test_an_approximate_top_k_has_the_recall_it_promises():
  batch, n, k, recall = 512, 1024, 16, 0.9
  rng = np.random.default_rng(6)
  x_BD = rng.standard_normal((batch, 128)).astype(np.float32)
  w_ND = rng.standard_normal((n, 128)).astype(np.float32)
  b_N = np.zeros(n, np.float32)
  x_BD[3, 0] = np.nan

  def found(recall):
    run = jax.jit(lambda *a: exact.encode_topk(*a, None, k, None, None, recall))
    return [np.asarray(a) for a in run(x_BD, w_ND, b_N)]

  _, want, _, all_found = found(1.0)
  vals, got, failed, promised = found(recall)
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
  assert all_found == 1


NAMED = {shape.name: shape for shape in shapes.SHAPES}


@pytest.mark.parametrize('chip', aot.CHIPS)
@pytest.mark.parametrize('name', ['128k', 'wide', '16m shard'])
def test_it_compiles_for_every_chip(chip, name):
  shape = NAMED[name]
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
