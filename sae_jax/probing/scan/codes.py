"""The codes of consecutive rows on disk, written as they are made.

  idx/ vals/     [R, K] int32 and float32, zarr3: the active latents of each row
                 in the order of their values, then zeros
  codes.json     written last: the first row, R and K

A shard is 65,536 rows and is whole or absent. It has all K columns, or 64 where
any number of latents may be active: K is then known after the last row, when
zeros are written for the columns that a shard's rows did not need.
"""

import json
from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.storage import files as files_lib
from sae_jax.storage import sharded
from sae_jax.storage import url as url_lib

SHARD_ROWS = 65_536
_CHUNK_ROWS = 4_096
_COLUMNS = 64
# Of zstd. They are read once and removed; at level 3 they took 1.6 times as
# long to pack, and 3 % less space.
_LEVEL = 1
_CACHE_BYTES = 64 * 2**20
_RECORD = 'codes.json'
_FORMAT_VERSION = 1
_SIZES = ('start', 'n_rows', 'k', 'columns')
_DTYPES = {'idx': 'int32', 'vals': 'float32'}
_AGAIN = 'delete the folder, and sae-probe makes it again'


class Codes:
  """Codes on disk, opened for reading.

  Attributes:
    url: their folder.
    start: the store's row that comes first.
    n_rows: number of rows, R.
    k: most active latents of a row, K.
    columns: of a shard.
  """

  def __init__(self, url: str, start: int, n_rows: int, k: int, columns: int):
    self.url, self.start, self.n_rows, self.k = url, start, n_rows, k
    self.columns = columns
    context = ts.Context({'cache_pool': {'total_bytes_limit': _CACHE_BYTES}})
    self._arrays = {
      name: sharded.opened(_spec(url, name, n_rows, k, columns), context)
      for name in _DTYPES
    }

  def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
    """The codes of the store's rows start to stop.

    Returns:
      vals_RK float32, descending, 0 where fewer than K latents are active, and
      idx_RK int32, 0 there too.

    Raises:
      IndexError: if there are no codes of such rows.
      UserError: if they cannot be read.
    """
    first, last = start - self.start, stop - self.start
    if not 0 <= first <= last <= self.n_rows:
      raise IndexError(
        f'rows {start} to {stop} of codes of {self.start} to '
        f'{self.start + self.n_rows}'
      )
    reads = [self._arrays[name][first:last].read() for name in ('vals', 'idx')]
    try:
      vals_RK, idx_RK = (read.result() for read in reads)
    except ValueError as error:
      raise errors.UserError(
        f'cannot read the codes {self.url}: {errors.reason(error)}: {_AGAIN}'
      ) from error
    return vals_RK, idx_RK


def open_codes(url: str) -> Codes:
  """Opens the codes in a folder.

  Raises:
    UserError: if there are none, or they are not finished.
  """
  file = ts.KvStore.open(url_lib.kvstore(url)).result().read(_RECORD).result()
  try:
    record = json.loads(file.value) if file.state == 'value' else {}
    if record.get('format_version') == _FORMAT_VERSION:
      sizes = (int(record[name]) for name in _SIZES)
      return Codes(url, *sizes)
  except (ValueError, KeyError, TypeError, AttributeError):
    pass
  raise errors.UserError(f'{url} holds no finished codes: run sae-probe again')


