"""The arrays in a folder that Orbax wrote, read and checked without Orbax."""

import collections
from collections.abc import Sequence
import itertools
from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import records, tensors
from sae_jax.storage import url as url_lib

# What zarr's two formats call the description of an array.
_ZARR = ('zarr.json', '.zarray')
_JSON = (*_ZARR, '_METADATA', '_sharding')
# Chunks that are in memory at once.
_AHEAD = 4


def add_digests(spec: dict[str, Any]) -> None:
  """Has a checksum stored with each chunk, which every reader compares.

  It is the XXH64 in zstd's frame of a chunk, so that a process of another mesh
  checks what it reads and no more, and any reader of zarr does.

  Args:
    spec: TensorStore's spec of an array in zarr's format 3 that is to be
      written, changed in place.
  """
  codecs = spec.get('base', spec)['metadata'].get('codecs', [])
  for codec in _chunk_codecs(codecs):
    if codec['name'] == 'zstd':
      # TensorStore may leave out a configuration that is all defaults.
      codec.setdefault('configuration', {})['checksum'] = True


def has_digests(array: ts.TensorStore) -> bool:
  """Whether a checksum is stored with each chunk of an array."""
  metadata = array.spec().to_json()['metadata']
  return any(
    codec['name'] == 'zstd'
    and codec.get('configuration', {}).get('checksum', False)
    for codec in _chunk_codecs(metadata.get('codecs', []))
  )


def _chunk_codecs(codecs: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """The codecs of what is read at once: of shards those of the parts."""
  if codecs and codecs[0]['name'] == 'sharding_indexed':
    return codecs[0]['configuration']['codecs']
  return codecs


def names(folder: str) -> list[str]:
  """The names of all arrays of a folder, local path or URL.

  Raises:
    ValueError: if it cannot be read.
  """
  return sorted(
    key.rpartition('/')[0]
    for key in _keys(_open(_arrays(folder)))
    if key.rpartition('/')[2] in _ZARR
  )


def open_array(folder: str, name: str) -> ts.TensorStore:
  """Opens an array for reading.

  Raises:
    ValueError: if it cannot be read.
  """
  spec = _arrays(folder)
  files = _open(spec)
  driver = {'zarr.json': 'zarr3', '.zarray': 'zarr'}
  for file in _ZARR:
    stored = files.read(f'{name}/{file}').result()
    if stored.state == 'value':
      # TensorStore's parser crashes on JSON that is nested deeply.
      records.check(stored.value)
      place = spec | {'path': f'{spec.get("path", "")}{name}/'}
      return ts.open(
        {
          'driver': driver[file],
          'kvstore': place,
          # As Orbax does; otherwise what is lost reads as zeros.
          'fill_missing_data_reads': False,
        }
      ).result()
  raise ValueError(f'{name} is not there')


def tensor(folder: str, keys: Sequence[str]) -> tensors.Tensor:
  """An array of a folder, of which parts are read as they are asked for.

  Args:
    folder: local path or URL.
    keys: those under which the tree has it.

  Raises:
    ValueError: if it cannot be read, also by the tensor's `part`.
  """
  array = open_array(folder, '.'.join(keys))

  def part(ranges: tensors.Ranges) -> np.ndarray:
    return array[tuple(slice(*one) for one in ranges)].read().result()

  return tensors.Tensor(
    tuple(array.shape),
    array.dtype.numpy_dtype,
    part,
    tuple(array.chunk_layout.read_chunk.shape or ()),
  )


def read_through(array: ts.TensorStore, chunks: int | None = None) -> int:
  """Reads an array a few chunks at a time and keeps none; returns its bytes.

  Args:
    array: from `open_array`.
    chunks: how many of the first to read; None for all.

  Raises:
    ValueError: if a chunk is absent or not as it was saved.
  """
  shape = array.chunk_layout.read_chunk.shape or ()
  grid = itertools.product(
    *(range(0, n, step) for n, step in zip(array.shape, shape))
  )
  reading, n_bytes = collections.deque(), 0
  for corner in itertools.islice(grid, chunks):
    if len(reading) == _AHEAD:
      n_bytes += reading.popleft().result().nbytes
    reading.append(
      array[
        tuple(
          slice(at, min(at + step, n))
          for at, step, n in zip(corner, shape, array.shape)
        )
      ].read()
    )
  return n_bytes + sum(chunk.result().nbytes for chunk in reading)


def first_damaged(folder: str) -> tuple[str, str] | None:
  """The first array of a folder that cannot be read, and why."""
  for name in names(folder):
    try:
      read_through(open_array(folder, name))
    except ValueError as error:
      return name, errors.reason(error)
  return None


def check_json(folder: str, remedy: str) -> None:
  """Reads all JSON of a folder, before TensorStore's parser or Orbax do.

  Args:
    folder: local path or URL.
    remedy: what the user can do if a file is damaged.

  Raises:
    UserError: if one is damaged; it names the file.
    ValueError: if the folder cannot be read.
  """
  base, arrays = url_lib.kvstore(folder), _arrays(folder)
  for spec in [base] if arrays == base else [base, arrays]:
    files = _open(spec)
    reading = {
      key: files.read(key)
      for key in _keys(files)
      if key.rpartition('/')[2] in _JSON or key.startswith('array_metadatas/')
    }
    for key, read in reading.items():
      records.parse(read.result().value, f'{folder}/{key}', remedy)


def _arrays(folder: str) -> dict[str, Any]:
  """The spec of the arrays' files, which may be in an OCDBT database."""
  base = url_lib.kvstore(folder)
  manifest = _open(base).read('manifest.ocdbt').result()
  if manifest.state == 'value':
    return {'driver': 'ocdbt', 'base': base}
  return base


def _open(spec: dict[str, Any]) -> ts.KvStore:
  return ts.KvStore.open(spec).result()


def _keys(files: ts.KvStore) -> list[str]:
  return [key.decode(errors='replace') for key in files.list().result()]
