"""Orders of pairs, by what is fast on a TPU and what is fast on a CPU.

A TPU sorts many arrays together faster than it gathers one. On a CPU XLA sorts
by comparisons, of which each costs more than to gather or to scatter a number.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sae_jax.probing.scan import counter_hash

# Bits of the keys that a CPU sorts by at a time: in the 131,072 slots of 4,096
# tokens it took 3.1 ms to sort by 13 bits so, and 7.0 by comparisons.
_DIGIT_BITS = 4
# Numbers that a CPU sums up at a time.
_ROW = 512


def by_latent(
  latent_BC: jax.Array,
  n_own: int,
  of_BC: Sequence[jax.Array],
  of_B: Sequence[jax.Array],
) -> tuple[jax.Array, ...]:
  """Sorts the slots of a batch by (latent, token).

  Args:
    latent_BC: latent of each slot, at most `n_own`, int32.
    n_own: one more than the last latent.
    of_BC: arrays that are sorted along.
    of_B: arrays whose entries all slots of a token share.

  Returns:
    latent_P, the arrays of_BC and those of_B, sorted.
  """
  return jax.lax.platform_dependent(
    latent_BC,
    tuple(of_BC),
    tuple(of_B),
    cpu=lambda *args: _by_latent_cpu(*args, n_own),
    default=_by_latent,
  )


def flat(of_B: jax.Array, n_candidates: int) -> jax.Array:
  """The entry of its token for each slot."""
  shape = len(of_B), n_candidates
  return jnp.broadcast_to(of_B[:, None], shape).reshape(-1)


def _by_latent(latent_BC, of_BC, of_B):
  n_tokens, n_candidates = latent_BC.shape
  token_B = jnp.arange(n_tokens, dtype=jnp.int32)
  operands = (
    latent_BC.reshape(-1),
    flat(token_B, n_candidates),
    *(of.reshape(-1) for of in of_BC),
    *(flat(of, n_candidates) for of in of_B),
  )
  # The token as a second key costs a TPU less than a stable sort.
  latent_P, _, *rest = jax.lax.sort(operands, num_keys=2, is_stable=False)
  return latent_P, *rest


def _by_latent_cpu(latent_BC, of_BC, of_B, n_own):
  latent_P = latent_BC.reshape(-1)
  slot_P = _radix(latent_P, n_own)
  token_P = slot_P // latent_BC.shape[1]
  return (
    latent_P[slot_P],
    *(of.reshape(-1)[slot_P] for of in of_BC),
    *(of[token_P] for of in of_B),
  )


def _radix(key_P: jax.Array, most: int) -> jax.Array:
  """The slots in a stable order of their keys, of one digit after the other.

  A slot's place is the number of those with lower digits, or with its digit
  before it. They are counted in words, a bit for each of 32 slots.
  """
  n_slots = len(key_P)
  # One word too many: where each digit's words begin at a power of two, they
  # fall on the same lines of the cache.
  n_words = -(-n_slots // 32) + 1
  slot_P = place_P = jnp.arange(n_slots, dtype=jnp.int32)
  bit_P = jnp.uint32(1) << (slot_P % 32).astype(jnp.uint32)
  for low in range(0, most.bit_length(), _DIGIT_BITS):
    digit_P = key_P[slot_P] >> low & 2**_DIGIT_BITS - 1
    word_P = jax.lax.optimization_barrier(digit_P * n_words + place_P // 32)
    words = jnp.zeros(2**_DIGIT_BITS * n_words, jnp.uint32)
    words = words.at[word_P].add(bit_P, mode='promise_in_bounds')
    counts = jax.lax.population_count(words).astype(jnp.int32)
    before = _cumsum(counts) - counts
    bits_P = words[word_P] & (bit_P - 1)
    to_P = before[word_P] + jax.lax.population_count(bits_P).astype(jnp.int32)
    slot_P = _moved(slot_P, to_P)
  return slot_P


def _moved(of_P: jax.Array, to_P: jax.Array) -> jax.Array:
  """The entries at other places, of which no two are the same."""
  return (
    jnp.zeros_like(of_P)
    .at[to_P]
    .set(of_P, mode='promise_in_bounds', unique_indices=True)
  )


def _cumsum(of_P: jax.Array) -> jax.Array:
  """Cumulative sums, int32: those of rows, then those of the rows' totals."""
  short = -len(of_P) % _ROW
  sums_RC = jnp.pad(of_P, (0, short)).reshape(-1, _ROW)
  sums_RC = jnp.cumsum(sums_RC, 1, dtype=jnp.int32)
  total_R = sums_RC[:, -1]
  sums_RC += (jnp.cumsum(total_R) - total_R)[:, None]
  return sums_RC.reshape(-1)[: len(of_P)]


