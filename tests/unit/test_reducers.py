"""Streaming statistics and samples against whole arrays and scipy."""

import warnings

import numpy as np
import pytest
from scipy import stats as scipy_stats

from sae_jax.probing import reducers

N, K, ROWS = 13, 3, 700


def make_codes(seed=0, scale=1.0):
  """Codes with zeros among them; latent 0 never fires, latent 1 once."""
  rng = np.random.default_rng(seed)
  idx_RK = 2 + np.argsort(rng.random((ROWS, N - 2)), axis=1)[:, :K]
  vals_RK = rng.gamma(1 + idx_RK / 4, scale).astype(np.float32)
  vals_RK[rng.random((ROWS, K)) < 0.2] = 0
  # Not active, whatever latent they name.
  idx_RK[vals_RK == 0] = 0
  idx_RK[5, 0], vals_RK[5, 0] = 1, 2.5
  return vals_RK, idx_RK.astype(np.int32)


def gather(vals_RK, idx_RK, sizes):
  stats = reducers.LatentStats(N)
  for part in np.split(np.arange(ROWS), np.cumsum(sizes)):
    stats.update(vals_RK[part], idx_RK[part])
  return stats


@pytest.mark.parametrize('sizes', [(), (1, 0, 300, 77)])
def test_statistics_equal_scipy(sizes):
  vals_RK, idx_RK = make_codes()
  stats = gather(vals_RK, idx_RK, sizes)
  mean_N, std_N, skew_N = stats.moments()
  edges = reducers.HISTOGRAM_EDGES
  assert stats.tokens == ROWS
  for latent in range(N):
    values = vals_RK[(idx_RK == latent) & (vals_RK > 0)].astype(np.float64)
    assert stats.count_N[latent] == len(values)
    assert stats.max_N[latent] == values.max(initial=0)
    np.testing.assert_array_equal(
      stats.hist_NH[latent], np.histogram(values, edges)[0]
    )
    if len(values) > 1:
      np.testing.assert_allclose(mean_N[latent], values.mean(), rtol=1e-12)
      np.testing.assert_allclose(std_N[latent], values.std(), rtol=1e-10)
      np.testing.assert_allclose(
        skew_N[latent], scipy_stats.skew(values), rtol=1e-8
      )
  assert (mean_N[0], std_N[0], skew_N[0]) == (0, 0, 0)
  assert (mean_N[1], std_N[1], skew_N[1]) == (2.5, 0, 0)
  # Control: counting the zeros would move every mean.
  rows_of = np.array([(idx_RK == i).any(1).sum() for i in range(2, N)])
  with_zeros_N = np.array(
    [vals_RK[idx_RK == i].sum() / ROWS for i in range(2, N)]
  )
  assert rows_of.min() > 100 and (mean_N[2:] > 1.2 * with_zeros_N).all()


def test_values_beyond_the_edges_count_in_the_end_bins():
  stats = reducers.LatentStats(2)
  values = np.float32([[1e-9], [3e-6], [1e3], [7e8], [1.0]])
  stats.update(values, np.ones((5, 1), np.int32))
  assert stats.hist_NH[1, 0] == 2 and stats.hist_NH[1, -1] == 2
  assert stats.hist_NH.sum() == stats.count_N.sum() == 5
  edges = reducers.HISTOGRAM_EDGES
  np.testing.assert_allclose(edges[20::20] / edges[:-20:20], 10)


@pytest.mark.parametrize('spread', [0, 3e-7, 1e-5, 1e-3, 0.1])
def test_skewness_of_values_that_nearly_agree(spread):
  rng = np.random.default_rng(0)
  values = (4 + 4 * spread * rng.gamma(2, 1, (500, 1))).astype(np.float32)
  stats = reducers.LatentStats(1)
  stats.update(values, np.zeros((500, 1), np.int32))
  _, std_N, skew_N = stats.moments()
  wide = values[:, 0].astype(np.float64)
  if spread < 1e-4:
    # The sums in float64 would give what is no statistic of these values.
    assert skew_N[0] == 0 and std_N[0] <= 1.1 * wide.std()
  else:
    np.testing.assert_allclose(std_N[0], wide.std(), rtol=1e-6)
    np.testing.assert_allclose(skew_N[0], scipy_stats.skew(wide), atol=1e-5)


def test_nothing_at_all_gives_zeros():
  stats = reducers.LatentStats(N)
  stats.update(np.zeros((4, K), np.float32), np.zeros((4, K), np.int32))
  assert stats.tokens == 4 and not stats.hist_NH.any()
  assert not np.any(stats.moments())


def make_offers(seed=0, count=900):
  """Offers with many ties, rows shuffled, several of a latent in a group."""
  rng = np.random.default_rng(seed)
  latents = rng.integers(1, N, count)
  rows = rng.permutation(count)
  scores = rng.integers(1, 12, count).astype(np.float32)
  return latents, scores, rows, rows // 20


def slow_best(latents, scores, rows, groups, n_examples):
  """[(score, row)] of each latent, by sorting everything."""
  out = []
  for latent in range(N):
    mine = np.flatnonzero(latents == latent)
    order = sorted(mine, key=lambda i: (-scores[i], rows[i]))
    seen, best = set(), []
    for i in order:
      if groups[i] not in seen:
        seen.add(groups[i])
        best.append((float(scores[i]), int(rows[i])))
    out.append(best[:n_examples])
  return out


