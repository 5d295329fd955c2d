"""Per-latent statistics and examples, accumulated over a stream of codes."""

import numpy as np

from sae_jax.feed import splitmix64

# Twenty bins per decade of activation; the first and the last bin also hold
# the values beyond them.
HISTOGRAM_EDGES = np.logspace(-5, 3, 161)


class LatentStats:
  """Counts, moments and histograms of each latent's positive activations."""

  def __init__(self, n_latents: int):
    bins = len(HISTOGRAM_EDGES) - 1
    self.tokens = 0
    self.count_N = np.zeros(n_latents, np.int64)
    self.max_N = np.zeros(n_latents)
    self._power_XN = np.zeros((3, n_latents))
    self.hist_NH = np.zeros((n_latents, bins), np.int64)

  def update(self, vals_BK: np.ndarray, idx_BK: np.ndarray) -> None:
    """Adds a batch of codes; values that are not positive do not count."""
    n_latents, bins = self.hist_NH.shape
    active = vals_BK > 0
    values, latents = vals_BK[active].astype(np.float64), idx_BK[active]
    self.tokens += len(vals_BK)
    self.count_N += np.bincount(latents, minlength=n_latents)
    np.maximum.at(self.max_N, latents, values)
    for power in range(3):
      self._power_XN[power] += np.bincount(
        latents, values ** (power + 1), n_latents
      )
    place = np.searchsorted(HISTOGRAM_EDGES, values, side='right') - 1
    place = np.clip(place, 0, bins - 1)
    # bincount would make an array of all latents and bins for every batch.
    np.add.at(
      self.hist_NH.reshape(-1), latents.astype(np.int64) * bins + place, 1
    )

  def moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, standard deviation and skewness of the positive activations.

    All are over the tokens on which the latent fired (population moments); 0
    for a latent that never did. Where all values agree the deviation is 0, and
    where they spread by less than 1e-4 of their mean the skewness is 0: sums in
    float64 give no more digits.
    """
    count_N = np.maximum(self.count_N, 1)
    mean_N, square_N, cube_N = self._power_XN / count_N
    variance_N = np.maximum(square_N - mean_N**2, 0)
    # Differences of equal values are rounding, not spread.
    variance_N[variance_N < 1e-12 * square_N] = 0
    third_N = cube_N - 3 * mean_N * square_N + 2 * mean_N**3
    std_N = np.sqrt(variance_N)
    skew_N = np.divide(
      third_N,
      std_N**3,
      out=np.zeros_like(std_N),
      where=variance_N > 1e-8 * square_N,
    )
    return mean_N, std_N, skew_N


class TopExamples:
  """The M highest-scoring tokens of each latent, one from each group."""

  def __init__(self, n_latents: int, n_examples: int):
    shape = (n_latents, n_examples)
    self.score_NM = np.full(shape, -np.inf)
    self.row_NM = np.full(shape, -1, np.int64)
    self._group_NM = np.full(shape, -1, np.int64)

  def update(
    self,
    latents: np.ndarray,
    scores: np.ndarray,
    rows: np.ndarray,
    groups: np.ndarray,
  ) -> None:
    """Offers tokens to latents; the result does not depend on batching.

    Args:
      latents: latent of each offer, a flat array, as are the others.
      scores: the higher the better; ties go to the lower row.
      rows: row of the store.
      groups: group of each offer (a document, say); a latent keeps the best
        offer of each group.
    """
    if not self.score_NM.shape[1]:
      return
    # Only offers that can displace a latent's worst example are sorted, with
    # the examples of those latents alone.
    hopeful = scores >= self.score_NM[:, -1][latents]
    touched = np.unique(latents[hopeful])
    present = self.row_NM[touched] >= 0

    def join(offers, kept_NM):
      return np.concatenate([offers[hopeful], kept_NM[touched][present]])

    latents = np.concatenate(
      [latents[hopeful], np.repeat(touched, present.sum(1))]
    )
    scores = join(scores, self.score_NM)
    rows = join(rows, self.row_NM)
    groups = join(groups, self._group_NM)

    best = np.lexsort((rows, -scores, groups, latents))
    first = np.ones(len(best), bool)
    first[1:] = (np.diff(latents[best]) != 0) | (np.diff(groups[best]) != 0)
    best = best[first]
    best = best[np.lexsort((rows[best], -scores[best], latents[best]))]
    starts = np.searchsorted(latents[best], latents[best])
    rank = np.arange(len(best)) - starts
    best, rank = (
      best[rank < self.score_NM.shape[1]],
      rank[rank < self.score_NM.shape[1]],
    )
    self.score_NM[latents[best], rank] = scores[best]
    self.row_NM[latents[best], rank] = rows[best]
    self._group_NM[latents[best], rank] = groups[best]


def random_scores(
  rows: np.ndarray, latents: np.ndarray, seed: int
) -> np.ndarray:
  """A pseudo-random score in [0, 1) for each pair of row and latent.

  The pairs with the highest scores are a uniform sample of all pairs, in any
  order and batching. The hash is SplitMix64's finaliser.
  """
  x = rows.astype(np.uint64) * splitmix64.GAMMA
  x ^= latents.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)
  x += np.uint64(seed * 0x8CB92BA72F3D8DD7 % 2**64)
  return (splitmix64.finalise(x) >> np.uint64(11)).astype(np.float64) / 2**53
