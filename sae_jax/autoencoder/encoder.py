"""The encoder's affine map, which every nonlinearity starts from."""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.autoencoder import params
from sae_jax.autoencoder.params import Sae, SaeConfig


def has_input_bias(config: SaeConfig) -> bool:
  """Whether the encoder subtracts b_pre; a transcoder's is of its output."""
  return config.pre_bias == params.TIED and not config.target_site


def input_bias(config: SaeConfig, sae: Sae) -> jax.Array:
  """What the encoder subtracts from its input, [D]: b_pre, or zeros."""
  if has_input_bias(config):
    return sae.b_pre_D
  return jnp.zeros_like(sae.b_pre_D)


def pre_activations(config: SaeConfig, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """W_enc (x - b_pre) + b_lat of every latent, [B, N]; see `input_bias`."""
  return products(config, sae, x_BD) + sae.b_lat_N


def products(config: SaeConfig, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """W_enc (x - b_pre), [B, N]: pre-activations without the latents' bias."""
  x_BD = x_BD - input_bias(config, sae)
  return ops.matmul(x_BD, sae.w_enc_ND.T, config.matmul_dtype)


def dense_codes(z_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Codes of all latents as values and indices: K is N."""
  latents_N = jnp.arange(z_BN.shape[1], dtype=jnp.int32)
  return z_BN, jnp.broadcast_to(latents_N, z_BN.shape)
