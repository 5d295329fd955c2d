"""Encoding in plain jax.numpy."""

import jax
import jax.numpy as jnp

from sae_jax.ops.dense import matmul
from sae_jax.ops.top_k import api as top_k_api

# Pre-activations that exist at a time. On two x86 cores blocks of this size
# cost nothing beside one product and spare the kernel mapping fresh pages.
BLOCK_BYTES = 2**27


def pre_activations(
  x_BD: jax.Array,
  w_enc_ND: jax.Array,
  b_lat_N: jax.Array,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """x W_enc^T + b_lat, [B, N]."""
  return matmul(x_BD, w_enc_ND.T, dtype) + b_lat_N


def encode_topk(x_BD, w_enc_ND, b_lat_N, mask_N, k, dtype, kernels=False):
  """Exact top-k of the pre-activations of the latents under the mask.

  See `exact.encode_topk` for the arguments, and `top_k` for `kernels`.
  """

  def block(x_BD):
    pre_BN = pre_activations(x_BD, w_enc_ND, b_lat_N, dtype)
    if mask_N is not None:
      pre_BN = jnp.where(mask_N, pre_BN, -jnp.inf)
    return top_k_api.top_k(pre_BN, k, kernels)

  batch, width = x_BD.shape
  token_bytes = w_enc_ND.shape[0] * x_BD.dtype.itemsize
  blocks = -(-batch * token_bytes // BLOCK_BYTES)
  if blocks <= 1:
    return block(x_BD)
  blocks = min(blocks, batch)
  size = -(-batch // blocks)
  # The last block is filled up with tokens that are dropped again.
  x_BD = jnp.pad(x_BD, ((0, blocks * size - batch), (0, 0)))
  vals, idx = jax.lax.map(block, x_BD.reshape(blocks, size, width))
  return vals.reshape(-1, k)[:batch], idx.reshape(-1, k)[:batch]
