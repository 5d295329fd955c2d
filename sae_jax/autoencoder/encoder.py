"""The encoder's affine map, which every nonlinearity starts from."""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.autoencoder.params import Sae, SaeConfig


def pre_activations(config: SaeConfig, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """W_enc (x - b_pre) + b_lat of every latent, [B, N]."""
  x_BD = x_BD - sae.b_pre_D
  return ops.matmul(x_BD, sae.w_enc_ND.T, config.matmul_dtype) + sae.b_lat_N


def dense_codes(z_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Codes of all latents as values and indices: K is N."""
  latents_N = jnp.arange(z_BN.shape[1], dtype=jnp.int32)
  return z_BN, jnp.broadcast_to(latents_N, z_BN.shape)
