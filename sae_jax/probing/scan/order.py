"""Orders of pairs, by what is fast on a TPU and what is fast on a CPU.

A TPU sorts many arrays together faster than it gathers one. XLA's sort for CPUs
is fast for one array alone, and gathering costs a fraction of it.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


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
  """The slots in a stable order of their keys.

  Each pass sorts words of some bits of the key and, below them, the place.
  """
  place_bits = max(1, (len(key_P) - 1).bit_length())
  width = 32 - place_bits
  slot_P = jnp.arange(len(key_P), dtype=jnp.int32)
  place_P = slot_P.astype(jnp.uint32)
  for low in range(0, most.bit_length(), width):
    digit_P = key_P[slot_P].astype(jnp.uint32) >> low
    # Bits above the digit's are shifted out.
    word_P = jax.lax.sort(digit_P << place_bits | place_P, is_stable=False)
    slot_P = slot_P[(word_P & jnp.uint32(2**place_bits - 1)).astype(jnp.int32)]
  return slot_P


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
  place_P = jnp.cumsum(chosen_P, dtype=jnp.int32) - 1
  place_P = jnp.where(chosen_P, place_P, n_slots)
  empty_P = jnp.full(n_slots, n_slots, jnp.int32)
  return empty_P.at[place_P].set(slot_P, mode='drop', unique_indices=True)
