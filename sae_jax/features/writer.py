"""Writing a feature table: shards in any order by any process, then the seal.

Objects are created where there are none, and never changed: whoever writes a
shard that is there with other bytes gets an error.
"""

from collections.abc import Iterator, Mapping
from concurrent import futures
import hashlib
from typing import Any

from etils import epath
import numpy as np

from sae_jax import config, errors
from sae_jax.features import columns as columns_lib
from sae_jax.features import manifest as manifest_lib
from sae_jax.features.manifest import Manifest, Plan, Shard
from sae_jax.storage import files as files_lib
from sae_jax.storage import sharded, signed

_WRITERS = 8  # threads: latency, of a disk's flush too, is the bound
_REMEDY = 'check the path, free space and your access; the same command goes on'


class TableWriter:
  """Writes shards of a table, and seals it.

  Any number of processes may write to one folder by equal plans.
  """

  def __init__(self, url: epath.PathLike, plan: Plan):
    """Opens a folder that is empty, or was begun by an equal plan.

    Args:
      url: the table's folder.
      plan: what is known of the table.

    Raises:
      UserError: if sizes are beyond what a table can have, or the folder can't
        be opened.
      ValueError: if the edges are not those of H bins.
    """
    self.url, self.plan = str(url), plan
    manifest_lib.check_size(plan.n_latents, 'a feature table')
    columns_lib.check(plan.columns, plan.sizes, 'a feature table')
    edges = np.asarray(plan.hist_edges, np.float32)
    if len(edges) != plan.sizes['H'] + 1 or not (np.diff(edges) > 0).all():
      raise ValueError(
        f'{len(edges)} edges of {plan.sizes["H"]} bins: they must rise, one '
        'more than bins'
      )
    self._arrays = manifest_lib.kinds(plan.n_latents, plan.sizes, plan.columns)
    try:
      self._files = files_lib.folder(self.url)
    except ValueError as error:
      raise self._error(error) from error

  def blocks(self) -> Iterator[tuple[int, int]]:
    """First latent of each shard, and the first beyond it."""
    return manifest_lib.blocks(self.plan.n_latents)

  def write(self, first: int, columns: Mapping[str, np.ndarray]) -> None:
    """Writes some columns of consecutive latents.

    Args:
      first: the first latent, that of a shard.
      columns: name -> the latents' entries, whole shards of them; any numbers
        that the declared type holds.

    Raises:
      ValueError: if they are not whole shards of declared columns.
      UserError: if the disk or bucket refuses the data, or a shard is there
        with other bytes, which stay.
    """
    columns = {name: self._checked(name, a) for name, a in columns.items()}
    lengths = {len(array) for array in columns.values()}
    blocks = dict(self.blocks())
    n_latents = lengths.pop() if len(lengths) == 1 else 0
    stop = first + n_latents
    if (
      not n_latents
      or first not in blocks
      or stop not in {*blocks, self.plan.n_latents}
    ):
      raise ValueError(
        f'{n_latents} latents from {first} are not whole shards of '
        f'{manifest_lib.shard_latents(self.plan.n_latents)}'
      )
    key = hashlib.sha256(' '.join(sorted(columns)).encode()).hexdigest()[:16]
    with futures.ThreadPoolExecutor(_WRITERS) as pool:
      while first < stop:
        last = blocks[first]
        number = first // manifest_lib.shard_latents(self.plan.n_latents)
        part = slice(first - stop, last - stop or None)
        digests = pool.map(
          lambda name, part=part, number=number: self._create(
            name, number, columns[name][part]
          ),
          columns,
        )
        checksums = {
          name: digest for name, digest in zip(columns, digests) if digest
        }
        shard = Shard(self.plan.digest, dict(sorted(checksums.items())))
        name = f'{manifest_lib.RECORDS}/{number:06d}/{key}.json'
        self._put(name, signed.to_file(shard))
        first = last

  def seal(self, record: Mapping[str, Any]) -> Manifest:
    """Writes the manifest, after which readers can open the table.

    By one process, when all have written all.

    Args:
      record: what probing says of the table, as JSON has it.

    Returns:
      The manifest.

    Raises:
      UserError: if a shard is missing or of another plan, or it can't be
        written.
    """
    checksums, metadata = self._checksums(), {}
    name, rows = 'hist_edges', np.asarray(self.plan.hist_edges, np.float32)
    checksums[name] = (self._create(name, 0, rows),)
    contents = {
      f'{name}/{sharded.METADATA}': sharded.metadata(
        kind, rows, columns_lib.COLUMNS[name].axes, declared['meaning']
      )
      for (name, declared), (rows, kind) in zip(
        manifest_lib.declarations(self.plan.columns).items(),
        self._arrays.values(),
      )
    }
    record = config.through_json(dict(record))
    group = {'zarr_format': 3, 'node_type': 'group', 'attributes': record}
    contents[sharded.METADATA] = config.to_json(group).encode()
    for name, data in contents.items():
      self._put(name, data)
      metadata[name] = hashlib.sha256(data).hexdigest()
    manifest = Manifest(
      format_version=manifest_lib.FORMAT_VERSION,
      n_latents=self.plan.n_latents,
      shard_latents=manifest_lib.shard_latents(self.plan.n_latents),
      chunk_latents=manifest_lib.CHUNK_LATENTS,
      sizes=self.plan.sizes,
      columns=manifest_lib.declarations(self.plan.columns),
      record=record,
      checksums={name: checksums[name] for name in self.plan.columns},
      metadata=metadata,
    )
    data = signed.to_file(manifest)
    self._put(manifest_lib.NAME, data)
    return manifest_lib.parse(data, f'{manifest_lib.NAME} in {self.url}')

  def _checked(self, name: str, array: np.ndarray) -> np.ndarray:
    """A column's entries in its declared type."""
    if name not in self.plan.columns or columns_lib.COLUMNS[name].is_shared:
      raise ValueError(f'{name} is no column of latents of the plan')
    _, kind = self._arrays[name]
    given = np.asarray(array)
    if given.ndim < 1 or given.shape[1:] != kind.row:
      raise ValueError(
        f'{name} has shape {given.shape}, not [latents, '
        f'{", ".join(map(str, kind.row))}]'
      )
    array = given.astype(kind.dtype)
    if kind.dtype.kind == 'i' and not np.array_equal(array, given):
      raise ValueError(f'{name} holds numbers that {kind.dtype} does not')
    return array

  def _create(self, name: str, number: int, values: np.ndarray) -> str:
    """Writes an object; its sha256, or '' if it has none as rows are empty."""
    _, kind = self._arrays[name]
    if 0 in kind.row:
      return ''
    data = sharded.encode(kind, values)
    self._put(sharded.object_name(name, kind, number), data)
    return hashlib.sha256(data).hexdigest()

  def _put(self, name: str, data: bytes) -> None:
    try:
      same = files_lib.create(self._files, name, data)
    except (ValueError, OSError) as error:
      raise self._error(error) from error
    if not same:
      raise errors.UserError(
        f'{name} of features {self.url} is there with other bytes: another '
        'sae-probe is writing there, or one of other inputs was ended there: '
        'if none runs, delete that folder and start again'
      )

  def _checksums(self) -> dict[str, tuple[str, ...]]:
    """The sha256 of each object of each column, once all are known."""
    folder = f'{manifest_lib.RECORDS}/'
    try:
      present = {key.decode() for key in self._files.list().result()}
      reading = {
        name: self._files.read(name)
        for name in sorted(present)
        if name.startswith(folder) and name.endswith('.json')
      }
      contents = {name: read.result().value for name, read in reading.items()}
    except ValueError as error:
      raise self._error(error) from error
    digests = {}
    for name, data in contents.items():
      where = f'{name} of features {self.url}'
      content = signed.parse(
        data, where, manifest_lib.AGAIN, manifest_lib.LONGEST
      )
      shard = config.from_dict(Shard, content, where)
      if shard.plan != self.plan.digest:
        raise errors.UserError(
          f'{where} is of another plan: delete that folder and run sae-probe '
          'again'
        )
      number = name.removeprefix(folder).partition('/')[0]
      for column, digest in shard.checksums.items():
        digests[column, int(number)] = digest
    checksums = {}
    for name, (rows, kind) in self._arrays.items():
      if columns_lib.COLUMNS[name].is_shared:
        continue
      for shard in range(manifest_lib.n_objects(rows, kind)):
        key = sharded.object_name(name, kind, shard)
        if (name, shard) not in digests or key not in present:
          raise errors.UserError(
            f'features {self.url} lack {key}: run sae-probe again, which '
            'writes what is missing'
          )
        checksums.setdefault(name, []).append(digests[name, shard])
    return {name: tuple(checksums.get(name, ())) for name in self._arrays}

  def _error(self, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'cannot write features {self.url}: {errors.reason(error)}: {_REMEDY}'
    )


