"""Fingerprints: what changes them and what they are."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import checkpoint
from sae_jax.checkpoint import bit_sums
from tests.support.checkpoints import contents


def of(array):
  return checkpoint.fingerprint({'w_ND': jnp.asarray(array)})


@pytest.fixture
def w_ND():
  return np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)


def test_every_bit_counts(w_ND):
  seen = {of(w_ND)}
  for place, bit in itertools.product(range(w_ND.size), range(0, 32, 3)):
    flipped = w_ND.view(np.uint32).copy()
    flipped.reshape(-1)[place] ^= 1 << bit
    seen.add(of(flipped.view(np.float32)))
  assert len(seen) == 1 + w_ND.size * 11
  zero, negative = (of(np.full(3, z, np.float32)) for z in (0.0, -0.0))
  assert zero != negative
  # Control: the same bits are the same.
  assert of(w_ND.copy()) in seen


def test_every_place_counts(w_ND):
  seen, count = {of(w_ND), of(w_ND[::-1]), of(w_ND[:, ::-1])}, 3
  for a, b in itertools.combinations(range(w_ND.size), 2):
    swapped = w_ND.copy().reshape(-1)
    swapped[[a, b]] = swapped[[b, a]]
    seen.add(of(swapped.reshape(w_ND.shape)))
    count += 1
  for axis in (0, 1):
    for a, b in itertools.combinations(range(w_ND.shape[axis]), 2):
      swapped = np.moveaxis(w_ND.copy(), axis, 0)
      swapped[[a, b]] = swapped[[b, a]]
      seen.add(of(np.moveaxis(swapped, 0, axis)))
      count += 1
  assert len(seen) == count


def test_names_types_and_shapes_count():
  zeros = np.zeros((4, 6), np.float32)
  fingerprints = [
    of(zeros),
    of(zeros.T),
    of(zeros.reshape(-1)),
    of(zeros.view(np.int32)),
    of(zeros.astype(jnp.bfloat16)),
    of(zeros.astype(bool)),
    of(np.float32(0)),
    checkpoint.fingerprint({'w_NE': jnp.asarray(zeros)}),
    checkpoint.fingerprint({'w_ND': jnp.asarray(zeros), 'x': jnp.zeros(0)}),
  ]
  assert len(set(fingerprints)) == len(fingerprints)


def test_that_of_an_autoencoder_says_which(w_ND):
  sae = contents('jumprelu').sae
  larger = sae.extra['log_threshold_N'].at[3].add(1e-6)
  other = sae.replace(extra={'log_threshold_N': larger})
  assert checkpoint.fingerprint(sae) != checkpoint.fingerprint(other)
  # Results on disk are known by it: with another, raise RESULTS_VERSION.
  assert of(w_ND[:2].round()).startswith('04eb2ca0b2c7d708')


def mix(x):
  x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32
  x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
  return x ^ (x >> 16)


@pytest.mark.parametrize(
  'shape, dtype',
  [
    ((7, 3), 'float32'),
    ((5,), 'bfloat16'),
    ((2, 3, 2), 'int16'),
    ((), 'int32'),
  ],
)
def test_sums_are_those_of_the_definition(monkeypatch, shape, dtype):
  """In Python's integers, an element at a time, in blocks of two rows."""
  monkeypatch.setattr(bit_sums, '_BLOCK', 6)
  rng = np.random.default_rng(1)
  array = jnp.asarray(rng.integers(-99, 99, shape), dtype)
  first = [2**32 - 3, 7, 1][: len(shape)]
  words = np.asarray(array).view(f'uint{8 * array.dtype.itemsize}')
  want = []
  for lane in bit_sums._LANES:
    total = 0
    for place, word in np.ndenumerate(words):
      at = lane
      for here, start in zip(place or (0,), first or [0]):
        at = mix(at ^ ((here + start) * lane % 2**32))
      total += mix(at ^ int(word))
    want.append(total % 2**32)
  # Another program than that of the whole block.
  got = jax.jit(bit_sums._sums.__wrapped__)(array, list(map(jnp.uint32, first)))
  assert got.tolist() == want
