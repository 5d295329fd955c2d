"""Sums of trees of double numbers, on the devices and on the host."""

from typing import Any

import jax
import jax.numpy as jnp

from sae_jax.probing.scan import double
from sae_jax.probing.scan.double import Double


def add(a: Any, b: Any) -> Any:
  """The sum of two trees of `Double`."""
  return jax.tree.map(
    double.add, a, b, is_leaf=lambda node: isinstance(node, Double)
  )


def total(of_E: jax.Array) -> Double:
  """The sum over the first axis, in an order that no compiler changes."""
  rows = of_E.shape[0]
  # Up to a power of two, so that halves are equal.
  more = (1 << (rows - 1).bit_length()) - rows
  of_E = jnp.pad(of_E, [(0, more), *[(0, 0)] * (of_E.ndim - 1)])
  sums = double.of(of_E)
  while sums.hi_N.shape[0] > 1:
    halves = jax.tree.map(lambda a: jnp.split(a, 2), sums)
    hi, lo = halves.hi_N, halves.lo_N
    sums = double.add(Double(hi[0], lo[0]), Double(hi[1], lo[1]))
  return jax.tree.map(lambda a: a[0], sums)


def whole(number: jax.Array) -> Double:
  """An int32 that is not negative, to the last bit."""
  low = number & 0xFFFF
  return double.add(
    double.of((number - low).astype(jnp.float32)),
    double.of(low.astype(jnp.float32)),
  )


def to_host(tree: Any) -> Any:
  """A tree of `Double` as float64."""
  return jax.tree.map(
    double.to_float64, tree, is_leaf=lambda node: isinstance(node, Double)
  )
