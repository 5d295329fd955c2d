"""The activation store: rows of activations and the tokens they come from.

A store is a folder, local or in a bucket, of zarr3 arrays with sharding:

  plan.json             what all shards have in common, written first
  shards/000000.json    a complete shard: its rows, documents and checksums
  manifest.json         written last: a folder without it is not sealed
  activations/SITE/     [S * shard_rows, D] float32 or bfloat16, kept tokens
  stream_index/         [S * shard_rows] int32, index of a row's token among the
                        stream tokens of its shard, ascending
  tokens/ documents/ positions/   [S * 2 * shard_rows] int32, masked tokens too

A shard is one object of each array, begins with a context, and is a function
of the plan and its number alone. So shards may be written in any order, by any
process, and an interrupted harvest makes those that are missing. Shards are
seldom full: the manifest says how many rows, and tokens of the stream, each one
holds. Rows of the store are counted over the rows that there are, shard after
shard.

An inner chunk is the smallest read and carries a crc32c, so reading a damaged
one is an error. `writer` makes stores.
"""

import dataclasses
from typing import Any

import numpy as np
import tensorstore as ts

from sae_jax import errors
from sae_jax.storage import sharded
from sae_jax.store import damage, layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest
from sae_jax.store.text import CACHE_BYTES, FAULTS, Text

# Where no row is read again: indices, and what two batches share.
_CACHE_BYTES_IN_ORDER = 16 * 2**20


