"""`decode`: the reconstruction from sparse codes."""

from collections.abc import Callable
import functools

import jax
import jax.numpy as jnp
import numpy as np

from sae_jax.ops import dispatch, scopes, varying
from sae_jax.ops.decode import blocks, reference
from sae_jax.ops.weight_grad import api as weight_grad_api


@jax.named_scope(scopes.DECODER)
def decode(
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  w_dec_ND: jax.Array,
  *,
  dtype: jnp.dtype | None = None,
  implementation: str | None = None,
  active: float = 1.0,
) -> jax.Array:
  """Sums decoder rows, weighted by the active latents' values.

  Computes sum_k vals[b, k] w_dec[idx[b, k]] (Gao et al. 2024, section 2.2,
  without the bias). Both gradients are sparse: <g, w_dec[idx]> for the values
  and a segment sum of vals * g for the decoder.

  Args:
    vals_BK: values of the active latents; a zero adds nothing.
    idx_BK: their rows in w_dec_ND; repeated rows add up.
    w_dec_ND: a row per latent.
    dtype: of the factors of dense products, see `matmul`.
    implementation: 'gather', 'dense', 'pallas' (TPU kernels, interpreted on
      other devices), or None to choose by device and shape.
    active: the share of values that is expected not to be 0. Where it is small
      'pallas' passes over zeros.

  Returns:
    The sum, [B, D].
  """
  name = dispatch.choose(
    w_dec_ND.shape[0], idx_BK.shape[1], implementation, w_dec_ND.shape[1]
  )
  vals_BK, idx_BK, w_dec_ND = map(jnp.asarray, (vals_BK, idx_BK, w_dec_ND))
  w_dec_ND = varying.match(w_dec_ND, vals_BK)
  return _decode(name, dtype, active, vals_BK, idx_BK, w_dec_ND)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _decode(name, dtype, active, vals_BK, idx_BK, w_dec_ND):
  return sums(name, active)(vals_BK, idx_BK, w_dec_ND, dtype)


def sums(name: str, active: float = 1.0) -> Callable[..., jax.Array]:
  """sum_k vals[b, k] w[idx[b, k]] of (vals, idx, w, dtype), by name."""
  return {
    'gather': lambda vals, idx, w, _: reference.gather_sum(vals, idx, w),
    'dense': reference.dense_sum,
    'pallas': functools.partial(blocks.sums_of_codes, active=active),
  }[name]


def _forward(name, dtype, active, vals_BK, idx_BK, w_dec_ND):
  output_BD = _decode(name, dtype, active, vals_BK, idx_BK, w_dec_ND)
  return output_BD, (vals_BK, idx_BK, w_dec_ND)


def _backward(name, dtype, active, saved, g_BD):
  del active
  vals_BK, idx_BK, w_dec_ND = saved
  products = {
    'gather': lambda g, idx, w, _: reference.sampled_products(g, idx, w),
    'dense': reference.dense_products,
    'pallas': blocks.products_of_codes,
  }[name]
  grad_ND = weight_grad_api.weight_grad(
    vals_BK, idx_BK, g_BD, w_dec_ND.shape[0], dtype=dtype, implementation=name
  )
  return (
    products(g_BD, idx_BK, w_dec_ND, dtype).astype(vals_BK.dtype),
    np.zeros(idx_BK.shape, jax.dtypes.float0),
    grad_ND.astype(w_dec_ND.dtype),
  )


_decode.defvjp(_forward, _backward)
