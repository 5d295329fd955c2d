"""The layout of a store's folder: its objects and arrays, and their specs."""

from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax import config, errors
from sae_jax.storage import names, records
from sae_jax.storage import url as url_lib
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest, Shard, StorePlan

DTYPES = {'float32': np.dtype('<f4'), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}

PLAN = 'plan.json'
METADATA = 'zarr.json'
ACTIVATIONS = 'activations'
STREAM_INDEX = 'stream_index'
STREAM = ('tokens', 'documents', 'positions')
_AGAIN = 'it is damaged: harvest the store again'


def manifest_name(version: int) -> str:
  """File name of a version's manifest; the first has the plain name."""
  return 'manifest.json' if version == 1 else f'manifest-{version}.json'


def shard_name(shard: int) -> str:
  """File name of a complete shard's record."""
  return f'{manifest_lib.RECORDS}/{shard:06d}.json'


def read_manifest(url: str, version: int | None = None) -> Manifest | None:
  """The manifest of a sealed store, None if the store has none.

  Args:
    url: the store's folder.
    version: its version; None for the last.

  Raises:
    UserError: if it cannot be read or is of another format version.
  """
  if version is not None:
    return read_json(url, manifest_name(version), Manifest)
  manifest = read_json(url, manifest_name(1), Manifest)
  while manifest is not None:
    later = read_json(url, manifest_name(manifest.version + 1), Manifest)
    if later is None:
      break
    manifest = later
  return manifest


def read_json(url: str, name: str, kind: type[Any]) -> Any:
  """A dataclass read from a JSON file of a store, None if there is no file.

  Raises:
    UserError: if it cannot be read or is of another format version.
  """
  spec = url_lib.kvstore(url)
  try:
    files = ts.KvStore.open(spec).result()
    file = files.read(name).result()
    if file.state == 'missing':
      return None
  except ValueError as error:
    raise errors.UserError(
      f'cannot read {name} in {url}: {errors.reason(error)}: '
      'check the path and your access'
    ) from error
  values = records.parse(file.value, f'{name} in {url}', _AGAIN)
  known = manifest_lib.FORMAT_VERSION
  version = values.get('format_version', known)
  if version != known:
    raise errors.UserError(
      f'store {url} has format version {version}, this sae_jax reads version '
      f'{known}: harvest it again'
    )
  return config.from_dict(kind, values, f'{name} in {url}')


def read_records(url: str) -> dict[int, Shard]:
  """The records of all shards that are complete, by number.

  One listing, then all reads at once: a store in a bucket may have thousands.

  Raises:
    UserError: if they cannot be read.
  """
  spec = url_lib.kvstore(url)
  try:
    files = ts.KvStore.open(spec).result()
    folder = f'{manifest_lib.RECORDS}/'
    inside = ts.KvStore.KeyRange(folder, folder + '\xff')
    reads = {
      name.decode(): files.read(name)
      for name in files.list(inside).result()
      if name.endswith(b'.json')
    }
    contents = {name: read.result().value for name, read in reads.items()}
  except ValueError as error:
    raise errors.UserError(
      f'cannot read the records of shards in {url}: {errors.reason(error)}: '
      'check the path and your access'
    ) from error
  return {
    int(name.removeprefix(folder).removesuffix('.json')): config.from_dict(
      Shard,
      records.parse(data, f'{name} in {url}', _AGAIN),
      f'{name} in {url}',
    )
    for name, data in contents.items()
  }


def array_name(site: str) -> str:
  """The folder of a site's activations; UserError if it may be another's."""
  return f'{ACTIVATIONS}/' + names.plain(site, 'the manifest')


class Kind(NamedTuple):
  """Element type and shapes of an array.

  Attributes:
    dtype: type of its elements.
    row: shape of a row.
    chunk: rows of an inner chunk.
    shard: rows that a shard has room for.
  """

  dtype: np.dtype
  row: tuple[int, ...]
  chunk: int
  shard: int


def array_kinds(plan: StorePlan | Manifest) -> dict[str, Kind]:
  """The kind of each array of a store, by name."""
  rows = Kind(
    DTYPES[plan.dtype], (plan.d_model,), plan.chunk_rows, plan.shard_rows
  )
  stream = manifest_lib.STREAM_PER_ROW * plan.shard_rows
  kinds = {array_name(site): rows for site in plan.sites}
  for name, shard in [
    (STREAM_INDEX, plan.shard_rows),
    *[(name, stream) for name in STREAM],
  ]:
    chunk = _flat_chunk(shard, plan.chunk_rows)
    kinds[name] = Kind(np.dtype('<i4'), (), chunk, shard)
  return kinds


def _flat_chunk(shard: int, chunk_rows: int) -> int:
  """Rows of a chunk of int32: at most 256 KB, and a divisor of a shard."""
  chunk = chunk_rows
  while 2 * chunk <= 65_536 and shard % (2 * chunk) == 0:
    chunk *= 2
  return chunk


def array_spec(url: str, name: str) -> dict[str, Any]:
  """TensorStore's spec to open one of a store's arrays.

  Reading a missing chunk is an error, so that a lost shard does not pass for
  zeros; hence chunks that are all zeros are written too.
  """
  folder = url_lib.kvstore(url)
  folder['path'] += name + '/'
  return {
    'driver': 'zarr3',
    'kvstore': folder,
    'fill_missing_data_reads': False,
    'store_data_equal_to_fill_value': True,
  }


def _metadata(kind: Kind, n_shards: int) -> dict[str, Any]:
  """Zarr3 metadata of an array of `n_shards`, cut along its first axis."""
  checked = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'crc32c'},
  ]
  sharding = {
    'chunk_shape': [kind.chunk, *kind.row],
    'codecs': checked,
    'index_codecs': checked,
  }
  grid = {'chunk_shape': [kind.shard, *kind.row]}
  return {
    'shape': [n_shards * kind.shard, *kind.row],
    'data_type': kind.dtype.name,
    'chunk_grid': {'name': 'regular', 'configuration': grid},
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }


def unsealed_spec(url: str, name: str, kind: Kind, n_shards: int):
  """`array_spec` for an array whose metadata is not written yet."""
  return array_spec(url, name) | {'metadata': _metadata(kind, n_shards)}


def _in_memory(kind: Kind, n_shards: int) -> tuple[ts.TensorStore, ts.KvStore]:
  array = ts.open(
    {
      'driver': 'zarr3',
      'kvstore': {'driver': 'memory'},
      'store_data_equal_to_fill_value': True,
      'metadata': _metadata(kind, n_shards),
    },
    create=True,
  ).result()
  return array, array.kvstore


def array_metadata(kind: Kind, n_shards: int) -> bytes:
  """The `zarr.json` of an array of `n_shards`."""
  _, files = _in_memory(kind, n_shards)
  return files.read(METADATA).result().value


def encode(kind: Kind, values: np.ndarray) -> bytes:
  """The bytes of the zarr3 object of a shard that holds these rows.

  They are made in memory, so that the object can be created only where there is
  none; TensorStore would overwrite one.
  """
  array, files = _in_memory(kind, 1)
  array[: len(values)].write(values).result()
  return files.read(object_name('', kind, 0)).result().value


def object_name(name: str, kind: Kind, shard: int) -> str:
  """Name of the object of one shard of an array."""
  folder = f'{name}/' if name else ''
  return f'{folder}c/{shard}' + '/0' * len(kind.row)
