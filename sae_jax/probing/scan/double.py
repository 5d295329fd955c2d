"""Numbers of 48 bits as the sum of two float32, and sums of them.

On a TPU there is no float64. Dekker, "A floating-point technique for extending
the available precision" (1971); Knuth's two-sum.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np


@flax.struct.dataclass
class Double:
  """hi + lo, where lo is at most half a unit of hi's last place.

  The arrays have any axes.
  """

  hi_N: jax.Array
  lo_N: jax.Array


def zeros(shape: tuple[int, ...]) -> Double:
  """Zeros, in two arrays."""
  return Double(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def of(a: jax.Array) -> Double:
  """Numbers of float32."""
  return Double(a, jnp.zeros_like(a))


def _quick(hi: jax.Array, lo: jax.Array) -> Double:
  """hi + lo, of which |hi| is not the smaller."""
  total = hi + lo
  return Double(total, lo - (total - hi))


def add(a: Double, b: Double) -> Double:
  """a + b; for numbers of one sign right to 2**-46 of the sum."""
  total = a.hi_N + b.hi_N
  part = total - a.hi_N
  error = (a.hi_N - (total - part)) + (b.hi_N - part)
  return _quick(total, error + (a.lo_N + b.lo_N))


def _halves(a: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Two numbers of 12 bits that sum to a: products of two such are exact."""
  bits = jax.lax.bitcast_convert_type(a, jnp.uint32)
  top = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFFF000), jnp.float32)
  return top, a - top


def product(a: jax.Array, b: jax.Array) -> Double:
  """a * b to 48 bits.

  All products here are exact, so that it is the same whether or not a compiler
  joins a product and a sum to one instruction; with Dekker's error term, which
  is what a rounded product lacks, it would not be.
  """
  a_hi, a_lo = _halves(a)
  b_hi, b_lo = _halves(b)
  middle = of(a_hi * b_lo)
  middle = add(middle, of(a_lo * b_hi))
  first = add(of(a_hi * b_hi), middle)
  return add(first, of(a_lo * b_lo))


def scale(a: Double, b: jax.Array) -> Double:
  """a * b to about 46 bits."""
  return add(product(a.hi_N, b), product(a.lo_N, b))


def to_float64(a: Double) -> np.ndarray:
  """The numbers on the host."""
  return np.asarray(a.hi_N, np.float64) + np.asarray(a.lo_N, np.float64)
