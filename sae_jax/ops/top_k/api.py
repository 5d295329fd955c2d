"""Exact top-k: one shard, then the exchange that makes it global."""

import functools

import jax
import jax.numpy as jnp

from sae_jax import errors
from sae_jax.ops import chip, scopes, varying
from sae_jax.ops.top_k import kernel, reference
from sae_jax.tpu import target

# On two x86 cores buckets won 2.7x at N 32,768, K 32 and nothing at 4,096. By
# the TPU compiler's estimate they win 6x at N 131,072 on v6e; and it takes more
# than a minute to compile a sort of such rows.
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
  if k > n:
    raise errors.UserError(f'k {k} exceeds the {n} latents: use k <= {n}')
  bucketed = (
    target.platform() in ('cpu', 'tpu')
    and n >= _BUCKETED_FROM
    and n % _BUCKETS == 0
    and k <= _BUCKETS // 4
  )
  if bucketed:
    # What is in the chosen buckets may be wide again.
    search = functools.partial(top_k, kernels=kernels)
    return reference.bucketed_top_k(x_BN, k, _BUCKETS, search)
  if kernels and not chip.interpret():
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
  share_BC = jax.lax.all_to_all(vals_BK, axis, 0, 1, tiled=True)
  _, place_Bk = top_k(share_BC, k, kernels)
  of_shard_BkP = (place_Bk // width)[:, :, None] == jnp.arange(shards)
  count_BP = of_shard_BkP.sum(1, dtype=jnp.int32)
  return jax.lax.all_to_all(count_BP, axis, 1, 0, tiled=True)[:, 0]


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
