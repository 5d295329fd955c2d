"""The sparse codes of a store's rows."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from sae_jax import autoencoder, ops, progress
from sae_jax import store as store_lib
from sae_jax.autoencoder import nonlinearity
from sae_jax.checkpoint import Trained


class Codes(NamedTuple):
  """Active latents of consecutive rows.

  Attributes:
    start: the store's row that comes first.
    vals_RK: float32 values, 0 where fewer than K latents are active.
    idx_RK: int32 latents.
  """

  start: int
  vals_RK: np.ndarray
  idx_RK: np.ndarray


@functools.partial(jax.jit, static_argnums=0)
def _encode(config, sae, raw_BD):
  """Codes, and the largest number of active latents of a token."""
  x_BD, _ = autoencoder.preprocess(config, sae, raw_BD)
  vals_BK, idx_BK = autoencoder.encode(config, sae, x_BD)
  return vals_BK, idx_BK, (vals_BK > 0).sum(-1).max()


_largest = jax.jit(ops.top_k, static_argnums=1)


def _compact(config, vals_BK, idx_BK, active) -> tuple[np.ndarray, np.ndarray]:
  """The codes without the columns of all N latents that hold nothing."""
  if nonlinearity.of(config.activation).active_per_token(config) is None:
    # A power of two, so that few programs serve all batches.
    width = 1 << (max(1, int(active)) - 1).bit_length()
    # Column n of such codes is latent n.
    vals_BK, idx_BK = _largest(vals_BK, min(width, vals_BK.shape[1]))
  return np.asarray(vals_BK), np.asarray(idx_BK)


def encode_rows(
  trained: Trained,
  store: store_lib.Store,
  start: int,
  stop: int,
  batch_rows: int,
) -> Codes:
  """Encodes rows start to stop of a store in one pass.

  K is that of TopK. Where a token may have any number of active latents it is
  the largest number of any token, or up to twice that, so that memory is 8 K
  bytes a row.
  """
  rows = stop - start
  vals_RK = np.zeros((rows, 0), np.float32)
  idx_RK = np.zeros((rows, 0), np.int32)
  with progress.bar(total=rows, unit='tok', desc='encode') as bar:
    for row in range(start, stop, batch_rows):
      last = min(stop, row + batch_rows)
      encoded = _encode(trained.config, trained.sae, store.read_rows(row, last))
      vals_BK, idx_BK = _compact(trained.config, *encoded)
      width = vals_BK.shape[1]
      if width > vals_RK.shape[1]:
        more = ((0, 0), (0, width - vals_RK.shape[1]))
        vals_RK, idx_RK = np.pad(vals_RK, more), np.pad(idx_RK, more)
      vals_RK[row - start : last - start, :width] = vals_BK
      idx_RK[row - start : last - start, :width] = idx_BK
      bar.update(last - row)
  return Codes(start, vals_RK, idx_RK)
