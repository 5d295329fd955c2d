"""The order in which a store's rows are trained on, a pure function.

An epoch visits every row once: the inner chunks are permuted, and the rows of
each window of consecutive permuted chunks are permuted among themselves. So
reads are whole chunks, a window is all that must be in memory, and a run that
resumes needs the step and nothing else.

The order of a large store has lanes. The chunks are dealt to the lanes once and
for all; each lane has an order of its own, and always gives the same positions
of every batch. A process that needs only some positions of each batch reads
only the chunks of those lanes. The lanes are part of the order, and do not
depend on the number of processes.

Permutations sort splitmix64 hashes, so they depend on no library's version.
"""

from collections.abc import Iterator
import dataclasses
import functools

import numpy as np

from sae_jax import errors
from sae_jax.feed import splitmix64

# The use of a hash, so that a chunk and a row of the same number differ.
_CHUNKS, _ROWS, _LANES = 1, 2, 3


@dataclasses.dataclass(frozen=True)
class Order:
  """An infinite order of rows, epoch after epoch.

  Attributes:
    seed: any int.
    n_rows: rows of an epoch; 0 to n_rows - 1 are visited, none beyond.
    chunk_rows: rows of an inner chunk of the store.
    window_chunks: chunks whose rows are mixed, over all lanes; at least one in
      each lane.
    shards: rows of each of the store's shards, whose last inner chunk may be
      short; empty for a single shard of all rows.
    lanes: how many lanes the order has.
  """

  seed: int
  n_rows: int
  chunk_rows: int
  window_chunks: int
  shards: tuple[int, ...] = ()
  lanes: int = 1

  def __post_init__(self):
    for name in ('n_rows', 'chunk_rows', 'window_chunks', 'lanes'):
      if getattr(self, name) < 1:
        raise errors.UserError(
          f'{name} {getattr(self, name)} of an order must be 1 or more'
        )
    if self.lanes > self.n_chunks:
      raise errors.UserError(
        f'an order of {self.n_chunks} chunks cannot have {self.lanes} lanes: '
        f'use {self.n_chunks} at most'
      )

  @functools.cached_property
  def chunks(self) -> tuple[np.ndarray, np.ndarray]:
    """First row of each inner chunk, and its number of rows, up to n_rows."""
    first, starts = 0, []
    for rows in self.shards or (self.n_rows,):
      starts.append(np.arange(first, first + rows, self.chunk_rows))
      first += rows
    starts = np.concatenate(starts)
    starts = starts[starts < self.n_rows]
    return starts, np.diff(np.append(starts, self.n_rows))

  @functools.cached_property
  def dealt(self) -> np.ndarray:
    """The chunks in the order in which they are dealt to lanes."""
    chunks = np.arange(self.n_chunks)
    return np.argsort(_hash(self.seed, 0, _LANES, chunks))

  @property
  def n_chunks(self) -> int:
    """Inner chunks of an epoch."""
    return len(self.chunks[0])

  def lane(self, number: int = 0) -> 'Lane':
    """A lane by its number, from 0."""
    return Lane(self, number)


def batch_rows(order: Order, step: int, batch_size: int) -> np.ndarray:
  """Rows of the batch of a step, int64 [B]."""
  size = lane_size(order, batch_size)
  return np.concatenate(
    [
      order.lane(number).rows_at(step * size, size)
      for number in range(order.lanes)
    ]
  )


def lane_size(order: Order, batch_size: int) -> int:
  """Rows of each batch that come from one lane.

  Raises:
    UserError: if the lanes do not divide the batch.
  """
  if batch_size < 1 or batch_size % order.lanes:
    raise errors.UserError(
      f'batch_size {batch_size} must be 1 or more, and a multiple of the '
      f"order's {order.lanes} lanes"
    )
  return batch_size // order.lanes


class Lane:
  """One lane of an order: an infinite order of its chunks' rows.

  Attributes:
    n_rows: rows of its epochs.
  """

  def __init__(self, order: Order, number: int):
    self._order = order
    starts, sizes = order.chunks
    chunks = np.arange(len(starts))
    if order.lanes > 1:
      chunks = np.sort(order.dealt[number :: order.lanes])
    self._starts, self._sizes, self._chunks = starts, sizes, chunks
    self._window_chunks = -(-order.window_chunks // order.lanes)
    self.n_rows = int(sizes[chunks].sum())
    # Keeps this epoch and the next.
    self._epoch = functools.lru_cache(maxsize=2)(self._find_epoch)

  def rows_at(self, start: int, count: int) -> np.ndarray:
    """Rows at positions start to start + count of the lane's order.

    Args:
      start: first position, 0 or more; n_rows is the start of epoch 1.
      count: how many rows.

    Returns:
      int64 [count] row numbers.
    """
    rows = [np.empty(0, np.int64)]
    for window, first, stop in self.pieces(start, count):
      window_rows, mixing = self.rows(*window)
      rows.append(window_rows[mixing[first:stop]])
    return np.concatenate(rows)

  def pieces(
    self, start: int, count: int
  ) -> Iterator[tuple[tuple[int, int], int, int]]:
    """((epoch, window), first, stop) of windows that hold these positions."""
    if start < 0 or count < 0:
      raise ValueError(
        f'{count} positions from {start}: neither may be negative'
      )
    stop = start + count
    while start < stop:
      epoch, position = divmod(start, self.n_rows)
      _, starts = self._epoch(epoch)
      window = int(np.searchsorted(starts, position, 'right')) - 1
      first = position - int(starts[window])
      size = min(int(starts[window + 1] - starts[window]) - first, stop - start)
      yield (epoch, window), first, first + size
      start += size

  def after(self, epoch: int, window: int) -> tuple[int, int]:
    """(epoch, window) of the next window."""
    _, starts = self._epoch(epoch)
    last = window + 2 == len(starts)
    return (epoch + 1, 0) if last else (epoch, window + 1)

  def chunks(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """First row of each chunk of a window, and its number of rows."""
    chunks, _ = self._epoch(epoch)
    chunks = chunks[window * self._window_chunks :][: self._window_chunks]
    return self._starts[chunks], self._sizes[chunks]

  def rows(self, epoch: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """A window's rows in the order of its chunks, and their permutation."""
    rows = np.concatenate(
      [
        np.arange(start, start + size)
        for start, size in zip(*self.chunks(epoch, window))
      ]
    )
    return rows, np.argsort(_hash(self._order.seed, epoch, _ROWS, rows))

  def _find_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The epoch's chunks in their order, and where each window starts."""
    hashes = _hash(self._order.seed, epoch, _CHUNKS, self._chunks)
    chunks = self._chunks[np.argsort(hashes)]
    ends = np.append(0, np.cumsum(self._sizes[chunks]))
    starts = ends[: len(chunks) : self._window_chunks]
    return chunks, np.append(starts, self.n_rows)


def mixing(seed: int, window: int, n_rows: int) -> np.ndarray:
  """A permutation of the rows of a window that is not made of chunks."""
  return np.argsort(_hash(seed, window, _ROWS, np.arange(n_rows)))


def _hash(seed: int, epoch: int, kind: int, items: np.ndarray) -> np.ndarray:
  """Hashes of items; for one (seed, epoch, kind) distinct items never tie."""
  key = np.zeros(1, np.uint64)
  for part in (seed, epoch, kind):
    key = splitmix64.step(key ^ np.uint64(part % 2**64))
  return splitmix64.step(key ^ items.astype(np.uint64))
