"""Decoding in plain jax.numpy: by gathering rows, and dense."""

import jax
import jax.numpy as jnp

from sae_jax.ops import dense, varying
from sae_jax.ops.dense import matmul


def gather_sum(
  vals_BK: jax.Array, idx_BK: jax.Array, w_ND: jax.Array
) -> jax.Array:
  """sum_k vals[b, k] w[idx[b, k]], one [B, D] gather at a time."""
  dtype = jnp.result_type(vals_BK, w_ND)
  start_BD = varying.zeros(
    (vals_BK.shape[0], w_ND.shape[1]), dtype, vals_BK, idx_BK, w_ND
  )

  def add(j, total_BD):
    return total_BD + vals_BK[:, j, None] * w_ND[idx_BK[:, j]]

  return jax.lax.fori_loop(0, vals_BK.shape[1], add, start_BD)


def sampled_products(
  g_BD: jax.Array, idx_BK: jax.Array, w_ND: jax.Array
) -> jax.Array:
  """<g[b], w[idx[b, k]]> for every pair, one [B, D] gather at a time."""
  dtype = jnp.result_type(g_BD, w_ND)
  start_BK = varying.zeros(idx_BK.shape, dtype, g_BD, idx_BK, w_ND)

  def put(j, out_BK):
    return out_BK.at[:, j].set((g_BD * w_ND[idx_BK[:, j]]).sum(-1))

  return jax.lax.fori_loop(0, idx_BK.shape[1], put, start_BK)


def dense_sum(
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  w_ND: jax.Array,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """`gather_sum` as one dense product over [B, N]."""
  return matmul(
    dense.scatter_codes(vals_BK, idx_BK, w_ND.shape[0]), w_ND, dtype
  )


def dense_products(
  g_BD: jax.Array,
  idx_BK: jax.Array,
  w_ND: jax.Array,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """`sampled_products` as one dense product over [B, N]."""
  return jnp.take_along_axis(matmul(g_BD, w_ND.T, dtype), idx_BK, axis=1)
