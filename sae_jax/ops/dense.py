"""The dense products of the sparse operations, in a chosen precision."""

import jax
import jax.numpy as jnp

from sae_jax.ops import varying


def matmul(
  a: jax.Array, b: jax.Array, dtype: jnp.dtype | None = None
) -> jax.Array:
  """a @ b.

  Args:
    a: the left factor.
    b: the right factor.
    dtype: type that the factors are rounded to, such as bfloat16; sums are kept
      in the type of `a`. None multiplies in full precision, where a TPU by
      default would round float32 to bfloat16.

  Returns:
    The product, in the type of `a`.
  """
  if dtype is None:
    return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
  return jnp.matmul(
    a.astype(dtype), b.astype(dtype), preferred_element_type=a.dtype
  )


def scatter_codes(
  vals_BK: jax.Array, idx_BK: jax.Array, n_latents: int
) -> jax.Array:
  """The codes as a dense [B, N]; repeated indices add up."""
  rows_B1 = jnp.arange(vals_BK.shape[0])[:, None]
  z_BN = varying.zeros(
    (vals_BK.shape[0], n_latents), vals_BK.dtype, vals_BK, idx_BK
  )
  return z_BN.at[rows_B1, idx_BK].add(vals_BK)
