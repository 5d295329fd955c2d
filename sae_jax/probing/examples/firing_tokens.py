"""The tokens on which latents fire.

Of each latent the tokens of the rows on which it is active are counted, the
most frequent first and of equally frequent ones the lower id. A token's share
is the part of all rows of that token on which the latent is active: 1 for a
latent that fires whenever the token is read.
"""

import numpy as np

from sae_jax.probing.examples import spills, tallies


def most_frequent(
  pieces: spills.Pieces,
  n_latents: int,
  total: int,
  rows_V: np.ndarray,
  most: int,
) -> dict[str, np.ndarray]:
  """The tokens on which each latent fires most often.

  Args:
    pieces: the latents' pairs, as often as it is called.
    n_latents: number of the latents.
    total: number of their pairs.
    rows_V: number of rows of each token.
    most: tokens that are wanted of each latent.

  Returns:
    token_ids, token_counts and token_shares, [n_latents, most]; -1, 0, 0 where
    a latent fires on fewer tokens.
  """
  width = len(rows_V)
  dtype = tallies.key_dtype(n_latents * width)

  def keys():
    for spill, pairs in pieces():
      tokens_R = spill.array('tokens')[spill.array('places')[pairs.row_P]]
      yield (pairs.latent_P * width + tokens_R).astype(dtype)

  key_C, count_C = tallies.tally(keys(), n_latents * width, total)
  latent_C, token_C = np.divmod(key_C.astype(np.int64), max(1, width))
  rare_C = 2**32 - 1 - np.minimum(count_C, 2**32 - 1)
  best, place = tallies.leaders(
    latent_C, rare_C.astype(np.uint32), (-count_C, token_C), most
  )
  at = latent_C[best], place
  shape = n_latents, most
  ids_NX, counts_NX = np.full(shape, -1, np.int32), np.zeros(shape, np.int64)
  shares_NX = np.zeros(shape, np.float32)
  ids_NX[at], counts_NX[at] = token_C[best], count_C[best]
  shares_NX[at] = count_C[best] / rows_V[token_C[best]]
  return {
    'token_ids': ids_NX,
    'token_counts': counts_NX,
    'token_shares': shares_NX,
  }
