"""The TopK sparse autoencoder: its arrays and pure functions over them.

Every function works on a whole autoencoder or, inside `jax.shard_map` with
`axis` naming the mesh axis of the latents, on one shard of it.
"""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.autoencoder import preprocessing, thresholds
from sae_jax.autoencoder.params import Sae, SaeConfig


def pre_activations(config: SaeConfig, sae: Sae, x_BD: jax.Array) -> jax.Array:
  """W_enc (x - b_pre) + b_lat of every latent, [B, N]."""
  x_BD = x_BD - sae.b_pre_D
  return ops.matmul(x_BD, sae.w_enc_ND.T, config.matmul_dtype) + sae.b_lat_N


def candidates(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  k: int,
  *,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """This shard's k largest pre-activations of each token, descending."""
  return ops.encode_topk(
    x_BD,
    sae.w_enc_ND,
    sae.b_lat_N,
    min(k, sae.w_enc_ND.shape[0]),
    b_pre_D=sae.b_pre_D,
    dtype=config.matmul_dtype,
    implementation=implementation,
  )


def select(
  vals_BK: jax.Array, idx_BK: jax.Array, k: int, axis: str | None = None
) -> tuple[jax.Array, jax.Array]:
  """ReLU of those of all shards' `candidates` that are in the top k."""
  vals_BK, idx_BK = vals_BK[:, :k], idx_BK[:, :k]
  return jax.nn.relu(ops.global_top_k(vals_BK, axis, k, 0.0)), idx_BK


def encode(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  *,
  axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The active latents of each token as values and indices.

  z = ReLU(TopK(W_enc (x - b_pre) + b_lat)), or ReLU or JumpReLU without the
  TopK; those have no fixed number of active latents, so K is N for them.

  Args:
    config: gives k and the activation.
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations.
    axis: the mesh axis the latents are sharded over, inside shard_map.

  Returns:
    vals_BK (>= 0; a 0 is not active; descending with TopK) and idx_BK into
    this shard's latents. With TopK, over all shards at most K values of a
    token are positive: those that an unsharded autoencoder gives.
  """
  if config.activation == 'topk':
    return select(*candidates(config, sae, x_BD, config.k), config.k, axis)
  pre_BN = pre_activations(config, sae, x_BD)
  idx_BN = jnp.broadcast_to(
    jnp.arange(pre_BN.shape[1], dtype=jnp.int32), pre_BN.shape
  )
  if config.activation == 'relu':
    return jax.nn.relu(pre_BN), idx_BN
  return thresholds.jump_relu(pre_BN, sae.log_threshold_N), idx_BN


def decode(
  sae: Sae,
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  *,
  axis: str | None = None,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> jax.Array:
  """x^ = W_dec z + b_pre, summed over the shards of the latents."""
  total_BD = ops.decode(
    vals_BK, idx_BK, sae.w_dec_ND, dtype=dtype, implementation=implementation
  )
  if axis is not None:
    total_BD = jax.lax.psum(total_BD, axis)
  return total_BD + sae.b_pre_D


def reconstruct(config: SaeConfig, sae: Sae, raw_BD: jax.Array) -> jax.Array:
  """The raw activations as the autoencoder gives them back, [B, D]."""
  x_BD, affine = preprocessing.preprocess(config, sae, raw_BD)
  codes = encode(config, sae, x_BD)
  return preprocessing.restore(
    affine, decode(sae, *codes, dtype=config.matmul_dtype)
  )