def plan(columns: Mapping[str, np.ndarray]) -> Plan:
  """The plan of a table that the caller has whole.

  Args:
    columns: all its columns.

  Raises:
    ValueError: if columns are not declared, lack an axis or differ in the size
      of one.
  """
  sizes, groups = {}, set()
  for name, array in columns.items():
    if name not in columns_lib.COLUMNS:
      raise ValueError(f'{name} is no column of a feature table')
    column, shape = columns_lib.COLUMNS[name], np.shape(array)
    if len(shape) != len(column.axes):
      raise ValueError(
        f'{name} has shape {shape}, not the axes {", ".join(column.axes)}'
      )
    groups.add(column.group)
    for axis, size in zip(column.axes, shape):
      axis, size = ('H', size - 1) if axis == 'H + 1' else (axis, size)
      first, first_size = sizes.setdefault(axis, (name, size))
      if size != first_size:
        raise ValueError(
          f'{name} has {size} along {axis} but {first} has {first_size}'
        )
  missing = {*columns_lib.of_groups(groups)} - columns.keys()
  if missing:
    raise ValueError(f'columns that are missing: {sorted(missing)}')
  counts = {axis: int(size) for axis, (_, size) in sizes.items()}
  edges = np.asarray(columns['hist_edges'], np.float32)
  return Plan(
    counts.pop('N'), counts, tuple(edges.tolist()), tuple(groups - {''})
  )


def write(
  url: epath.PathLike,
  columns: Mapping[str, np.ndarray],
  record: Mapping[str, Any] | None = None,
) -> Manifest:
  """Writes and seals a table that the caller has whole.

  Args:
    url: its folder.
    columns: all its columns.
    record: see `TableWriter.seal`.

  Raises:
    ValueError: see `plan`.
    UserError: see `TableWriter`.
  """
  writer = TableWriter(url, plan(columns))
  for first, stop in writer.blocks():
    block = {
      name: array[first:stop]
      for name, array in columns.items()
      if not columns_lib.COLUMNS[name].is_shared
    }
    writer.write(first, block)
  return writer.seal(record or {})


def clear(url: epath.PathLike) -> None:
  """Removes a table, or what was begun of one; its manifest first.

  Args:
    url: its folder, which no other process uses.
  """
  folder = epath.Path(url)
  (folder / manifest_lib.NAME).unlink(missing_ok=True)
  if folder.exists():
    folder.rmtree()
