"""What a top k must be, over shards too."""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import numpy as np

from sae_jax import ops


def stable_top_k(x_BN, k):
  idx_BK = np.argsort(-x_BN, axis=1, kind='stable')[:, :k]
  return np.take_along_axis(x_BN, idx_BK, 1), idx_BK


ADVERSARIAL = {
  'random': lambda rng: rng.standard_normal((5, 64)),
  'all equal': lambda rng: np.zeros((5, 64)),
  'few values': lambda rng: rng.integers(0, 3, (5, 64)).astype(float),
  'ascending': lambda rng: np.tile(np.arange(64.0), (5, 1)),
  'descending': lambda rng: np.tile(-np.arange(64.0), (5, 1)),
  'one bucket': lambda rng: (
    np.where(np.arange(64) // 4 == 5, 9.0, 1.0) + np.zeros((5, 1))
  ),
  # The other buckets then rank by their ties, in an order to be undone.
  'high in a low bucket': lambda rng: (
    np.where(np.arange(64) == 21, 9.0, 1.0) + np.zeros((5, 1))
  ),
  'minus infinity': lambda rng: np.where(
    np.arange(64) < 60, -np.inf, rng.standard_normal((5, 64))
  ),
}


def sharded_winners(x_BN, k, shards, select):
  """Top-k over a sharded axis as a dense row of winners' values."""
  line = jax.make_mesh(
    (shards,),
    ('latent',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:shards],
  )

  @functools.partial(
    jax.shard_map,
    mesh=line,
    in_specs=P(None, 'latent'),
    out_specs=P(None, 'latent'),
  )
  def run(x_BS):
    vals_BK, idx_BK = ops.top_k(x_BS, min(k, x_BS.shape[1]))
    vals_BK = select(vals_BK, 'latent', k, -jnp.inf)
    rows_B1 = jnp.arange(x_BS.shape[0])[:, None]
    empty = jnp.full_like(x_BS, -jnp.inf)
    return empty.at[rows_B1, idx_BK].set(vals_BK)

  return np.asarray(jax.jit(run)(x_BN))


def capacity_limited(vals_BK, axis, k, empty):
  """A plausible mistake: every shard may win k / shards places at most."""
  most = k // jax.lax.axis_size(axis)
  return jnp.where(jnp.arange(vals_BK.shape[1]) < most, vals_BK, empty)


def unsharded_winners(x_BN, k):
  vals, idx = stable_top_k(x_BN, k)
  want = np.full_like(x_BN, -np.inf)
  np.put_along_axis(want, idx, vals, 1)
  return want


def winners_that_crowd_one_shard_are_kept():
  x_BN = np.random.default_rng(4).standard_normal((5, 64)).astype(np.float32)
  x_BN[:, 16:24] += 100
  want = unsharded_winners(x_BN, 8)
  got = sharded_winners(x_BN, 8, 8, ops.global_top_k)
  np.testing.assert_array_equal(got, want)
  # Control: a capacity factor loses them.
  limited = sharded_winners(x_BN, 8, 8, capacity_limited)
  assert (limited != want).any()


def sharded_ranks(x_BN, k, shards, most, ranks=ops.ranks):
  """Each latent's rank, and the first of all, of rows over a sharded axis.

  Args:
    x_BN: rows of values.
    k: candidates of a shard.
    shards: number of shards.
    most: places that are told apart.
    ranks: the function that is checked.

  Returns:
    rank_BN, `most` where a latent is no candidate; vals_BM, idx_BM.
  """
  line = jax.make_mesh(
    (shards,),
    ('latent',),
    axis_types=(jax.sharding.AxisType.Auto,),
    devices=jax.devices()[:shards],
  )

  @functools.partial(
    jax.shard_map,
    mesh=line,
    in_specs=P(None, 'latent'),
    out_specs=(P(None, 'latent'), P('latent'), P('latent')),
  )
  def run(x_BS):
    vals_BK, own_BK = ops.top_k(x_BS, min(k, x_BS.shape[1]))
    first = jax.lax.axis_index('latent') * x_BS.shape[1]
    rank_BK, *first_of_all = ranks(vals_BK, own_BK + first, 'latent', most)
    rows_B1 = jnp.arange(x_BS.shape[0])[:, None]
    none = jnp.full_like(own_BK, most, shape=x_BS.shape)
    return none.at[rows_B1, own_BK].set(rank_BK), *first_of_all

  return [np.asarray(a) for a in jax.jit(run)(x_BN)]


def assert_ranks(x_BN, k, shards, most, ranks=ops.ranks):
  """The ranks are the places in a stable sort of whole rows."""
  rank_BN, vals_BM, idx_BM = sharded_ranks(x_BN, k, shards, most, ranks)
  want_vals, want_idx = stable_top_k(x_BN, most)
  np.testing.assert_array_equal(vals_BM, want_vals)
  np.testing.assert_array_equal(idx_BM, want_idx)
  want_BN = np.full(x_BN.shape, most)
  np.put_along_axis(want_BN, want_idx, np.arange(most)[None], 1)
  np.testing.assert_array_equal(rank_BN, want_BN)
