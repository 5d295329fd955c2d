"""The sparse autoencoder: pure functions over its arrays.

Every function works on a whole autoencoder or, inside `jax.shard_map` with
`axis` naming the mesh axis of the latents, on one shard of it.
"""

import jax
import jax.numpy as jnp

from sae_jax import ops
from sae_jax.autoencoder import nonlinearity, preprocessing
from sae_jax.autoencoder.params import Sae, SaeConfig


def encode(
  config: SaeConfig,
  sae: Sae,
  x_BD: jax.Array,
  *,
  axis: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The active latents of each token as values and indices.

  z = f(W_enc (x - b_pre) + b_lat), where f is the config's nonlinearity, such
  as ReLU(TopK(.)); b_pre is left out if `pre_bias` is output. If a token may
  have any number of active latents (`nonlinearity.active_per_token`), K is N.

  Args:
    config: gives the nonlinearity and its k.
    sae: the autoencoder, or this shard of it.
    x_BD: preprocessed activations.
    axis: the mesh axis the latents are sharded over, inside shard_map.

  Returns:
    vals_BK (>= 0; a 0 is not active; descending with TopK) and idx_BK into
    this shard's latents. With TopK, over all shards at most K values of a
    token are positive: those that an unsharded autoencoder gives.
  """
  return nonlinearity.of(config.activation).codes(config, sae, x_BD, axis)


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


def reconstruct(
  config: SaeConfig, sae: Sae, raw_BD: jax.Array, *, axis: str | None = None
) -> jax.Array:
  """The reconstruction of raw activations, [B, D], or a transcoder's output."""
  x_BD, affine = preprocessing.preprocess(config, sae, raw_BD)
  codes = encode(config, sae, x_BD, axis=axis)
  return preprocessing.restore(
    preprocessing.way_back(config, sae, x_BD, affine),
    decode(sae, *codes, axis=axis, dtype=config.matmul_dtype),
  )
