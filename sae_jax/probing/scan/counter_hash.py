"""Random numbers of (row, latent, seed) by a hash, in 32-bit words."""

import jax
import jax.numpy as jnp
import numpy as np

# 2**32 over the golden ratio, and odd constants of xxHash32 (Collet).
_GAMMA = 0x9E3779B9
_ROW_LO = 0x85EBCA77
_ROW_HI = 0xC2B2AE3D
_LATENT = 0x27D4EB2F


def _mix(x: jax.Array) -> jax.Array:
  """MurmurHash3's finaliser: each bit turns half of the bits (Appleby)."""
  x ^= x >> 16
  x *= jnp.uint32(0x85EBCA6B)
  x ^= x >> 13
  x *= jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def random_key(
  row_hi: jax.Array, row_lo: jax.Array, latent: jax.Array, seed: int
) -> jax.Array:
  """A uint32 for each pair of row and latent, the same whatever the batching.

  The pairs with the highest keys are a uniform sample of all pairs.

  Args:
    row_hi: upper 32 bits of the row, uint32.
    row_lo: lower 32 bits.
    latent: number of the latent in the autoencoder, of any integer type.
    seed: of the sample; its lower 64 bits count.
  """
  seed_lo = np.uint32(seed & 0xFFFFFFFF)
  seed_hi = np.uint32(seed >> 32 & 0xFFFFFFFF)
  x = jnp.uint32(seed_lo) + jnp.uint32(_GAMMA)
  for word, factor in (
    (jnp.uint32(seed_hi), _GAMMA),
    (latent.astype(jnp.uint32), _LATENT),
    (row_hi, _ROW_HI),
    (row_lo, _ROW_LO),
  ):
    # Between two words all bits are mixed, so that none can cancel another.
    x = _mix(x ^ (word * jnp.uint32(factor))) + jnp.uint32(_GAMMA)
  return _mix(x)
