"""The order of a store's rows: a pure function, mixed, in lanes."""

import dataclasses
import types

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.feed import from_store
from sae_jax.feed import order as order_lib

# n_rows, chunk_rows, window_chunks: short last chunk, one window, one chunk,
# chunks that divide, windows of one chunk; shards.
ORDERS = [
  (1003, 16, 4),
  (50, 16, 9),
  (7, 16, 4),
  (512, 32, 4),
  (300, 10, 1),
  # Shards that are not full, of which the last is held out in part.
  (150, 16, 3, (61, 16, 30, 64)),
]


def _order(shape=(1003, 16, 4), seed=0):
  return order_lib.Order(seed, *shape)


def _neighbours(rows):
  return np.mean(np.abs(np.diff(rows)) == 1)


@pytest.mark.parametrize('shape', ORDERS)
def test_every_epoch_is_a_permutation(shape):
  order, n = _order(shape), shape[0]
  rows = order.lane().rows_at(0, 3 * n).reshape(3, n)
  np.testing.assert_array_equal(np.sort(rows, 1), np.tile(np.arange(n), (3, 1)))
  if n > 16:
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])


@pytest.mark.parametrize('shape', ORDERS)
def test_any_stretch_is_a_part_of_the_whole(shape):
  order = _order(shape)
  whole = order.lane().rows_at(0, 2 * shape[0] + 5)
  for start in (0, 1, shape[0] - 1, shape[0], shape[0] + 3):
    for count in (0, 1, 2, shape[0]):
      got = order.lane().rows_at(start, count)
      np.testing.assert_array_equal(got, whole[start : start + count])
      assert got.dtype == np.int64


def _splitmix64(x):
  mask = 2**64 - 1
  x = (x + 0x9E3779B97F4A7C15) & mask
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
  return x ^ (x >> 31)


def _slow_hash(order, epoch, kind, item):
  key = 0
  for part in (order.seed % 2**64, epoch, kind):
    key = _splitmix64(key ^ part)
  return _splitmix64(key ^ item)


def _slow_chunks(order):
  """The chunks in the order in which they are dealt to lanes."""
  return sorted(
    range(order.n_chunks), key=lambda chunk: _slow_hash(order, 0, 3, chunk)
  )


