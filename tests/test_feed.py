"""The order as a pure function, and batches that follow it."""

import dataclasses
import shutil
import threading
import types

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import config
from sae_jax.activations import feed, store
from sae_jax.activations import order as order_lib
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
  return order_lib.Order(seed, *shape)


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


def _slow_epoch(order, epoch, some=None):
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
  some = range(len(by_chunk)) if some is None else some
  chunks = sorted(some, key=lambda chunk: hashed(1, chunk))
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


def test_bfloat16_is_widened(tmp_path):
  rows_RD = np.random.default_rng(0).standard_normal((200, 8), np.float32)
  rows_RD = rows_RD.astype(jnp.bfloat16)
  plan = Plan(
    subject='none',
    sites=('blocks.0.resid_post',),
    d_model=8,
    dtype='bfloat16',
    chunk_rows=16,
    shard_rows=64,
    context_length=50,
  )
  places = np.arange(200)
  writer_lib.write(
    str(tmp_path),
    plan,
    (
      (some, some // 50, some % 50, some >= 0, {plan.sites[0]: rows_RD[some]})
      for some in places.reshape(4, 50)
    ),
    holdout_rows=50,
  )
  opened = store.open_store(str(tmp_path))
  order = order_lib.train_order(opened, 0, 4)
  for step in (0, 3):
    batch_BD = feed.Feed(opened, order, 32).batch(step)
    assert batch_BD.dtype == np.float32
    rows = order_lib.batch_rows(order, step, 32)
    np.testing.assert_array_equal(batch_BD, rows_RD[rows].astype(np.float32))


@pytest.mark.parametrize('batch_size', [1, 64, 100, 901, 2000])
def test_batches_are_the_rows_of_the_order(url, rows_of, batch_size):
  opened = store.open_store(url)
  order = order_lib.train_order(opened, seed=1, window_chunks=4)
  batches = feed.Feed(opened, order, batch_size)
  for step in (0, 1, 2, 7, 3, 40):
    batch_BD = batches.batch(step)
    assert batch_BD.dtype == np.float32
    np.testing.assert_array_equal(
      rows_of(batch_BD), order.lane().rows_at(step * batch_size, batch_size)
    )


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


def test_a_batch_has_a_part_of_every_lane_in_its_place(url, rows_of):
  opened = store.open_store(url)
  order = order_lib.train_order(opened, 1, 8, 4)
  batches = feed.Feed(opened, order, 40)
  for step in (0, 3, 50):
    rows = rows_of(batches.batch(step))
    np.testing.assert_array_equal(rows, order_lib.batch_rows(order, step, 40))
    for number, part in enumerate(rows.reshape(4, 10)):
      want = order.lane(number).rows_at(step * 10, 10)
      np.testing.assert_array_equal(part, want)
  with pytest.raises(config.UserError, match=r'42 .* 4 lanes'):
    feed.Feed(opened, order, 42)


class _Sharding:
  """As if this process held some stretches of a batch, on a device each."""

  def __init__(self, *stretches):
    self._stretches = stretches

  def addressable_devices_indices_map(self, shape):
    del shape
    return {
      number: (slice(*stretch), slice(None))
      for number, stretch in enumerate(self._stretches)
    }


@pytest.mark.parametrize(
  ('stretches', 'lanes'),
  [
    ([(0, 10)], 1),
    ([(10, 20)], 1),
    ([(20, 30), (30, 40)], 2),
    # Devices that hold the same rows, a part of a lane, and a gap.
    ([(0, 20), (0, 20)], 2),
    ([(5, 15)], 2),
    ([(0, 5), (32, 36)], 2),
  ],
)
def test_a_process_reads_its_lanes_alone(
  url, rows_of, monkeypatch, stretches, lanes
):
  opened = store.open_store(url)
  order = order_lib.train_order(opened, 1, 8, 4)
  sharding = _Sharding(*stretches)
  monkeypatch.setattr(feed.mesh_lib, 'sharding', lambda *_: sharding)
  some = feed.Feed(opened, order, 40, mesh=())
  whole = feed.Feed(opened, order, 40)
  for step in range(40):
    places = some.places
    np.testing.assert_array_equal(
      rows_of(some.batch(step)), rows_of(whole.batch(step))[places]
    )
  wanted = {p for start, stop in stretches for p in range(start, stop)}
  assert set(places) == wanted
  # Chunks that were asked for, of so many lanes of the four.
  share = some.bytes_read / whole.bytes_read
  assert abs(share - lanes / 4) < 0.05


def test_large_stores_have_lanes(monkeypatch):
  def lanes(n_train, batch_size):
    opened = types.SimpleNamespace(
      n_train=n_train, manifest=types.SimpleNamespace(chunk_rows=1024)
    )
    return order_lib.lanes_for(opened, batch_size)

  assert lanes(2**20, 2048) == 1
  assert lanes(2**21, 2048) == 2
  assert lanes(10**10, 131_072) == 256
  assert lanes(10**10, 24) == 8
  assert lanes(10**10, 5) == 1


def test_no_held_out_row_appears(url, rows_of):
  opened = store.open_store(url)
  order = order_lib.train_order(opened, seed=1, window_chunks=4)
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
  order = order_lib.train_order(opened, seed=2, window_chunks=4)
  whole = list(feed.Feed(opened, order, 70).iterate(0, 30))
  assert len(whole) == 30
  for step in (1, 12, 13, 29):
    fresh = feed.Feed(store.open_store(url), order, 70)
    rest = list(fresh.iterate(step, 30))
    np.testing.assert_array_equal(np.stack(rest), np.stack(whole[step:]))
    assert not np.array_equal(rest[0], whole[step - 1])


def test_two_windows_are_in_memory(url):
  opened = store.open_store(url)
  order = order_lib.train_order(opened, seed=2, window_chunks=8)
  batches = feed.Feed(opened, order, 32)
  held = []
  for step in range(60):
    batches.batch(step)
    held.append(sum(len(data) for data, *_ in batches._windows.values()))
  # A batch may straddle two windows, and the next is read ahead.
  assert max(held) <= 3 * 8 * 16
  assert np.median(held) <= 2 * 8 * 16


def _feed_threads():
  return [t for t in threading.enumerate() if t.name == 'feed']


def test_closing_ends_the_thread(url):
  opened = store.open_store(url)
  order = order_lib.train_order(opened, seed=0)
  batches = feed.Feed(opened, order, 10).iterate(0)
  for _ in range(5):
    next(batches)
  assert _feed_threads()
  batches.close()
  assert not _feed_threads()


def test_errors_reach_the_consumer_and_end_the_thread(url, monkeypatch):
  opened = store.open_store(url)
  batches = feed.Feed(opened, order_lib.train_order(opened, seed=0), 10)
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
  order = order_lib.train_order(opened, seed=0, window_chunks=2)
  for shard in (copy / 'activations').glob('*/c/*/0'):
    shard.write_bytes(shard.read_bytes()[:-10])
  with pytest.raises(config.UserError, match='cannot read store'):
    for _ in feed.Feed(opened, order, 10).iterate(0, 100):
      pass
  assert not _feed_threads()


@pytest.mark.parametrize(
  'field', ['n_rows', 'chunk_rows', 'window_chunks', 'lanes']
)
def test_orders_of_nothing_are_refused(field):
  sizes = {'n_rows': 1, 'chunk_rows': 1, 'window_chunks': 1, field: 0}
  with pytest.raises(config.UserError, match=f'{field} 0 '):
    order_lib.Order(0, **sizes)


def test_what_does_not_fit_is_refused(url):
  opened = store.open_store(url)
  with pytest.raises(config.UserError, match='order of 2000 rows'):
    feed.Feed(opened, order_lib.Order(0, 2000, 16, 4), 10)
  with pytest.raises(config.UserError, match='batch_size 0'):
    feed.Feed(opened, order_lib.train_order(opened, 0), 0)
  with pytest.raises(ValueError, match='negative'):
    _order().lane().rows_at(-1, 3)
