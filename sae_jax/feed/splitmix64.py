"""Hashes of 64-bit integers (Steele, Lea, Flood, "Fast splittable pseudorandom
number generators", 2014), which depend on no library's version."""

import numpy as np

GAMMA = np.uint64(0x9E3779B97F4A7C15)


def finalise(x: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64: a bijection of uint64."""
  x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return x ^ (x >> np.uint64(31))


def step(x: np.ndarray) -> np.ndarray:
  """One step of splitmix64: a bijection of uint64."""
  return finalise(x + GAMMA)
