"""The order as a pure function, and batches that follow it."""

import dataclasses
import shutil
import threading

import numpy as np
import pytest

from sae_jax import config
from sae_jax.activations import feed, store
from sae_jax.activations import writer as writer_lib
from sae_jax.activations.manifest import Plan

pytestmark = pytest.mark.fast

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
  return feed.Order(seed, *shape)


def _neighbours(rows):
  return np.mean(np.abs(np.diff(rows)) == 1)


@pytest.fixture(scope='module')
def url(tmp_path_factory):
  """1,003 rows that hold their own number, the last 103 held out."""
  url = str(tmp_path_factory.mktemp('feed') / 'store')
  n = 1003
  plan = Plan(
    subject='none',
    sites=('blocks.0.resid_post',),
    d_model=4,
    chunk_rows=16,
    shard_rows=64,
    context_length=103,
  )

  def stretches():
    # Shards of 64, 61, 64, ... rows: not all of them are full.
    stop = 0
    while stop < n:
      start, stop = stop, min(n, stop + (64 if stop % 125 == 0 else 61))
      rows = np.arange(start, stop)
      yield (
        rows,
        rows // 103,
        rows % 103,
        np.ones(len(rows), bool),
        {
          'blocks.0.resid_post': (
            rows[:, None] + np.array([0, 0.25, 0.5, 0.75])
          ).astype(np.float32)
        },
      )

  writer_lib.write(url, plan, stretches(), holdout_rows=103)
  return url


@pytest.fixture
def rows_of(url):
  opened = store.open_store(url)

  def rows(batch_BD):
    numbers = batch_BD[:, 0].astype(int)
    np.testing.assert_array_equal(batch_BD, opened.gather(numbers))
    return numbers

  return rows


@pytest.mark.parametrize('shape', ORDERS)
def test_every_epoch_is_a_permutation(shape):
  order, n = _order(shape), shape[0]
  rows = feed.rows_at(order, 0, 3 * n).reshape(3, n)
  np.testing.assert_array_equal(np.sort(rows, 1), np.tile(np.arange(n), (3, 1)))
  if n > 16:
    assert not np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[1], rows[2])


@pytest.mark.parametrize('shape', ORDERS)
def test_any_stretch_is_a_part_of_the_whole(shape):
  order = _order(shape)
  whole = feed.rows_at(order, 0, 2 * shape[0] + 5)
  for start in (0, 1, shape[0] - 1, shape[0], shape[0] + 3):
    for count in (0, 1, 2, shape[0]):
      got = feed.rows_at(order, start, count)
      np.testing.assert_array_equal(got, whole[start : start + count])
      assert got.dtype == np.int64


def _splitmix64(x):
  mask = 2**64 - 1
  x = (x + 0x9E3779B97F4A7C15) & mask
  x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
  x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
  return x ^ (x >> 31)


def _slow_epoch(order, epoch):
  """The order of an epoch in plain Python, from its definition."""

  def hashed(kind, item):
    key = 0
    for part in (order.seed % 2**64, epoch, kind):
      key = _splitmix64(key ^ part)
    return _splitmix64(key ^ item)

  by_chunk, row = [], 0
  for shard in order.shards or (order.n_rows,):
    stop = row + shard
    while row < min(stop, order.n_rows):
      end = min(row + order.chunk_rows, stop, order.n_rows)
      by_chunk.append(range(row, end))
      row = end
    row = stop
  chunks = sorted(range(len(by_chunk)), key=lambda chunk: hashed(1, chunk))
  rows = []
  for start in range(0, len(chunks), order.window_chunks):
    window = [
      row
      for chunk in chunks[start : start + order.window_chunks]
      for row in by_chunk[chunk]
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
      feed.rows_at(order, epoch * shape[0], shape[0]), _slow_epoch(order, epoch)
    )


def test_seeds_give_different_orders():
  orders = [feed.rows_at(_order(seed=s), 0, 1003) for s in (0, 1, 2, -1)]
  for i, one in enumerate(orders):
    for other in orders[:i]:
      assert np.mean(one == other) < 0.01


