"""Statistics of each latent against float64, in any batching, order, shards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax.probing.scan import reducers
from sae_jax.probing.scan.reducers import statistics
from tests.support import pair_streams

N = 24
STATISTICS = reducers.Statistics()
update = jax.jit(STATISTICS.update)


def run(codes, n_latents=N, **how):
  return pair_streams.run(STATISTICS, codes, n_latents, update=update, **how)


def by_loops(codes):
  """The columns, a latent at a time."""
  columns = []
  for latent in range(N):
    pairs = list(pair_streams.of_latent(codes, latent))
    _, values, ranks, margins, _ = map(
      np.array, zip(*pairs) if pairs else [()] * 5
    )
    places = np.searchsorted(statistics.HISTOGRAM_EDGES, values, side='right')
    values = values.astype(np.float64)
    deviations = values - values.mean() if pairs else values
    std = np.sqrt(np.mean(deviations**2)) if pairs else 0
    columns.append(
      {
        'count': len(pairs),
        'max': max(values, default=0),
        'mean': values.mean() if pairs else 0,
        'std': std,
        'skew': np.mean(deviations**3) / std**3 if len(pairs) > 1 else 0,
        'hist_counts': np.bincount(
          np.clip(places - 1, 0, statistics.BINS - 1), minlength=statistics.BINS
        ),
        'rank_mean': np.mean(ranks) if pairs else 0,
        'margin_mean': np.mean(margins) if pairs else 0,
      }
    )
  return {name: np.stack([of[name] for of in columns]) for name in columns[0]}


def check_equal(columns, others, rtol=1e-9):
  assert columns.keys() == others.keys()
  for name, of in columns.items():
    if name in ('count', 'max', 'hist_counts', 'rank_mean'):
      np.testing.assert_array_equal(of, others[name], name)
    else:
      np.testing.assert_allclose(of, others[name], rtol, 1e-9, err_msg=name)


@pytest.fixture(scope='module')
def codes():
  return pair_streams.codes(n_latents=N)


@pytest.fixture(scope='module')
def columns(codes):
  return run(codes)


def test_every_column_equals_loops_in_float64(codes, columns):
  check_equal(columns, by_loops(codes))
  assert columns['count'][0] == 0
  assert columns['count'][1] == 1
  assert columns['std'][1] == columns['skew'][1] == 0


@pytest.mark.parametrize(
  'how',
  [
    {'sizes': (1, 100, 3, 256, 17)},
    {'shards': 3, 'sizes': (5,)},
  ],
)
def test_batches_and_shards_of_rows_do_not_matter(codes, columns, how):
  check_equal(run(codes, **how), columns)


def test_shards_of_latents_do_not_matter(codes, columns):
  how = {'owners': 3}
  check_equal(pair_streams.run(STATISTICS, codes, N, **how), columns)


def test_the_order_of_rows_does_not_matter(codes, columns):
  shuffled = codes.take(np.random.default_rng(1).permutation(len(codes.row_R)))
  check_equal(run(shuffled, sizes=(9,)), columns)


def test_more_latents_than_pairs(codes, columns):
  """Only the rows of latents with pairs are read and written."""
  wide = pair_streams.run(STATISTICS, codes.take(slice(0, 300)), 4096)
  narrow = run(codes.take(slice(0, 300)))
  check_equal({name: of[:N] for name, of in wide.items()}, narrow)
  assert not wide['hist_counts'][N:].any()
  with pytest.raises(AssertionError):
    check_equal(narrow, columns)


def test_a_bin_beside_the_right_one_is_noticed(codes, columns, monkeypatch):
  bins = statistics.bins
  monkeypatch.setattr(statistics, 'bins', lambda value_P: bins(value_P) + 1)
  wrong = pair_streams.run(reducers.Statistics(), codes, N)
  with pytest.raises(AssertionError, match='hist_counts'):
    check_equal(wrong, columns)


def test_bins_are_those_of_numpy():
  edges = statistics.HISTOGRAM_EDGES.astype(np.float32)
  values = np.concatenate(
    [
      edges,
      np.nextafter(edges, np.float32(0)),
      np.nextafter(edges, np.float32(np.inf)),
      np.float32([1e-45, 1e-40, 1e-9, 1e6, 3e38]),
      np.random.default_rng(0).lognormal(0, 5, 10_000).astype(np.float32),
    ]
  )
  edges = statistics.HISTOGRAM_EDGES
  places = np.searchsorted(edges, values, side='right') - 1
  bins = np.clip(places, 0, statistics.BINS - 1)
  np.testing.assert_array_equal(jax.jit(statistics.bins)(values), bins)
  # How a TPU finds them.
  edges_32 = statistics.EDGES
  places = jnp.searchsorted(
    edges_32, values, side='right', method='compare_all'
  )
  places = np.clip(places - 1, 0, statistics.BINS - 1)
  np.testing.assert_array_equal(places, bins)
  # Control: rounded edges put some on the other side.
  left = np.searchsorted(edges.astype(np.float32), values, side='right') - 1
  assert (np.clip(left, 0, statistics.BINS - 1) != bins).any()


def test_a_step_may_overwrite_the_first_state(codes, columns):
  donating = jax.jit(STATISTICS.update, donate_argnums=0)
  check_equal(pair_streams.run(STATISTICS, codes, N, update=donating), columns)


LARGE = 100_000


def moments(values):
  """mean, std, skew of one latent, from a batch of one candidate a row."""
  n_rows = len(values)
  one_RC = np.ones((n_rows, 1), bool)
  codes = pair_streams.Codes(
    vals_RC=np.float32(values)[:, None],
    idx_RC=one_RC.astype(np.int32),
    rank_RC=np.full((n_rows, 1), 255, np.int32),
    margin_RC=np.float32(values)[:, None],
    row_R=np.arange(n_rows),
    document_R=np.zeros(n_rows, np.int32),
    active_RC=one_RC,
  )
  pairs = pair_streams.pairs(codes, 2)
  state = large_update(STATISTICS.init(2), pairs)
  columns = STATISTICS.finish(jax.device_get(state))
  assert columns['rank_mean'][1] == 255
  assert columns['mean'][0] == columns['margin_mean'][0] == 0
  return [columns[name][1] for name in ('mean', 'std', 'skew', 'margin_mean')]


large_update = jax.jit(STATISTICS.update)


@pytest.mark.parametrize(
  'scale, spread', [(1, 1), (1e6, 1), (1, 1e-3), (1e-4, 2), (7, 1e-5)]
)
def test_sums_of_many_pairs_keep_their_digits(scale, spread):
  rng = np.random.default_rng(0)
  values = scale * (1 + spread * rng.gamma(2, 1, LARGE) / 5)
  values = np.float32(values).astype(np.float64)
  mean, std, skew, margin = moments(values)
  deviations = values - values.mean()
  np.testing.assert_allclose([mean, margin], values.mean(), rtol=1e-12)
  np.testing.assert_allclose(std, deviations.std(), rtol=0, atol=1e-6 * mean)
  if spread >= 1e-3:
    expected = np.mean(deviations**3) / deviations.std() ** 3
    np.testing.assert_allclose(std, deviations.std(), rtol=1e-6)
    np.testing.assert_allclose(skew, expected, rtol=1e-6 / spread)
  # What float32 alone gives.
  single = np.cumsum(np.float32(values), dtype=np.float32)[-1] / LARGE
  assert abs(single / values.mean() - 1) > 1e-7


@pytest.mark.parametrize('value', [0.1, 3.3e5, 1e6])
def test_equal_values_have_no_spread(value):
  mean, std, skew, _ = moments(np.full(LARGE, value))
  assert mean == np.float32(value)
  assert std == skew == 0


def test_counts_carry_beyond_32_bits(codes):
  """A state of 2**40 pairs counts on, and merges."""
  pairs = pair_streams.pairs(
    codes.take(slice(0, 200)), N, 0, pair_streams.BATCH
  )
  fresh = update(STATISTICS.init(N), pairs)
  few = np.asarray(fresh.count_lo_N, np.int64)
  full_N = jnp.full(N, 2**32 - 2, jnp.uint32)
  high_N = jnp.full(N, 2**8 - 1, jnp.uint32)
  state = STATISTICS.init(N).replace(
    count_hi_N=high_N, count_lo_N=full_N, rank_hi_N=high_N, rank_lo_N=full_N
  )
  counted = STATISTICS.finish(jax.device_get(update(state, pairs)))['count']
  merged = STATISTICS.finish(jax.device_get(STATISTICS.merge(fresh, state)))
  np.testing.assert_array_equal(counted, few + 2**40 - 2)
  np.testing.assert_array_equal(merged['count'], few + 2**40 - 2)
  assert few.max() > 2


def test_sums_of_2_to_the_40_large_cubes_are_finite():
  state = STATISTICS.init(1)
  sums = {
    f'{name}_N': getattr(state, f'{name}_N').replace(
      hi_N=jnp.full(1, 2.0**40 * 1e6**power, jnp.float32)
    )
    for name, power in (('value', 1), ('square', 2), ('cube', 3))
  }
  high_N = jnp.full(1, 2**8, jnp.uint32)
  state = state.replace(count_hi_N=high_N, **sums)
  columns = STATISTICS.finish(jax.device_get(STATISTICS.merge(state, state)))
  np.testing.assert_allclose(columns['mean'], 1e6, rtol=1e-6)
  assert np.isfinite(columns['skew']).all()
