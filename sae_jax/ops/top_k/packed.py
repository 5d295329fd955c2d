"""Exact top-k for CPUs: a few entries of each row are packed, then sorted.

XLA searches a row for its k largest on one core, an entry at a time. Here whole
rows are only compared and summed, which runs on vectors and on all cores.
"""

import jax
import jax.numpy as jnp

from sae_jax.ops import varying
from sae_jax.ops.top_k import ordered, reference

# Entries of a run of neighbours. On two x86 cores, of 4,096 rows of 4,096
# entries `lax.top_k` took 4.5 times as long at K 32 and 4.8 times at K 64; of
# rows of 768 2.4 times at K 16, in runs of 8.
_RUN = range(8, 33)
# With four runs for each of the k entries few runs hold two of them.
_RUNS_PER_ENTRY = 4
# Bits of the bound, from the top one: sign, exponent and nine of the mantissa.
_BITS = 18
# Entries of a word, a bit for each.
_WORD = 32
# Entries that all others are compared with at a time: with one it took twice as
# long.
_AT_ONCE = 4


def _run_length(n: int, k: int) -> int:
  longest = min(n // (_RUNS_PER_ENTRY * k), _RUN[-1])
  return 1 << max(0, longest.bit_length() - 1)


def takes(x_BN: jax.Array, k: int) -> bool:
  """Whether `top_k` is worth while, and can do it."""
  can = x_BN.ndim == 2 and x_BN.dtype == jnp.float32 and k > 0
  return can and _run_length(x_BN.shape[1], k) in _RUN


def top_k(x_BN: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """The k largest entries of each row, float32, as `lax.top_k` gives them.

  The k-th largest of the maxima of runs of neighbours is a bound that at least
  k entries reach. Those that do, some more than k, are packed in their order,
  and sorted. If they do not fit in some row, as where many are equal, whole
  rows are sorted.
  """
  run = _run_length(x_BN.shape[1], k)
  n_slots = k + k // 4 + 16
  n_slots += -n_slots % _AT_ONCE
  short = -x_BN.shape[1] % _WORD
  padded_BN = jnp.pad(x_BN, ((0, 0), (0, short)), constant_values=-jnp.inf)
  most_BG = padded_BN.reshape(len(x_BN), -1, run).max(-1)
  bound_B = ordered.kth_largest(most_BG, k, _BITS)
  bits_BG = _words(padded_BN >= bound_B[:, None])
  # Of one reading of the whole row there are two results.
  bits_BG = jax.lax.optimization_barrier(bits_BG)
  count_BG = jax.lax.population_count(bits_BG).astype(jnp.int32)
  end_BG = jnp.cumsum(count_BG, 1)
  total_B = end_BG[:, -1]

  def sort_few(x_BN):
    slot_S = jnp.arange(n_slots, dtype=jnp.int32)
    word_BS = _words_of_slots(end_BG, n_slots)

    def of_word(of_BG):
      return jnp.take_along_axis(of_BG, word_BS, axis=1)

    nth_BS = slot_S - of_word(end_BG - count_BG)
    bit_BS = _place_of_bit(of_word(bits_BG), nth_BS, _WORD)
    idx_BS = word_BS * _WORD + bit_BS
    idx_BS = jnp.minimum(idx_BS, x_BN.shape[1] - 1)
    vals_BS = jnp.take_along_axis(x_BN, idx_BS, axis=1)
    vals_BS = jnp.where(slot_S < total_B[:, None], vals_BS, -jnp.inf)
    # They are in the order of their indices, so that ties are right.
    slot_BK = _order(vals_BS)[:, :k]
    return tuple(
      jnp.take_along_axis(of_BS, slot_BK, axis=1) for of_BS in (vals_BS, idx_BS)
    )

  # A NaN as the bound is reached by none.
  fits = ((total_B >= k) & (total_B <= n_slots)).all()
  return jax.lax.cond(
    fits, sort_few, lambda x_BN: reference.sorted_top_k(x_BN, k), x_BN
  )


def _words(is_set_BN: jax.Array) -> jax.Array:
  """Entries as bits of words, their first one as the lowest."""
  # A sum of 32 terms is no vector code: on two x86 cores it took three times as
  # long as two of 16.
  half = _WORD // 2
  is_set_BGHW = is_set_BN.reshape(len(is_set_BN), -1, 2, half)
  bits_BGH = (
    is_set_BGHW.astype(jnp.uint32) << jnp.arange(half, dtype=jnp.uint32)
  ).sum(-1)
  return bits_BGH[:, :, 0] | bits_BGH[:, :, 1] << half


def _words_of_slots(end_BG: jax.Array, n_slots: int) -> jax.Array:
  """The word that each slot's entry is in; the last one for slots behind.

  Args:
    end_BG: the slot behind the last one of each word.
    n_slots: S.
  """
  rows_B1 = jnp.arange(len(end_BG))[:, None]
  ends_BS = varying.zeros((len(end_BG), n_slots), jnp.int32, end_BG)
  ends_BS = ends_BS.at[rows_B1, end_BG].add(1, mode='drop')
  return jnp.minimum(jnp.cumsum(ends_BS, 1), end_BG.shape[1] - 1)


def _order(x_BS: jax.Array) -> jax.Array:
  """The slots of each row, highest entry first, equal ones as they lie.

  An entry's place is how many come before it: all are compared with all.
  """
  batch, n_slots = x_BS.shape
  top = jnp.uint32(1 << 31)
  key_BS = jax.lax.bitcast_convert_type(ordered.keys(x_BS) ^ top, jnp.int32)
  slot_S = jnp.arange(n_slots, dtype=jnp.int32)

  def compare(nth, place_BS):
    for slot in (_AT_ONCE * nth + i for i in range(_AT_ONCE)):
      other_B1 = jax.lax.dynamic_slice_in_dim(key_BS, slot, 1, axis=1)
      # Those behind it come after it at the same key too.
      place_BS += other_B1 > key_BS - (slot < slot_S)
    return place_BS

  place_BS = varying.zeros(x_BS.shape, jnp.int32, x_BS)
  place_BS = jax.lax.fori_loop(0, n_slots // _AT_ONCE, compare, place_BS)
  first_B1 = n_slots * jnp.arange(batch, dtype=jnp.int32)[:, None]
  slot_BS = jnp.broadcast_to(slot_S, x_BS.shape)
  order_P = varying.zeros((x_BS.size,), jnp.int32, x_BS)
  order_P = order_P.at[(first_B1 + place_BS).reshape(-1)].set(
    slot_BS.reshape(-1), mode='promise_in_bounds', unique_indices=True
  )
  return order_P.reshape(x_BS.shape)


def _place_of_bit(
  word_BS: jax.Array, nth_BS: jax.Array, width: int
) -> jax.Array:
  """The place of each word's nth set bit, from 0, among `width` bits."""
  place_BS = jnp.zeros_like(nth_BS)
  half = width // 2
  while half:
    low_BS = word_BS & jnp.uint32((1 << half) - 1)
    below_BS = jax.lax.population_count(low_BS).astype(jnp.int32)
    is_above_BS = nth_BS >= below_BS
    place_BS += jnp.where(is_above_BS, half, 0)
    nth_BS -= jnp.where(is_above_BS, below_BS, 0)
    word_BS = jnp.where(is_above_BS, word_BS >> half, low_BS)
    half //= 2
  return place_BS
