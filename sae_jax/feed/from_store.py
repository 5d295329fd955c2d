"""Batches of a store's rows, on the devices that use them."""

from collections.abc import Iterator
import functools
import itertools
import threading
from typing import Any, NamedTuple

import jax
import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax import mesh as mesh_lib
from sae_jax import store as store_lib
from sae_jax.feed import ahead
from sae_jax.feed import order as order_lib
from sae_jax.feed.order import Order

_READ_AHEAD = 2


class _Stretch(NamedTuple):
  """Consecutive rows of a batch that this process reads, all of one lane.

  Attributes:
    lane: the lane.
    first: the first row, counted within the lane's share of the batch.
    stop: one past the last row.
    offset: where the rows begin among those that this process reads.
  """

  lane: int
  first: int
  stop: int
  offset: int


class StoreFeed:
  """Batches of a store's rows in an order.

  The current and the next window of each lane are in memory, in the store's
  dtype; the next is read while the current is used.

  Attributes:
    bytes_read: bytes of activations read so far.
  """

  def __init__(
    self,
    store: store_lib.Store,
    order: order_lib.Order,
    batch_size: int,
    mesh: jax.sharding.Mesh | None = None,
  ):
    """Reads nothing yet.

    Args:
      store: the activations.
      order: the order of its rows.
      batch_size: B.
      mesh: where `iterate` puts the batches. This process then reads the rows
        that its own devices hold, and only the lanes that these come from.

    Raises:
      UserError: if the order has more rows than the store, or its lanes do not
        divide the batch.
    """
    manifest = store.manifest
    if order.n_rows > manifest.n_rows:
      raise errors.UserError(
        f'an order of {order.n_rows} rows does not fit store {store.url} of '
        f'{manifest.n_rows}: use another store, or the order of this one'
      )
    self._lane_size = order_lib.lane_size(order, batch_size)
    self._store = store
    self._order = order
    self._shape = batch_size, store.width
    self._sharding = None if mesh is None else mesh_lib.sharding(mesh, 'BD')
    self._stretches = self._local_stretches()
    numbers = sorted({stretch.lane for stretch in self._stretches})
    self._lanes = {number: order.lane(number) for number in numbers}
    self._windows, self._spare = {}, []
    self._lock = threading.Lock()
    self.bytes_read = 0

  @functools.cached_property
  def local_rows(self) -> np.ndarray:
    """The rows of a batch that this process reads, ascending."""
    size = self._lane_size
    return np.concatenate(
      [
        np.arange(lane * size + first, lane * size + stop)
        for lane, first, stop, _ in self._stretches
      ]
    )

  def batch(self, step: int) -> np.ndarray:
    """This process's rows of the batch of a step, float32 [local_rows, D].

    A pure function of the step; consecutive steps are fastest.

    Raises:
      UserError: if the store cannot be read.
    """
    size, pieces, n_rows = self._lane_size, [], 0
    for lane, first, stop, _ in self._stretches:
      order = self._lanes[lane]
      for window, begin, end in order.pieces(step * size + first, stop - first):
        pieces.append(((lane, *window), begin, end, n_rows))
        n_rows += end - begin
    rows_BD = np.empty((n_rows, self._shape[1]), np.float32)
    with self._lock:
      needed = [window for window, _, _, _ in pieces]
      self._start_reading([*needed, *map(self._after, needed)])
      for window, begin, end, offset in pieces:
        data, mixing = self._wait(window)
        indices = mixing[begin:end]
        out = rows_BD[offset : offset + end - begin]
        if data.dtype == out.dtype:
          # Without 'clip', which never happens, NumPy copies all rows first.
          np.take(data, indices, axis=0, out=out, mode='clip')
        else:
          out[:] = data[indices]
    return rows_BD

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Iterator[np.ndarray | jax.Array]:
    """Batches of start_step to stop_step, made ahead by a thread.

    Args:
      start_step: the first step.
      stop_step: the step to stop before; None never stops.

    Yields:
      float32 [B, D], sharded over the mesh if there is one. Closing the
      generator ends the thread.

    Raises:
      UserError: if the store cannot be read.
    """
    steps = itertools.count(start_step)
    if stop_step is not None:
      steps = range(start_step, stop_step)
    batches = (self._put(self.batch(step)) for step in steps)
    return ahead.iterate(batches, _READ_AHEAD, 'feed')

  def cursor(self, step: int) -> dict[str, Any]:
    """What a checkpoint keeps to resume after a step: nothing, it has it."""
    del step
    return {}

  def describe(self, step: int) -> str:
    """Which rows of the store a batch holds, and whether all are finite."""
    size = self._shape[0]
    rows = order_lib.batch_rows(self._order, step, size)
    bad = rows[~np.isfinite(self._store.gather(rows)).all(1)]
    return (
      f'store row {bad[0]} is not finite, one of {len(bad)} such rows'
      if len(bad)
      else f'its {size} store rows, {rows[0]} to {rows[-1]}, are finite'
    )

  def _local_stretches(self) -> list[_Stretch]:
    """The rows of a batch that this process reads."""
    size, is_local = self._lane_size, np.zeros(self._shape[0], bool)
    is_local[:] = self._sharding is None
    if self._sharding is not None:
      devices = self._sharding.addressable_devices_indices_map(self._shape)
      for rows, _ in devices.values():
        is_local[rows] = True
    stretches, offset = [], 0
    for lane in range(self._order.lanes):
      rows = np.flatnonzero(is_local[lane * size : (lane + 1) * size])
      # The devices of a process may hold rows with gaps between them.
      for run in np.split(rows, np.flatnonzero(np.diff(rows) > 1) + 1):
        if len(run):
          stretches.append(
            _Stretch(lane, int(run[0]), int(run[-1]) + 1, offset)
          )
          offset += len(run)
    return stretches

  def _put(self, rows_BD: np.ndarray) -> np.ndarray | jax.Array:
    if self._sharding is None:
      return rows_BD
    local_rows = self.local_rows
    return jax.make_array_from_callback(
      self._shape,
      self._sharding,
      lambda index: rows_BD[
        slice(
          *np.searchsorted(local_rows, index[0].indices(self._shape[0])[:2])
        )
      ],
    )

  def _new_buffer(self) -> np.ndarray:
    """Memory that is large enough for any window."""
    order, source = self._order, self._store.activations
    chunks = min(order.n_chunks, -(-order.window_chunks // order.lanes))
    return np.empty(
      (chunks * order.chunk_rows, source.shape[1]), source.dtype.numpy_dtype
    )

  def _after(self, window: tuple[int, int, int]) -> tuple[int, int, int]:
    """The window that follows one in its lane."""
    lane, *epoch_and_number = window
    return lane, *self._lanes[lane].after(*epoch_and_number)

  def _start_reading(self, windows: list[tuple[int, int, int]]) -> None:
    """Starts reading those not in memory, and drops all other windows."""
    for window in set(self._windows).difference(windows):
      data, _, reads = self._windows.pop(window)
      if not reads:
        self._spare.append(data.base)
    for window in windows:
      if window not in self._windows:
        self._windows[window] = self._read(*window)

  def _read(
    self, lane: int, epoch: int, window: int
  ) -> tuple[np.ndarray, np.ndarray, list]:
    rows, mixing = self._lanes[lane].rows(epoch, window)
    source = self._store.activations
    # Buffers are used again: for new memory the kernel clears pages, which
    # takes as long as reading.
    buffer = self._spare.pop() if self._spare else self._new_buffer()
    data = buffer[: len(rows)]
    target, reads, filled = ts.array(data), [], 0
    starts, sizes = self._lanes[lane].chunks(epoch, window)
    firsts = self._store.array_rows(starts)
    for first, size in zip(firsts.tolist(), sizes.tolist()):
      chunk = target[filled : filled + size].translate_to[0, 0]
      reads.append(chunk.write(source[first : first + size].translate_to[0, 0]))
      filled += size
    return data, mixing, reads

  def _wait(
    self, window: tuple[int, int, int]
  ) -> tuple[np.ndarray, np.ndarray]:
    """A window's rows in the order of its chunks, and their permutation."""
    data, mixing, reads = self._windows[window]
    if reads:
      try:
        for read in reads:
          read.result()
      except ValueError as error:
        del self._windows[window]
        raise errors.UserError(
          f'cannot read store {self._store.url}: {errors.reason(error)}: '
          'check the path and your access, or harvest it again'
        ) from error
      reads.clear()
      self.bytes_read += data.nbytes
    return data, mixing


# Lanes differ in length by up to a chunk; with this many chunks in a lane that
# is a thousandth of an epoch.
_MIN_CHUNKS_PER_LANE = 1024
_MAX_LANES = 256


def train_order(
  store: store_lib.Store,
  seed: int,
  window_chunks: int = 64,
  lanes: int = 1,
) -> Order:
  """The order of a store's training rows, without the held-out ones."""
  return Order(
    seed,
    store.n_train,
    store.manifest.chunk_rows,
    window_chunks,
    tuple(rows for rows, _ in store.manifest.shard_counts),
    lanes,
  )


def lanes_for(store: store_lib.Store, batch_size: int) -> int:
  """The number of lanes to use: the most that are long and divide a batch."""
  chunks = store.n_train // store.manifest.chunk_rows
  lanes = 1
  while (
    2 * lanes <= _MAX_LANES
    and 2 * lanes * _MIN_CHUNKS_PER_LANE <= chunks
    and batch_size % (2 * lanes) == 0
  ):
    lanes *= 2
  return lanes