class Store(Text):
  """A store, opened for reading one site's activations.

  Attributes:
    site: the site whose activations are read.
    target_site: another site whose activations follow in the same rows, for a
      transcoder; empty for none.
    activations: [S * shard_rows, width], the array of them.
    width: D, or 2 D with a target site.
  """

  def __init__(
    self,
    url: str,
    manifest: Manifest,
    site: str,
    cache_bytes: int = CACHE_BYTES,
    target_site: str = '',
  ):
    super().__init__(url, manifest, cache_bytes)
    self.site, self.target_site = site, target_site
    self.activations = self._open(layout.array_name(site))
    if target_site:
      target = self._open(layout.array_name(target_site))
      self.activations = ts.concat([self.activations, target], axis=1)
    self.width = self.activations.shape[1]

  @property
  def about(self) -> dict[str, Any]:
    """The description of the data that a checkpoint keeps."""
    about = dataclasses.asdict(self.manifest) | {'site': self.site}
    if self.target_site:
      about['target_site'] = self.target_site
    # They grow with the shards, and the identity covers them.
    del about['shard_counts'], about['checksums']
    return about

  def array_rows(self, rows: np.ndarray) -> np.ndarray:
    """Indices of rows along the first axis of `activations`, int64."""
    shard = np.searchsorted(self.starts, rows, 'right') - 1
    return rows - self.starts[shard] + shard * self.manifest.shard_rows

  def read_rows(self, start: int, stop: int) -> np.ndarray:
    """Activations of rows start to stop, [stop - start, width] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    self._check_rows(start, stop - 1, stop == start)
    rows_RD = self._read_range(
      layout.array_name(self.site),
      self.activations,
      self.starts,
      start,
      stop,
      # Two arrays beside each other say nothing of their shards.
      self.manifest.shard_rows,
    )
    return rows_RD.astype(np.float32, copy=False)

  def finite_rows(self, start: int, stop: int) -> np.ndarray:
    """`read_rows`, all numbers of which must be finite.

    Raises:
      IndexError: see `read_rows`.
      UserError: see `read_rows`; also if a row is not finite, naming it.
    """
    rows_RD = self.read_rows(start, stop)
    bad = np.flatnonzero(~np.isfinite(rows_RD).all(1))
    if len(bad):
      raise errors.UserError(
        f'row {start + bad[0]} of store {self.url} is not finite, one of '
        f'{len(bad)} such rows from {start} to {stop}: leave them out of the '
        'store, as sae-harvest does'
      )
    return rows_RD

  def gather(self, rows: np.ndarray) -> np.ndarray:
    """Activations of any rows in the order given, [len(rows), width] float32.

    Raises:
      IndexError: if there are no such rows.
      UserError: if they cannot be read.
    """
    rows = np.asarray(rows, np.int64)
    if rows.size:
      self._check_rows(rows.min(), rows.max())
    try:
      rows_RD = self.activations[self.array_rows(rows)].read(order='C').result()
    except FAULTS as error:
      raise self._error(layout.array_name(self.site), error) from error
    return rows_RD.astype(np.float32, copy=False)

  def verify(self) -> int:
    """Reads every byte and compares checksums.

    Returns:
      How many bytes of arrays were read.

    Raises:
      UserError: if anything is not what was written; it names all damaged
        objects.
    """
    damaged, n_bytes = damage.damaged_files(self.url, self.manifest), 0
    kinds = layout.array_kinds(self.manifest)
    for name, kind in kinds.items():
      array = self._open(name)
      starts = self._starts_of(name)
      for shard, want in enumerate(self.manifest.checksums[name]):
        try:
          values = self._read_range(
            name, array, starts, starts[shard], starts[shard + 1]
          )
          n_bytes += values.nbytes
          if manifest_lib.sha256(values) == want:
            continue
          problem = 'is not what was written'
        except errors.UserError as error:
          problem = str(error)
        damaged.append(f'{sharded.object_name(name, kind, shard)} {problem}')
    if damaged:
      raise errors.UserError(
        f'{len(damaged)} objects of store {self.url} are damaged: '
        f'{"; ".join(damaged)}: delete them and their records in shards/, and '
        'the manifest, and harvest again, which makes what is missing'
      )
    return n_bytes


def open_store(
  url: str,
  site: str = '',
  version: int | None = None,
  unsealed: bool = False,
  in_order: bool = False,
  target_site: str = '',
) -> Store:
  """Opens a store.

  Args:
    url: its folder, local or in a bucket.
    site: the site to read; optional if the store has only one.
    version: see `Manifest`; None for the last.
    unsealed: whether to open a store whose harvest is not finished, up to its
      first missing shard. Its version is 0, and it has no held-out rows.
    in_order: whether rows are read once, in order: fewer are kept in memory.
    target_site: see `Store`.

  Raises:
    UserError: if there is no store, its harvest is not finished, or it has no
      such site.
  """
  manifest = layout.read_manifest(url, version)
  if manifest is None and unsealed:
    manifest = _unsealed(url)
  if manifest is None:
    what = f'version {version} of a' if version else 'a'
    raise errors.UserError(
      f'{url} is not {what} finished store, it has no '
      f'{layout.manifest_name(version or 1)}: harvest it first, or check the '
      'path'
    )
  if not manifest.sites:
    raise errors.UserError(
      f'{url} holds text alone, no activations: give a store of sae-harvest'
    )
  if not site and len(manifest.sites) == 1:
    (site,) = manifest.sites
  if site not in manifest.sites:
    raise errors.UserError(
      f'store {url} holds {", ".join(manifest.sites)}'
      + (f', not {site}' if site else '')
      + ': name one of them as the site'
    )
  if target_site and target_site not in manifest.sites:
    raise errors.UserError(
      f'store {url} holds {", ".join(manifest.sites)}, not {target_site}: '
      'harvest both sites in one pass, as --sites=A,B'
    )
  if target_site == site:
    raise errors.UserError(
      f'the target site {site} is the site that is read, which an autoencoder '
      'reconstructs: leave it out'
    )
  cache_bytes = _CACHE_BYTES_IN_ORDER if in_order else CACHE_BYTES
  return Store(url, manifest, site, cache_bytes, target_site)


def _unsealed(url: str) -> Manifest | None:
  """A manifest of version 0 for the complete shards of an unsealed store."""
  plan = layout.read_plan(url)
  if plan is None:
    return None
  records = layout.read_shards(url, plan)
  # Up to the first that is missing.
  shards = [
    shard
    for i, (number, shard) in enumerate(sorted(records.items()))
    if number == i
  ]
  return manifest_lib.make(plan, shards, version=0) if shards else None
