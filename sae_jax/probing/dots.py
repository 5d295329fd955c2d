"""Products of rows that are rounded alike, however the rows are split.

What a matrix product gives for two rows differs in the last bits with the sizes
of the matrices and with where in them the rows are. So it only proposes; a few
candidates more than are wanted are multiplied again, each pair by itself, and
put into order by that.
"""

import jax
import jax.numpy as jnp

from sae_jax import ops

# A TPU multiplies float32 in bfloat16 by default.
EXACT = jax.lax.Precision.HIGHEST
# Candidates beyond those that are wanted.
_SPARE = 8
_LANES = 64


def dot(a_D: jax.Array, b_D: jax.Array) -> jax.Array:
  """Sums of products along the last axis, always added in the same order."""
  product_D = a_D * b_D
  fill = [(0, 0)] * (product_D.ndim - 1) + [(0, -product_D.shape[-1] % _LANES)]
  product_D = jnp.pad(product_D, fill)
  sum_D = product_D[..., :_LANES]
  for start in range(_LANES, product_D.shape[-1], _LANES):
    sum_D = sum_D + product_D[..., start : start + _LANES]
  # Else the compiler writes out the sum of all, which takes it long.
  sum_D = jax.lax.optimization_barrier(sum_D)
  while sum_D.shape[-1] > 1:
    half = sum_D.shape[-1] // 2
    sum_D = sum_D[..., :half] + sum_D[..., half:]
  return sum_D[..., 0]


def unit(w_ND: jax.Array) -> jax.Array:
  """Rows of length one, float32; one of zeros stays."""
  w_ND = w_ND.astype(jnp.float32)
  # Else squares of a very short row would be zero.
  largest_N1 = jnp.abs(w_ND).max(-1, keepdims=True)
  w_ND = w_ND / jnp.where(largest_N1 > 0, largest_N1, 1)
  norm_N1 = jnp.sqrt(dot(w_ND, w_ND))[:, None]
  return w_ND / jnp.where(norm_N1 > 0, norm_N1, 1)


def candidates(
  rough_BK: jax.Array, rows_BD: jax.Array, others_KD: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  """The best by a matrix product, and a few more, multiplied again.

  Args:
    rough_BK: products of rows and others; -inf for pairs that do not count.
    rows_BD: the rows.
    others_KD: the others.
    count: how many are wanted.

  Returns:
    Products and places among the others, [B, count or a few more], in no order.
  """
  kept = min(count + _SPARE, rough_BK.shape[-1])
  best_BC, place_BC = ops.top_k(rough_BK, kept)
  product_BC = dot(rows_BD[:, None], others_KD[place_BC])
  return jnp.where(best_BC == -jnp.inf, -jnp.inf, product_BC), place_BC


def largest(
  values_BC: jax.Array, ids_BC: jax.Array, count: int
) -> tuple[jax.Array, jax.Array]:
  """The largest values in descending order; of equal ones the lower id."""
  down_BC, ids_BC = jax.lax.sort((-values_BC, ids_BC), num_keys=2)
  return -down_BC[:, :count], ids_BC[:, :count]
