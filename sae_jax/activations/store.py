"""The activation store: residual rows and the token stream they come from.

A store is a folder, local or gs://, of zarr3 arrays with sharding:

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

Objects are made where there are none, and never changed: of two writers of one
shard the first one's bytes stay, and the other is told if its own differ. An
inner chunk is the smallest read and carries a crc32c, so a damaged one fails
to read.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import functools
import hashlib
import json
from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import config
from sae_jax.activations import layout

Manifest, Plan, Shard = layout.Manifest, layout.Plan, layout.Shard

_CACHE_BYTES = 128 * 2**20


class StoreWriter:
  """Writes shards of a store, and seals it.

  Any number of processes may have one for the same folder; what they find
  there of the same plan stays.
  """

  def __init__(self, url: str, plan: Plan):
    """Opens the folder, or makes it.

    Args:
      url: the store's folder.
      plan: what all shards have in common.

    Raises:
      UserError: if sizes do not fit, the folder can't be written, or holds
        shards of another plan.
    """
    if plan.chunk_rows < 1 or plan.shard_rows % plan.chunk_rows:
      raise config.UserError(
        f'shard_rows {plan.shard_rows} must be a multiple of chunk_rows '
        f'{plan.chunk_rows}, which must be 1 or more'
      )
    if plan.dtype not in layout.DTYPES:
      raise config.UserError(
        f'dtype {plan.dtype!r} cannot be stored: use '
        f'{" or ".join(layout.DTYPES)}'
      )
    self.url, self.plan = url, plan
    try:
      self._files = ts.KvStore.open(layout.kvstore(url)).result()
      text = config.to_json(plan).encode()
      if not layout.create(self._files, layout.PLAN, text):
        self._check_plan()
    except config.UserError:
      raise
    except (ValueError, OSError) as error:
      raise self._error(error) from error

  def agree(self, name: str, value: Any) -> Any:
    """Stores a dataclass, and returns that of whoever was first.

    Raises:
      UserError: if it can't be written.
    """
    try:
      layout.create(self._files, name, config.to_json(value).encode())
    except (ValueError, OSError) as error:
      raise self._error(error) from error
    return layout.read_json(self.url, name, type(value))

  def record(self, shard: int) -> Shard | None:
    """The record of a complete shard, None where it is missing."""
    return layout.read_json(self.url, layout.shard_name(shard), Shard)

  def shard(self, number: int) -> 'ShardWriter':
    """Opens a missing shard."""
    return ShardWriter(self, number)

  def complete(self, n_shards: int) -> list[Shard] | None:
    """The records of the first shards, None if one is missing."""
    shards = [self.record(i) for i in range(n_shards)]
    return None if None in shards else shards

  def seal(
    self,
    shards: Sequence[Shard],
    *,
    holdout_rows: int = 0,
    mask: dict[str, Any] | None = None,
    wanted: dict[str, Any] | None = None,
  ) -> Manifest:
    """Writes the manifest, after which readers find the store.

    Args:
      shards: the records of all of them, of `complete`.
      holdout_rows: the last so many rows are held out, see `holdout_rows`.
      mask: the rule by which tokens were left out; how many were is added.
      wanted: what of the config says how much there should be.

    Returns:
      The manifest; that of another process if it was first.

    Raises:
      UserError: if it can't be written.
    """
    plan = dataclasses.asdict(self.plan)
    plan['config'] = plan['config'] | (wanted or {})
    before = layout.read_manifest(self.url)
    masked = _summed(shard.masked for shard in shards)
    manifest = Manifest(
      version=1 + (before.version if before else 0),
      n_rows=sum(shard.rows for shard in shards),
      n_stream=sum(shard.stream for shard in shards),
      holdout_rows=holdout_rows,
      shard_counts=tuple((shard.rows, shard.stream) for shard in shards),
      source_rows=_summed(shard.source_rows for shard in shards),
      mask=(mask or {}) | {f'masked_{rule}': n for rule, n in masked.items()},
      checksums=_checksums(self.plan, shards),
      **plan,
    )
    manifest = dataclasses.replace(manifest, identity=layout.identity(manifest))
    try:
      for name, kind in layout.array_kinds(self.plan).items():
        metadata = layout.array_metadata(kind, len(shards))
        self._files.write(f'{name}/{layout.METADATA}', metadata).result()
      name = layout.manifest_name(manifest.version)
      if not layout.create(
        self._files, name, config.to_json(manifest).encode()
      ):
        # Another process was first; what it says of the same shards holds.
        return layout.read_manifest(self.url, manifest.version)
    except (ValueError, OSError) as error:
      raise self._error(error) from error
    return layout.read_manifest(self.url, manifest.version)

  def _check_plan(self):
    found = layout.read_json(self.url, layout.PLAN, Plan)
    # What is not there yet is like what is: lists, not tuples.
    own = config.from_dict(Plan, json.loads(config.to_json(self.plan)))
    changes = config.differences(
      *(dataclasses.replace(plan, software={}) for plan in (found, own))
    )
    if changes:
      raise config.UserError(
        f'store {self.url} was begun with another plan ({"; ".join(changes)}): '
        'use another folder or delete this one'
      )

  def _error(self, error: Exception) -> config.UserError:
    return config.UserError(
      f'cannot write store {self.url}: {layout.reason(error)}: '
      'check the path, free space and your access'
    )


class ShardWriter:
  """One shard: contexts are appended, then all of it is written.

  It is in memory until then.
  """

  def __init__(self, writer: StoreWriter, number: int):
    self._writer, self.number = writer, number
    self._plan = writer.plan
    self._parts = {name: [] for name in layout.array_kinds(self._plan)}
    self._contexts, self._stream = 0, 0
    self.rows = 0

  def has_room(self, tokens: int, rows: int) -> bool:
    """Whether so many tokens with so many rows fit."""
    return (
      self.rows + rows <= self._plan.shard_rows
      and self._stream + tokens <= self._plan.shard_stream
    )

  def append(
    self,
    tokens: np.ndarray,
    documents: np.ndarray,
    positions: np.ndarray,
    keep_mask: np.ndarray,
    kept: dict[str, np.ndarray],
  ) -> None:
    """Appends a stretch of the token stream and its kept activations.

    Args:
      tokens: int [l] token ids.
      documents: int [l] document numbers, never descending.
      positions: int [l] places in the subject's context, 0 at its start.
      keep_mask: bool [l], whose activations are kept.
      kept: site -> [keep_mask.sum(), D] their activations.

    Raises:
      ValueError: if shapes do not fit, or the shard has no room.
    """
    places = self._stream + np.flatnonzero(keep_mask)
    shape = (len(places), self._plan.d_model)
    for site in self._plan.sites:
      if kept[site].shape != shape:
        raise ValueError(
          f'activations at {site} are {kept[site].shape}, but keep_mask keeps '
          f'{shape[0]} tokens of width {shape[1]}'
        )
    if not len(tokens) == len(documents) == len(positions) == len(keep_mask):
      raise ValueError('tokens, documents, positions, keep_mask differ in size')
    if not self.has_room(len(tokens), len(places)):
      raise ValueError(
        f'{len(places)} rows of {len(tokens)} tokens do not fit a shard of '
        f'{self._plan.shard_rows} and {self._plan.shard_stream} that holds '
        f'{self.rows} and {self._stream}'
      )
    for site in self._plan.sites:
      self._take(layout.array_name(site), kept[site])
    self._take(layout.STREAM_INDEX, places)
    for name, values in zip(layout.STREAM, (tokens, documents, positions)):
      self._take(name, values)
    self._contexts += int((np.asarray(positions) == 0).sum())
    self.rows += len(places)
    self._stream += len(tokens)

  def finish(
    self,
    source_rows: dict[str, int] | None = None,
    masked: dict[str, int] | None = None,
  ) -> Shard:
    """Writes the objects, then the record that makes them count.

    Args:
      source_rows: source -> rows of this shard that came from it.
      masked: rule -> tokens that were left out.

    Returns:
      The record; that of another writer if it was first with the same bytes.

    Raises:
      UserError: if the disk or bucket refuses the data, or another writer has
        written other bytes, which stay.
    """
    kinds = layout.array_kinds(self._plan)
    arrays = {
      name: np.concatenate([np.empty((0, *kind.row), kind.dtype), *parts])
      for (name, kind), parts in zip(kinds.items(), self._parts.values())
    }
    documents = arrays['documents'][arrays[layout.STREAM_INDEX]]
    numbers, counts = np.unique(documents, return_counts=True)
    shard = Shard(
      rows=self.rows,
      stream=self._stream,
      contexts=self._contexts,
      documents=tuple(zip(numbers.tolist(), counts.tolist())),
      source_rows=source_rows or {},
      masked=masked or {},
      checksums={name: _sha256(values) for name, values in arrays.items()},
    )
    files = self._writer._files
    try:
      for name, values in arrays.items():
        key = layout.object_name(name, kinds[name], self.number)
        if not layout.create(files, key, layout.encode(kinds[name], values)):
          raise self._conflict(key)
      key = layout.shard_name(self.number)
      text = config.to_json(shard).encode()
      if not layout.create(files, key, text):
        raise self._conflict(key)
    except config.UserError:
      raise
    except (ValueError, OSError) as error:
      raise self._writer._error(error) from error
    return shard

  def _take(self, name, values):
    dtype = layout.array_kinds(self._plan)[name][0]
    self._parts[name].append(np.asarray(values).astype(dtype))

  def _conflict(self, key):
    return config.UserError(
      f'{key} of store {self._writer.url} is there with other bytes: another '
      'harvest is writing this store, or one on another machine was ended '
      'here. If none runs, delete that object and start again'
    )


def _sha256(values: np.ndarray) -> str:
  return hashlib.sha256(np.ascontiguousarray(values).view(np.uint8)).hexdigest()


def _checksums(plan: Plan, shards: Sequence[Shard]) -> dict[str, tuple]:
  sums = {
    name: tuple(shard.checksums[name] for shard in shards)
    for name in layout.array_kinds(plan)
  }
  records = (config.to_json(shard).encode() for shard in shards)
  sums[layout.RECORDS] = tuple(map(layout.record_sum, records))
  return sums


def _summed(counts: Iterable[dict[str, int]]) -> dict[str, int]:
  total = {}
  for one in counts:
    for name, n in one.items():
      total[name] = total.get(name, 0) + n
  return total


def holdout_rows(shards: Sequence[Shard], fraction: float) -> int:
  """Rows of the last documents, the fewest that are the share wanted.

  Raises:
    UserError: if that is all of them.
  """
  rows_by_document = {}
  for shard in shards:
    for document, rows in shard.documents:
      rows_by_document[document] = rows_by_document.get(document, 0) + rows
  total = sum(rows_by_document.values())
  holdout = 0
  for rows in reversed(rows_by_document.values()):
    if holdout >= fraction * total:
      break
    holdout += rows
  if holdout == total:
    raise config.UserError(
      f'{len(rows_by_document)} documents cannot be split with '
      f'holdout_fraction {fraction}: use more or shorter ones, or a smaller '
      'fraction'
    )
  return holdout


def write(
  url: str,
  plan: Plan,
  stretches: Iterable[tuple],
  *,
  holdout_rows: int = 0,
  mask: dict[str, Any] | None = None,
) -> Manifest:
  """Writes and seals a store of activations that come from elsewhere.

  Args:
    url: its folder.
    plan: what it holds.
    stretches: of the token stream with their activations, in order, each the
      arguments of `ShardWriter.append`: whole contexts, that a shard has room
      for.
    holdout_rows: see `StoreWriter.seal`.
    mask: see `StoreWriter.seal`.

  Returns:
    The manifest.

  Raises:
    UserError: if it can't be written, or the folder holds something else.
  """
  writer, number = StoreWriter(url, plan), 0
  shard = writer.shard(number)
  for stretch in stretches:
    if not shard.has_room(len(stretch[0]), int(np.sum(stretch[3]))):
      shard.finish()
      number += 1
      shard = writer.shard(number)
    shard.append(*stretch)
  shard.finish()
  return writer.seal(
    writer.complete(number + 1), holdout_rows=holdout_rows, mask=mask
  )


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
    return self._parts(self.activations, self.starts, start, stop).astype(
      np.float32
    )

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Activations of any rows in the order given, [len(rows), D] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    rows = np.asarray(rows, np.int64)
    if rows.size:
      self._check_rows(rows.min(), rows.max())
    return self._read(self.activations[self.places(rows)]).astype(np.float32)

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
    if layout.identity(self.manifest) != self.manifest.identity:
      raise config.UserError(
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
          if _sha256(values) == want:
            continue
          problem = 'is not what was written'
        except config.UserError as error:
          problem = str(error)
        bad.append(f'{layout.object_name(name, kind, shard)} {problem}')
    files = ts.KvStore.open(layout.kvstore(self.url)).result()
    for shard, want in enumerate(self.manifest.checksums[layout.RECORDS]):
      name = layout.shard_name(shard)
      if layout.record_sum(files.read(name).result().value) != want:
        bad.append(f'{name} is not what was written')
    if bad:
      raise config.UserError(
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
      raise config.UserError(
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

  def _error(self, name: str, error: Exception) -> config.UserError:
    return config.UserError(
      f'cannot read {name} of store {self.url}: {layout.reason(error)}: '
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
    url: its folder, local or gs://.
    site: whose activations; may be left out where there is one.
    version: of the data, see `Manifest`; None for the last.
    unsealed: whether one whose harvest is not finished will do, as far as its
      first shards are complete. It has no held-out rows and no identity.

  Raises:
    UserError: if there is none, its harvest was not finished, or it has no
      such site.
  """
  manifest = layout.read_manifest(url, version)
  if manifest is None and unsealed:
    manifest = _unsealed(url)
  if manifest is None:
    what = f'version {version} of a' if version else 'a'
    raise config.UserError(
      f'{url} is not {what} finished store, it has no '
      f'{layout.manifest_name(version or 1)}: harvest it first, or check the '
      'path'
    )
  if not site and len(manifest.sites) == 1:
    (site,) = manifest.sites
  if site not in manifest.sites:
    raise config.UserError(
      f'store {url} holds {", ".join(manifest.sites)}'
      + (f', not {site}' if site else '')
      + ': name one of them as the site'
    )
  return Store(url, manifest, site)


def _unsealed(url: str) -> Manifest | None:
  """What is complete of a store without a manifest; its version is 0."""
  plan = layout.read_json(url, layout.PLAN, Plan)
  if plan is None:
    return None
  shards = []
  while True:
    found = layout.read_json(url, layout.shard_name(len(shards)), Shard)
    if found is None:
      break
    shards.append(found)
  if not shards:
    return None
  return Manifest(
    version=0,
    n_rows=sum(shard.rows for shard in shards),
    n_stream=sum(shard.stream for shard in shards),
    holdout_rows=0,
    shard_counts=tuple((shard.rows, shard.stream) for shard in shards),
    source_rows=_summed(shard.source_rows for shard in shards),
    mask={},
    checksums=_checksums(plan, shards),
    **dataclasses.asdict(plan),
  )
