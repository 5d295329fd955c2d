"""The activation store: residual rows and the token stream they come from.

A store is a folder, local or gs://, of zarr3 arrays with sharding:

  manifest.json   written last: a folder without it is not a finished store
  activations/    [R, D] float32 or bfloat16, a row per kept token
  stream_index/   [R] int64, the row's place in the token stream, ascending
  tokens/ documents/ positions/   [L] int32, the stream, masked tokens too

A shard is one object with one writer, an inner chunk the smallest read. Every
inner chunk carries a crc32c, so a damaged one fails to read.
"""

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import config
from sae_jax.activations import layout

Manifest = layout.Manifest

# One-dimensional arrays: inner chunks of 256 KB to 512 KB, shards of 64 times
# that.
_FLAT_CHUNK = 65_536
_FLAT_SHARD = 64 * _FLAT_CHUNK
# The length is known at the end: arrays are made this long, then cut.
_UNBOUNDED = 2**48
_CACHE_BYTES = 128 * 2**20


class StoreWriter:
  """Writes a new store; rows and tokens are appended in stream order.

  Opening it deletes what an unfinished or earlier store left in the folder,
  manifest first. Whole shards are written while the next one fills, so two
  shards are in memory. Without `finish` there is no manifest, and readers
  refuse the folder.
  """

  def __init__(
    self,
    url: str,
    d_model: int,
    dtype: str = 'float32',
    chunk_rows: int = 1024,
    shard_rows: int = 65_536,
  ):
    """Raises UserError if sizes do not fit or the folder can't be written."""
    if chunk_rows < 1 or shard_rows % chunk_rows:
      raise config.UserError(
        f'shard_rows {shard_rows} must be a multiple of chunk_rows '
        f'{chunk_rows}, which must be 1 or more'
      )
    if dtype not in layout.DTYPES:
      raise config.UserError(
        f'dtype {dtype!r} cannot be stored: use {" or ".join(layout.DTYPES)}'
      )
    self._url = url
    self._shape = {
      'd_model': d_model,
      'dtype': dtype,
      'chunk_rows': chunk_rows,
      'shard_rows': shard_rows,
    }
    flat = {layout.STREAM_INDEX: 'int64'} | dict.fromkeys(
      layout.STREAM, 'int32'
    )
    try:
      self._files = ts.KvStore.open(layout.kvstore(url)).result()
      self._files.write(layout.MANIFEST, None).result()
      self._arrays = {
        name: _ArrayWriter(
          url, name, (), np.dtype(kind), _FLAT_CHUNK, _FLAT_SHARD
        )
        for name, kind in flat.items()
      }
      self._arrays[layout.ACTIVATIONS] = _ArrayWriter(
        url,
        layout.ACTIVATIONS,
        (d_model,),
        layout.DTYPES[dtype],
        chunk_rows,
        shard_rows,
      )
    except (ValueError, OSError) as error:
      raise self._error(error) from error

  @property
  def n_rows(self) -> int:
    """Rows appended so far."""
    return self._arrays[layout.ACTIVATIONS].length

  @property
  def n_stream(self) -> int:
    """Tokens appended to the stream so far."""
    return self._arrays['tokens'].length

  def __enter__(self) -> 'StoreWriter':
    return self

  def __exit__(self, *exc) -> None:
    # On the way out of an error only: `finish` has waited for every write.
    for array in self._arrays.values():
      array.abandon()

  def append(
    self,
    tokens: np.ndarray,
    documents: np.ndarray,
    positions: np.ndarray,
    keep_mask: np.ndarray,
    resid_kept: np.ndarray,
  ) -> None:
    """Appends a stretch of the token stream and its kept activations.

    Args:
      tokens: int [l] token ids.
      documents: int [l] document numbers, never descending.
      positions: int [l] places in the subject's context, 0 at its start.
      keep_mask: bool [l], whose activations are kept.
      resid_kept: [keep_mask.sum(), D] their activations.

    Raises:
      UserError: if the disk or bucket refuses the data.
    """
    places = self.n_stream + np.flatnonzero(keep_mask)
    if resid_kept.shape != (len(places), self._shape['d_model']):
      raise ValueError(
        f'resid_kept is {resid_kept.shape}, but keep_mask keeps {len(places)} '
        f'tokens of width {self._shape["d_model"]}'
      )
    if not len(tokens) == len(documents) == len(positions) == len(keep_mask):
      raise ValueError('tokens, documents, positions, keep_mask differ in size')
    try:
      self._arrays[layout.ACTIVATIONS].append(resid_kept)
      self._arrays[layout.STREAM_INDEX].append(places)
      for name, values in zip(layout.STREAM, (tokens, documents, positions)):
        self._arrays[name].append(values)
    except (ValueError, OSError) as error:
      raise self._error(error) from error

  def finish(self, **fields: Any) -> Manifest:
    """Writes what is buffered, then the manifest in one atomic write.

    Args:
      **fields: the fields of `Manifest` that the writer does not know.

    Returns:
      The manifest.

    Raises:
      UserError: if the disk or bucket refuses the data.
    """
    try:
      checksums = {name: a.finish() for name, a in self._arrays.items()}
      manifest = Manifest(
        format_version=layout.FORMAT_VERSION,
        n_rows=self.n_rows,
        n_stream=self.n_stream,
        checksums=checksums,
        **self._shape,
        **fields,
      )
      manifest = dataclasses.replace(
        manifest, identity=layout.identity(manifest)
      )
      text = config.to_json(manifest)
      # TensorStore's file driver writes beside, syncs and renames; on GCS it
      # is one put.
      self._files.write(layout.MANIFEST, text.encode()).result()
    except (ValueError, OSError) as error:
      raise self._error(error) from error
    return config.from_dict(Manifest, json.loads(text))

  def _error(self, error: Exception) -> config.UserError:
    return config.UserError(
      f'cannot write store {self._url}: {layout.reason(error)}: '
      'check the path, free space and your access'
    )


