"""The (token, latent) pairs of a batch: what reducers read."""

from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.probing.scan import order


@flax.struct.dataclass
class Slots:
  """Pairs of one batch and one shard of the latents, in any order.

  P is the number of slots, of which some hold no pair.

  Attributes:
    latent_P: latent within the shard, int32; `n_own` where the slot is empty.
    value_P: activation, float32; above 0 where the slot is real.
    rank_P: the pair's place among the candidates of its token, int32.
    margin_P: value less the least active value of the token, float32.
    row_hi_P: upper 32 bits of the row of the store, uint32.
    row_lo_P: lower 32 bits.
    document_P: document of the row, int32, at least 0.
    first_latent: number of the shard's first latent in the autoencoder, int32.
    n_own: S, the latents of the shard.
  """

  latent_P: jax.Array
  value_P: jax.Array
  rank_P: jax.Array
  margin_P: jax.Array
  row_hi_P: jax.Array
  row_lo_P: jax.Array
  document_P: jax.Array
  first_latent: jax.Array
  n_own: int = flax.struct.field(pytree_node=False)

  @property
  def real_P(self) -> jax.Array:
    """Which slots hold a pair."""
    return self.latent_P < self.n_own


@flax.struct.dataclass
class Pairs(Slots):
  """Pairs sorted by (latent, token), with the empty slots last.

  U is min(S, P), as many latents as P pairs can have among the S of the shard.

  Attributes:
    latent_U: the latents that have pairs, in order, int32; `n_own` behind them.
      If U is S it is all latents, with pairs or without.
    start_U: slot of the first pair of each, int32.
    stop_U: slot behind its last pair; equal to the start where it has none.
  """

  latent_U: jax.Array
  start_U: jax.Array
  stop_U: jax.Array


def packed(
  n_slots: int,
  active_BC: jax.Array,
  of_BC: Sequence[jax.Array],
  of_B: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
  """The wanted candidates as those of tokens that have one each.

  Where few are wanted, what follows works on as many slots as they need.

  Args:
    n_slots: tokens of the result, at least the number of wanted candidates.
      Where there are no more candidates, they stay as they are.
    active_BC: the wanted ones.
    of_BC: arrays of candidates.
    of_B: arrays of their tokens.

  Returns:
    The arrays of_BC, those of_B, and active_BC, in the order of `slots`.
  """
  if n_slots >= active_BC.size:
    return *of_BC, *of_B, active_BC
  slot_P = order.front(active_BC.reshape(-1))[:n_slots]
  token_P = slot_P // active_BC.shape[1]
  return (
    *(of.reshape(-1).at[slot_P].get(mode='clip')[:, None] for of in of_BC),
    *(of.at[token_P].get(mode='clip') for of in of_B),
    (slot_P < active_BC.size)[:, None],
  )


def slots(
  vals_BC: jax.Array,
  idx_BC: jax.Array,
  rank_BC: jax.Array,
  margin_BC: jax.Array,
  row_hi_B: jax.Array,
  row_lo_B: jax.Array,
  document_B: jax.Array,
  active_BC: jax.Array,
  n_own: int,
  first_latent: jax.Array | int = 0,
) -> Slots:
  """The candidates of a batch that are wanted, as they lie.

  It is enough for the best pairs of each latent, and costs no sort.

  Args:
    vals_BC: values of the C candidates of each token, float32.
    idx_BC: their latents within this shard.
    rank_BC: their places among all candidates of the token; the ranks of a
      latent sum to less than 2**32 in a batch.
    margin_BC: their values less the least active value of the token.
    row_hi_B: upper 32 bits of each token's row, uint32. Rows differ; they may
      have any order.
    row_lo_B: lower 32 bits.
    document_B: document of each token.
    active_BC: the candidates that are wanted: active ones, or near misses.
      They must be above 0 and latents of this shard, of which a token names
      none twice.
    n_own: latents of this shard.
    first_latent: number of the shard's first latent in the autoencoder.
  """
  latent_BC = jnp.where(active_BC, idx_BC, n_own).astype(jnp.int32)
  n_candidates = vals_BC.shape[1]
  return Slots(
    latent_P=latent_BC.reshape(-1),
    value_P=vals_BC.astype(jnp.float32).reshape(-1),
    rank_P=rank_BC.astype(jnp.int32).reshape(-1),
    margin_P=margin_BC.astype(jnp.float32).reshape(-1),
    row_hi_P=order.flat(row_hi_B, n_candidates),
    row_lo_P=order.flat(row_lo_B, n_candidates),
    document_P=order.flat(document_B, n_candidates),
    first_latent=jnp.asarray(first_latent, jnp.int32),
    n_own=n_own,
  )


def pairs(
  vals_BC: jax.Array,
  idx_BC: jax.Array,
  rank_BC: jax.Array,
  margin_BC: jax.Array,
  row_hi_B: jax.Array,
  row_lo_B: jax.Array,
  document_B: jax.Array,
  active_BC: jax.Array,
  n_own: int,
  first_latent: jax.Array | int = 0,
) -> Pairs:
  """The candidates of a batch that are wanted, sorted; see `slots`."""
  latent_P, *payload_P = order.by_latent(
    jnp.where(active_BC, idx_BC, n_own).astype(jnp.int32),
    n_own,
    (
      vals_BC.astype(jnp.float32),
      rank_BC.astype(jnp.int32),
      margin_BC.astype(jnp.float32),
    ),
    (row_hi_B, row_lo_B, document_B),
  )
  latent_U, start_U, stop_U = _segments(latent_P, n_own)
  return Pairs(
    latent_P,
    *payload_P,
    first_latent=jnp.asarray(first_latent, jnp.int32),
    n_own=n_own,
    latent_U=latent_U,
    start_U=start_U,
    stop_U=stop_U,
  )


def _segments(
  latent_P: jax.Array, n_own: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Where each latent's pairs lie among sorted ones: latent, start, stop."""
  n_slots = len(latent_P)
  if n_own <= n_slots:
    latent_U = jnp.arange(n_own, dtype=jnp.int32)
    start_U = jnp.searchsorted(latent_P, latent_U)
    stop_U = jnp.searchsorted(latent_P, latent_U, side='right')
    return latent_U, start_U.astype(jnp.int32), stop_U.astype(jnp.int32)
  is_first_P = latent_P < n_own
  is_first_P &= latent_P != jnp.roll(latent_P, 1).at[0].set(-1)
  nth_P = jnp.cumsum(is_first_P, dtype=jnp.int32)
  n_real = jnp.searchsorted(latent_P, n_own)
  wanted_U = jnp.arange(1, n_slots + 1, dtype=jnp.int32)
  start_U = jnp.minimum(jnp.searchsorted(nth_P, wanted_U), n_real)
  start_U = start_U.astype(jnp.int32)
  stop_U = jnp.append(start_U[1:], n_real).astype(jnp.int32)
  latent_U = jnp.where(
    start_U < n_real, latent_P[jnp.minimum(start_U, n_slots - 1)], n_own
  )
  return latent_U, start_U, stop_U
