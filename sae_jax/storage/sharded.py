"""Arrays in zarr's format 3 that are cut into shards along their first axis.

A shard is one object with one writer. An inner chunk, some whole rows of it, is
the smallest read and carries a crc32c, so reading a damaged one is an error.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts

from sae_jax.storage import url as url_lib

METADATA = 'zarr.json'


class Kind(NamedTuple):
  """Element type and shapes of an array.

  Attributes:
    dtype: type of its elements.
    row: shape of a row.
    chunk: rows of an inner chunk.
    shard: rows that a shard has room for.
    is_packed: whether chunks are compressed, by zstd.
    level: of its effort.
  """

  dtype: np.dtype
  row: tuple[int, ...]
  chunk: int
  shard: int
  is_packed: bool = False
  level: int = 3


def spec(url: str, name: str, kind: Kind, n_rows: int) -> dict[str, Any]:
  """TensorStore's spec of an array.

  It holds the array's metadata, so that what reads by it need not parse its
  `zarr.json`. Reading a missing chunk is an error, so that a lost shard does
  not pass for zeros; hence chunks that are all zeros are written too.

  Args:
    url: the folder that the array's folder is in.
    name: the array.
    kind: its kind.
    n_rows: its size along the first axis.
  """
  folder = url_lib.kvstore(url)
  folder['path'] += name + '/'
  return {
    'driver': 'zarr3',
    'kvstore': folder,
    'metadata': _metadata(kind, n_rows),
    'fill_missing_data_reads': False,
    'store_data_equal_to_fill_value': True,
  }


def opened(spec: dict[str, Any], context: ts.Context) -> ts.TensorStore:
  """An array that is there, read without asking again what it is.

  Args:
    spec: from `spec`.
    context: whose cache and connections are used.

  Raises:
    ValueError: if it cannot be opened.
  """
  return ts.open(
    spec | {'recheck_cached_data': 'open'},
    open=True,
    assume_metadata=True,
    context=context,
  ).result()


def _metadata(kind: Kind, n_rows: int) -> dict[str, Any]:
  checked = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'crc32c'},
  ]
  effort = {'level': kind.level, 'checksum': False}
  packed = [{'name': 'zstd', 'configuration': effort}] if kind.is_packed else []
  # No chunk is empty, even if a row is.
  row = [max(1, size) for size in kind.row]
  sharding = {
    'chunk_shape': [kind.chunk, *row],
    'codecs': [checked[0], *packed, checked[1]],
    'index_codecs': checked,
  }
  grid = {'chunk_shape': [kind.shard, *row]}
  return {
    'shape': [n_rows, *kind.row],
    'data_type': kind.dtype.name,
    'fill_value': 0,
    'chunk_grid': {'name': 'regular', 'configuration': grid},
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }


def _in_memory(content: dict[str, Any]) -> tuple[ts.TensorStore, ts.KvStore]:
  array = ts.open(
    {
      'driver': 'zarr3',
      'kvstore': {'driver': 'memory'},
      'store_data_equal_to_fill_value': True,
      'metadata': content,
    },
    create=True,
  ).result()
  return array, array.kvstore


def metadata(
  kind: Kind, n_rows: int, axes: Sequence[str] = (), meaning: str = ''
) -> bytes:
  """The `zarr.json` of an array.

  Args:
    kind: its kind.
    n_rows: its size along the first axis.
    axes: names of its axes; empty if they have none.
    meaning: the meaning of an entry; empty if that is said elsewhere.
  """
  content = _metadata(kind, n_rows)
  if axes:
    content['dimension_names'] = list(axes)
  if meaning:
    content['attributes'] = {'meaning': meaning}
  _, files = _in_memory(content)
  return files.read(METADATA).result().value


def encode(kind: Kind, values: np.ndarray) -> bytes:
  """The bytes of the object of a shard that holds these rows.

  They are made in memory, so that the object can be created only where there is
  none; TensorStore would overwrite one.
  """
  array, files = _in_memory(_metadata(kind, kind.shard))
  array[: len(values)].write(values).result()
  return files.read(object_name('', kind, 0)).result().value


def object_name(name: str, kind: Kind, shard: int) -> str:
  """Name of the object of one shard of an array."""
  folder = f'{name}/' if name else ''
  return f'{folder}c/{shard}' + '/0' * len(kind.row)
