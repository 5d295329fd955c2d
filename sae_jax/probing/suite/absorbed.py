"""How much of a concept's direction other latents than its own have taken.

The definitions are SAEBench 0.6's (Karvonen et al. 2025), after Chanin et al.,
"A is for absorption" (2024), with decoder rows of any length: of a latent's
activation times the length of its row all that follows depends.
"""

import numpy as np

# The lowest cosine with the probe of an absorbing latent.
COSINE, FULL_COSINE = 0.1, 0.025
# The least share of the activation's projection that absorbers have.
SHARE = 0.4
# Most latents that together are counted as absorbers of a word.
ABSORBERS = 3
# Activations below it are none.
_NONE = 1e-8


def scores(
  vals_WK: np.ndarray,
  idx_WK: np.ndarray,
  cosine_N: np.ndarray,
  length_N: np.ndarray,
  projection_W: np.ndarray,
  own: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
  """Absorption of a concept on words that have it.

  Args:
    vals_WK: activations of each word's active latents, 0 for none.
    idx_WK: the latents.
    cosine_N: of each decoder row with the concept's probe.
    length_N: of each decoder row.
    projection_W: of each activation on the probe's direction.
    own: the latents that stand for the concept.

  Returns:
    Absorption fractions in [0, 1], and whether absorption is full.
  """
  size_WK = np.asarray(vals_WK, np.float64) * length_N[idx_WK]
  cosine_WK = cosine_N[idx_WK]
  part_WK = size_WK * cosine_WK
  is_own_WK = np.isin(idx_WK, own)
  own_W = np.where(is_own_WK, part_WK, 0).sum(1)
  may_WK = ~is_own_WK & (cosine_WK >= COSINE) & (part_WK > 0)
  others_WK = -np.sort(-np.where(may_WK, part_WK, 0), 1)
  others_W = others_WK[:, :ABSORBERS].sum(1)
  is_positive_W = projection_W > 0
  whole_W = np.where(is_positive_W, projection_W, 1)
  enough_W = is_positive_W & (others_W / whole_W >= SHARE)
  absorbs_W = enough_W & (own_W < projection_W)
  taken_W = np.minimum(others_W, projection_W - own_W)
  some_W = absorbs_W & (own_W > 0)
  total_W = np.where(some_W, taken_W + own_W, 1)
  fraction_W = np.where(some_W, taken_W / total_W, absorbs_W.astype(float))
  silent_W = np.where(is_own_WK, size_WK, 0).max(1) < _NONE
  best_W1 = part_WK.argmax(1)[:, None]
  best_W, best_cosine_W = (
    np.take_along_axis(of, best_W1, 1)[:, 0] for of in (part_WK, cosine_WK)
  )
  full_W = silent_W & is_positive_W & (best_cosine_W >= FULL_COSINE)
  full_W &= best_W / whole_W >= SHARE
  return fraction_W, full_W
