"""The encoder's kernel: exact on any input."""

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.ops.encode_topk import tiles as tiles_lib
from tests.support.encode_runs import GROUPED, run_and_raw, TILES
from tests.support.top_k_checks import stable_top_k


def through_identity(pre_BN, k, mask_N=None, tiles=TILES):
  """The exact top-k of given pre-activations, and what the kernel gave."""
  n = pre_BN.shape[1]
  width = -(-n // 128) * 128
  w_ND = np.eye(n, width, dtype=np.float32)
  x_BD = np.zeros((len(pre_BN), width), np.float32)
  x_BD[:, :n] = pre_BN
  mask_N = np.ones(n, bool) if mask_N is None else mask_N
  whole, raw = run_and_raw(
    x_BD, w_ND, np.zeros(n, np.float32), mask_N, k, tiles
  )
  return whole[:3], raw


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


def test_values_that_are_no_numbers_come_through():
  pre_BN = ADVERSARIAL['random'].astype(np.float32)
  x_BD = np.zeros((5, 256), np.float32)
  x_BD[:, :N] = pre_BN
  x_BD[2, 3] = np.nan
  w_ND = np.eye(N, 256, dtype=np.float32)
  rest = np.zeros(N, np.float32), np.ones(N, bool), K, TILES
  (vals, _, failed, _), _ = run_and_raw(x_BD, w_ND, *rest)
  np.testing.assert_array_equal(failed, np.arange(5) == 2)
  assert np.isnan(vals[2]).any()
  assert np.isfinite(np.delete(vals, 2, 0)).all()
  w_ND[17, 0] = np.nan
  (vals, idx, failed, _), _ = run_and_raw(x_BD, w_ND, *rest)
  assert failed.all()
  # As `lax.top_k` has it, NaN comes first.
  assert (idx[:2, 0] == 17).all()
  assert np.isnan(vals[:2, 0]).all()


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
