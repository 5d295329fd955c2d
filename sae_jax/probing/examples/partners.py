"""Latents that fire together.

Two latents are partners if they are active on the same rows more often than
chance has it. The score is the phi coefficient, the correlation of the two
indicators "is active on the row" over all R rows of the codes: of latents that
are active on a and on b rows, and on c rows together,

  phi = (R c - a b) / sqrt(a (R - a) b (R - b)),

1 for latents that are always active together and 0 for independent ones
(Yule, "On the methods of measuring association between two attributes", 1912).
A single row in common is no evidence, and would score 1 for latents that are
active once: partners share two rows at least. Ties go to the lower latent.
"""

import numpy as np

from sae_jax.probing.examples import spills, tallies

_LEAST_ROWS = 2


def strongest(
  pieces: spills.Pieces,
  latents: range,
  active_N: np.ndarray,
  n_rows: int,
  k: int,
  most: int,
) -> dict[str, np.ndarray]:
  """The partners of latents with the highest scores.

  Args:
    pieces: the latents' pairs, as often as it is called.
    latents: the latents.
    active_N: number of rows on which each of all latents is active.
    n_rows: number of rows of the codes, R.
    k: most active latents of a row.
    most: partners that are wanted of each latent.

  Returns:
    partner_ids, partner_counts, the rows on which both are active, and
    partner_scores, [len(latents), most]; -1, 0, 0 where there are no more.
  """
  # One more than there are latents: where a row has fewer than k.
  width = len(active_N) + 1
  cells = len(latents) * width
  dtype = tallies.key_dtype(cells)

  def keys():
    for spill, pairs in pieces():
      latents_RK = spill.array('latents')
      row_P = pairs.row_P - (spill.start - spill.first)
      step = max(1, tallies.CHUNK // max(1, k))
      for start in range(0, len(row_P), step):
        take = slice(start, start + step)
        others_PK = latents_RK[row_P[take]].view(np.uint32)
        np.minimum(others_PK, width - 1, out=others_PK)
        keys_PK = (pairs.latent_P[take, None] * width).astype(dtype) + others_PK
        yield keys_PK.reshape(-1)

  own_N = active_N[latents.start : latents.stop]
  key_C, count_C = tallies.tally(keys(), cells, int(own_N.sum()) * k)
  shared = count_C >= _LEAST_ROWS
  key_C, count_C = key_C[shared].astype(np.int64), count_C[shared]
  latent_C, other_C = key_C // width, key_C % width
  real = (other_C < width - 1) & (other_C != latent_C + latents.start)
  latent_C, other_C, count_C = latent_C[real], other_C[real], count_C[real]
  phi_C = _phi(own_N[latent_C], active_N[other_C], count_C, n_rows)
  real = phi_C > 0
  latent_C, other_C, count_C, phi_C = (
    array[real] for array in (latent_C, other_C, count_C, phi_C)
  )
  best, place = tallies.leaders(
    latent_C, ~phi_C.astype(np.float32).view(np.uint32), (-phi_C, other_C), most
  )
  at = latent_C[best], place
  shape = len(latents), most
  ids_NX, counts_NX = np.full(shape, -1, np.int32), np.zeros(shape, np.int64)
  scores_NX = np.zeros(shape, np.float32)
  ids_NX[at], counts_NX[at] = other_C[best], count_C[best]
  scores_NX[at] = phi_C[best]
  return {
    'partner_ids': ids_NX,
    'partner_counts': counts_NX,
    'partner_scores': scores_NX,
  }


def _phi(
  a: np.ndarray, b: np.ndarray, both: np.ndarray, n_rows: int
) -> np.ndarray:
  """The phi coefficient in float64; 0 of a latent that is always active."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  scale = np.sqrt(a * (n_rows - a)) * np.sqrt(b * (n_rows - b))
  return np.divide(
    both * float(n_rows) - a * b, scale, np.zeros_like(scale), where=scale > 0
  )
