"""How many candidates a shard offers of the k that all shards choose."""

import math

# Chance that some shard holds more winners of some token of a batch than it
# offers, if winners lie on random shards. Such a batch is done again.
_SHORT = 1e-3


def width(k: int, shards: int, tokens: int) -> int:
  """Candidates of a token that a shard offers, at most k.

  Args:
    k: active latents of a token, over all shards.
    shards: of the latents.
    tokens: of a batch on a shard.

  Returns:
    The least multiple of 8 with which at most 0.1 % of batches have a token
    whose winners fill a shard's list; k if that is less.
  """
  share = 1 / shards
  chance = [
    math.comb(k, n) * share**n * (1 - share) ** (k - n) for n in range(k + 1)
  ]
  # chance[n] is that of n winners of a token on a shard.
  for offered in range(8, k, 8):
    # Summed from the small end, where 1 minus the rest would cancel.
    filled = math.fsum(reversed(chance[offered:]))
    if filled * tokens * shards <= _SHORT:
      return offered
  return k
