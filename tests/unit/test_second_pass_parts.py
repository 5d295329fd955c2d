"""The parts of the second pass: tallies, leaders and the bounds of tenths."""

import collections

import numpy as np
import pytest

from sae_jax.probing.examples import deciles, spills, tallies


@pytest.mark.parametrize('chunk', [1, 7, 64, 10_000])
@pytest.mark.parametrize('cells', [40, 2**31, 2**40])
def test_tally_counts_keys(monkeypatch, chunk, cells):
  monkeypatch.setattr(tallies, 'CHUNK', chunk)
  rng = np.random.default_rng(0)
  values = rng.integers(0, 40, 500) * (cells // 40)
  parts = np.split(values.astype(tallies.key_dtype(cells)), [0, 3, 90, 90, 400])
  keys, counts = tallies.tally(iter(parts), cells, len(values))
  assert dict(zip(keys.tolist(), counts.tolist())) == collections.Counter(
    values.tolist()
  )
  assert counts.dtype == np.int64 and (np.diff(keys.astype(np.int64)) > 0).all()


def test_tally_of_nothing():
  for cells in (0, 5, 2**40):
    keys, counts = tallies.tally([], cells, 0)
    assert len(keys) == len(counts) == 0


@pytest.mark.parametrize('most', [1, 3, 50])
def test_leaders_are_the_first_of_each_group(most):
  rng = np.random.default_rng(0)
  group_P = rng.integers(0, 30, 600)
  # The coarse order has many ties, which the fine one breaks.
  fine_P = rng.permutation(600)
  rank_P = rng.integers(0, 5, 600)
  best, place = tallies.leaders(
    group_P, (rank_P // 2).astype(np.uint32), (rank_P, fine_P), most
  )
  want = []
  for group in range(30):
    (of,) = np.nonzero(group_P == group)
    want += sorted(of.tolist(), key=lambda p: (rank_P[p], fine_P[p]))[:most]
  assert best.tolist() == want
  assert place.tolist() == [
    i for n in np.bincount(group_P[want]).tolist() for i in range(n)
  ]


def pieces_of(values, cuts):
  """One latent's values on rows 0, 1, ..., in pieces."""
  spill = spills.Spill('', 0, len(values), 0, len(values), 1, 0, 0)
  rows = np.arange(len(values))
  return lambda: [
    (spill, spills.Pairs(np.zeros(len(part), int), part, values[part]))
    for part in np.split(rows, cuts)
  ]


@pytest.mark.parametrize('size', [10, 11, 99, 1234])
@pytest.mark.parametrize('digits', [1, 3, 9])
def test_bounds_of_a_latent_that_is_too_large_to_sort(
  monkeypatch, size, digits
):
  rng = np.random.default_rng(size)
  values = (rng.random(size).round(digits) + 0.1).astype(np.float32)
  pieces, count = pieces_of(values, [3, size // 2]), np.array([size])
  sorted_keys, sorted_equal = deciles._bounds(pieces, count)
  drawn = deciles.draw(pieces, 7, count, 1, 0)
  monkeypatch.setattr(tallies, 'CHUNK', 9)
  keys, equal = deciles._bounds(pieces, count)
  np.testing.assert_array_equal(keys, sorted_keys)
  np.testing.assert_array_equal(equal, sorted_equal)
  np.testing.assert_array_equal(deciles.draw(pieces, 7, count, 1, 0), drawn)
  assert (drawn >= 0).all()


def test_examples_of_a_tenth_are_drawn_uniformly():
  values = np.linspace(1, 2, 50).astype(np.float32)
  draws = np.array(
    [
      deciles.draw(pieces_of(values, [20]), latent, np.array([50]), 2, seed)
      for latent, seed in np.ndindex(5, 200)
    ]
  )[:, 0]
  # Tenth t has rows 5 t to 5 t + 4, of which two differ.
  assert (draws[..., 0] != draws[..., 1]).all()
  assert (draws // 5 == np.arange(10)[:, None]).all()
  counts = np.bincount(draws.reshape(-1), minlength=50)
  # 400 are expected of each: five standard deviations.
  assert abs(counts - 400).max() < 5 * np.sqrt(1000 * 0.4 * 0.6)
