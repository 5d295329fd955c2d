"""Figures from sums over units: values, intervals, spreads, differences."""

import numpy as np
import pytest
from scipy import stats

from sae_jax.probing import intervals
from sae_jax.probing.suite import figures


def statistic(**changes):
  values = {
    'title': 'a',
    'definition': 'b',
    'of': figures.ratio('top', 'bottom'),
  }
  return figures.Statistic(**values | changes)


def make_sample(units=40, draws=5, seed=0, shift=0.0, points=None):
  rng = np.random.default_rng(seed)
  shape = (units,) if points is None else (units, points)
  bottom = rng.uniform(1, 3, shape)
  top = bottom * (0.5 + shift + 0.1 * rng.standard_normal(shape))
  return figures.Sample(
    np.arange(units), np.arange(units) % draws, {'top': top, 'bottom': bottom}
  )


def test_the_interval_is_the_jackknife_of_units():
  sample = make_sample()
  got = figures.figure(statistic(), sample)
  top, bottom = sample.sums['top'], sample.sums['bottom']
  without = [
    np.delete(top, i).sum() / np.delete(bottom, i).sum() for i in range(40)
  ]
  error = np.sqrt(39 / 40 * ((without - np.mean(without)) ** 2).sum())
  value = top.sum() / bottom.sum()
  reach = stats.t.ppf(0.975, 39) * error
  np.testing.assert_allclose(
    (got.value, got.low, got.high), (value, value - reach, value + reach)
  )
  assert got.units == 40


def test_intervals_cover_the_truth():
  """Of the ratio 0.5, in about 95 % of samples; not so if units are pairs."""
  covered = {'units': 0, 'pairs': 0}
  for seed in range(300):
    rng = np.random.default_rng(seed)
    # Both of a pair have the same departure.
    departure = np.repeat(0.3 * rng.standard_normal(12), 2)
    bottom = rng.uniform(1, 3, 24)
    sums = {'top': bottom * (0.5 + departure), 'bottom': bottom}
    for kind, unit_U in (
      ('units', np.arange(24) // 2),
      ('pairs', np.arange(24)),
    ):
      sample = figures.Sample(unit_U, np.zeros(24, int), sums)
      got = figures.figure(statistic(), sample)
      covered[kind] += got.low <= 0.5 <= got.high
  assert 0.92 < covered['units'] / 300 < 0.98
  assert covered['pairs'] / 300 < 0.9


@pytest.mark.parametrize('points', [None, 2])
def test_the_interval_of_a_share_ends_where_shares_do(points):
  def ends(shift, **changes):
    sample = make_sample(units=3, shift=shift, points=points)
    got = figures.figure(statistic(**changes), sample)
    return np.array([got.low, got.high])

  for shift, end in ((-0.48, 0), (0.48, 1)):
    # Without ends it goes beyond.
    plain, share = ends(shift), ends(shift, ends=figures.SHARE)
    assert ((plain < 0) | (plain > 1)).any()
    np.testing.assert_array_equal(share, plain.clip(0, 1))
    assert (share == end).any()


def test_entries_of_one_unit_are_one():
  sample = make_sample(units=30)
  thirds = figures.Sample(np.arange(30) // 3, sample.draw_U, sample.sums)
  got = figures.figure(statistic(), thirds)
  assert got.units == 10
  merged = {term: of.reshape(10, 3).sum(1) for term, of in sample.sums.items()}
  want = figures.figure(
    statistic(), figures.Sample(np.arange(10), np.arange(10), merged)
  )
  np.testing.assert_allclose((got.low, got.high), (want.low, want.high))


def test_the_least_difference_is_what_two_runs_show():
  """Two runs of the same evaluation differ by more in one of twenty cases."""
  beyond = 0
  for seed in range(400):
    one, other = (
      figures.figure(statistic(), make_sample(seed=2 * seed + i))
      for i in range(2)
    )
    beyond += abs(one.value - other.value) > one.least_difference
  assert 0.02 < beyond / 400 < 0.09


def test_curves_are_figures_point_by_point():
  sample = make_sample(points=3)
  got = figures.figure(statistic(points='x'), sample)
  for place in range(3):
    part = figures.Sample(
      sample.unit_U,
      sample.draw_U,
      {term: of[:, place] for term, of in sample.sums.items()},
    )
    want = figures.figure(statistic(), part)
    for name in ('value', 'low', 'high', 'least_difference'):
      assert getattr(got, name)[place] == pytest.approx(getattr(want, name))


def test_what_is_no_number_is_none():
  sums = {'top': np.array([1.0]), 'bottom': np.array([0.0])}
  sample = figures.Sample(np.array([3]), np.array([0]), sums)
  got = figures.figure(statistic(), sample)
  assert got == figures.Figure(None, None, None, None, 1)
  # Of one unit and one draw there is a value, and no spread.
  sums = {'top': np.array([1.0]), 'bottom': np.array([4.0])}
  got = figures.figure(
    statistic(), figures.Sample(sample.unit_U, *[np.array([0]), sums])
  )
  assert got == figures.Figure(0.25, None, None, None, 1)


def test_paired_differences_are_of_common_units():
  """What both have from a unit is not spread between them."""
  rng = np.random.default_rng(1)
  common = rng.standard_normal(40)
  bottom = np.ones(40)

  def sample(shift, first):
    top = 5 + common + shift + 0.01 * rng.standard_normal(40)
    rows = slice(first, first + 30)
    return figures.Sample(
      np.arange(40)[rows],
      np.arange(40)[rows] % 5,
      {'top': top[rows], 'bottom': bottom[rows]},
    )

  one, other = sample(0.1, 0), sample(0.0, 10)
  got = figures.difference(statistic(), one, other, paired=True)
  assert got.units == 20
  assert got.low < 0.1 < got.high and got.high - got.low < 0.03
  loose = figures.difference(statistic(), one, other, paired=False)
  assert loose.high - loose.low > 0.5
  far = figures.Sample(np.arange(100, 130), one.draw_U, one.sums)
  with pytest.raises(ValueError, match='no unit in common'):
    figures.difference(statistic(), one, far, paired=True)


def test_unpaired_differences_add_their_spreads():
  one, other = make_sample(seed=1, shift=0.2), make_sample(seed=2)
  got = figures.difference(statistic(), one, other, paired=False)
  ends = [figures.figure(statistic(), of) for of in (one, other)]
  assert got.value == pytest.approx(ends[0].value - ends[1].value)
  want = np.hypot(*(end.high - end.value for end in ends))
  assert got.high - got.value == pytest.approx(want)


def test_sums_of_a_unit_are_added_whatever_the_order():
  unit_U = np.array([7, 3, 7, 5])
  units, sums = intervals.by_unit(unit_U, {'a': np.arange(8.0).reshape(4, 2)})
  np.testing.assert_array_equal(units, [3, 5, 7])
  np.testing.assert_array_equal(sums['a'], [[2, 3], [6, 7], [4, 6]])
