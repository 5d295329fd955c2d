"""Encoding in plain jax.numpy."""

import jax
import jax.numpy as jnp

from sae_jax.sparse.top_k import api as top_k_api


def pre_activations(
  x_BD: jax.Array, w_enc_ND: jax.Array, b_lat_N: jax.Array
) -> jax.Array:
  """x W_enc^T + b_lat, [B, N]."""
  return x_BD @ w_enc_ND.T + b_lat_N


def encode_topk(x_BD, w_enc_ND, b_lat_N, mask_N, k):
  """Exact top-k of the pre-activations of the latents under the mask."""
  pre_BN = pre_activations(x_BD, w_enc_ND, b_lat_N)
  if mask_N is not None:
    pre_BN = jnp.where(mask_N, pre_BN, -jnp.inf)
  return top_k_api.top_k(pre_BN, k)
