"""Batches from a store, in a seeded order that is a pure function.

An epoch visits every row once: the inner chunks are permuted, and the rows of
each window of consecutive permuted chunks are permuted among themselves. So
reads are whole chunks, a window is all that must be in memory, and a run that
resumes needs the step and nothing else.

Permutations sort splitmix64 hashes (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", 2014), so they hang on no library's version.
"""

from collections.abc import Iterator
import dataclasses
import functools
import itertools
import queue
import threading

import numpy as np
import tensorstore as ts

from sae_jax import config
from sae_jax.activations import store as store_lib

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
# What a hash is for, so that chunks and rows of one number differ.
_CHUNKS, _ROWS = 1, 2


@dataclasses.dataclass(frozen=True)
class Order:
  """An infinite order of rows, epoch after epoch.

  Attributes:
    seed: any int.
    n_rows: rows of an epoch; 0 to n_rows - 1 are visited, none beyond.
    chunk_rows: rows of an inner chunk of the store.
    window_chunks: chunks whose rows are mixed.
    shards: rows of each of the store's shards, of which the last inner chunk
      may be short; none for one shard of all rows.
  """

  seed: int
  n_rows: int
  chunk_rows: int
  window_chunks: int
  shards: tuple[int, ...] = ()

  def __post_init__(self):
    for name in ('n_rows', 'chunk_rows', 'window_chunks'):
      if getattr(self, name) < 1:
        raise config.UserError(
          f'{name} {getattr(self, name)} of an order must be 1 or more'
        )


def train_order(
  store: store_lib.Store, seed: int, window_chunks: int = 32
) -> Order:
  """The order of a store's training rows; the held-out split is beyond it."""
  return Order(
    seed,
    store.n_train,
    store.manifest.chunk_rows,
    window_chunks,
    tuple(rows for rows, _ in store.manifest.shard_counts),
  )


def rows_at(order: Order, start: int, count: int) -> np.ndarray:
  """Rows at places start to start + count of the infinite order.

  Args:
    order: the order.
    start: place, 0 or more; place n_rows starts the second epoch.
    count: how many.

  Returns:
    int64 [count] row numbers.
  """
  rows = [np.empty(0, np.int64)]
  for window, first, stop in _pieces(order, start, count):
    rows.append(_window_rows(order, *window)[first:stop])
  return np.concatenate(rows)


def _pieces(order, start, count) -> Iterator[tuple[tuple[int, int], int, int]]:
  """The ((epoch, window), first, stop) that hold a stretch of places."""
  if start < 0 or count < 0:
    raise ValueError(f'{count} places from {start}: neither may be negative')
  stop = start + count
  while start < stop:
    epoch, place = divmod(start, order.n_rows)
    _, starts = _epoch(order, epoch)
    window = int(np.searchsorted(starts, place, 'right')) - 1
    first = place - int(starts[window])
    size = min(int(starts[window + 1] - starts[window]) - first, stop - start)
    yield (epoch, window), first, first + size
    start += size


def _mix(x: np.ndarray) -> np.ndarray:
  """One splitmix64 step: a bijection of uint64."""
  with np.errstate(over='ignore'):
    x = x + _GAMMA
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _hash(order: Order, epoch: int, kind: int, items: np.ndarray) -> np.ndarray:
  """Hashes of items; distinct items of one (seed, epoch, kind) never tie."""
  key = np.zeros(1, np.uint64)
  for part in (order.seed, epoch, kind):
    key = _mix(key ^ np.uint64(part % 2**64))
  return _mix(key ^ items.astype(np.uint64))


@functools.lru_cache(maxsize=4)
def _chunks(order: Order) -> tuple[np.ndarray, np.ndarray]:
  """First row of each inner chunk, and how many it has, of the n_rows."""
  first, starts = 0, []
  for rows in order.shards or (order.n_rows,):
    starts.append(np.arange(first, first + rows, order.chunk_rows))
    first += rows
  starts = np.concatenate(starts)
  starts = starts[starts < order.n_rows]
  return starts, np.diff(np.append(starts, order.n_rows))


@functools.lru_cache(maxsize=4)
def _epoch(order: Order, epoch: int) -> tuple[np.ndarray, np.ndarray]:
  """The epoch's permutation of chunks, and the place each window starts at."""
  _, sizes = _chunks(order)
  n_chunks = len(sizes)
  chunks = np.argsort(_hash(order, epoch, _CHUNKS, np.arange(n_chunks)))
  ends = np.append(0, np.cumsum(sizes[chunks]))
  starts = np.append(ends[: n_chunks : order.window_chunks], order.n_rows)
  return chunks, starts


def _window_chunks(order: Order, epoch: int, window: int) -> np.ndarray:
  chunks, _ = _epoch(order, epoch)
  return chunks[window * order.window_chunks :][: order.window_chunks]


