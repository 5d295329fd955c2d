"""The sparse codes of a store's rows."""

import functools
from typing import NamedTuple

import jax
import numpy as np

from sae_jax import autoencoder, progress
from sae_jax import store as store_lib
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
  x_BD, _ = autoencoder.preprocess(config, sae, raw_BD)
  return autoencoder.encode(config, sae, x_BD)


def encode_rows(
  trained: Trained,
  store: store_lib.Store,
  start: int,
  stop: int,
  batch_rows: int,
) -> Codes:
  """Encodes rows start to stop of a store in one pass."""
  k = trained.config.k
  vals_RK = np.zeros((stop - start, k), np.float32)
  idx_RK = np.zeros((stop - start, k), np.int32)
  with progress.bar(total=stop - start, unit='tok', desc='encode') as bar:
    for row in range(start, stop, batch_rows):
      last = min(stop, row + batch_rows)
      vals_BK, idx_BK = _encode(
        trained.config, trained.sae, store.read_rows(row, last)
      )
      vals_RK[row - start : last - start] = vals_BK
      idx_RK[row - start : last - start] = idx_BK
      bar.update(last - row)
  return Codes(start, vals_RK, idx_RK)
