"""The activation store: residual rows and the token stream they come from.

A store is a folder, local or in a bucket, of zarr3 arrays with sharding:

  plan.json             what all shards have in common, written first
  shards/000000.json    a complete shard: its rows, documents and checksums
  manifest.json         written last: a folder without it is not sealed
  activations/SITE/     [S * shard_rows, D] float32 or bfloat16, kept tokens
  stream_index/         [S * shard_rows] int32, a row's place in its shard's
                        part of the token stream, ascending
  tokens/ documents/ positions/   [S * 2 * shard_rows] int32, masked tokens too

A shard is one object of each array, begins with a context, and is a function
of the plan and its number alone. So shards may be written in any order, by any
process, and an interrupted harvest makes those that are missing. Shards are
seldom full: the manifest says how many of each one's rows, and tokens of the
stream, there are. Row r of the store is row r minus those of the shards before
of its shard.

An inner chunk is the smallest read and carries a crc32c, so a damaged one fails
to read. `writer` makes stores.
"""

import dataclasses
import functools
from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import url as url_lib
from sae_jax.store import layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest, StorePlan

_CACHE_BYTES = 128 * 2**20


class Store:
  """A store, opened for reading one site's activations.

  Attributes:
    url: where it is.
    manifest: what it holds.
    site: whose activations.
    starts: [S + 1], the first row of each shard.
  """

  def __init__(self, url: str, manifest: Manifest, site: str):
    self.url, self.manifest, self.site = url, manifest, site
    counts = np.array(manifest.shard_counts, np.int64).reshape(-1, 2)
    self.starts, self._stream_starts = (
      np.append(0, np.cumsum(column)) for column in counts.T
    )
    # One cache for all arrays: it spares the request for each shard's index.
    self._context = ts.Context(
      {'cache_pool': {'total_bytes_limit': _CACHE_BYTES}}
    )
    self._whole = functools.cache(self._read_whole)
    self.activations = self._open(layout.array_name(site))

  @property
  def about(self) -> dict[str, Any]:
    """What a checkpoint says of the data it was trained on."""
    found = dataclasses.asdict(self.manifest) | {'site': self.site}
    # As long as there are shards, and named by the identity.
    del found['shard_counts'], found['checksums']
    return found

  @property
  def n_train(self) -> int:
    """Rows before the held-out split."""
    return self.manifest.n_rows - self.manifest.holdout_rows

  def places(self, rows: np.ndarray) -> np.ndarray:
    """Where rows lie along the first axis of `activations`, int64."""
    shard = np.searchsorted(self.starts, rows, 'right') - 1
    return rows - self.starts[shard] + shard * self.manifest.shard_rows

  def read_rows(self, start: int, stop: int) -> np.ndarray:
    """Activations of rows start to stop, [stop - start, D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    self._check_rows(start, stop - 1, stop == start)
    rows_RD = self._parts(self.activations, self.starts, start, stop)
    return rows_RD.astype(np.float32, copy=False)

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Activations of any rows in the order given, [len(rows), D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    rows = np.asarray(rows, np.int64)
    if rows.size:
      self._check_rows(rows.min(), rows.max())
    rows_RD = self._read(self.activations[self.places(rows)])
    return rows_RD.astype(np.float32, copy=False)

  def tokens(self) -> np.ndarray:
    """Token ids of the whole stream, int32 [L]."""
    return self._whole('tokens')

  def documents(self) -> np.ndarray:
    """Document number of each token of the stream, int32 [L], ascending."""
    return self._whole('documents')

  def positions(self) -> np.ndarray:
    """Place of each token in its context, int32 [L]; 0 starts a context."""
    return self._whole('positions')

  def stream_index(self) -> np.ndarray:
    """Place of each row in the stream, int64 [R], ascending."""
    shard = np.repeat(
      np.arange(len(self.starts) - 1), np.diff(self.starts).astype(int)
    )
    return self._whole(layout.STREAM_INDEX) + self._stream_starts[shard]

  def verify(self) -> int:
    """Reads every byte again and compares checksums and identity.

    Returns:
      The bytes that were read.

    Raises:
      UserError: if data or manifest are not what was written; it names the
        objects, all of them.
    """
    if manifest_lib.identity(self.manifest) != self.manifest.identity:
      raise errors.UserError(
        f'the manifest of store {self.url} was edited: its content does not '
        'give its identity: harvest it again'
      )
    bad, total = [], 0
    kinds = layout.array_kinds(self.manifest)
    for name, kind in kinds.items():
      array = self._open(name)
      starts = self._starts_of(name)
      for shard, want in enumerate(self.manifest.checksums[name]):
        try:
          values = self._parts(array, starts, starts[shard], starts[shard + 1])
          total += values.nbytes
          if manifest_lib.sha256(values) == want:
            continue
          problem = 'is not what was written'
        except errors.UserError as error:
          problem = str(error)
        bad.append(f'{layout.object_name(name, kind, shard)} {problem}')
    files = ts.KvStore.open(url_lib.kvstore(self.url)).result()
    for shard, want in enumerate(self.manifest.checksums[manifest_lib.RECORDS]):
      name = layout.shard_name(shard)
      if manifest_lib.sha256(files.read(name).result().value) != want:
        bad.append(f'{name} is not what was written')
    if bad:
      raise errors.UserError(
        f'{len(bad)} objects of store {self.url} are damaged: '
        f'{"; ".join(bad)}: delete them and their records in shards/, and the '
        'manifest, and harvest again, which makes what is missing'
      )
    return total

  def _check_rows(self, first, last, empty=False):
    if not empty and not 0 <= first <= last < self.manifest.n_rows:
      raise IndexError(
        f'rows {first} to {last} of a store of {self.manifest.n_rows}'
      )

  def _starts_of(self, name):
    return self._stream_starts if name in layout.STREAM else self.starts

  def _read_whole(self, name: str) -> np.ndarray:
    starts = self._starts_of(name)
    return self._parts(self._open(name), starts, 0, starts[-1])

  def _parts(self, array, starts, start, stop):
    """Rows start to stop of an array whose shards are not full."""
    room = array.chunk_layout.write_chunk.shape[0]
    shape = (int(stop - start), *array.shape[1:])
    data = np.empty(shape, array.dtype.numpy_dtype)
    target, copies = ts.array(data), []
    shard = int(np.searchsorted(starts, start, 'right')) - 1
    while start < stop:
      end = min(stop, starts[shard + 1])
      place = int(start - starts[shard]) + shard * room
      first = shape[0] - int(stop - start)
      part = target[first : first + int(end - start)]
      source = array[place : place + int(end - start)]
      copies.append(
        part.translate_to[(0,) * array.rank].write(
          source.translate_to[(0,) * array.rank]
        )
      )
      start, shard = end, shard + 1
    try:
      for copy in copies:
        copy.result()
    except ValueError as error:
      raise self._error('an array', error) from error
    return data

  def _open(self, name: str) -> ts.TensorStore:
    kind = layout.array_kinds(self.manifest)[name]
    n_shards = len(self.manifest.shard_counts)
    sealed = bool(self.manifest.version)
    spec = (
      layout.array_spec(self.url, name)
      if sealed
      else layout.unsealed_spec(self.url, name, kind, n_shards)
    )
    try:
      array = ts.open(
        spec | {'recheck_cached_data': 'open'},
        open=True,
        assume_metadata=not sealed,
        context=self._context,
      ).result()
    except ValueError as error:
      raise self._error(name, error) from error
    dtype, row, _, shard_rows = kind
    enough = array.shape[0] >= n_shards * shard_rows
    found = (array.dtype.numpy_dtype, array.shape[1:])
    if not enough or found != (dtype, row):
      raise errors.UserError(
        f'{name} of store {self.url} is {array.dtype.name} {array.shape}, its '
        f'manifest says {dtype.name} {(n_shards * shard_rows, *row)}: copy or '
        'harvest it again'
      )
    return array

  def _read(self, region: ts.TensorStore) -> np.ndarray:
    try:
      return region.read(order='C').result()
    except ValueError as error:
      raise self._error('an array', error) from error

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
    site: whose activations; may be left out where there is one.
    version: of the data, see `Manifest`; None for the last.
    unsealed: whether one whose harvest is not finished will do, as far as its
      first shards are complete. Its version is 0, and it has no held-out rows.

  Raises:
    UserError: if there is none, its harvest was not finished, or it has no
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
  """What is complete of a store without a manifest; its version is 0."""
  plan = layout.read_json(url, layout.PLAN, StorePlan)
  if plan is None:
    return None
  found = layout.read_records(url)
  # As far as none is missing.
  shards = [
    shard
    for i, (number, shard) in enumerate(sorted(found.items()))
    if number == i
  ]
  return manifest_lib.make(plan, shards, version=0) if shards else None
