"""The k largest values of each token (Gao et al. 2024)."""

import jax

from sae_jax import ops
from sae_jax.autoencoder import encoder, nonlinearity
from sae_jax.autoencoder.params import Sae, SaeConfig

TRAINED = ()
extra = nonlinearity.no_extra
fit = nonlinearity.keep_fitted
follow = nonlinearity.keep


def active_per_token(config: SaeConfig) -> int:
  """k; fewer are active if some of the top k are not positive."""
  return config.k


def codes(
  config: SaeConfig, sae: Sae, x_BD: jax.Array, axis: str | None
) -> tuple[jax.Array, jax.Array]:
  """ReLU of this shard's candidates that are in the top k of all shards."""
  vals_BK, idx_BK = ops.encode_topk(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    min(config.k, sae.w_enc_ND.shape[0]),
    b_pre_D=encoder.input_bias(config, sae),
    dtype=config.matmul_dtype,
  )
  return jax.nn.relu(ops.global_top_k(vals_BK, axis, config.k, 0.0)), idx_BK