def _slow_epoch(order, epoch, chunks=None):
  """The order of an epoch, or of some chunks, from its definition."""

  def hashed(kind, item):
    return _slow_hash(order, epoch, kind, item)

  by_chunk, row = [], 0
  for shard in order.shards or (order.n_rows,):
    stop = row + shard
    while row < min(stop, order.n_rows):
      end = min(row + order.chunk_rows, stop, order.n_rows)
      by_chunk.append(range(row, end))
      row = end
    row = stop
  chunks = range(len(by_chunk)) if chunks is None else chunks
  chunks = sorted(chunks, key=lambda chunk: hashed(1, chunk))
  rows, size = [], -(-order.window_chunks // order.lanes)
  for start in range(0, len(chunks), size):
    window = [
      row for chunk in chunks[start : start + size] for row in by_chunk[chunk]
    ]
    rows += sorted(window, key=lambda row: hashed(2, row))
  return rows


def test_splitmix64_has_its_published_values():
  # The first outputs of the generator from state 0 (Vigna's splitmix64.c).
  assert _splitmix64(0) == 0xE220A8397B1DCDAF
  assert _splitmix64(0x9E3779B97F4A7C15) == 0x6E789E6AA1B965F4


@pytest.mark.parametrize('seed', [0, 7, -1, 2**70 + 3])
@pytest.mark.parametrize('shape', ORDERS)
def test_the_order_is_its_definition(shape, seed):
  order = _order(shape, seed)
  for epoch in (0, 5):
    np.testing.assert_array_equal(
      order.lane().rows_at(epoch * shape[0], shape[0]),
      _slow_epoch(order, epoch),
    )


def test_seeds_give_different_orders():
  orders = [_order(seed=s).lane().rows_at(0, 1003) for s in (0, 1, 2, -1)]
  for i, one in enumerate(orders):
    for other in orders[:i]:
      assert np.mean(one == other) < 0.01


def test_rows_are_mixed_in_windows():
  shape = (65_536, 64, 32)
  rows = _order(shape).lane().rows_at(0, shape[0])
  assert _neighbours(rows) < 0.01
  chunks_in_batch = [len(set(b // 64)) for b in rows.reshape(-1, 128)]
  assert min(chunks_in_batch) > 24  # Of 32: 128 draws miss few.
  # What the figures look like where nothing, or a chunk alone, is mixed.
  assert _neighbours(np.arange(shape[0])) == 1
  alone = _order((65_536, 64, 1)).lane().rows_at(0, shape[0])
  assert max(len(set(b // 64)) for b in alone.reshape(-1, 128)) == 2


@pytest.mark.parametrize('window_chunks', [1, 8, 64])
def test_neighbours_in_a_batch_are_related_by_the_window_alone(window_chunks):
  """Two rows of a batch are of one chunk with the chance 1 / window_chunks.

  Here a chunk is one document, whose rows correlate by 0.8: the correlation
  of neighbours falls by that factor, to that of random rows.
  """
  n, size, related = 2**17, 64, 0.8
  rng = np.random.default_rng(0)
  shared, own = rng.standard_normal(n // size), rng.standard_normal(n)
  values = related**0.5 * np.repeat(shared, size) + (1 - related) ** 0.5 * own

  def correlation(rows):
    return np.mean(values[rows[1:]] * values[rows[:-1]]) / np.mean(values**2)

  rows = _order((n, size, window_chunks)).lane().rows_at(0, n)
  noise = 4 / n**0.5
  assert abs(correlation(rows) - related / window_chunks) < noise + 0.01
  # Controls: as they lie in the store, and drawn at random.
  assert correlation(np.arange(n)) > 0.7
  assert abs(correlation(rng.permutation(n))) < noise


def test_windows_are_not_neighbouring_chunks():
  rows = _order((65_536, 64, 32)).lane().rows_at(0, 64 * 32)
  chunks = np.unique(rows // 64)
  assert len(chunks) == 32
  assert np.ptp(chunks) > 512


def _lanes(shape, lanes, seed=0):
  return dataclasses.replace(_order(shape, seed), lanes=lanes)


@pytest.mark.parametrize('lanes', [2, 4, 7])
@pytest.mark.parametrize('shape', [ORDERS[0], ORDERS[3], ORDERS[5]])
def test_lanes_share_the_rows_and_are_orders_of_their_own(shape, lanes):
  order = _lanes(shape, lanes)
  every, chunks = [], []
  for number in range(lanes):
    lane = order.lane(number)
    rows = lane.rows_at(0, 2 * lane.n_rows).reshape(2, lane.n_rows)
    np.testing.assert_array_equal(np.sort(rows[0]), np.sort(rows[1]))
    assert not np.array_equal(*rows)
    every.append(np.sort(rows[0]))
    chunks.append(len(set(np.searchsorted(order.chunks[0], rows[0], 'right'))))
  np.testing.assert_array_equal(
    np.sort(np.concatenate(every)), np.arange(shape[0])
  )
  # Whole chunks, dealt evenly and at random.
  assert sum(chunks) == order.n_chunks and max(chunks) - min(chunks) <= 1
  assert any(np.any(np.diff(rows) > shape[1]) for rows in every)


@pytest.mark.parametrize('lanes', [2, 4])
def test_a_lane_is_its_definition(lanes):
  shape = ORDERS[0]
  dealt = _slow_chunks(_lanes(shape, lanes))
  for number in range(lanes):
    lane = _lanes(shape, lanes).lane(number)
    for epoch in (0, 3):
      np.testing.assert_array_equal(
        lane.rows_at(epoch * lane.n_rows, lane.n_rows),
        _slow_epoch(_lanes(shape, lanes), epoch, dealt[number::lanes]),
      )


def test_large_stores_have_lanes(monkeypatch):
  def lanes(n_train, batch_size):
    opened = types.SimpleNamespace(
      n_train=n_train, manifest=types.SimpleNamespace(chunk_rows=1024)
    )
    return from_store.lanes_for(opened, batch_size)

  assert lanes(2**20, 2048) == 1
  assert lanes(2**21, 2048) == 2
  assert lanes(10**10, 131_072) == 256
  assert lanes(10**10, 24) == 8
  assert lanes(10**10, 5) == 1


@pytest.mark.parametrize(
  'field', ['n_rows', 'chunk_rows', 'window_chunks', 'lanes']
)
def test_orders_of_nothing_are_refused(field):
  sizes = {'n_rows': 1, 'chunk_rows': 1, 'window_chunks': 1, field: 0}
  with pytest.raises(errors.UserError, match=f'{field} 0 '):
    order_lib.Order(0, **sizes)
