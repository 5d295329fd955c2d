"""`autoencode`: a TopK autoencoder's whole pass over some tokens."""

import flax.struct
import jax
import jax.numpy as jnp

from sae_jax.sparse import dispatch, varying
from sae_jax.sparse.autoencode import fused
from sae_jax.sparse.decode import api as decode_api
from sae_jax.sparse.encode_topk import api as encode_api
from sae_jax.sparse.top_k import api as top_k_api


@flax.struct.dataclass
class Coded:
  """A shard's codes and its part of the reconstructions.

  Attributes:
    vals_BK: values of the active latents for the first of the ks, 0 for a
      candidate that is not active. No gradient passes through them.
    idx_BK: their latents.
    models: sum_k vals[b, k] w_dec[idx[b, k]] for each of the ks, [B, D].
    failed: tokens whose top k the kernel could not vouch for, so that they
      were encoded again; a share of the batch, 0 with other implementations.
    exhausted: whether some token's winners are all of this shard's candidates
      and fewer than k, so that there may be more; all of it is to be done
      again with k candidates then. False where those were asked for.
    recall: the share of this shard's top candidates that is expected to be
      found, 1 if all are.
  """

  vals_BK: jax.Array
  idx_BK: jax.Array
  models: tuple[jax.Array, ...]
  failed: jax.Array
  exhausted: jax.Array
  recall: jax.Array


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
) -> Coded:
  """W_dec ReLU(TopK(W_enc (x - b_pre) + b_lat)) for one or more k.

  The same as `encode_topk`, `global_top_k` and `decode` one after another, and
  with 'gather' and 'dense' made of them. With 'pallas' the backward pass is
  one too: pairs of tokens and latents are sorted once, and a token's input and
  cotangent come by the same copy, for the gradients of encoder and decoder.

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
    candidates: of a token that this shard offers, with 'pallas'; None for as
      many as might win. See `Coded.exhausted`.
    recall: with 'pallas' and below 1, so much of each shard's top candidates
      is asked to be found, see `Coded.recall`. Other implementations find all.
  """
  n_latents, width = w_enc_ND.shape
  shards = 1 if axis is None else jax.lax.axis_size(axis)
  name = dispatch.choose(n_latents * shards, ks[-1], implementation, width)
  if name == 'pallas':
    return Coded(
      *fused.autoencode(
        x_BD,
        w_enc_ND,
        b_lat_N,
        w_dec_ND,
        ks,
        b_pre_D,
        mask_N,
        axis,
        dtype,
        candidates,
        recall,
      )
    )
  found_BK, idx_BK = encode_api.encode_topk(
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
    jax.nn.relu(top_k_api.global_top_k(found_BK[:, :k], axis, k, 0.0))
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
  return Coded(
    vals_BK=vals_BK,
    idx_BK=idx_BK[:, : vals_BK.shape[1]],
    models=models,
    failed=varying.zeros((), x_BD.dtype, vals_BK),
    exhausted=varying.zeros((), bool, vals_BK),
    recall=varying.match(jnp.ones((), x_BD.dtype), vals_BK),
  )
