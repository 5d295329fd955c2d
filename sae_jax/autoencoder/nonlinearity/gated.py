"""A baseline: gates say which are active, and by how much is apart from that.

"Improving dictionary learning with gated sparse autoencoders" (Rajamanoharan et
al. 2024): a latent is active where its gate W_enc (x - b_pre) + b_lat is
positive, with ReLU(exp(r_mag) W_enc (x - b_pre) + b_mag) (equations 4 to 7).
"""

import jax
import jax.numpy as jnp

from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.autoencoder.params import Sae, SaeConfig

# The logarithm of a magnitude's scale, and its bias.
TRAINED = ('r_mag_N', 'b_mag_N')

fit = nonlinearity.keep_fitted
follow = nonlinearity.keep
active_per_token = nonlinearity.any_number


def extra(config: SaeConfig, dtype: jnp.dtype) -> dict[str, jax.Array]:
  """Magnitudes that equal the gates."""
  return {name: jnp.zeros((config.n_latents,), dtype) for name in TRAINED}


def codes(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """Magnitudes of latents whose gates are open."""
  del axis
  gate_BN, magnitude_BN = gates(sae, encoder.products(config, sae, x_BD))
  return encoder.dense_codes(
    jnp.where(gate_BN > 0, jax.nn.relu(magnitude_BN), 0)
  )


def gates(sae: Sae, product_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Gates and magnitudes before their ReLU, [B, N].

  Args:
    sae: the biases and scales.
    product_BN: W_enc (x - b_pre).
  """
  scale_N = jnp.exp(sae.extra['r_mag_N'])
  return product_BN + sae.b_lat_N, product_BN * scale_N + sae.extra['b_mag_N']