class _ArrayWriter:
  """Appends to one array; whole shards are written behind the caller."""

  def __init__(self, url, name, row_shape, dtype, chunk, shard):
    self.length = 0
    self._buffer = np.empty((shard, *row_shape), dtype)
    self._sha256 = hashlib.sha256()
    self._pending = None
    self._array = ts.open(
      layout.array_spec(url, name)
      | {
        'metadata': layout.array_metadata(
          [_UNBOUNDED, *row_shape], dtype, chunk, shard
        )
      },
      create=True,
      delete_existing=True,
    ).result()

  def append(self, values):
    while len(values):
      start = self.length % len(self._buffer)
      part = values[: len(self._buffer) - start]
      self._buffer[start : start + len(part)] = part
      self._sha256.update(
        self._buffer[start : start + len(part)].view(np.uint8)
      )
      self.length += len(part)
      values = values[len(part) :]
      if self.length % len(self._buffer) == 0:
        self._write(len(self._buffer))

  def finish(self):
    if self.length % len(self._buffer):
      self._write(self.length % len(self._buffer))
    if self._pending is not None:
      self._pending.result()
    stop = [self.length] + [None] * (self._array.rank - 1)
    self._array.resize(exclusive_max=stop, resize_metadata_only=True).result()
    return self._sha256.hexdigest()

  def abandon(self):
    if self._pending is not None:
      self._pending.cancel()

  def _write(self, rows):
    if self._pending is not None:
      self._pending.result()
    region = self._array[self.length - rows : self.length]
    self._pending = region.write(self._buffer[:rows])
    self._buffer = np.empty_like(self._buffer)


