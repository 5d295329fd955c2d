"""Batches from a store, in its order, on the devices that use them."""

from collections.abc import Iterator
import functools
import itertools
import threading
from typing import Any

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


class StoreFeed:
  """Batches of a store's rows in an order.

  The current window of each lane and the next are in memory, in the store's
  dtype; the next is read while the current is used.

  Attributes:
    bytes_read: of activations, so far.
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
      order: of its rows.
      batch_size: B.
      mesh: where `iterate` puts the batches. This process then reads what its
        own devices hold of them, and the lanes that these are of.

    Raises:
      UserError: if the order is not one of this store's rows, or of such
        batches.
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
    self._shape = batch_size, manifest.d_model
    self._sharding = None if mesh is None else mesh_lib.sharding(mesh, 'BD')
    self._stretches = self._needed()
    numbers = sorted({number for number, _, _, _ in self._stretches})
    self._lanes = {number: order.lane(number) for number in numbers}
    self._windows, self._spare = {}, []
    self._lock = threading.Lock()
    self.bytes_read = 0

  @functools.cached_property
  def places(self) -> np.ndarray:
    """Places in a batch of the rows that this process reads, ascending."""
    size = self._lane_size
    return np.concatenate(
      [
        np.arange(lane * size + first, lane * size + stop)
        for lane, first, stop, _ in self._stretches
      ]
    )

  def batch(self, step: int) -> np.ndarray:
    """What this process reads of the batch of a step, float32 [B, D] or less.

    A pure function of the step; consecutive steps are the fast way.

    Raises:
      UserError: if the store cannot be read.
    """
    size, pieces = self._lane_size, []
    for lane, first, stop, at in self._stretches:
      order = self._lanes[lane]
      for window, begin, end in order.pieces(step * size + first, stop - first):
        pieces.append(((lane, *window), begin, end, at))
        at += end - begin
    rows_BD = np.empty((at, self._shape[1]), np.float32)
    with self._lock:
      needed = [window for window, _, _, _ in pieces]
      self._hold([*needed, *map(self._after, needed)])
      for window, begin, end, at in pieces:
        data, mixing = self._wait(window)
        # Clipping, which never happens, spares a copy of all of it.
        some, out = mixing[begin:end], rows_BD[at : at + end - begin]
        if data.dtype == out.dtype:
          np.take(data, some, axis=0, out=out, mode='clip')
        else:
          out[:] = data[some]
    return rows_BD

  def iterate(
    self, start_step: int, stop_step: int | None = None
  ) -> Iterator[np.ndarray | jax.Array]:
    """Batches of start_step to stop_step, made ahead by a thread.

    Args:
      start_step: the first step.
      stop_step: the step to stop before; None never stops.

    Yields:
      float32 [B, D], on the mesh if there is one, each device's part on it.
      Closing the generator ends the thread.

    Raises:
      UserError: if the store cannot be read.
    """
    steps = itertools.count(start_step)
    if stop_step is not None:
      steps = range(start_step, stop_step)
    batches = (self._put(self.batch(step)) for step in steps)
    return ahead.iterate(batches, _READ_AHEAD, 'feed')

  def cursor(self, step: int) -> dict[str, Any]:
    """What a checkpoint keeps to go on after a step: nothing more than it."""
    del step
    return {}

  def describe(self, step: int) -> str:
    """Which rows of the store a batch holds, and whether they are finite."""
    size = self._shape[0]
    rows = order_lib.batch_rows(self._order, step, size)
    bad = rows[~np.isfinite(self._store.gather(rows)).all(1)]
    return (
      f'store row {bad[0]} is not finite, one of {len(bad)} such rows'
      if len(bad)
      else f'its {size} store rows, {rows[0]} to {rows[-1]}, are finite'
    )

  def _needed(self) -> list[tuple[int, int, int, int]]:
    """(lane, first, stop, where they go) of places this process reads."""
    size, wanted = self._lane_size, np.zeros(self._shape[0], bool)
    wanted[:] = self._sharding is None
    if self._sharding is not None:
      devices = self._sharding.addressable_devices_indices_map(self._shape)
      for rows, _ in devices.values():
        wanted[rows] = True
    found, at = [], 0
    for lane in range(self._order.lanes):
      some = np.flatnonzero(wanted[lane * size : (lane + 1) * size])
      # The devices of a process may hold stretches with gaps between.
      for part in np.split(some, np.flatnonzero(np.diff(some) > 1) + 1):
        if len(part):
          found.append((lane, int(part[0]), int(part[-1]) + 1, at))
          at += len(part)
    return found

  def _put(self, rows_BD: np.ndarray) -> np.ndarray | jax.Array:
    if self._sharding is None:
      return rows_BD
    places = self.places
    return jax.make_array_from_callback(
      self._shape,
      self._sharding,
      lambda index: rows_BD[
        slice(*np.searchsorted(places, index[0].indices(self._shape[0])[:2]))
      ],
    )

  def _empty(self) -> np.ndarray:
    """Room for any window."""
    order, source = self._order, self._store.activations
    chunks = min(order.n_chunks, -(-order.window_chunks // order.lanes))
    return np.empty(
      (chunks * order.chunk_rows, source.shape[1]), source.dtype.numpy_dtype
    )

  def _after(self, window: tuple[int, int, int]) -> tuple[int, int, int]:
    lane, *place = window
    return lane, *self._lanes[lane].after(*place)

  def _hold(self, windows: list[tuple[int, int, int]]) -> None:
    """Starts reading windows that are not in memory and drops all others."""
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
    # Memory is used again: the kernel takes as long to clear new pages as
    # reading them takes.
    spare = self._spare.pop() if self._spare else self._empty()
    data = spare[: len(rows)]
    target, reads, filled = ts.array(data), [], 0
    starts, sizes = self._lanes[lane].chunks(epoch, window)
    places = self._store.places(starts)
    for place, size in zip(places.tolist(), sizes.tolist()):
      part = target[filled : filled + size].translate_to[0, 0]
      reads.append(part.write(source[place : place + size].translate_to[0, 0]))
      filled += size
    return data, mixing, reads

  def _wait(
    self, window: tuple[int, int, int]
  ) -> tuple[np.ndarray, np.ndarray]:
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


# A lane that is a chunk longer than another ends its epoch so much later; with
# so many chunks that is a thousandth.
_CHUNKS_OF_A_LANE = 1024
_MOST_LANES = 256


def train_order(
  store: store_lib.Store,
  seed: int,
  window_chunks: int = 64,
  lanes: int = 1,
) -> Order:
  """The order of a store's training rows; the held-out split is beyond it."""
  return Order(
    seed,
    store.n_train,
    store.manifest.chunk_rows,
    window_chunks,
    tuple(rows for rows, _ in store.manifest.shard_counts),
    lanes,
  )


def lanes_for(store: store_lib.Store, batch_size: int) -> int:
  """Lanes for batches of a store: as many as are worth it, and divide them."""
  chunks = store.n_train // store.manifest.chunk_rows
  lanes = 1
  while (
    2 * lanes <= _MOST_LANES
    and 2 * lanes * _CHUNKS_OF_A_LANE <= chunks
    and batch_size % (2 * lanes) == 0
  ):
    lanes *= 2
  return lanes