def offered(offers, n_examples, sizes):
  top = reducers.TopExamples(N, n_examples)
  for part in np.split(np.arange(len(offers[0])), np.cumsum(sizes)):
    top.update(*(a[part] for a in offers))
  return top


def examples(top):
  return [
    [(s, r) for s, r in zip(*pair) if r >= 0]
    for pair in zip(top.score_NM.tolist(), top.row_NM.tolist())
  ]


@pytest.mark.parametrize('sizes', [(), (1, 2, 0, 500), tuple([9] * 99)])
@pytest.mark.parametrize('n_examples', [1, 7, 60])
def test_top_examples_equal_a_full_sort(n_examples, sizes):
  offers = make_offers()
  top = offered(offers, n_examples, sizes)
  want = slow_best(*offers, n_examples)
  assert examples(top) == want
  assert want[0] == [] and (top.row_NM[0] == -1).all()
  # With 60 places, latents have fewer groups than that.
  assert n_examples < 60 or (top.row_NM[:, -1] == -1).all()
  # Control: without groups, the lists are others.
  latents, scores, rows, _ = offers
  assert (
    n_examples == 1
    or slow_best(latents, scores, rows, rows, n_examples) != want
  )


def test_control_order_of_arrival_is_no_order():
  """Ties go to the lower row, not to the one that came first."""
  latents, scores, rows, groups = make_offers()
  by_arrival = slow_best(latents, scores, np.arange(900), groups, 7)
  rows_of = [[int(rows[i]) for _, i in best] for best in by_arrival]
  by_row = [
    [r for _, r in best] for best in examples(offered(make_offers(), 7, ()))
  ]
  assert rows_of != by_row


def test_a_better_token_of_a_group_replaces_the_held_one():
  top = reducers.TopExamples(1, 2)

  def offer(score, row, group):
    top.update(*(np.array([a]) for a in (0, score, row, group)))

  offer(5.0, 10, 1)
  offer(4.0, 20, 2)
  offer(3.0, 30, 3)
  offer(6.0, 40, 2)
  assert examples(top) == [[(6.0, 40), (5.0, 10)]]
  offer(5.5, 50, 2)
  offer(5.0, 9, 4)
  assert examples(top) == [[(6.0, 40), (5.0, 9)]]
  offer(np.nan, 1, 5)
  assert examples(top) == [[(6.0, 40), (5.0, 9)]]


def test_no_places_hold_nothing():
  assert offered(make_offers(), 0, ()).row_NM.shape == (N, 0)


@pytest.mark.parametrize('seed', [0, 1, 2, 2**40])
def test_random_scores_are_uniform(seed):
  rows, latents = (a.ravel() for a in np.mgrid[:300, :200])
  with warnings.catch_warnings():
    warnings.simplefilter('error')
    scores = reducers.random_scores(rows, latents.astype(np.int32), seed)
  assert ((scores >= 0) & (scores < 1)).all()
  assert scipy_stats.kstest(scores, 'uniform').pvalue > 1e-3
  # And in the plane of neighbours: along rows, along latents.
  square = scores.reshape(300, 200)
  for one, other in (
    (square[1:], square[:-1]), (square[:, 1:], square[:, :-1])
  ):  # fmt: skip
    cells = np.histogram2d(one.ravel(), other.ravel(), 10, [(0, 1)] * 2)[0]
    assert scipy_stats.chisquare(cells.ravel()).pvalue > 1e-3
    assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02


def test_control_uniformity_tests_find_a_bad_hash():
  rows, latents = (a.ravel() for a in np.mgrid[:300, :200])
  bad = (rows * 0.6180339887 + latents * 0.7548776662) % 1
  square = bad.reshape(300, 200)
  cells = np.histogram2d(
    square[1:].ravel(), square[:-1].ravel(), 10, [(0, 1)] * 2
  )[0]
  assert scipy_stats.chisquare(cells.ravel()).pvalue < 1e-6


def test_random_scores_know_pair_and_seed_only():
  rows, latents = np.arange(1000), np.arange(1000) % 7
  whole = reducers.random_scores(rows, latents, 3)
  parts = [
    reducers.random_scores(rows[part], latents[part], 3)
    for part in np.split(np.arange(1000), [1, 400])
  ]
  np.testing.assert_array_equal(np.concatenate(parts), whole)
  order = np.random.default_rng(0).permutation(1000)
  np.testing.assert_array_equal(
    reducers.random_scores(rows[order], latents[order], 3), whole[order]
  )
  other = reducers.random_scores(rows, latents, 4)
  assert abs(np.corrcoef(whole, other)[0, 1]) < 0.1


def test_highest_random_scores_are_a_uniform_sample():
  """Each of 40 rows is among the 4 kept as often as any other."""
  times = np.zeros(40)
  for seed in range(60):
    top = reducers.TopExamples(50, 4)
    latents, rows = (a.ravel() for a in np.mgrid[:50, :40])
    chance = reducers.random_scores(rows, latents, seed)
    top.update(latents, chance, rows, rows)
    times += np.bincount(top.row_NM.ravel(), minlength=40)
  assert times.sum() == 60 * 50 * 4
  # Without replacement, so the counts vary a little less than Poisson's.
  statistic = ((times - times.mean()) ** 2 / times.mean()).sum() / (36 / 39)
  assert scipy_stats.chi2(39).sf(statistic) > 1e-3
  assert scipy_stats.chi2(39).cdf(statistic) > 1e-3