class Store:
  """A finished store, opened for reading.

  Attributes:
    url: where it is.
    manifest: what it holds.
    activations: the [R, D] array, in the dtype it is stored in.
  """

  def __init__(self, url: str, manifest: Manifest):
    self.url = url
    self.manifest = manifest
    # One cache for all arrays: it spares the request for each shard's index.
    self._context = ts.Context(
      {'cache_pool': {'total_bytes_limit': _CACHE_BYTES}}
    )
    self._arrays = {}
    self.activations = self._open(layout.ACTIVATIONS, np.dtype(manifest.dtype))

  @property
  def n_train(self) -> int:
    """Rows before the held-out split."""
    return self.manifest.n_rows - self.manifest.holdout_rows

  def read_rows(self, start: int, stop: int) -> np.ndarray:
    """Activations of rows start to stop, [stop - start, D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    if not 0 <= start <= stop <= self.manifest.n_rows:
      raise IndexError(
        f'rows {start} to {stop} of a store of {self.manifest.n_rows}'
      )
    return self._read(self.activations[start:stop]).astype(np.float32)

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Activations of any rows in the order given, [len(rows), D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    rows = np.asarray(rows, np.int64)
    if rows.size and not 0 <= rows.min() <= rows.max() < self.manifest.n_rows:
      raise IndexError(
        f'rows {rows.min()} to {rows.max()} of a store of '
        f'{self.manifest.n_rows}'
      )
    return self._read(self.activations[rows]).astype(np.float32)

  def _whole(self, name: str, dtype: str) -> np.ndarray:
    if name not in self._arrays:
      self._arrays[name] = self._read(self._open(name, np.dtype(dtype)))
    return self._arrays[name]

  def tokens(self) -> np.ndarray:
    """Token ids of the whole stream, int32 [L]."""
    return self._whole('tokens', 'int32')

  def documents(self) -> np.ndarray:
    """Document number of each token of the stream, int32 [L], ascending."""
    return self._whole('documents', 'int32')

  def positions(self) -> np.ndarray:
    """Place of each token in its context, int32 [L]; 0 starts a context."""
    return self._whole('positions', 'int32')

  def stream_index(self) -> np.ndarray:
    """Place of each row in the stream, int64 [R], ascending."""
    return self._whole(layout.STREAM_INDEX, 'int64')

  def verify(self) -> None:
    """Reads every byte again and compares checksums and identity.

    Raises:
      UserError: if data or manifest are not what was written.
    """
    if layout.identity(self.manifest) != self.manifest.identity:
      raise config.UserError(
        f'the manifest of store {self.url} was edited: its content does not '
        'give its identity: harvest it again'
      )
    sums = {layout.ACTIVATIONS: hashlib.sha256()}
    step = self.manifest.shard_rows
    for start in range(0, self.manifest.n_rows, step):
      stop = min(start + step, self.manifest.n_rows)
      data = self._read(self.activations[start:stop])
      sums[layout.ACTIVATIONS].update(data.view(np.uint8))
    for name in (layout.STREAM_INDEX, *layout.STREAM):
      dtype = 'int64' if name == layout.STREAM_INDEX else 'int32'
      sums[name] = hashlib.sha256(self._whole(name, dtype).view(np.uint8))
    for name, digest in sums.items():
      if digest.hexdigest() != self.manifest.checksums[name]:
        raise config.UserError(
          f'{name} of store {self.url} is not what was written: '
          'copy or harvest it again'
        )

  def _open(self, name: str, dtype: np.dtype) -> ts.TensorStore:
    rows = self.manifest.n_rows
    shape = {
      layout.ACTIVATIONS: (rows, self.manifest.d_model),
      layout.STREAM_INDEX: (rows,),
    }.get(name, (self.manifest.n_stream,))
    try:
      array = ts.open(
        layout.array_spec(self.url, name) | {'recheck_cached_data': 'open'},
        open=True,
        context=self._context,
      ).result()
    except ValueError as error:
      raise self._error(name, error) from error
    if array.shape != shape or array.dtype.numpy_dtype != dtype:
      raise config.UserError(
        f'{name} of store {self.url} is {array.dtype.name} {array.shape}, its '
        f'manifest says {dtype.name} {shape}: copy or harvest it again'
      )
    return array

  def _read(self, region: ts.TensorStore) -> np.ndarray:
    try:
      return region.read(order='C').result()
    except ValueError as error:
      raise self._error('an array', error) from error

  def _error(self, name: str, error: Exception) -> config.UserError:
    return config.UserError(
      f'cannot read {name} of store {self.url}: {layout.reason(error)}: '
      'check the path and your access, or copy or harvest it again'
    )


def open_store(url: str) -> Store:
  """Opens a finished store.

  Args:
    url: its folder, local or gs://.

  Raises:
    UserError: if there is none, or its harvest was not finished.
  """
  manifest = layout.read_manifest(url)
  if manifest is None:
    raise config.UserError(
      f'{url} is not a finished store, it has no {layout.MANIFEST}: '
      'harvest it first, or check the path'
    )
  return Store(url, manifest)
