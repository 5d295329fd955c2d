"""Batches of a store, which follow its order."""

import dataclasses
import shutil
import threading

import jax.numpy as jnp
import numpy as np
import pytest

from sae_jax import errors, store
from sae_jax.feed import from_store
from sae_jax.feed import order as order_lib
from sae_jax.store import writer as writer_lib
from sae_jax.store.manifest import StorePlan


@pytest.fixture(scope='module')
def url(tmp_path_factory):
  """1,003 rows that hold their own number, the last 103 held out."""
  url = str(tmp_path_factory.mktemp('feed') / 'store')
  n = 1003
  plan = StorePlan(
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


def test_bfloat16_is_widened(tmp_path):
  rows_RD = np.random.default_rng(0).standard_normal((200, 8), np.float32)
  rows_RD = rows_RD.astype(jnp.bfloat16)
  plan = StorePlan(
    subject='none',
    sites=('blocks.0.resid_post',),
    d_model=8,
    dtype='bfloat16',
    chunk_rows=16,
    shard_rows=64,
    context_length=50,
  )
  numbers = np.arange(200)
  writer_lib.write(
    str(tmp_path),
    plan,
    (
      (rows, rows // 50, rows % 50, rows >= 0, {plan.sites[0]: rows_RD[rows]})
      for rows in numbers.reshape(4, 50)
    ),
    holdout_rows=50,
  )
  opened = store.open_store(str(tmp_path))
  order = from_store.train_order(opened, 0, 4)
  for step in (0, 3):
    batch_BD = from_store.StoreFeed(opened, order, 32).batch(step)
    assert batch_BD.dtype == np.float32
    rows = order_lib.batch_rows(order, step, 32)
    np.testing.assert_array_equal(batch_BD, rows_RD[rows].astype(np.float32))


@pytest.mark.parametrize('batch_size', [1, 64, 100, 901, 2000])
def test_batches_are_the_rows_of_the_order(url, rows_of, batch_size):
  opened = store.open_store(url)
  order = from_store.train_order(opened, seed=1, window_chunks=4)
  batches = from_store.StoreFeed(opened, order, batch_size)
  for step in (0, 1, 2, 7, 3, 40):
    batch_BD = batches.batch(step)
    assert batch_BD.dtype == np.float32
    np.testing.assert_array_equal(
      rows_of(batch_BD), order.lane().rows_at(step * batch_size, batch_size)
    )


def test_each_lane_gives_the_same_positions_of_every_batch(url, rows_of):
  opened = store.open_store(url)
  order = from_store.train_order(opened, 1, 8, 4)
  batches = from_store.StoreFeed(opened, order, 40)
  for step in (0, 3, 50):
    rows = rows_of(batches.batch(step))
    np.testing.assert_array_equal(rows, order_lib.batch_rows(order, step, 40))
    for number, lane_rows in enumerate(rows.reshape(4, 10)):
      want = order.lane(number).rows_at(step * 10, 10)
      np.testing.assert_array_equal(lane_rows, want)
  with pytest.raises(errors.UserError, match=r'42 .* 4 lanes'):
    from_store.StoreFeed(opened, order, 42)


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
  order = from_store.train_order(opened, 1, 8, 4)
  sharding = _Sharding(*stretches)
  monkeypatch.setattr(from_store.mesh_lib, 'sharding', lambda *_: sharding)
  local = from_store.StoreFeed(opened, order, 40, mesh=())
  whole = from_store.StoreFeed(opened, order, 40)
  for step in range(40):
    np.testing.assert_array_equal(
      rows_of(local.batch(step)), rows_of(whole.batch(step))[local.local_rows]
    )
  assert set(local.local_rows) == {
    row for start, stop in stretches for row in range(start, stop)
  }
  # It read the chunks of these lanes of the four.
  share = local.bytes_read / whole.bytes_read
  assert abs(share - lanes / 4) < 0.05


def test_no_held_out_row_appears(url, rows_of):
  opened = store.open_store(url)
  order = from_store.train_order(opened, seed=1, window_chunks=4)
  assert order.n_rows == 900

  def epoch(order):
    batches = from_store.StoreFeed(opened, order, 100).iterate(
      0, -(-order.n_rows // 100)
    )
    return np.concatenate([rows_of(b) for b in batches])

  np.testing.assert_array_equal(np.sort(epoch(order)), np.arange(900))
  # An order of all rows does show them, so they could have been seen.
  everything = dataclasses.replace(order, n_rows=opened.manifest.n_rows)
  assert epoch(everything).max() >= 900


def test_resuming_at_any_step_gives_the_same_batches(url):
  opened = store.open_store(url)
  order = from_store.train_order(opened, seed=2, window_chunks=4)
  whole = list(from_store.StoreFeed(opened, order, 70).iterate(0, 30))
  assert len(whole) == 30
  for step in (1, 12, 13, 29):
    fresh = from_store.StoreFeed(store.open_store(url), order, 70)
    rest = list(fresh.iterate(step, 30))
    np.testing.assert_array_equal(np.stack(rest), np.stack(whole[step:]))
    assert not np.array_equal(rest[0], whole[step - 1])


def test_two_windows_are_in_memory(url):
  opened = store.open_store(url)
  order = from_store.train_order(opened, seed=2, window_chunks=8)
  batches = from_store.StoreFeed(opened, order, 32)
  in_memory = []
  for step in range(60):
    batches.batch(step)
    in_memory.append(sum(len(data) for data, *_ in batches._windows.values()))
  # A batch may straddle two windows, and the next is read ahead.
  assert max(in_memory) <= 3 * 8 * 16
  assert np.median(in_memory) <= 2 * 8 * 16


def _feed_threads():
  return [t for t in threading.enumerate() if t.name == 'feed']


def test_closing_ends_the_thread(url):
  opened = store.open_store(url)
  order = from_store.train_order(opened, seed=0)
  batches = from_store.StoreFeed(opened, order, 10).iterate(0)
  for _ in range(5):
    next(batches)
  assert _feed_threads()
  batches.close()
  assert not _feed_threads()


def test_errors_reach_the_consumer_and_end_the_thread(url, monkeypatch):
  opened = store.open_store(url)
  batches = from_store.StoreFeed(
    opened, from_store.train_order(opened, seed=0), 10
  )
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
  order = from_store.train_order(opened, seed=0, window_chunks=2)
  for shard in (copy / 'activations').glob('*/c/*/0'):
    shard.write_bytes(shard.read_bytes()[:-10])
  with pytest.raises(errors.UserError, match='cannot read store'):
    for _ in from_store.StoreFeed(opened, order, 10).iterate(0, 100):
      pass
  assert not _feed_threads()


def test_what_does_not_fit_is_refused(url):
  opened = store.open_store(url)
  with pytest.raises(errors.UserError, match='order of 2000 rows'):
    from_store.StoreFeed(opened, order_lib.Order(0, 2000, 16, 4), 10)
  with pytest.raises(errors.UserError, match='batch_size 0'):
    from_store.StoreFeed(opened, from_store.train_order(opened, 0), 0)
  with pytest.raises(ValueError, match='negative'):
    order_lib.Order(0, 1003, 16, 4).lane().rows_at(-1, 3)
