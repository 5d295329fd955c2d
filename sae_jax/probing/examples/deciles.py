"""Examples of each tenth of a latent's positive activations.

The activations of a latent, the highest first and of equal ones that of the
lower row, are cut into tenths: of c activations the one of rank r, from 0, is
in tenth 9 - 10 r // c, so that tenth 0 holds the lowest. Of each tenth the rows
with the lowest hashes of (row, latent, seed) are taken, which is a uniform draw
without replacement. Documents may recur: with one of each, a document's rows
would be drawn the less often the more of them there are.
"""

import numpy as np

from sae_jax.feed import splitmix64
from sae_jax.probing.examples import spills, tallies

TENTHS = 10
# Beyond the key of any activation.
_NEVER = 2**32 - 1
_BITS = 16
# The random examples of the same seed are another draw.
_SALT = 0xD6E8FEB86659FD93


def draw(
  pieces: spills.Pieces, first: int, count_N: np.ndarray, each: int, seed: int
) -> np.ndarray:
  """Rows of examples from each tenth of each latent.

  Args:
    pieces: the latents' pairs in the order of rows, as often as it is called.
    first: the first latent.
    count_N: number of positive activations of each latent; a latent with more
      than `tallies.CHUNK` must be the only one.
    each: examples of a tenth.
    seed: seed of the draw.

  Returns:
    int64 [N, 10, each], the lowest tenth first; -1 where a tenth has no more
    activations.
  """
  bounds = _bounds(pieces, count_N)
  seen_TN = np.zeros(bounds[0].shape, np.int64)
  kept = tuple(np.zeros(0, dtype) for dtype in (np.int64, np.uint64, np.int64))
  rows_NTX = np.full((len(count_N), TENTHS, each), -1, np.int64)
  for spill, pairs in pieces():
    row_P = pairs.row_P + spill.first
    hash_P = _hash(row_P, pairs.latent_P + first, seed)
    group_P = pairs.latent_P * TENTHS + _tenths(pairs, *bounds, seen_TN)
    group_P, hash_P, row_P = (
      np.concatenate(both) for both in zip(kept, (group_P, hash_P, row_P))
    )
    chosen, place = tallies.leaders(
      group_P, hash_P >> np.uint64(32), (hash_P, row_P), each
    )
    kept = group_P[chosen], hash_P[chosen], row_P[chosen]
    rows_NTX.reshape(-1)[kept[0] * each + place] = kept[2]
  return rows_NTX


def _hash(row_P: np.ndarray, latent_P: np.ndarray, seed: int) -> np.ndarray:
  """A pseudo-random uint64 for each pair of row and latent."""
  seeded = splitmix64.step(np.array([seed % 2**64 ^ _SALT], np.uint64))
  return splitmix64.step(
    splitmix64.step(row_P.astype(np.uint64) ^ seeded)
    ^ latent_P.astype(np.uint64)
  )


def _keys(value_P: np.ndarray) -> np.ndarray:
  """uint32 that ascend as positive float32 descend."""
  return ~value_P.view(np.uint32)


def _bounds(
  pieces: spills.Pieces, count_N: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """The first activation of each tenth but the highest, by rank.

  Returns:
    keys_TN, the key of the activation that comes first in a tenth, and
    equal_TN, how many activations equal to it come before it.
  """
  wanted_TN = -(-np.arange(1, TENTHS)[:, None] * count_N // TENTHS)
  if len(count_N) == 1 and count_N[0] > tallies.CHUNK:
    return _selected(pieces, wanted_TN)
  keys_P = [
    pairs.latent_P.astype(np.uint64) << np.uint64(32) | _keys(pairs.value_P)
    for _, pairs in pieces()
  ]
  # A key that is looked up where a tenth is empty.
  keys_P = np.sort(np.concatenate([*keys_P, np.array([2**64 - 1], np.uint64)]))
  starts_N = np.cumsum(count_N) - count_N
  exists_TN = wanted_TN < count_N
  at_TN = np.where(exists_TN, wanted_TN + starts_N, len(keys_P) - 1)
  keys_TN = keys_P[at_TN]
  equal_TN = at_TN - np.searchsorted(keys_P, keys_TN)
  return (keys_TN & np.uint64(_NEVER)).astype(np.uint32), equal_TN


def _selected(
  pieces: spills.Pieces, wanted_TN: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """`_bounds` of one latent of any number of activations, none of them kept.

  First the upper halves of the keys are counted, then the lower halves of keys
  that share the upper half of a wanted one.
  """
  counts_U = np.zeros(2**_BITS, np.int64)
  for _, pairs in pieces():
    upper_P = _keys(pairs.value_P) >> np.uint32(_BITS)
    counts_U += np.bincount(upper_P, minlength=2**_BITS)
  ends_U = np.cumsum(counts_U)
  upper_T = np.searchsorted(ends_U, wanted_TN[:, 0], 'right')
  left_T = wanted_TN[:, 0] - (ends_U - counts_U)[upper_T]
  halves = np.unique(upper_T)
  counts_XL = np.zeros((len(halves), 2**_BITS), np.int64)
  for _, pairs in pieces():
    keys_P = _keys(pairs.value_P)
    for half, counts_L in zip(halves, counts_XL):
      lower_P = keys_P[keys_P >> np.uint32(_BITS) == half] & np.uint32(
        2**_BITS - 1
      )
      counts_L += np.bincount(lower_P, minlength=2**_BITS)
  keys_TN = np.zeros(wanted_TN.shape, np.uint32)
  equal_TN = np.zeros(wanted_TN.shape, np.int64)
  for tenth, (upper, left) in enumerate(zip(upper_T, left_T)):
    counts_L = counts_XL[np.searchsorted(halves, upper)]
    ends_L = np.cumsum(counts_L)
    lower = np.searchsorted(ends_L, left, 'right')
    keys_TN[tenth] = upper << _BITS | lower
    equal_TN[tenth] = left - (ends_L[lower] - counts_L[lower])
  return keys_TN, equal_TN


def _tenths(
  pairs: spills.Pairs,
  keys_TN: np.ndarray,
  equal_TN: np.ndarray,
  seen_TN: np.ndarray,
) -> np.ndarray:
  """The tenth of each pair, int64, the lowest 0.

  Args:
    pairs: pairs of rows that come after all that were seen.
    keys_TN: see `_bounds`.
    equal_TN: see `_bounds`.
    seen_TN: how many activations equal to each bound were seen, to which those
      of the pairs are added.
  """
  keys_P = _keys(pairs.value_P)
  tenth_P = np.full(len(keys_P), TENTHS - 1)
  for keys_N, equal_N, seen_N in zip(keys_TN, equal_TN, seen_TN):
    bound_P = keys_N[pairs.latent_P]
    tenth_P -= keys_P > bound_P
    (ties,) = np.nonzero(keys_P == bound_P)
    latents = pairs.latent_P[ties]
    place = tallies.places(latents) + seen_N[latents]
    tenth_P[ties] -= place >= equal_N[latents]
    seen_N += np.bincount(latents, minlength=len(seen_N))
  return tenth_P
