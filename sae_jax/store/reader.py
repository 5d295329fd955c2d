"""The activation store: rows of activations and the tokens they come from.

A store is a folder, local or in a bucket, of zarr3 arrays with sharding:

  plan.json             what all shards have in common, written first
  shards/000000.json    a complete shard: its rows, documents and checksums
  manifest.json         written last: a folder without it is not sealed
  activations/SITE/     [S * shard_rows, D] float32 or bfloat16, kept tokens
  stream_index/         [S * shard_rows] int32, index of a row's token among the
                        stream tokens of its shard, ascending
  tokens/ documents/ positions/   [S * 2 * shard_rows] int32, masked tokens too

A shard is one object of each array, begins with a context, and is a function
of the plan and its number alone. So shards may be written in any order, by any
process, and an interrupted harvest makes those that are missing. Shards are
seldom full: the manifest says how many rows, and tokens of the stream, each one
holds. Rows of the store are counted over the rows that there are, shard after
shard.

An inner chunk is the smallest read and carries a crc32c, so reading a damaged
one is an error. `writer` makes stores.
"""

import dataclasses
import functools
from typing import Any

from absl import logging
import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import sharded
from sae_jax.store import damage, layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest

_CACHE_BYTES = 128 * 2**20
# What TensorStore raises if a read fails.
_FAULTS = (ValueError, MemoryError)