def test_rows_are_mixed_in_windows():
  shape = (65_536, 64, 32)
  rows = feed.rows_at(_order(shape), 0, shape[0])
  assert _neighbours(rows) < 0.01
  chunks_in_batch = [len(set(b // 64)) for b in rows.reshape(-1, 128)]
  assert min(chunks_in_batch) > 24  # Of 32: 128 draws miss few.
  # What the figures look like where nothing, or a chunk alone, is mixed.
  assert _neighbours(np.arange(shape[0])) == 1
  alone = feed.rows_at(_order((65_536, 64, 1)), 0, shape[0])
  assert max(len(set(b // 64)) for b in alone.reshape(-1, 128)) == 2


def test_windows_are_not_neighbouring_chunks():
  rows = feed.rows_at(_order((65_536, 64, 32)), 0, 64 * 32)
  chunks = np.unique(rows // 64)
  assert len(chunks) == 32
  assert np.ptp(chunks) > 512


@pytest.mark.parametrize('batch_size', [1, 64, 100, 901, 2000])
def test_batches_are_the_rows_of_the_order(url, rows_of, batch_size):
  opened = store.open_store(url)
  order = feed.train_order(opened, seed=1, window_chunks=4)
  batches = feed.Feed(opened, order, batch_size)
  for step in (0, 1, 2, 7, 3, 40):
    batch_BD = batches.batch(step)
    assert batch_BD.dtype == np.float32
    np.testing.assert_array_equal(
      rows_of(batch_BD), feed.rows_at(order, step * batch_size, batch_size)
    )


def test_no_held_out_row_appears(url, rows_of):
  opened = store.open_store(url)
  order = feed.train_order(opened, seed=1, window_chunks=4)
  assert order.n_rows == 900

  def epoch(order):
    batches = feed.Feed(opened, order, 100).iterate(0, -(-order.n_rows // 100))
    return np.concatenate([rows_of(b) for b in batches])

  np.testing.assert_array_equal(np.sort(epoch(order)), np.arange(900))
  # An order of all rows does show them, so they could have been seen.
  everything = dataclasses.replace(order, n_rows=opened.manifest.n_rows)
  assert epoch(everything).max() >= 900


def test_resuming_at_any_step_gives_the_same_batches(url):
  opened = store.open_store(url)
  order = feed.train_order(opened, seed=2, window_chunks=4)
  whole = list(feed.Feed(opened, order, 70).iterate(0, 30))
  assert len(whole) == 30
  for step in (1, 12, 13, 29):
    fresh = feed.Feed(store.open_store(url), order, 70)
    rest = list(fresh.iterate(step, 30, read_ahead=1))
    np.testing.assert_array_equal(np.stack(rest), np.stack(whole[step:]))
    assert not np.array_equal(rest[0], whole[step - 1])


def test_two_windows_are_in_memory(url):
  opened = store.open_store(url)
  order = feed.train_order(opened, seed=2, window_chunks=8)
  batches = feed.Feed(opened, order, 32)
  held = []
  for step in range(60):
    batches.batch(step)
    held.append(sum(len(data) for data, _ in batches._windows.values()))
  # A batch may straddle two windows, and the next is read ahead.
  assert max(held) <= 3 * 8 * 16
  assert np.median(held) <= 2 * 8 * 16


def _feed_threads():
  return [t for t in threading.enumerate() if t.name == 'feed']


def test_closing_ends_the_thread(url):
  opened = store.open_store(url)
  order = feed.train_order(opened, seed=0)
  batches = feed.Feed(opened, order, 10).iterate(0)
  for _ in range(5):
    next(batches)
  assert _feed_threads()
  batches.close()
  assert not _feed_threads()


def test_errors_reach_the_consumer_and_end_the_thread(url, monkeypatch):
  opened = store.open_store(url)
  batches = feed.Feed(opened, feed.train_order(opened, seed=0), 10)
  make = batches.batch

  def failing(step):
    if step == 3:
      raise RuntimeError('a planted error')
    return make(step)

  monkeypatch.setattr(batches, 'batch', failing)
  got = []
  with pytest.raises(RuntimeError, match='a planted error'):
    for batch_BD in batches.iterate(0):
      got.append(batch_BD)
  assert len(got) == 3
  assert not _feed_threads()


def test_damaged_shards_are_one_line_errors(url, tmp_path):
  copy = tmp_path / 'copy'
  shutil.copytree(url, copy)
  opened = store.open_store(str(copy))
  order = feed.train_order(opened, seed=0, window_chunks=2)
  for shard in (copy / 'activations').glob('*/c/*/0'):
    shard.write_bytes(shard.read_bytes()[:-10])
  with pytest.raises(config.UserError, match='cannot read store'):
    for _ in feed.Feed(opened, order, 10).iterate(0, 100):
      pass
  assert not _feed_threads()


@pytest.mark.parametrize('field', ['n_rows', 'chunk_rows', 'window_chunks'])
def test_orders_of_nothing_are_refused(field):
  sizes = {'n_rows': 1, 'chunk_rows': 1, 'window_chunks': 1, field: 0}
  with pytest.raises(config.UserError, match=f'{field} 0 '):
    feed.Order(0, **sizes)


def test_what_does_not_fit_is_refused(url):
  opened = store.open_store(url)
  with pytest.raises(config.UserError, match='order of 2000 rows'):
    feed.Feed(opened, feed.Order(0, 2000, 16, 4), 10)
  with pytest.raises(config.UserError, match='batch_size 0'):
    feed.Feed(opened, feed.train_order(opened, 0), 0)
  with pytest.raises(ValueError, match='negative'):
    feed.rows_at(_order(), -1, 3)
