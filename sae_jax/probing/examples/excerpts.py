"""The text around examples, from a spill."""

import numpy as np

from sae_jax.probing.examples import spills

# Examples whose windows are made at a time.
_EXAMPLES = 2**15


def write(
  columns: dict[str, np.ndarray],
  spill: spills.Spill,
  pairs: spills.Pairs,
  example_E: np.ndarray,
  latent_E: np.ndarray,
  row_E: np.ndarray,
  before: int,
) -> None:
  """Writes windows of examples into their places.

  A window is the tokens of the example's context from `before` before it to
  some after it, masked ones too, up to the first and the last row that has
  codes.

  Args:
    columns: tokens and acts [E, W], peak and document [E], which are changed;
      W is `before` + 1 and the tokens after.
    spill: the spill of the examples' rows.
    pairs: its pairs of these latents, those of rows beyond its own too.
    example_E: place of each example in the columns.
    latent_E: its latent, numbered as in `pairs`.
    row_E: its row in the store, one of the spill's own.
    before: see above.
  """
  places_R, befores_L, tokens_L, documents_L, begins_L, ends_L = (
    np.array(spill.array(name))
    for name in ('places', 'befores', 'tokens', 'documents', 'begins', 'ends')
  )
  width = columns['tokens'].shape[1]
  padded_L = np.pad(tokens_L, (before, width - before - 1))
  windows_LW = np.lib.stride_tricks.sliding_window_view(padded_L, width)
  n_rows = len(places_R) + 1
  pair_keys_P = pairs.latent_P * n_rows + pairs.row_P
  for part in range(0, len(example_E), _EXAMPLES):
    take = slice(part, part + _EXAMPLES)
    example, latent = example_E[take], latent_E[take]
    centre = places_R[row_E[take] - spill.first]
    start = centre - before
    low = np.maximum(begins_L[centre], start)
    high = np.minimum(ends_L[centre], start + width)
    column = np.arange(width)
    inside = column >= (low - start)[:, None]
    inside &= column < (high - start)[:, None]
    columns['tokens'][example] = np.where(inside, windows_LW[centre], -1)
    columns['peak'][example] = before
    columns['document'][example] = documents_L[centre]
    # The pairs of a window are consecutive.
    edges = [
      np.searchsorted(pair_keys_P, latent * n_rows + befores_L[edge])
      for edge in (low, high)
    ]
    sizes = edges[1] - edges[0]
    of = np.repeat(np.arange(len(example)), sizes)
    pair = np.arange(len(of)) + np.repeat(edges[0] - np.cumsum(sizes), sizes)
    pair += sizes[of]
    place = places_R[pairs.row_P[pair]] - start[of]
    columns['acts'][example[of], place] = pairs.value_P[pair]
