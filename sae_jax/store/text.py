"""The text of a store: what stands beside its activations, or alone.

Tokens, documents and positions of the whole stream, and which of its tokens are
rows; rows of activations are numbered by these.
"""

import functools

from absl import logging
import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import sharded
from sae_jax.store import layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest

CACHE_BYTES = 128 * 2**20
# What TensorStore raises if a read fails.
FAULTS = (ValueError, MemoryError)


class Text:
  """The text of a sealed store.

  Attributes:
    url: where it is.
    manifest: what it holds.
    starts: [S + 1], the first row of each shard, and the number of rows.
  """

  def __init__(
    self, url: str, manifest: Manifest, cache_bytes: int = CACHE_BYTES
  ):
    self.url, self.manifest = url, manifest
    counts = np.array(manifest.shard_counts, np.int64).reshape(-1, 2)
    self.starts, self._stream_starts = (
      np.append(0, np.cumsum(column)) for column in counts.T
    )
    # One cache for all arrays: each shard's index is then requested only once.
    self._context = ts.Context(
      {'cache_pool': {'total_bytes_limit': cache_bytes}}
    )
    self._whole = functools.cache(self._read_whole)
    self._opened = functools.cache(self._open)
    self._record = functools.cache(
      functools.partial(layout.read_shard, url, manifest)
    )

  def check_subject(self, name: str, weights_sha256: str) -> None:
    """Raises UserError if the store was not harvested from this subject."""
    manifest_lib.check_subject(self.manifest, self.url, name, weights_sha256)

  @property
  def n_train(self) -> int:
    """Number of rows that are not held out; they come first."""
    return self.manifest.n_rows - self.manifest.holdout_rows

  @property
  def validation_rows(self) -> range:
    """Held-out rows that runs are compared by and choices are made on.

    Raises:
      UserError: if a shard's record cannot be read.
    """
    return self._held_out[0]

  @property
  def test_rows(self) -> range:
    """Held-out rows that reports are of, of other documents.

    Of a store that holds out a single document they are the validation rows.

    Raises:
      UserError: see `validation_rows`.
    """
    return self._held_out[1]

  @functools.cached_property
  def _held_out(self) -> tuple[range, range]:
    first, stop = self.n_train, self.manifest.n_rows
    held_out = range(first, stop)
    if not held_out:
      return held_out, held_out
    test = manifest_lib.first_test_row(self.manifest, self._document)
    if test is None:
      logging.warning(
        'store %s holds out one document: its %d rows are both validation and '
        'test, so a report is of rows that choices were made on; harvest more '
        'documents, of which two or more are held out',
        self.url,
        len(held_out),
      )
      return held_out, held_out
    return range(first, test), range(test, stop)

  def _document(self, row: int) -> int:
    """Number of the document that a row is of, by its shard's record."""
    shard = int(np.searchsorted(self.starts, row, 'right')) - 1
    numbers, counts = zip(*self._record(shard).documents)
    within = row - self.starts[shard]
    return numbers[np.searchsorted(np.cumsum(counts), within, 'right')]

  def tokens(self) -> np.ndarray:
    """Token ids of the whole stream, int32 [L]."""
    return self._whole('tokens')

  def documents(self) -> np.ndarray:
    """Document number of each token of the stream, int32 [L], ascending."""
    return self._whole('documents')

  def positions(self) -> np.ndarray:
    """Position of each token in its context, int32 [L]; 0 starts a context."""
    return self._whole('positions')

  def stream_index(self, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Index of each row's token in the stream, int64 [R], ascending.

    Args:
      start: the first row; the whole index is kept, a part is not.
      stop: the row after the last; None for all that follow.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    n_rows = self.manifest.n_rows
    stop = n_rows if stop is None else stop
    self._check_rows(start, stop - 1, stop == start)
    if (start, stop) == (0, n_rows):
      within_R = self._whole(layout.STREAM_INDEX)
    else:
      within_R = self._part(layout.STREAM_INDEX, start, stop)
    shard_R = np.searchsorted(self.starts, np.arange(start, stop), 'right') - 1
    return within_R + self._stream_starts[shard_R]

  def stream(
    self, start: int, stop: int
  ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, documents and positions of a part of the stream, int32 each.

    Args:
      start: index of the first token in the stream.
      stop: that of the token after the last.

    Raises:
      IndexError: if there are no such tokens.
      UserError: if they cannot be read.
    """
    n_stream = self.manifest.n_stream
    if not 0 <= start <= stop <= n_stream:
      raise IndexError(f'tokens {start} to {stop} of a stream of {n_stream}')
    return tuple(self._part(name, start, stop) for name in layout.STREAM)

  def _check_rows(self, first, last, empty=False):
    if not empty and not 0 <= first <= last < self.manifest.n_rows:
      raise IndexError(
        f'rows {first} to {last} of a store of {self.manifest.n_rows}'
      )

  def _starts_of(self, name):
    return self._stream_starts if name in layout.STREAM else self.starts

  def _read_whole(self, name: str) -> np.ndarray:
    return self._part(name, 0, self._starts_of(name)[-1])

  def _part(self, name: str, start: int, stop: int) -> np.ndarray:
    return self._read_range(
      name, self._opened(name), self._starts_of(name), start, stop
    )

  def _read_range(self, name, array, starts, start, stop, shard_rows=0):
    """Rows start to stop of an array whose shards begin at rows `starts`."""
    shard_rows = shard_rows or array.chunk_layout.write_chunk.shape[0]
    shape = (int(stop - start), *array.shape[1:])
    try:
      data = np.empty(shape, array.dtype.numpy_dtype)
    except MemoryError as error:
      raise self._error(name, error) from error
    target, copies = ts.array(data), []
    shard = int(np.searchsorted(starts, start, 'right')) - 1
    while start < stop:
      end = min(stop, starts[shard + 1])
      size = int(end - start)
      first = shape[0] - int(stop - start)
      array_first = int(start - starts[shard]) + shard * shard_rows
      source = array[array_first : array_first + size]
      copies.append(
        target[first : first + size]
        .translate_to[(0,) * array.rank]
        .write(source.translate_to[(0,) * array.rank])
      )
      start, shard = end, shard + 1
    try:
      for copy in copies:
        copy.result()
    except FAULTS as error:
      raise self._error(name, error) from error
    return data

  def _open(self, name: str) -> ts.TensorStore:
    kind = layout.array_kinds(self.manifest)[name]
    spec = layout.array_spec(
      self.url, name, kind, len(self.manifest.shard_counts)
    )
    try:
      return sharded.opened(spec, self._context)
    except ValueError as error:
      raise self._error(name, error) from error

  def _error(self, name: str, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'cannot read {name} of store {self.url}: {errors.reason(error)}: '
      'check the path and your access, or copy or harvest it again'
    )