def counts(latent_P: jax.Array, n_own: int) -> jax.Array:
  """Slots of each latent, [n_own] int32; those of `n_own` are not counted."""
  return jax.lax.platform_dependent(
    latent_P,
    cpu=lambda latent_P: _counts_cpu(latent_P, n_own),
    default=lambda latent_P: _counts(latent_P, n_own),
  )


def _counts(latent_P, n_own):
  latent_P = jax.lax.sort(latent_P, is_stable=False)
  end_N = jnp.searchsorted(latent_P, jnp.arange(n_own), side='right')
  return jnp.diff(end_N.astype(jnp.int32), prepend=0)


def _counts_cpu(latent_P, n_own):
  count_N = jnp.zeros(n_own, jnp.int32)
  return count_N.at[latent_P].add(1, mode='drop')


def repeated(latent_C: jax.Array, document_C: jax.Array) -> jax.Array:
  """Which slots have the latent and the document of one before them."""
  return jax.lax.platform_dependent(
    latent_C, document_C, cpu=_repeated_cpu, default=_repeated
  )


def _repeated(latent_C, document_C):
  slot_C = jnp.arange(len(latent_C), dtype=jnp.int32)
  *both, slot_C = jax.lax.sort(
    (latent_C, document_C, slot_C), num_keys=3, is_stable=False
  )
  is_same_C = [(of_C == jnp.roll(of_C, 1)).at[0].set(False) for of_C in both]
  again_C = (is_same_C[0] & is_same_C[1]).astype(jnp.int32)
  _, again_C = jax.lax.sort((slot_C, again_C), num_keys=1, is_stable=False)
  return again_C > 0


def _repeated_cpu(latent_C, document_C):
  """By hashes: those that meet one of another kind have a new hash."""
  n_slots = len(latent_C)
  slot_C = jnp.arange(n_slots, dtype=jnp.int32)
  size = 8 * n_slots

  def compare(carry):
    nth, open_C, again_C = carry
    place_C = _hash(nth, latent_C, document_C, size)
    place_C = jnp.where(open_C, place_C, size)
    first = jnp.full(size, n_slots, jnp.int32)
    first = first.at[place_C].min(slot_C, mode='drop')
    first_C = first.at[place_C].get(mode='fill', fill_value=0)
    is_same_C = open_C & (latent_C[first_C] == latent_C)
    is_same_C &= document_C[first_C] == document_C
    again_C |= is_same_C & (first_C < slot_C)
    return nth + 1, open_C & ~is_same_C, again_C

  start = jnp.uint32(0), jnp.ones(n_slots, bool), jnp.zeros(n_slots, bool)
  return jax.lax.while_loop(lambda carry: carry[1].any(), compare, start)[2]


def _hash(nth, latent_P, document_P, size):
  """Below `size`: equal for equal ones, and for others once in `size`."""
  document_P = document_P.astype(jnp.uint32)
  hash_P = counter_hash.random_key(nth, document_P, latent_P, 0)
  return (hash_P % jnp.uint32(size)).astype(jnp.int32)


def beaten_cpu(
  latent_P: jax.Array, document_P: jax.Array, key_P: jax.Array
) -> jax.Array:
  """Most slots whose key is below another of their latent and document.

  Those whose hash is that of another latent's or document's are not seen.
  """
  n_slots = len(latent_P)
  slot_P = jnp.arange(n_slots, dtype=jnp.int32)
  size = 2 * n_slots
  place_P = _hash(jnp.uint32(0), latent_P, document_P, size)
  highest = jnp.zeros(size, jnp.uint32).at[place_P].max(key_P)
  is_below_P = key_P < highest[place_P]
  others = jnp.zeros(size, jnp.int32)
  others = others.at[jnp.where(is_below_P, size, place_P)].set(
    slot_P, mode='drop'
  )
  other_P = others[place_P]
  is_below_P &= latent_P[other_P] == latent_P
  return is_below_P & (document_P[other_P] == document_P)


def front(chosen_P: jax.Array) -> jax.Array:
  """The slots that are chosen, in order; P behind them."""
  return jax.lax.platform_dependent(chosen_P, cpu=_front_cpu, default=_front)


def _front(chosen_P):
  slot_P = jnp.arange(len(chosen_P), dtype=jnp.int32)
  slot_P = jnp.where(chosen_P, slot_P, len(chosen_P))
  return jax.lax.sort(slot_P, is_stable=False)


def _front_cpu(chosen_P):
  n_slots = len(chosen_P)
  slot_P = jnp.arange(n_slots, dtype=jnp.int32)
  place_P = _cumsum(chosen_P) - 1
  place_P = jnp.where(chosen_P, place_P, n_slots)
  empty_P = jnp.full(n_slots, n_slots, jnp.int32)
  return empty_P.at[place_P].set(slot_P, mode='drop', unique_indices=True)
