"""`encode_topk`: the active latents of each token."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.ops import dispatch, scopes, varying
from sae_jax.ops.decode import api as decode_api
from sae_jax.ops.dense import matmul
from sae_jax.ops.encode_topk import exact, reference
from sae_jax.ops.weight_grad import api as weight_grad_api


@jax.named_scope(scopes.ENCODER)
def encode_topk(
  x_BD: jax.Array,
  w_enc_ND: jax.Array,
  b_lat_N: jax.Array,
  k: int,
  *,
  b_pre_D: jax.Array | None = None,
  mask_N: jax.Array | None = None,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
  """The k largest pre-activations of each token and their latents.

  Computes TopK(W_enc (x - b_pre) + b_lat) (Gao et al. 2024, equation 1),
  exactly, ties to the lowest latent. The gradients with respect to x, w_enc
  and b_lat are sparse products over the selected pairs; that of b_pre is
  -W_enc^T times b_lat's, which needs no pass over the pairs.

  Args:
    x_BD: preprocessed inputs.
    w_enc_ND: a row per latent.
    b_lat_N: latent bias.
    k: active latents of a token.
    b_pre_D: subtracted from the inputs; None for nothing.
    mask_N: only latents where this is true may be chosen (AuxK's dead ones).
      Where fewer than k are, the rest of a row has the value -inf.
    dtype: of the factors of dense products, see `matmul`.
    implementation: of the gradients' products: 'gather', 'dense', or None to
      choose by device and shape; with 'pallas' pre-activations stay in VMEM.

  Returns:
    vals_BK, descending, before any ReLU, and idx_BK int32.

  Raises:
    UserError: if k exceeds N.
  """
  name = dispatch.choose(
    w_enc_ND.shape[0], k, implementation, w_enc_ND.shape[1]
  )
  x_BD, w_enc_ND, b_lat_N = map(jnp.asarray, (x_BD, w_enc_ND, b_lat_N))
  if b_pre_D is None:
    b_pre_D = jnp.zeros(x_BD.shape[1:], x_BD.dtype)
  x_BD = varying.match(x_BD, w_enc_ND)
  return _encode_topk(
    name,
    k,
    dtype,
    mask_N,
    x_BD,
    varying.match(jnp.asarray(b_pre_D), x_BD),
    varying.match(w_enc_ND, x_BD),
    varying.match(b_lat_N, x_BD),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _encode_topk(name, k, dtype, mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N):
  inputs = x_BD - b_pre_D, w_enc_ND, b_lat_N, mask_N, k, dtype
  if name == 'pallas':
    return exact.encode_topk(*inputs)[:2]
  return reference.encode_topk(*inputs)


def _forward(name, k, dtype, mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N):
  vals_BK, idx_BK = _encode_topk(
    name, k, dtype, mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N
  )
  saved = (mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, idx_BK)
  return (vals_BK, idx_BK), saved


def _backward(name, k, dtype, saved, cotangents):
  mask_N, x_BD, b_pre_D, w_enc_ND, b_lat_N, idx_BK = saved
  g_BK = jnp.asarray(cotangents[0])
  n = w_enc_ND.shape[0]
  mask_grad = (
    None if mask_N is None else np.zeros(mask_N.shape, jax.dtypes.float0)
  )
  bias_grad_N = varying.zeros((n,), b_lat_N.dtype, g_BK)
  bias_grad_N = bias_grad_N.at[idx_BK.reshape(-1)].add(
    g_BK.reshape(-1).astype(b_lat_N.dtype)
  )
  x_grad_BD = decode_api.sums(name)(g_BK, idx_BK, w_enc_ND, dtype)
  grad_ND = weight_grad_api.weight_grad(
    g_BK, idx_BK, x_BD - b_pre_D, n, dtype=dtype, implementation=name
  )
  return (
    mask_grad,
    x_grad_BD.astype(x_BD.dtype),
    -matmul(bias_grad_N, w_enc_ND).astype(b_pre_D.dtype),
    grad_ND.astype(w_enc_ND.dtype),
    bias_grad_N,
  )


_encode_topk.defvjp(_forward, _backward)
