"""The layout of a store's folder: its objects and arrays, and their specs."""

from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import config, errors
from sae_jax.storage import names, records, sharded, signed
from sae_jax.storage import url as url_lib
from sae_jax.storage.sharded import Kind
from sae_jax.store import checks
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest, Mask, Shard, StorePlan

PLAN = 'plan.json'
MASK = 'mask.json'
ACTIVATIONS = 'activations'
STREAM_INDEX = 'stream_index'
STREAM = ('tokens', 'documents', 'positions')
_AGAIN = 'copy the store again, or harvest it again'
_DAMAGED = f'it is damaged: {_AGAIN}'
# Of a store of a million shards.
_LONGEST_MANIFEST = 2**30


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
    UserError: if it cannot be read, is damaged or of another format version.
  """
  if version is not None:
    return _read_version(url, version)
  manifest = _read_version(url, 1)
  while manifest is not None:
    later = _read_version(url, manifest.version + 1)
    if later is None:
      break
    manifest = later
  return manifest


def _read_version(url: str, version: int) -> Manifest | None:
  name = manifest_name(version)
  content = read_content(url, name)
  if content is None:
    return None
  where = f'{name} in {url}'
  # Manifests of older stores have no digest, but all have the identity.
  if content.get('identity') != manifest_lib.identity(content):
    raise signed.damaged(where, _AGAIN)
  manifest = config.from_dict(Manifest, content, where)
  checks.check_plan(manifest, where)
  checks.check_manifest(manifest, version, array_kinds(manifest), where)
  return manifest


def read_plan(url: str) -> StorePlan | None:
  """The plan of a store that was begun, None if there is none.

  Raises:
    UserError: see `read_content`; also if it contradicts itself.
  """
  content = read_content(url, PLAN)
  if content is None:
    return None
  where = f'{PLAN} in {url}'
  plan = config.from_dict(StorePlan, content, where)
  checks.check_plan(plan, where)
  return plan


def read_mask(url: str, of: StorePlan | Manifest) -> Mask | None:
  """The mask of a store, None if it has none.

  Args:
    url: the store's folder.
    of: its plan, or its manifest if it is sealed.

  Raises:
    UserError: see `read_content`; also if it is not the mask of that store.
  """
  content = read_content(url, MASK)
  if content is None:
    return None
  where = f'{MASK} in {url}'
  mask = config.from_dict(Mask, content, where)
  checks.check_mask(mask, of, where)
  return mask


def read_content(url: str, name: str) -> dict[str, Any] | None:
  """The fields of a JSON file of a store, None if there is no file.

  Raises:
    UserError: if it cannot be read, is damaged or of another format version.
  """
  spec = url_lib.kvstore(url)
  try:
    file = ts.KvStore.open(spec).result().read(name).result()
  except ValueError as error:
    raise errors.UserError(
      f'cannot read {name} in {url}: {errors.reason(error)}: '
      'check the path and your access'
    ) from error
  if file.state == 'missing':
    return None
  return _content(file.value, url, f'{name} in {url}')


def _content(data: bytes, url: str, where: str) -> dict[str, Any]:
  """The fields of a record's file, once its digest is known to be theirs."""
  content = records.parse(data, where, _DAMAGED, _LONGEST_MANIFEST)
  known = manifest_lib.FORMAT_VERSION
  version = content.get('format_version', known)
  if version != known:
    raise errors.UserError(
      f'store {url} has format version {version}, this sae_jax reads version '
      f'{known}: harvest it again'
    )
  # Those of older stores have none.
  if signed.DIGEST in content:
    signed.check(content, where, _AGAIN)
  return content


def read_shards(url: str, plan: StorePlan) -> dict[int, Shard]:
  """The records of all shards that are complete, by number.

  One listing, then all reads at once: a store in a bucket may have thousands.

  Args:
    url: the store's folder.
    plan: its plan.

  Raises:
    UserError: if they cannot be read, are damaged or do not fit the plan.
  """
  spec = url_lib.kvstore(url)
  try:
    files = ts.KvStore.open(spec).result()
    folder = f'{manifest_lib.RECORDS}/'
    inside = ts.KvStore.KeyRange(folder, folder + '\xff')
    reads = {}
    for key in files.list(inside).result():
      name = key.decode(errors='replace')
      digits = name.removeprefix(folder).removesuffix('.json')
      # What else lies there is not ours.
      if digits.isdecimal() and name == shard_name(int(digits)):
        reads[int(digits)] = files.read(name)
    contents = {shard: read.result().value for shard, read in reads.items()}
  except ValueError as error:
    raise errors.UserError(
      f'cannot read the records of shards in {url}: {errors.reason(error)}: '
      'check the path and your access'
    ) from error
  shards = {}
  for number, data in contents.items():
    where = f'{shard_name(number)} in {url}'
    shard = config.from_dict(Shard, _content(data, url, where), where)
    checks.check_shard(plan, shard, array_kinds(plan), where)
    shards[number] = shard
  return shards


def read_shard(url: str, manifest: Manifest, number: int) -> Shard:
  """The record of a shard of a sealed store.

  Raises:
    UserError: if it cannot be read, or is not what the manifest was written
      with.
  """
  name = shard_name(number)
  content, where = read_content(url, name), f'{name} in {url}'
  if content is None:
    raise errors.UserError(
      f'{where} is not there: copy the store again, or harvest it again'
    )
  if (
    signed.digest(content) != (manifest.checksums[manifest_lib.RECORDS][number])
  ):
    raise errors.UserError(
      f'{where} has not the sha256 that the manifest has of it: {_DAMAGED}'
    )
  shard = config.from_dict(Shard, content, where)
  checks.check_shard(manifest, shard, array_kinds(manifest), where)
  return shard


def array_name(site: str) -> str:
  """The folder of a site's activations; UserError if it may be another's."""
  return f'{ACTIVATIONS}/' + names.plain(site, 'the manifest')


def array_kinds(plan: StorePlan | Manifest) -> dict[str, Kind]:
  """The kind of each array of a store, by name."""
  rows = Kind(
    manifest_lib.DTYPES[plan.dtype],
    (plan.d_model,),
    plan.chunk_rows,
    plan.shard_rows,
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


def array_spec(
  url: str, name: str, kind: Kind, n_shards: int
) -> dict[str, Any]:
  """TensorStore's spec of one of a store's arrays, see `sharded.spec`."""
  return sharded.spec(url, name, kind, n_shards * kind.shard)
