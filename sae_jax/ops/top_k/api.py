"""Exact top-k: one shard, then the exchange that makes it global."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.ops import chip, scopes, varying
from sae_jax.ops.top_k import kernel, packed, reference
from sae_jax.tpu import target

# On two x86 cores `lax.top_k` took 4.4 times as long as buckets searched by
# `packed` at N 32,768, K 32, and 7 times at 131,072; `packed` alone 1.8 and 2.1
# times as long. By the TPU compiler's estimate buckets win 6x at N 131,072 on
# v6e; and it takes more than a minute to compile a sort of such rows.
_BUCKETED_FROM = 16_384
_BUCKETS = 1_024


def top_k(
  x_BN: jax.Array, k: int, kernels: bool = False
) -> tuple[jax.Array, jax.Array]:
  """The k largest entries of each row.

  Args:
    x_BN: values.
    k: how many to take.
    kernels: whether rows are sorted by a kernel, on a TPU.

  Returns:
    vals_BK in descending order and idx_BK int32. Of equal values the one with
    the lowest index comes first, so the result is unique.

  Raises:
    UserError: if k exceeds N.
  """
  x_BN = jnp.asarray(x_BN)
  n = x_BN.shape[-1]
  platform = target.platform()
  if k > n:
    raise errors.UserError(f'k {k} exceeds the {n} latents: use k <= {n}')
  bucketed = (
    platform in ('cpu', 'tpu') and n >= _BUCKETED_FROM and k <= _BUCKETS // 4
  )
  if bucketed:
    # What fills up comes after all else, at equal values too.
    fill = ((0, 0), (0, -n % _BUCKETS))
    x_BN = jnp.pad(x_BN, fill, constant_values=-jnp.inf)
    # What is in the chosen buckets may be wide again.
    search = functools.partial(top_k, kernels=kernels)
    return reference.bucketed_top_k(x_BN, k, _BUCKETS, search)
  if platform == 'cpu' and packed.takes(x_BN, k):
    return packed.top_k(x_BN, k)
  if kernels and chip.takes_kernels():
    return kernel.top_k(x_BN, k)
  return reference.sorted_top_k(x_BN, k)


@jax.named_scope(scopes.EXCHANGE)
def winners(
  vals_BK: jax.Array, axis: str | None, k: int, kernels: bool = False
) -> jax.Array:
  """How many of a shard's candidates are in the top k of all shards.

  Each shard offers its sorted list. What wins is a prefix of it, so a count
  says it all, and no index travels. Equal values go to the lower shard and
  there to the lower index: the lowest latent index overall, as on one shard.

  Every shard ranks its share of the tokens: values go out by an all-to-all
  and counts come back by another, 4 (K + 1) bytes a token and shard. Where the
  tokens cannot be shared out evenly, every shard ranks them all.

  Args:
    vals_BK: the shard's candidates in descending order, as `top_k` gives them.
    axis: the mesh axis the latents are sharded over; None for one shard.
    k: how many are kept of all shards' candidates.
    kernels: see `top_k`.

  Returns:
    The counts, [B] int32. They are exact if each list holds the shard's k
    largest, or all of its latents, or is not used up: a count below K.
  """
  batch, width = vals_BK.shape
  shards = 1 if axis is None else jax.lax.axis_size(axis)
  if shards == 1:
    full = jnp.full((batch,), min(k, width), jnp.int32)
    return varying.match(full, vals_BK)
  k = min(k, shards * width)
  vals_BK = jax.lax.stop_gradient(vals_BK)
  if batch % shards:
    all_PBK = jax.lax.all_gather(vals_BK, axis)
    all_BC = all_PBK.transpose(1, 0, 2).reshape(-1, shards * width)
    _, place_Bk = top_k(all_BC, k, kernels)
    own_Bk = place_Bk // width == jax.lax.axis_index(axis)
    return own_Bk.sum(-1, dtype=jnp.int32)
  _, place_Bk = top_k(_share(vals_BK, axis), k, kernels)
  of_shard_BkP = (place_Bk // width)[:, :, None] == jnp.arange(shards)
  count_BP = of_shard_BkP.sum(1, dtype=jnp.int32)
  return jax.lax.all_to_all(count_BP, axis, 1, 0, tiled=True)[:, 0]


def _share(of_BK: jax.Array, axis: str) -> jax.Array:
  """This shard's share of the tokens, with the columns of all shards."""
  return jax.lax.all_to_all(of_BK, axis, 0, 1, tiled=True)


