"""Activations of chosen latents on windows of a store's rows.

Memory is that of a batch and of eight bytes for each window and latent.
"""

from collections.abc import Sequence
import functools
import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import autoencoder, checkpoint, progress
from sae_jax import store as store_lib
from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.explaining import windows as windows_lib
from sae_jax.explaining.windows import Windows


class Peaks(NamedTuple):
  """What latents do on windows; U latents, W windows.

  Attributes:
    peak_WU: highest activation on the window's rows; 0 if there is none.
    near_WU: highest pre-activation on them.
    frequent: of each latent the tokens of the explainer's rows on which it is
      active, the most frequent first, and of equal ones the lower.
  """

  peak_WU: np.ndarray
  near_WU: np.ndarray
  frequent: list[np.ndarray]


def peaks(
  trained: checkpoint.Trained,
  store: store_lib.Store,
  windows: Windows,
  latents: np.ndarray,
  batch_rows: int,
  most_tokens: int,
) -> Peaks:
  """Reads all rows of windows once.

  Args:
    trained: the autoencoder.
    store: the store that the windows are of.
    windows: the windows.
    latents: the latents, [U].
    batch_rows: rows at a time.
    most_tokens: tokens that are wanted of each latent.

  Raises:
    UserError: if rows cannot be read or are not finite.
  """
  shape = len(windows.start_W), len(latents)
  peak_WU = np.zeros(shape, np.float32)
  near_WU = np.full(shape, -np.inf, np.float32)
  width = int(windows.tokens_L.max()) + 1
  counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
  encode = _encoder(trained, latents)
  n_rows = len(windows.place_R)
  with progress.bar(total=n_rows, unit='tok', desc='texts') as bar:
    for start in range(0, n_rows, batch_rows):
      rows = np.arange(start, min(n_rows, start + batch_rows))
      raw_RD = store.finite_rows(
        windows.first_row + start, windows.first_row + int(rows[-1]) + 1
      )
      act_RU, pre_RU = encode(raw_RD, batch_rows)
      kept = windows.window_R[rows] >= 0
      rows, act_RU, pre_RU = rows[kept], act_RU[kept], pre_RU[kept]
      if len(rows):
        own, starts = np.unique(windows.window_R[rows], return_index=True)
        for total_WU, of_RU in ((peak_WU, act_RU), (near_WU, pre_RU)):
          highest = np.maximum.reduceat(of_RU, starts, axis=0)
          total_WU[own] = np.maximum(total_WU[own], highest)
        of_explainer = (
          windows.side_W[windows.window_R[rows]] == windows_lib.EXPLAINER
        )
        row, latent = np.nonzero((act_RU > 0) & of_explainer[:, None])
        tokens = windows.tokens_L[windows.place_R[rows[row]]]
        counts = _added(*counts, latent * width + tokens)
      bar.update(len(kept))
  frequent = _frequent(*counts, width, len(latents), most_tokens)
  return Peaks(peak_WU, near_WU, frequent)


def of_windows(
  trained: checkpoint.Trained,
  store: store_lib.Store,
  windows: Windows,
  latents: np.ndarray,
  wanted: Sequence[tuple[int, int]],
  batch_rows: int,
) -> dict[tuple[int, int], np.ndarray]:
  """The activation on each token of some windows.

  Args:
    trained: see `peaks`.
    store: see `peaks`.
    windows: see `peaks`.
    latents: see `peaks`.
    wanted: pairs of a window and the place of a latent in `latents`.
    batch_rows: see `peaks`.

  Returns:
    By pair, float32 [tokens of the window].
  """
  by_window = {}
  for window, latent in wanted:
    by_window.setdefault(window, []).append(latent)
  encode, found, batch = _encoder(trained, latents), {}, []

  def flush():
    rows = np.concatenate([windows.rows(window) for window in batch])
    act_RU, _ = encode(store.gather(windows.first_row + rows), batch_rows)
    start = 0
    for window in batch:
      stop = start + len(windows.rows(window))
      for latent in by_window[window]:
        found[window, latent] = act_RU[start:stop, latent]
      start = stop

  size = 0
  for window in progress.bar(sorted(by_window), desc='chosen texts'):
    more = len(windows.rows(window))
    if batch and size + more > batch_rows:
      flush()
      batch, size = [], 0
    batch.append(window)
    size += more
  if batch:
    flush()
  return found


def _encoder(trained: checkpoint.Trained, latents: np.ndarray):
  """Raw rows and a size to pad to -> activations and pre-activations [R, U]."""
  config, sae = trained.config, trained.sae
  own = sae.replace(
    w_enc_ND=sae.w_enc_ND[latents],
    b_lat_N=sae.b_lat_N[latents],
    w_dec_ND=sae.w_dec_ND[latents],
    extra={
      name: of[latents] if name.endswith('_N') else of
      for name, of in sae.extra.items()
    },
  )
  # One more than there are chosen: of all others.
  place_N = np.full(config.n_latents, len(latents), np.int32)
  place_N[latents] = np.arange(len(latents))

  def encode(raw_RD, size):
    # Windows of long contexts may be more than a batch.
    size = max(size, len(raw_RD))
    padded_BD = np.pad(raw_RD, ((0, size - len(raw_RD)), (0, 0)), mode='edge')
    out = _values(config, sae, own, place_N, padded_BD)
    return [np.asarray(of)[: len(raw_RD)] for of in out]

  return encode


@functools.partial(jax.jit, static_argnums=0)
def _values(config, sae, own, place_N, raw_BD):
  """Activations and pre-activations of the latents of `own`, [B, U].

  Where a token may have any number of active latents, each one depends on its
  own pre-activation alone.
  """
  x_BD, _ = autoencoder.preprocess(config, sae, raw_BD)
  pre_BU = encoder.pre_activations(config, own, x_BD)
  if nonlinearity.of(config.activation).active_per_token(config) is None:
    act_BU, _ = autoencoder.encode(config, own, x_BD)
    return act_BU, pre_BU
  vals_BK, idx_BK = autoencoder.encode(config, sae, x_BD)
  rows_B1 = jnp.arange(len(x_BD))[:, None]
  act_BU = jnp.zeros((len(x_BD), pre_BU.shape[1] + 1), vals_BK.dtype)
  act_BU = act_BU.at[rows_B1, place_N[idx_BK]].max(vals_BK)
  return act_BU[:, :-1], pre_BU


def _added(keys, counts, more):
  """Counts of keys with one more of each of some keys."""
  new, added = np.unique(more, return_counts=True)
  joined, place = np.unique(np.concatenate([keys, new]), return_inverse=True)
  weights = np.concatenate([counts, added])
  return joined, np.bincount(place, weights, len(joined)).astype(np.int64)


def _frequent(keys, counts, width, n_latents, most) -> list[np.ndarray]:
  """See `Peaks`."""
  latent, token = np.divmod(keys, width)
  order = np.lexsort((token, -counts, latent))
  ends = np.searchsorted(latent[order], np.arange(n_latents + 1))
  return [token[order[a:b]][:most] for a, b in itertools.pairwise(ends)]
