"""Weight gradients in plain jax.numpy: by scattering rows, and dense."""

import jax
import jax.numpy as jnp

from sae_jax.ops import dense, varying
from sae_jax.ops.dense import matmul


def scatter_rows(
  vals_BK: jax.Array, idx_BK: jax.Array, g_BD: jax.Array, n_latents: int
) -> jax.Array:
  """Adds vals[b, k] g[b] to row idx[b, k], one [B, D] scatter at a time."""
  dtype = jnp.result_type(vals_BK, g_BD)
  start_ND = varying.zeros(
    (n_latents, g_BD.shape[1]), dtype, vals_BK, idx_BK, g_BD
  )

  def add(j, grad_ND):
    return grad_ND.at[idx_BK[:, j]].add(vals_BK[:, j, None] * g_BD)

  return jax.lax.fori_loop(0, idx_BK.shape[1], add, start_ND)


def dense_outer(
  vals_BK: jax.Array,
  idx_BK: jax.Array,
  g_BD: jax.Array,
  n_latents: int,
  dtype: jnp.dtype | None = None,
) -> jax.Array:
  """The same as one dense product over [B, N]."""
  z_BN = dense.scatter_codes(vals_BK, idx_BK, n_latents)
  return matmul(z_BN.T, g_BD, dtype)
