"""The kernel's top-k, made exact: tokens that fail its test are done again."""

import jax
import jax.numpy as jnp

from sae_jax.ops import chip, varying
from sae_jax.ops.encode_topk import kernel, reference
from sae_jax.ops.encode_topk import tiles as tiles_lib

# Most tokens that are encoded again in one pass, and the most bytes of their
# pre-activations. Each pass reads the whole encoder, so passes should be few.
REDO_TOKENS = 64
_REDO_BYTES = 2**28


def encode_topk(
  x_BD: jax.Array,
  w_enc_ND: jax.Array,
  b_lat_N: jax.Array,
  mask_N: jax.Array | None,
  k: int,
  dtype: jnp.dtype | None,
  tiles: tiles_lib.Tiles | None = None,
  recall: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array, float]:
  """Top-k of x W_enc^T + b_lat of the latents under the mask.

  Args:
    x_BD: inputs with the bias b_pre subtracted.
    w_enc_ND: a row per latent.
    b_lat_N: latent bias.
    mask_N: latents that may be chosen; None for all.
    k: how many are taken.
    dtype: of the factors, see `ops.matmul`.
    tiles: of the kernel; None for those of the shape and chip.
    recall: at 1 the result is exact. Below 1 the kernel's result stands, and
      is expected to hold at least this share of the top k; only tokens that
      are not finite are encoded again.

  Returns:
    vals_BK, descending; idx_BK int32; failed_B, the tokens whose top k the
    kernel could not vouch for, so that they were encoded again in full; and
    the share of the top k that the result is expected to hold, see
    `tiles.expected_recall`, which is 1 for a `recall` of 1.
  """
  batch, width = x_BD.shape
  n_latents = w_enc_ND.shape[0]
  if tiles is None:
    tiles = tiles_lib.choose(batch, width, n_latents, k, dtype, recall)
  bias_N = b_lat_N
  if mask_N is not None:
    bias_N = jnp.where(mask_N, b_lat_N, -jnp.inf)
  # Rounded once, for the kernel and for the tokens that are encoded again.
  if dtype is not None:
    w_enc_ND = w_enc_ND.astype(dtype)
  vals_BK, idx_BK, dropped_B = kernel.encode_topk(
    x_BD,
    w_enc_ND,
    bias_N,
    k,
    tiles=tiles,
    dtype=dtype,
    interpret=chip.interpret(),
  )
  # No comparison holds for a NaN, so the kernel never sees one.
  weights_ok = jnp.isfinite(w_enc_ND).all() & ~jnp.isnan(bias_N).any()
  numbers_B = jnp.isfinite(x_BD).all(-1) & weights_ok
  sure_B = (vals_BK[:, -1] > dropped_B) | jnp.isneginf(dropped_B)
  failed_B, expected = ~numbers_B, 1.0
  if recall == 1:
    failed_B |= ~sure_B
  else:
    expected = tiles_lib.expected_recall(n_latents, k, tiles.bins, tiles.kept)
  vals_BK, idx_BK = _again(
    failed_B, vals_BK, idx_BK, (x_BD, w_enc_ND, b_lat_N, mask_N, dtype)
  )
  return vals_BK, idx_BK, failed_B, expected


def _again(failed_B, vals_BK, idx_BK, inputs):
  """Replaces the rows of the tokens that failed, `size` of them at a time."""
  x_BD, w_enc_ND, b_lat_N, mask_N, dtype = inputs
  batch, k = vals_BK.shape
  size = max(8, _REDO_BYTES // (4 * w_enc_ND.shape[0]))
  size = min(batch, size, REDO_TOKENS)
  # Places past the last failed token repeat it, and write it once more.
  order_B = jnp.nonzero(failed_B, size=batch)[0]
  total = failed_B.sum(dtype=jnp.int32)

  def body(carry):
    start, vals_BK, idx_BK = carry
    place = jnp.minimum(start + jnp.arange(size), total - 1)
    token = order_B[place]
    vals, idx = reference.encode_topk(
      x_BD[token], w_enc_ND, b_lat_N, mask_N, k, dtype, kernels=True
    )
    vals_BK = vals_BK.at[token].set(vals)
    idx_BK = idx_BK.at[token].set(idx)
    return start + size, vals_BK, idx_BK

  start = varying.match(jnp.zeros((), jnp.int32), vals_BK)
  _, vals_BK, idx_BK = jax.lax.while_loop(
    lambda carry: carry[0] < total, body, (start, vals_BK, idx_BK)
  )
  return vals_BK, idx_BK