@functools.lru_cache(maxsize=4)
def _mixing(order: Order, epoch: int, window: int) -> tuple[np.ndarray, ...]:
  """A window's rows as its chunks hold them, and the order that mixes them."""
  starts, sizes = _chunks(order)
  rows = np.concatenate(
    [
      np.arange(starts[chunk], starts[chunk] + sizes[chunk])
      for chunk in _window_chunks(order, epoch, window)
    ]
  )
  return rows, np.argsort(_hash(order, epoch, _ROWS, rows))


def _window_rows(order: Order, epoch: int, window: int) -> np.ndarray:
  rows, mixing = _mixing(order, epoch, window)
  return rows[mixing]


class Feed:
  """Batches of a store's rows in an order.

  The current window and the next are in memory, in the store's dtype; the
  next is read while the current is used.
  """

  def __init__(self, store: store_lib.Store, order: Order, batch_size: int):
    """Raises UserError if the order is not one of this store's rows."""
    manifest = store.manifest
    if order.n_rows > manifest.n_rows:
      raise config.UserError(
        f'an order of {order.n_rows} rows does not fit store {store.url} of '
        f'{manifest.n_rows}: use another store, or the order of this one'
      )
    if batch_size < 1:
      raise config.UserError(f'batch_size {batch_size} must be 1 or more')
    self._store = store
    self._order = order
    self._batch_size = batch_size
    self._windows = {}
    self._lock = threading.Lock()

  def batch(self, step: int) -> np.ndarray:
    """The batch of a step, float32 [B, D].

    A pure function of the step; consecutive steps are the fast way.

    Raises:
      UserError: if the store cannot be read.
    """
    pieces = list(
      _pieces(self._order, step * self._batch_size, self._batch_size)
    )
    batch_BD = np.empty(
      (self._batch_size, self._store.manifest.d_model), np.float32
    )
    filled = 0
    with self._lock:
      needed = [window for window, _, _ in pieces]
      self._hold([*needed, self._after(*needed[-1])])
      for window, first, stop in pieces:
        _, mixing = _mixing(self._order, *window)
        data = self._wait(window)
        batch_BD[filled : filled + stop - first] = data[mixing[first:stop]]
        filled += stop - first
    return batch_BD

  def iterate(
    self, start_step: int, stop_step: int | None = None, read_ahead: int = 2
  ) -> Iterator[np.ndarray]:
    """Batches of start_step to stop_step, made by a background thread.

    Args:
      start_step: the first step.
      stop_step: the step to stop before; None never stops.
      read_ahead: batches that may wait.

    Yields:
      float32 [B, D]. Closing the generator ends the thread.

    Raises:
      UserError: if the store cannot be read.
    """
    ready = queue.Queue(maxsize=max(1, read_ahead))
    closed = threading.Event()

    def put(item):
      while not closed.is_set():
        try:
          return ready.put(item, timeout=0.1)
        except queue.Full:
          continue

    def work():
      try:
        for step in itertools.count(start_step):
          if closed.is_set() or (stop_step is not None and step >= stop_step):
            break
          put((self.batch(step), None))
        put((None, None))
      except BaseException as error:  # It is raised where the batches are used.
        put((None, error))

    thread = threading.Thread(target=work, name='feed', daemon=True)
    thread.start()
    try:
      while True:
        batch_BD, error = ready.get()
        if error is not None:
          raise error
        if batch_BD is None:
          return
        yield batch_BD
    finally:
      closed.set()
      thread.join()

  def _after(self, epoch: int, window: int) -> tuple[int, int]:
    _, starts = _epoch(self._order, epoch)
    last = window + 2 == len(starts)
    return (epoch + 1, 0) if last else (epoch, window + 1)

  def _hold(self, windows: list[tuple[int, int]]) -> None:
    """Starts reading windows that are not in memory and drops all others."""
    self._windows = {w: d for w, d in self._windows.items() if w in windows}
    for window in windows:
      if window not in self._windows:
        self._windows[window] = self._read(*window)

  def _read(self, epoch: int, window: int) -> tuple[np.ndarray, list]:
    rows, _ = _mixing(self._order, epoch, window)
    source = self._store.activations
    data = np.empty((len(rows), source.shape[1]), source.dtype.numpy_dtype)
    target, reads, filled = ts.array(data), [], 0
    starts, sizes = _chunks(self._order)
    chunks = _window_chunks(self._order, epoch, window)
    places = self._store.places(starts[chunks])
    for place, size in zip(places.tolist(), sizes[chunks].tolist()):
      part = target[filled : filled + size].translate_to[0, 0]
      reads.append(part.write(source[place : place + size].translate_to[0, 0]))
      filled += size
    return data, reads

  def _wait(self, window: tuple[int, int]) -> np.ndarray:
    data, reads = self._windows[window]
    try:
      for read in reads:
        read.result()
    except ValueError as error:
      del self._windows[window]
      raise config.UserError(
        f'cannot read store {self._store.url}: {config.reason(error)}: '
        'check the path and your access, or harvest it again'
      ) from error
    reads.clear()
    return data