class Writer:
  """Writes codes of consecutive rows, by one or several processes.

  Every process is given all rows. The shards of rows go round the processes,
  and only its owner keeps and writes one.

  Attributes:
    start: the store's row that comes first.
    row: the row that comes next.
  """

  def __init__(
    self,
    url: str,
    start: int,
    fixed_k: int | None,
    process: int = 0,
    processes: int = 1,
  ):
    """Opens a folder for writing.

    Args:
      url: the folder.
      start: the store's row that comes first.
      fixed_k: K; None for a power of two that holds the most active token.
      process: number of this process.
      processes: of so many.
    """
    self.url, self.start, self.row = url, start, start
    self._fixed_k, self._process, self._processes = fixed_k, process, processes
    self._files = files_lib.folder(url)
    # The shard that is not full: its memory, and how many rows are there.
    self._shard = [np.zeros((0, 0), dtype) for dtype in (np.float32, np.int32)]
    self._waiting = 0

  def owns(self, row: int) -> bool:
    """Whether this process writes the shard that a row is in."""
    shard = (row - self.start) // SHARD_ROWS
    return shard % self._processes == self._process

  def append(self, vals_RK: np.ndarray, idx_RK: np.ndarray) -> None:
    """The codes of the next rows, which are of one shard, of any width.

    Raises:
      UserError: if they cannot be written.
    """
    shard = (self.row - self.start) // SHARD_ROWS
    if self.owns(self.row):
      self._keep(vals_RK, idx_RK)
    self.row += len(vals_RK)
    if self.row == self.start + (shard + 1) * SHARD_ROWS:
      self._write(shard)

  def skip(self, rows: int) -> None:
    """`append` of rows whose shard another process owns."""
    self.row += rows

  def _keep(self, vals_RK: np.ndarray, idx_RK: np.ndarray) -> None:
    """Copies codes to the shard's own memory, which all shards use.

    As many small arrays, made between the large ones of each step, they would
    keep the allocator from giving much more than their own bytes back.
    """
    width, rows = vals_RK.shape[1], self._waiting
    if width > self._shard[0].shape[1]:
      for place, old in enumerate(self._shard):
        self._shard[place] = np.zeros((SHARD_ROWS, width), old.dtype)
        self._shard[place][:rows, : old.shape[1]] = old[:rows]
    here = slice(rows, rows + len(vals_RK))
    for kept, given in zip(self._shard, (vals_RK, idx_RK)):
      kept[here, :width] = given
      kept[here, width:] = 0
    self._waiting = here.stop

  def unwritten(self) -> tuple[np.ndarray, np.ndarray]:
    """The codes that wait for their shard to be full: vals_RK, idx_RK."""
    vals_RK, idx_RK = (kept[: self._waiting].copy() for kept in self._shard)
    return vals_RK, idx_RK

  def resume(self, row: int, vals_RK: np.ndarray, idx_RK: np.ndarray) -> None:
    """Goes on at a row, with what was `unwritten` there."""
    self.row, self._waiting = row, 0
    if self.owns(row) and len(vals_RK):
      self._keep(vals_RK, idx_RK)

  def seal(self, most: int) -> Codes:
    """Writes what is left, and the record by which the codes are found.

    Every process calls it, the first one last: see `run`.

    Args:
      most: active latents of the most active token, in all processes.
    """
    rows = self.row - self.start
    if rows % SHARD_ROWS:
      self._write(rows // SHARD_ROWS)
    k = self._fixed_k or 1 << (max(1, most) - 1).bit_length()
    for shard in range(-(-rows // SHARD_ROWS)):
      if shard % self._processes == self._process:
        self._fill(shard, k)
    return Codes(self.url, self.start, rows, k, self._columns)

  def record(self, codes: Codes) -> None:
    """Writes what says that they are finished, after all have sealed."""
    try:
      for name in _DTYPES:
        kind = _kind(name, codes.columns)
        content = json.loads(sharded.metadata(kind, codes.n_rows))
        content['shape'] = [codes.n_rows, codes.k]
        data = json.dumps(content, allow_nan=False).encode()
        self._put(f'{name}/{sharded.METADATA}', data)
      record = {name: getattr(codes, name) for name in _SIZES}
      record |= {'format_version': _FORMAT_VERSION}
      self._put(_RECORD, config_lib.to_json(record).encode())
    except ValueError as error:
      raise self._error(error) from error

  def _write(self, shard: int) -> None:
    """Writes the shard that waits, whose rows are all there."""
    if not self._waiting:
      return
    vals_RK, idx_RK = (kept[: self._waiting] for kept in self._shard)
    self._waiting = 0
    most = self._fixed_k or int((vals_RK > 0).sum(1).max())
    for column in range(max(1, -(-most // self._columns))):
      here = slice(column * self._columns, (column + 1) * self._columns)
      for name, of_RK in (('vals', vals_RK), ('idx', idx_RK)):
        name, data = self._object(name, shard, column, of_RK[:, here])
        self._put(name, data)

  def _fill(self, shard: int, k: int) -> None:
    """Writes zeros for the columns that a shard's rows did not need."""
    left = self.row - self.start - shard * SHARD_ROWS
    empty_RK = np.zeros((min(left, SHARD_ROWS), 0))
    try:
      for column in range(1, -(-k // self._columns)):
        for name in _DTYPES:
          # What is there stays.
          files_lib.create(
            self._files, *self._object(name, shard, column, empty_RK)
          )
    except ValueError as error:
      raise self._error(error) from error

  def _object(self, name, shard, column, of_RK) -> tuple[str, bytes]:
    """Name and bytes of an object; columns at the end may be missing."""
    kind = _kind(name, self._columns)
    values_RK = np.zeros((len(of_RK), self._columns), kind.dtype)
    values_RK[:, : of_RK.shape[1]] = of_RK
    return f'{name}/c/{shard}/{column}', sharded.encode(kind, values_RK)

  def _put(self, name: str, data: bytes) -> None:
    try:
      self._files.write(name, data).result()
    except ValueError as error:
      raise self._error(error) from error

  @property
  def _columns(self) -> int:
    return self._fixed_k or _COLUMNS

  def _error(self, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'cannot write the codes {self.url}: {errors.reason(error)}: check the '
      'path, free space and your access; the same command goes on'
    )


def _kind(name: str, columns: int) -> sharded.Kind:
  dtype = np.dtype(_DTYPES[name])
  return sharded.Kind(
    dtype, (columns,), _CHUNK_ROWS, SHARD_ROWS, is_packed=True, level=_LEVEL
  )


def _spec(
  url: str, name: str, n_rows: int, k: int, columns: int
) -> dict[str, Any]:
  """TensorStore's spec of an array, which is cut along both axes."""
  spec = sharded.spec(url, name, _kind(name, columns), n_rows)
  spec['metadata']['shape'] = [n_rows, k]
  return spec
