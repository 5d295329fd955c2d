"""Intervals of an AUC hold the truth as often as they say."""

import math

import numpy as np
import pytest

from sae_jax.probing import intervals, probes


def coverage(prompts, truth, draw, confidence=0.95, trials=300):
  """Share of trials whose interval holds the truth, and has no width."""
  labels_P = np.arange(prompts) % 2
  rng = np.random.default_rng(prompts)
  hits = flat = 0
  for _ in range(trials):
    score_P = draw(rng, labels_P)
    low, high = intervals.auc_interval(score_P, labels_P, confidence)
    hits += low <= truth <= high
    flat += low == high
  return hits / trials, flat / trials


def normals(distance):
  return lambda rng, labels_P: (
    rng.standard_normal(len(labels_P)) + distance * labels_P
  )


def fires_half(rng, labels_P):
  """Far above the others in half of the prompts with label 1."""
  fires_P = labels_P * (rng.random(len(labels_P)) < 0.5)
  return rng.standard_normal(len(labels_P)) + 9 * fires_P


def few_values(rng, labels_P):
  return (rng.random(len(labels_P)) < 0.3 + 0.6 * labels_P).astype(float)


@pytest.mark.parametrize('prompts', [8, 20, 80])
@pytest.mark.parametrize(
  ('truth', 'draw'),
  [
    (0.5, normals(0)),
    ((1 + math.erf(1)) / 2, normals(2)),
    ((1 + math.erf(1.5)) / 2, normals(3)),
    (0.75, fires_half),
    (0.8, few_values),
  ],
  ids=['none', '2 apart', '3 apart', 'half', 'ties'],
)
def test_the_interval_covers_the_truth(prompts, truth, draw):
  covered, flat = coverage(prompts, truth, draw)
  # Three standard errors of 300 trials below 0.95.
  assert covered > 0.91 and not flat


def test_few_that_spread_widely_are_covered():
  """Newcombe's interval alone held the truth in 0.90 of the trials."""
  labels_P = np.repeat([0, 1], [20, 5])
  truth = (1 + math.erf(3 / math.sqrt(20))) / 2
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(500):
    scale_P = np.where(labels_P, 3, 1)
    score_P = scale_P * (rng.standard_normal(25) + labels_P)
    low, high = intervals.auc_interval(score_P, labels_P)
    hits += low <= truth <= high
  assert hits / 500 > 0.94


def test_control_an_interval_that_is_too_narrow_is_noticed():
  assert coverage(80, 0.5, normals(0), confidence=0.6)[0] < 0.75
  # As is a percentile bootstrap of few prompts.
  labels_P = np.arange(20) % 2
  rng = np.random.default_rng(0)
  hits = 0
  for _ in range(100):
    score_P = normals(2)(rng, labels_P)
    drawn = [
      rng.choice(score_P[labels_P == label], (10, 200)) for label in (0, 1)
    ]
    auc_R = probes.auc(np.concatenate(drawn), np.repeat([0, 1], 10))
    low, high = np.quantile(auc_R, [0.025, 0.975])
    hits += low <= (1 + math.erf(1)) / 2 <= high
  assert hits < 91


def test_a_perfect_score_has_an_interval():
  labels_P = np.repeat([0, 1], 10)
  low, high = intervals.auc_interval(labels_P, labels_P)
  assert 0.7 < low < 0.9 and high == 1
  assert intervals.auc_interval(-labels_P, labels_P)[0] == 0
  # More prompts say more, one of each next to nothing.
  many_P = np.repeat([0, 1], 100)
  assert intervals.auc_interval(many_P, many_P)[0] > 0.97
  low, high = intervals.auc_interval([0.0, 1.0], [0, 1])
  assert low < 0.25 and high == 1


def test_the_interval_holds_the_estimate_and_mirrors():
  rng = np.random.default_rng(3)
  for _ in range(50):
    labels_P = rng.permutation(np.repeat([0, 1], [7, 12]))
    score_P = np.round(normals(1)(rng, labels_P), 1)
    low, high = intervals.auc_interval(score_P, labels_P)
    assert 0 <= low < probes.auc(score_P[:, None], labels_P)[0] < high <= 1
    other = intervals.auc_interval(-score_P, labels_P)
    np.testing.assert_allclose(other, [1 - high, 1 - low], atol=1e-9)


def test_newcombes_ends_are_where_the_estimate_is_unlikely():
  """Newcombe 2006, method 5, by its definition."""
  reach, zeros, ones = 1.96, 12, 20
  for estimate in (0.0, 0.3, 0.9, 1.0):
    for end in intervals._newcombe(estimate, zeros, ones, reach):
      if end == estimate:
        assert estimate in (0, 1)
        continue
      half = (zeros + ones) / 2 - 1
      spread = 1 + half * (1 - end) / (2 - end) + half * end / (1 + end)
      error = math.sqrt(end * (1 - end) * spread / (zeros * ones))
      np.testing.assert_allclose(abs(end - estimate), reach * error, rtol=1e-9)


def test_a_score_that_is_nan_has_no_interval():
  assert np.isnan(intervals.auc_interval([np.nan, 1.0], [0, 1])).all()