class Ranked(NamedTuple):
  """The order of the candidates of all shards.

  Attributes:
    rank_BK: int32 place of each of this shard's candidates, from 0; `most` for
      those beyond.
    vals_EM: the first `most` of all candidates in order, of this shard's share
      of the tokens: with P shards the p-th has the p-th run of B / P tokens.
    idx_EM: their latents.
  """

  rank_BK: jax.Array
  vals_EM: jax.Array
  idx_EM: jax.Array


@jax.named_scope(scopes.EXCHANGE)
def ranks(
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  axis: str | None,
  most: int,
  kernels: bool = False,
) -> Ranked:
  """Where a shard's candidates stand among those of all shards.

  Equal values are in the order that `winners` describes. As there, every shard
  ranks its share of the tokens: values and latents go out by an all-to-all and
  ranks come back by another, 12 K bytes a token and shard.

  Args:
    vals_BK: the shard's candidates in descending order, as `top_k` gives them.
      B is a multiple of the number of shards.
    idx_BK: their latents, in the numbers of all shards.
    axis: the mesh axis the latents are sharded over; None for one shard.
    most: how many places are told apart, no more than there are candidates.
    kernels: see `top_k`.

  Returns:
    The order. It is exact up to `most` if each list holds the shard's `most`
    largest, or all of its latents.
  """
  batch, width = vals_BK.shape
  shards = 1 if axis is None else jax.lax.axis_size(axis)
  if shards == 1:
    rank_K = jnp.minimum(jnp.arange(width, dtype=jnp.int32), most)
    rank_BK = varying.match(jnp.broadcast_to(rank_K, vals_BK.shape), vals_BK)
    return Ranked(rank_BK, vals_BK[:, :most], idx_BK[:, :most])
  share_EC = _share(vals_BK, axis)
  vals_EM, place_EM = top_k(share_EC, most, kernels)
  rank_EC = jnp.full(share_EC.shape, most, jnp.int32)
  rows_E1 = jnp.arange(batch // shards)[:, None]
  rank_EC = rank_EC.at[rows_E1, place_EM].set(jnp.arange(most, dtype=jnp.int32))
  idx_EM = jnp.take_along_axis(_share(idx_BK, axis), place_EM, axis=1)
  rank_BK = jax.lax.all_to_all(rank_EC, axis, 1, 0, tiled=True)
  return Ranked(rank_BK, vals_EM, idx_EM)


def global_top_k(
  vals_BK: jax.Array, axis: str | None, k: int, empty: float
) -> jax.Array:
  """Keeps those of a shard's candidates that are in the top k of all shards.

  Each shard offers its own sorted top k, which holds every winner it can
  have, so the selection is exact whatever the distribution over shards.

  Args:
    vals_BK: the shard's candidates in descending order, as `top_k` gives them.
      Fewer than k columns are right where a shard has fewer latents.
    axis: the mesh axis the latents are sharded over; None for one shard.
    k: how many are kept of all shards' candidates.
    empty: the value of a candidate that loses.

  Returns:
    vals_BK with the losers set to `empty`. Differentiable in vals_BK.
  """
  if axis is None or jax.lax.axis_size(axis) == 1:
    return vals_BK
  won_B1 = winners(vals_BK, axis, k)[:, None]
  with jax.named_scope(scopes.EXCHANGE):
    return jnp.where(jnp.arange(vals_BK.shape[1]) < won_B1, vals_BK, empty)
