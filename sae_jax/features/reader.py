"""Reading a feature table by blocks of latents; all that is read is checked."""

from collections.abc import Iterable
from concurrent import futures
import functools
import hashlib
from typing import Any

from etils import epath
import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax.features import checks
from sae_jax.features import columns as columns_lib
from sae_jax.features import manifest as manifest_lib
from sae_jax.features.columns import Column
from sae_jax.features.manifest import Manifest
from sae_jax.storage import sharded
from sae_jax.storage import url as url_lib

_CACHE_BYTES = 64 * 2**20
_READERS = 8  # threads: a bucket's latency is the bound
# What TensorStore raises if a read fails.
_FAULTS = (ValueError, MemoryError)


class Features:
  """A feature table that is open.

  Attributes:
    url: where it is.
    manifest: what it holds.
    vocabulary_size: number of tokens of the subject, see `open_features`.
  """

  def __init__(
    self, url: str, manifest: Manifest, vocabulary_size: int | None = None
  ):
    self.url, self.manifest = url, manifest
    self.vocabulary_size = vocabulary_size
    self._arrays = manifest_lib.kinds(
      manifest.n_latents, manifest.sizes, manifest.columns
    )
    # One cache for all arrays: each shard's index is then requested only once.
    self._context = ts.Context(
      {'cache_pool': {'total_bytes_limit': _CACHE_BYTES}}
    )
    self._open = functools.cache(self._open_array)

  @property
  def n_latents(self) -> int:
    """Number of latents, N."""
    return self.manifest.n_latents

  @property
  def shard_latents(self) -> int:
    """Latents of a shard."""
    return self.manifest.shard_latents

  @property
  def columns(self) -> dict[str, Column]:
    """Its columns by name, `hist_edges` too."""
    return {name: columns_lib.COLUMNS[name] for name in self.manifest.columns}

  @property
  def sizes(self) -> dict[str, int]:
    """Size of each axis but N."""
    return self.manifest.sizes

  @property
  def record(self) -> dict[str, Any]:
    """What probing says of the table."""
    return self.manifest.record

  def latents(
    self, start: int, stop: int, names: Iterable[str] | None = None
  ) -> dict[str, np.ndarray]:
    """Columns of the latents start to stop.

    Args:
      start: the first latent.
      stop: the first beyond them.
      names: columns; None for all but `hist_edges`.

    Returns:
      Column -> [stop - start, ...] in its declared type.

    Raises:
      IndexError: if there are no such latents.
      KeyError: if the table has no such column.
      UserError: if they cannot be read, or hold what a table cannot; it names
        the column and the shard.
    """
    if not 0 <= start <= stop <= self.n_latents:
      raise IndexError(
        f'latents {start} to {stop} of a table of {self.n_latents}'
      )
    if names is None:
      names = [name for name, c in self.columns.items() if not c.is_shared]
    arrays = {
      name: np.empty((stop - start, *self._arrays[name][1].row), dtype)
      for name, dtype in ((n, self._arrays[n][1].dtype) for n in names)
    }
    reading = []
    for first in _cuts(start, stop, self.shard_latents):
      last = min(stop, first - first % self.shard_latents + self.shard_latents)
      for name, array in arrays.items():
        part = array[first - start : last - start]
        if part.size:
          read = self._open(name)[first:last].read()
          reading.append((name, first, part, read))
    for name, first, part, read in reading:
      try:
        part[...] = read.result()
      except _FAULTS as error:
        raise self._error(name, first // self.shard_latents, error) from error
    for first in _cuts(start, stop, self.shard_latents):
      last = min(stop, first - first % self.shard_latents + self.shard_latents)
      block = {n: a[first - start : last - start] for n, a in arrays.items()}
      self._check(block, first)
    return arrays

  def column(self, name: str) -> np.ndarray:
    """A column of all latents, or `hist_edges`.

    Raises:
      KeyError: if the table has no such column.
      UserError: see `latents`.
    """
    if not self.columns[name].is_shared:
      return self.latents(0, self.n_latents, [name])[name]
    try:
      array = self._open(name).read(order='C').result()
    except _FAULTS as error:
      raise self._error(name, 0, error) from error
    self._check({name: array}, 0)
    return array

  def verify(self) -> int:
    """Reads every byte and compares sha256s.

    Returns:
      How many bytes were read.

    Raises:
      UserError: if anything is not what was written; it names all damaged
        objects.
    """
    wanted = dict(self.manifest.metadata)
    for name, (_, kind) in self._arrays.items():
      for shard, digest in enumerate(self.manifest.checksums[name]):
        wanted[sharded.object_name(name, kind, shard)] = digest
    try:
      files = ts.KvStore.open(url_lib.kvstore(self.url)).result()
    except ValueError as error:
      raise self._error('', 0, error) from error

    def problem(name):
      try:
        read = files.read(name).result()
      except ValueError as error:
        return 0, f'{name} cannot be read ({errors.reason(error)})'
      if read.state == 'missing':
        return 0, f'{name} is not there'
      right = hashlib.sha256(read.value).hexdigest() == wanted[name]
      return len(read.value), '' if right else f'{name} is not what was written'

    with futures.ThreadPoolExecutor(_READERS) as pool:
      sizes, problems = zip(*pool.map(problem, wanted))
    damaged = list(filter(None, problems))
    if damaged:
      raise errors.UserError(
        f'{len(damaged)} objects of features {self.url} are damaged: '
        f'{"; ".join(damaged)}: {manifest_lib.AGAIN}'
      )
    return sum(sizes)

  def _open_array(self, name: str) -> ts.TensorStore:
    rows, kind = self._arrays[name]
    spec = sharded.spec(self.url, name, kind, rows)
    try:
      return sharded.opened(spec, self._context)
    except ValueError as error:
      raise self._error(name, 0, error) from error

  def _check(self, block: dict[str, np.ndarray], first: int) -> None:
    try:
      checks.check(block, first, self.n_latents, self.vocabulary_size)
    except errors.UserError as error:
      number = first // self.shard_latents
      raise errors.UserError(
        f'shard {number} of features {self.url}: {error}'
      ) from None

  def _error(self, name: str, number: int, error: Exception):
    if name:
      name = sharded.object_name(name, self._arrays[name][1], number) + ' of '
    return errors.UserError(
      f'cannot read {name}features {self.url}: {errors.reason(error)}: check '
      f'the path and your access, or {manifest_lib.AGAIN}'
    )


def _cuts(start: int, stop: int, size: int) -> list[int]:
  """The first of some latents, and those of later shards that they reach."""
  if start == stop:
    return []
  return [start, *range(start - start % size + size, stop, size)]


def open_features(
  url: epath.PathLike, vocabulary_size: int | None = None
) -> Features:
  """Opens a feature table.

  Args:
    url: its folder, `features/` in a workdir of sae-probe.
    vocabulary_size: number of tokens of the subject, so that ids beyond it are
      errors; None if it is not known.

  Raises:
    UserError: if there is none, it is not finished, or its manifest is damaged
      or of another version.
  """
  url = str(url)
  path = epath.Path(url) / manifest_lib.NAME
  try:
    data = path.read_bytes()
  except (FileNotFoundError, NotADirectoryError):
    refuse_npz(url)
    raise errors.UserError(
      f'{url} is no finished feature table, it has no {manifest_lib.NAME}: '
      'give features/ in the workdir of sae-probe, or run sae-probe first'
    ) from None
  return Features(url, manifest_lib.parse(data, str(path)), vocabulary_size)


def refuse_npz(url: epath.PathLike) -> None:
  """Raises UserError if a table is a file of an earlier version."""
  path = epath.Path(url)
  for old in (path, path.parent / 'features.npz'):
    if old.name.endswith('.npz') and old.exists() and not path.is_dir():
      raise errors.UserError(
        f'{old} is a table of an earlier sae_jax: run sae-probe again'
      )
