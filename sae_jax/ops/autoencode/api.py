"""`autoencode`: a TopK autoencoder's whole pass over some tokens."""

import jax
import jax.numpy as jnp

from sae_jax.ops import dispatch, scopes, varying
from sae_jax.ops.autoencode import dense, fused, tally
from sae_jax.ops.autoencode.coded import Coded, How, plain
from sae_jax.ops.decode import api as decode_api
from sae_jax.ops.encode_topk import api as encode_api
from sae_jax.ops.top_k import api as top_k_api


@jax.named_scope(scopes.ENCODER_AND_DECODER)
def autoencode(
  x_BD: jax.Array,
  w_enc_ND: jax.Array,
  b_lat_N: jax.Array,
  w_dec_ND: jax.Array,
  ks: tuple[int, ...],
  *,
  b_pre_D: jax.Array,
  mask_N: jax.Array | None = None,
  axis: str | None = None,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
  candidates: int | None = None,
  recall: float = 1.0,
  tally_N: jax.Array | None = None,
) -> Coded:
  """W_dec ReLU(TopK(W_enc (x - b_pre) + b_lat)) for one or more k.

  The result is that of `encode_topk`, `global_top_k` and `decode` one after
  another. 'gather' calls these. 'dense' takes pre-activations [B, N] under a
  mask for codes, without gathers or scatters. 'pallas' has one backward pass
  for the gradients of encoder and decoder: pairs of tokens and latents are
  sorted once, and one copy brings a token's input and cotangent.

  Args:
    x_BD: preprocessed inputs.
    w_enc_ND: encoder, or this shard of it.
    b_lat_N: latent bias.
    w_dec_ND: decoder.
    ks: active latents of a token, over all shards, ascending; each gives a
      reconstruction (Multi-TopK has two).
    b_pre_D: subtracted from the inputs.
    mask_N: only latents where this is true may be active.
    axis: the mesh axis of the latents, inside shard_map.
    dtype: of the factors of products, see `matmul`.
    implementation: see `decode`.
    candidates: number of candidates that this shard offers of each token, with
      'pallas'; None for as many as might win. See `Coded.exhausted`.
    recall: share of each shard's top candidates that the search must be
      expected to find, with 'pallas'; other implementations find all. See
      `Coded.recall`.
    tally_N: zeros, float32. Its cotangent, whatever those of the models are,
      is the sum of each latent's active values for the first of the ks, so
      above 0 for latents that fired. The backward pass adds up by latent
      anyway; to mark them otherwise a TPU would sort all pairs once more.
  """
  x_BD, w_enc_ND, b_lat_N, w_dec_ND, b_pre_D = map(
    jnp.asarray, (x_BD, w_enc_ND, b_lat_N, w_dec_ND, b_pre_D)
  )
  n_latents, width = w_enc_ND.shape
  how = How(ks, axis, dtype, candidates, recall)
  name = dispatch.choose(n_latents * how.shards, ks[-1], implementation, width)
  if name in ('pallas', 'dense'):
    whole = fused.autoencode if name == 'pallas' else dense.autoencode
    return whole(
      how, x_BD, w_enc_ND, b_lat_N, w_dec_ND, b_pre_D, mask_N, tally_N
    )
  offered_BK, idx_BK = encode_api.encode_topk(
    x_BD,
    w_enc_ND,
    b_lat_N,
    min(ks[-1], n_latents),
    b_pre_D=b_pre_D,
    mask_N=mask_N,
    dtype=dtype,
    implementation=name,
  )
  codes = [
    jax.nn.relu(top_k_api.global_top_k(offered_BK[:, :k], axis, k, 0.0))
    for k in ks
  ]
  models = tuple(
    decode_api.decode(
      vals_BK,
      idx_BK[:, : vals_BK.shape[1]],
      w_dec_ND,
      dtype=dtype,
      implementation=name,
    )
    for vals_BK in codes
  )
  vals_BK = jax.lax.stop_gradient(codes[0])
  idx_BK = idx_BK[:, : vals_BK.shape[1]]
  if tally_N is not None:
    used_N = varying.match(jnp.zeros_like(tally_N), vals_BK)
    used_N = used_N.at[idx_BK.reshape(-1)].add(
      vals_BK.reshape(-1).astype(used_N.dtype)
    )
    models = tally.counted(models, used_N, tally_N)
  return plain(x_BD, vals_BK, idx_BK, models)
