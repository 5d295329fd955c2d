"""The k-th largest entry and the median of rows, without sorting them.

Floats are ordered as unsigned integers, whose bits are found one by one from
the top: entries are only compared and counted, which runs on vectors and on all
cores. Of 64 rows of 49,152 entries on two x86 cores a median took a tenth of
the time of `jnp.median`.
"""

import jax
import jax.numpy as jnp

from sae_jax.ops import varying

BITS = 32


def keys(x: jax.Array) -> jax.Array:
  """Unsigned integers in the order of floats, of float32."""
  bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
  top = jnp.uint32(1 << 31)
  return jnp.where(bits < top, bits | top, ~bits)


def kth_largest(x_BN: jax.Array, k: int, bits: int = BITS) -> jax.Array:
  """The k-th largest entry of each row, [B].

  Args:
    x_BN: float32; a NaN lies beyond the infinity of its sign.
    k: from 1 on.
    bits: that are found; with fewer the result may be a little less.
  """
  key_BN = keys(x_BN)
  top = jnp.uint32(1 << 31)

  def set_bit(nth, key_B):
    higher_B = key_B | (top >> nth.astype(jnp.uint32))
    reached_B = (key_BN >= higher_B[:, None]).sum(1, dtype=jnp.int32)
    return jnp.where(reached_B >= k, higher_B, key_B)

  start_B = varying.zeros((len(x_BN),), jnp.uint32, x_BN)
  key_B = jax.lax.fori_loop(0, bits, set_bit, start_B)
  bits_B = jnp.where(key_B < top, ~key_B, key_B ^ top)
  return jax.lax.bitcast_convert_type(bits_B, x_BN.dtype)


def median(x: jax.Array) -> jax.Array:
  """`jnp.median` along the last axis, of float32 without NaN."""
  x_BN = x.reshape(-1, x.shape[-1])
  n = x_BN.shape[1]
  upper_B = kth_largest(x_BN, (n + 1) // 2)
  if n % 2:
    return upper_B.reshape(x.shape[:-1])
  is_upper_BN = x_BN >= upper_B[:, None]
  below_B = jnp.where(is_upper_BN, -jnp.inf, x_BN).max(1)
  lower_B = jnp.where(is_upper_BN.sum(1) > n // 2, upper_B, below_B)
  return ((upper_B + lower_B) / 2).reshape(x.shape[:-1])