class Store:
  """A store, opened for reading one site's activations.

  Attributes:
    url: where it is.
    manifest: what it holds.
    site: the site whose activations are read.
    starts: [S + 1], the first row of each shard, and the number of rows.
  """

  def __init__(self, url: str, manifest: Manifest, site: str):
    self.url, self.manifest, self.site = url, manifest, site
    counts = np.array(manifest.shard_counts, np.int64).reshape(-1, 2)
    self.starts, self._stream_starts = (
      np.append(0, np.cumsum(column)) for column in counts.T
    )
    # One cache for all arrays: each shard's index is then requested only once.
    self._context = ts.Context(
      {'cache_pool': {'total_bytes_limit': _CACHE_BYTES}}
    )
    self._whole = functools.cache(self._read_whole)
    self._opened = functools.cache(self._open)
    self._record = functools.cache(
      functools.partial(layout.read_shard, url, manifest)
    )
    self.activations = self._open(layout.array_name(site))

  @property
  def about(self) -> dict[str, Any]:
    """The description of the data that a checkpoint keeps."""
    about = dataclasses.asdict(self.manifest) | {'site': self.site}
    # They grow with the shards, and the identity covers them.
    del about['shard_counts'], about['checksums']
    return about

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

  def array_rows(self, rows: np.ndarray) -> np.ndarray:
    """Indices of rows along the first axis of `activations`, int64."""
    shard = np.searchsorted(self.starts, rows, 'right') - 1
    return rows - self.starts[shard] + shard * self.manifest.shard_rows

  def read_rows(self, start: int, stop: int) -> np.ndarray:
    """Activations of rows start to stop, [stop - start, D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    self._check_rows(start, stop - 1, stop == start)
    rows_RD = self._read_range(
      layout.array_name(self.site), self.activations, self.starts, start, stop
    )
    return rows_RD.astype(np.float32, copy=False)

  def finite_rows(self, start: int, stop: int) -> np.ndarray:
    """`read_rows`, all numbers of which must be finite.

    Raises:
      IndexError: see `read_rows`.
      UserError: see `read_rows`; also if a row is not finite, naming it.
    """
    rows_RD = self.read_rows(start, stop)
    bad = np.flatnonzero(~np.isfinite(rows_RD).all(1))
    if len(bad):
      raise errors.UserError(
        f'row {start + bad[0]} of store {self.url} is not finite, one of '
        f'{len(bad)} such rows from {start} to {stop}: leave them out of the '
        'store, as sae-harvest does'
      )
    return rows_RD

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Activations of any rows in the order given, [len(rows), D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    rows = np.asarray(rows, np.int64)
    if rows.size:
      self._check_rows(rows.min(), rows.max())
    try:
      rows_RD = self.activations[self.array_rows(rows)].read(order='C').result()
    except _FAULTS as error:
      raise self._error(layout.array_name(self.site), error) from error
    return rows_RD.astype(np.float32, copy=False)

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

  def verify(self) -> int:
    """Reads every byte and compares checksums.

    Returns:
      How many bytes of arrays were read.

    Raises:
      UserError: if anything is not what was written; it names all damaged
        objects.
    """
    damaged, n_bytes = damage.damaged_files(self.url, self.manifest), 0
    kinds = layout.array_kinds(self.manifest)
    for name, kind in kinds.items():
      array = self._open(name)
      starts = self._starts_of(name)
      for shard, want in enumerate(self.manifest.checksums[name]):
        try:
          values = self._read_range(
            name, array, starts, starts[shard], starts[shard + 1]
          )
          n_bytes += values.nbytes
          if manifest_lib.sha256(values) == want:
            continue
          problem = 'is not what was written'
        except errors.UserError as error:
          problem = str(error)
        damaged.append(f'{sharded.object_name(name, kind, shard)} {problem}')
    if damaged:
      raise errors.UserError(
        f'{len(damaged)} objects of store {self.url} are damaged: '
        f'{"; ".join(damaged)}: delete them and their records in shards/, and '
        'the manifest, and harvest again, which makes what is missing'
      )
    return n_bytes

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

  def _read_range(self, name, array, starts, start, stop):
    """Rows start to stop of an array whose shards begin at rows `starts`."""
    shard_rows = array.chunk_layout.write_chunk.shape[0]
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
    except _FAULTS as error:
      raise self._error(name, error) from error
    return data

  def _open(self, name: str) -> ts.TensorStore:
    kind = layout.array_kinds(self.manifest)[name]
    spec = layout.array_spec(
      self.url, name, kind, len(self.manifest.shard_counts)
    )
    try:
      return ts.open(
        spec | {'recheck_cached_data': 'open'},
        open=True,
        assume_metadata=True,
        context=self._context,
      ).result()
    except ValueError as error:
      raise self._error(name, error) from error

  def _error(self, name: str, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'cannot read {name} of store {self.url}: {errors.reason(error)}: '
      'check the path and your access, or copy or harvest it again'
    )


def open_store(
  url: str,
  site: str = '',
  version: int | None = None,
  unsealed: bool = False,
) -> Store:
  """Opens a store.

  Args:
    url: its folder, local or in a bucket.
    site: the site to read; optional if the store has only one.
    version: see `Manifest`; None for the last.
    unsealed: whether to open a store whose harvest is not finished, up to its
      first missing shard. Its version is 0, and it has no held-out rows.

  Raises:
    UserError: if there is no store, its harvest is not finished, or it has no
      such site.
  """
  manifest = layout.read_manifest(url, version)
  if manifest is None and unsealed:
    manifest = _unsealed(url)
  if manifest is None:
    what = f'version {version} of a' if version else 'a'
    raise errors.UserError(
      f'{url} is not {what} finished store, it has no '
      f'{layout.manifest_name(version or 1)}: harvest it first, or check the '
      'path'
    )
  if not site and len(manifest.sites) == 1:
    (site,) = manifest.sites
  if site not in manifest.sites:
    raise errors.UserError(
      f'store {url} holds {", ".join(manifest.sites)}'
      + (f', not {site}' if site else '')
      + ': name one of them as the site'
    )
  return Store(url, manifest, site)


def _unsealed(url: str) -> Manifest | None:
  """A manifest of version 0 for the complete shards of an unsealed store."""
  plan = layout.read_plan(url)
  if plan is None:
    return None
  records = layout.read_shards(url, plan)
  # Up to the first that is missing.
  shards = [
    shard
    for i, (number, shard) in enumerate(sorted(records.items()))
    if number == i
  ]
  return manifest_lib.make(plan, shards, version=0) if shards else None
