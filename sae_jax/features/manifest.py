"""A table's descriptions of itself: plan, records of shards, manifest."""

from collections.abc import Iterator
import dataclasses
from typing import Any

import numpy as np

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.features import columns as columns_lib
from sae_jax.storage import sharded, signed

FORMAT_VERSION = 1
NAME = 'manifest.json'
RECORDS = 'shards'
AGAIN = 'copy the features again, or run sae-probe again'
CHUNK_LATENTS = 64
_LEAST_SHARD, _MOST_SHARD = 64, 16_384
# Latents are int32.
_MOST_LATENTS = 2**31 - 1
# Of a table of a million shards.
LONGEST = 2**30


def shard_latents(n_latents: int) -> int:
  """Latents of a shard: a function of the table's size alone."""
  below = 1 << max(0, (n_latents // _LEAST_SHARD).bit_length() - 1)
  return min(max(below, _LEAST_SHARD), _MOST_SHARD)


@dataclasses.dataclass(frozen=True)
class Plan:
  """What is known of a table before it is written.

  Attributes:
    n_latents: number of latents.
    sizes: size of each axis but N.
    hist_edges: edges of the histograms' bins, float32 and rising.
    groups: groups of columns that it has beside those that every table has.
  """

  n_latents: int
  sizes: dict[str, int]
  hist_edges: tuple[float, ...]
  groups: tuple[str, ...] = ()

  def __post_init__(self):
    # In one order, as bytes and digests depend on it.
    groups = tuple(g for g in columns_lib.GROUPS if g in self.groups)
    object.__setattr__(self, 'groups', groups)
    object.__setattr__(self, 'sizes', dict(sorted(self.sizes.items())))

  @property
  def columns(self) -> tuple[str, ...]:
    """Names of its columns, in the order of their declarations."""
    return columns_lib.of_groups(self.groups)

  @property
  def digest(self) -> str:
    """A sha256 of the plan."""
    return signed.digest(dataclasses.asdict(self))


def blocks(n_latents: int) -> Iterator[tuple[int, int]]:
  """First latent of each shard, and the first beyond it."""
  size = shard_latents(n_latents)
  for first in range(0, n_latents, size):
    yield first, min(first + size, n_latents)


@dataclasses.dataclass(frozen=True)
class Shard:
  """What one call of a writer wrote of a shard; `shards/000000/KEY.json`.

  Attributes:
    plan: digest of the plan that it was written by.
    checksums: column -> sha256 of its object.
  """

  plan: str
  checksums: dict[str, str]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """Content of a sealed table; `manifest.json`.

  Attributes:
    format_version: version of the layout.
    n_latents: number of latents, N.
    shard_latents: latents of a shard.
    chunk_latents: latents of an inner chunk.
    sizes: size of each axis but N.
    columns: name of each column -> its `axes`, `dtype` and `meaning`.
    record: what probing says of the table.
    checksums: column -> sha256 of each of its shards' objects.
    metadata: path of each `zarr.json` -> its sha256.
  """

  format_version: int
  n_latents: int
  shard_latents: int
  chunk_latents: int
  sizes: dict[str, int]
  columns: dict[str, dict[str, Any]]
  record: dict[str, Any]
  checksums: dict[str, tuple[str, ...]]
  metadata: dict[str, str]


def kinds(n_latents: int, sizes: dict[str, int], names) -> dict[str, Any]:
  """Column -> its number of rows and `sharded.Kind`."""
  size = shard_latents(n_latents)
  arrays = {}
  for name in names:
    column = columns_lib.COLUMNS[name]
    dtype, row = np.dtype(column.dtype), column.row(sizes)
    if column.is_shared:
      (rows,) = row
      arrays[name] = rows, sharded.Kind(dtype, (), rows, rows, True)
    else:
      kind = sharded.Kind(dtype, row, CHUNK_LATENTS, size, True)
      arrays[name] = n_latents, kind
  return arrays


def n_objects(n_rows: int, kind: sharded.Kind) -> int:
  """How many objects an array has: none if its rows are empty."""
  return -(-n_rows // kind.shard) if 0 not in kind.row else 0


def declarations(names) -> dict[str, dict[str, Any]]:
  """What a manifest, and each array's `zarr.json`, says of columns."""
  return {
    name: {
      'axes': list(columns_lib.COLUMNS[name].axes),
      'dtype': columns_lib.COLUMNS[name].dtype,
      'meaning': columns_lib.COLUMNS[name].meaning,
    }
    for name in names
  }


def check_size(n_latents: int, where: str) -> None:
  """Raises UserError if no table has so many latents."""
  if not 0 < n_latents <= _MOST_LATENTS:
    raise errors.UserError(
      f'{where}: {n_latents:,} latents, not from 1 to {_MOST_LATENTS:,}: run '
      'sae-probe again'
    )


def parse(data: bytes, where: str) -> Manifest:
  """The manifest that a file holds.

  Args:
    data: its bytes.
    where: its name, for the errors.

  Raises:
    UserError: if it is damaged, of another version or says what cannot be.
  """
  content = signed.parse(data, where, AGAIN, LONGEST)
  version = content.get('format_version')
  if version != FORMAT_VERSION:
    raise errors.UserError(
      f'{where} has format version {version}, this sae_jax reads version '
      f'{FORMAT_VERSION}: run sae-probe again'
    )
  manifest = config_lib.from_dict(Manifest, content, where)
  check_size(manifest.n_latents, where)
  columns_lib.check(manifest.columns, manifest.sizes, where)
  sizes = manifest.shard_latents, manifest.chunk_latents
  if sizes != (shard_latents(manifest.n_latents), CHUNK_LATENTS):
    raise errors.UserError(
      f'{where} says shards of {sizes[0]} and chunks of {sizes[1]} latents, '
      f'not {shard_latents(manifest.n_latents)} and {CHUNK_LATENTS}: run '
      'sae-probe again'
    )
  for name, declared in declarations(manifest.columns).items():
    for key in ('axes', 'dtype'):
      stored = manifest.columns[name].get(key)
      if stored != declared[key]:
        raise errors.UserError(
          f'{where} says {stored} as {key} of {name}, not {declared[key]}: run '
          'sae-probe of this version'
        )
  for name, array in kinds(
    manifest.n_latents, manifest.sizes, manifest.columns
  ).items():
    stored, right = len(manifest.checksums.get(name, ())), n_objects(*array)
    if stored != right:
      raise errors.UserError(
        f'{where} says {stored} checksums of {name}, not {right}: run '
        'sae-probe again'
      )
  paths = {f'{name}/{sharded.METADATA}' for name in manifest.columns}
  paths.add(sharded.METADATA)
  if manifest.metadata.keys() != paths:
    wrong = sorted(manifest.metadata.keys() ^ paths)
    raise errors.UserError(
      f'{where} has too many or few checksums of zarr.json ({wrong[0]}): run '
      'sae-probe again'
    )
  return manifest
