"""A baseline: ReLU, trained with an L1 penalty."""

import jax

from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.autoencoder.params import Sae, SaeConfig

TRAINED = ()
extra = nonlinearity.no_extra
fit = nonlinearity.keep_fitted
follow = nonlinearity.keep
active_per_token = nonlinearity.any_number


def codes(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """ReLU of every latent's pre-activation."""
  del axis
  pre_BN = encoder.pre_activations(config, sae, x_BD)
  return encoder.dense_codes(jax.nn.relu(pre_BN))
