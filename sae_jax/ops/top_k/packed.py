"""Exact top-k for CPUs: a few entries of each row are packed, then sorted.

XLA searches a row for its k largest on one core, an entry at a time. Here whole
rows are only compared and summed, which runs on vectors and on all cores.
"""

import jax
import jax.numpy as jnp

from sae_jax.ops import varying
from sae_jax.ops.top_k import reference

# Entries of a run of neighbours: the most are the bits of a word. On two x86
# cores, of 4,096 rows of 4,096 entries `lax.top_k` took 3.1 times as long at K
# 32 and 3.0 times at K 64; of rows of 768 2.6 times at K 16, in runs of 8.
_RUN = range(8, 33)
# With four runs for each of the k entries few runs hold two of them.
_RUNS_PER_ENTRY = 4
# Bits of the bound, from the top one: sign, exponent and nine of the mantissa.
_BITS = 18


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
  short = -x_BN.shape[1] % run
  padded_BN = jnp.pad(x_BN, ((0, 0), (0, short)), constant_values=-jnp.inf)
  x_BGW = padded_BN.reshape(len(x_BN), -1, run)
  bound_B = _bound(x_BGW.max(-1), k)
  is_above_BGW = x_BGW >= bound_B[:, None, None]
  place_W = jnp.arange(run, dtype=jnp.uint32)
  bits_BG = (is_above_BGW.astype(jnp.uint32) << place_W).sum(-1)
  # Of one reading of the whole row there are two results.
  bits_BG = jax.lax.optimization_barrier(bits_BG)
  count_BG = jax.lax.population_count(bits_BG).astype(jnp.int32)
  end_BG = jnp.cumsum(count_BG, 1)
  total_B = end_BG[:, -1]

  def sort_few(x_BN):
    slot_S = jnp.arange(n_slots, dtype=jnp.int32)
    run_BS = jax.vmap(
      lambda end_G: jnp.searchsorted(end_G, slot_S, side='right')
    )(end_BG)
    run_BS = jnp.minimum(run_BS.astype(jnp.int32), end_BG.shape[1] - 1)

    def of_run(of_BG):
      return jnp.take_along_axis(of_BG, run_BS, axis=1)

    nth_BS = slot_S - of_run(end_BG - count_BG)
    idx_BS = run_BS * run + _place_of_bit(of_run(bits_BG), nth_BS, run)
    idx_BS = jnp.minimum(idx_BS, x_BN.shape[1] - 1)
    vals_BS = jnp.take_along_axis(x_BN, idx_BS, axis=1)
    vals_BS = jnp.where(slot_S < total_B[:, None], vals_BS, -jnp.inf)
    # They are in the order of their indices, so that ties are right.
    vals_BK, slot_BK = reference.sorted_top_k(vals_BS, k)
    return vals_BK, jnp.take_along_axis(idx_BS, slot_BK, axis=1)

  # A NaN as the bound is reached by none.
  fits = ((total_B >= k) & (total_B <= n_slots)).all()
  return jax.lax.cond(
    fits, sort_few, lambda x_BN: reference.sorted_top_k(x_BN, k), x_BN
  )


def _bound(x_BG: jax.Array, k: int) -> jax.Array:
  """The k-th largest entry of each row, or a little less."""
  bits_BG = jax.lax.bitcast_convert_type(x_BG, jnp.uint32)
  top = jnp.uint32(1 << 31)
  # Unsigned integers in the order of the floats.
  key_BG = jnp.where(bits_BG < top, bits_BG | top, ~bits_BG)

  def set_bit(nth, bound_B):
    higher_B = bound_B | (top >> nth.astype(jnp.uint32))
    reached_B = (key_BG >= higher_B[:, None]).sum(1, dtype=jnp.int32)
    return jnp.where(reached_B >= k, higher_B, bound_B)

  start_B = varying.zeros((len(x_BG),), jnp.uint32, x_BG)
  key_B = jax.lax.fori_loop(0, _BITS, set_bit, start_B)
  bits_B = jnp.where(key_B < top, ~key_B, key_B ^ top)
  return jax.lax.bitcast_convert_type(bits_B, x_BG.dtype)


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
