"""The top k over shards."""

import numpy as np
import pytest

from sae_jax import ops
from tests.support.top_k_checks import (
  ADVERSARIAL,
  assert_ranks,
  sharded_winners,
  unsharded_winners,
  winners_that_crowd_one_shard_are_kept,
)


@pytest.mark.parametrize('name', ADVERSARIAL)
@pytest.mark.parametrize('k', [1, 7, 24])
# Eight shards share 16 tokens out; five are ranked by every shard.
@pytest.mark.parametrize('batch', [5, 16])
def test_top_k_over_shards_equals_one_stable_sort(name, k, batch):
  rng = np.random.default_rng(3)
  x_BN = np.concatenate([ADVERSARIAL[name](rng) for _ in range(4)])
  x_BN = x_BN[:batch].astype(np.float32)
  got = sharded_winners(x_BN, k, 8, ops.global_top_k)
  np.testing.assert_array_equal(got, unsharded_winners(x_BN, k))


def test_long_shards_are_searched_for_few_entries_of_each():
  rng = np.random.default_rng(4)
  x_BN = rng.integers(0, 999, (16, 8 * 256)).astype(np.float32)
  # Rows of two shards do not fit, and are sorted there alone.
  x_BN[3, 256:700] = 999
  got = sharded_winners(x_BN, 8, 8, ops.global_top_k)
  np.testing.assert_array_equal(got, unsharded_winners(x_BN, 8))


def test_top_k_over_shards_keeps_winners_that_crowd_one_shard():
  winners_that_crowd_one_shard_are_kept()


@pytest.mark.parametrize('name', ADVERSARIAL)
@pytest.mark.parametrize('most', [1, 8, 24])
@pytest.mark.parametrize('shards', [1, 8])
def test_ranks_over_shards_equal_one_stable_sort(name, most, shards):
  rng = np.random.default_rng(5)
  x_BN = np.concatenate([ADVERSARIAL[name](rng) for _ in range(4)])
  assert_ranks(x_BN[:16].astype(np.float32), most, shards, most)


def test_ranks_within_a_shard_are_not_those_of_all():
  def own(vals_BK, idx_BK, axis, most):
    rank_BK, *_ = ops.ranks(vals_BK, idx_BK, None, most)
    return ops.ranks(vals_BK, idx_BK, axis, most)._replace(rank_BK=rank_BK)

  x_BN = np.random.default_rng(6).standard_normal((8, 64)).astype(np.float32)
  with pytest.raises(AssertionError):
    assert_ranks(x_BN, 8, 8, 8, own)
