"""How a store lies in its folder, and the manifest that says what it is."""

import dataclasses
import hashlib
import json
import os
from typing import Any

import ml_dtypes
import numpy as np
import tensorstore as ts

from sae_jax import config

FORMAT_VERSION = 1
DTYPES = {'float32': np.dtype('<f4'), 'bfloat16': np.dtype(ml_dtypes.bfloat16)}

MANIFEST = 'manifest.json'
ACTIVATIONS = 'activations'
STREAM_INDEX = 'stream_index'
STREAM = ('tokens', 'documents', 'positions')


@dataclasses.dataclass(frozen=True)
class Manifest:
  """What a store holds and where it comes from; `manifest.json`.

  Attributes:
    format_version: of the store's layout.
    subject: name or path the subject was loaded by.
    weights_sha256: digest of the subject's file.
    site: name of the site that was read.
    d_model: D.
    dtype: of the stored activations.
    n_rows: R, kept tokens.
    n_stream: L, tokens of the stream.
    holdout_rows: the last so many rows are the held-out split; it begins
      with a document.
    chunk_rows: rows of an inner chunk.
    shard_rows: rows of a shard.
    context_length: tokens in the longest context.
    sources: names of the text sources.
    source_rows: source -> rows that came from it.
    seed: of the order of documents.
    mask: the rule by which tokens were left out, and how many were.
    config: the harvest's whole config.
    checksums: array -> sha256 of its little-endian bytes in row order.
    software: name -> version of what wrote it.
    identity: sha256 over all of the above but `software`.
  """

  format_version: int
  subject: str
  weights_sha256: str
  site: str
  d_model: int
  dtype: str
  n_rows: int
  n_stream: int
  holdout_rows: int
  chunk_rows: int
  shard_rows: int
  context_length: int
  sources: tuple[str, ...]
  source_rows: dict[str, int]
  seed: int
  mask: dict[str, Any]
  config: dict[str, Any]
  checksums: dict[str, str]
  software: dict[str, str]
  identity: str = ''


def identity(manifest: Manifest) -> str:
  """The sha256 that names the data and how it was made, `software` aside."""
  content = dataclasses.asdict(manifest)
  del content['software'], content['identity']
  return hashlib.sha256(
    json.dumps(content, sort_keys=True).encode()
  ).hexdigest()


def read_manifest(url: str) -> Manifest | None:
  """The manifest of a finished store, None where there is none.

  Raises:
    UserError: if it cannot be read or is of another format version.
  """
  try:
    found = ts.KvStore.open(kvstore(url)).result().read(MANIFEST).result()
    if found.state == 'missing':
      return None
    values = json.loads(found.value)
  except ValueError as error:
    raise config.UserError(
      f'cannot read {MANIFEST} in {url}: {reason(error)}: '
      'check the path and your access'
    ) from error
  if values.get('format_version') != FORMAT_VERSION:
    raise config.UserError(
      f'store {url} has format version {values.get("format_version")}, this '
      f'sae_jax reads version {FORMAT_VERSION}: harvest it again'
    )
  return config.from_dict(Manifest, values)


def kvstore(url: str | os.PathLike[str]) -> dict[str, str]:
  """TensorStore's spec of the folder a URL names, local or gs://."""
  url = os.fspath(url)
  if url.startswith('gs://'):
    bucket, _, path = url.removeprefix('gs://').partition('/')
    path = path.rstrip('/') + '/' if path else ''
    return {'driver': 'gcs', 'bucket': bucket, 'path': path}
  path = os.path.abspath(os.path.expanduser(url))
  return {'driver': 'file', 'path': path.rstrip('/') + '/'}


def array_spec(url: str, name: str) -> dict[str, Any]:
  """TensorStore's spec to open one of a store's arrays.

  What is absent fails to read: a lost shard must not pass for zeros, so chunks
  that are all zeros are written too.
  """
  folder = kvstore(url)
  folder['path'] += name + '/'
  return {
    'driver': 'zarr3',
    'kvstore': folder,
    'fill_missing_data_reads': False,
    'store_data_equal_to_fill_value': True,
  }


def array_metadata(
  shape: list[int], dtype: np.dtype, chunk: int, shard: int
) -> dict[str, Any]:
  """Zarr3 metadata of an array cut along its first axis.

  Args:
    shape: of the array.
    dtype: of its elements.
    chunk: rows of an inner chunk.
    shard: rows of a shard, a multiple of chunk.
  """
  checked = [
    {'name': 'bytes', 'configuration': {'endian': 'little'}},
    {'name': 'crc32c'},
  ]
  sharding = {
    'chunk_shape': [chunk, *shape[1:]],
    'codecs': checked,
    'index_codecs': checked,
  }
  grid = {'chunk_shape': [shard, *shape[1:]]}
  return {
    'shape': shape,
    'data_type': dtype.name,
    'chunk_grid': {'name': 'regular', 'configuration': grid},
    'codecs': [{'name': 'sharding_indexed', 'configuration': sharding}],
  }


def reason(error: Exception) -> str:
  """The first line of an error, without TensorStore's dump of its spec."""
  return str(error).partition('\n')[0].partition(' [')[0]
