"""Writing a store: shards in any order by any process, then the manifest.

Objects are created where there are none, and never changed: of two writers of a
shard the first one's bytes stay, and the other gets an error if its own differ.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import json
from typing import Any

import numpy as np

from sae_jax import config, errors
from sae_jax.storage import files as files_lib
from sae_jax.storage import sharded, signed, workdir
from sae_jax.store import checks, layout
from sae_jax.store import manifest as manifest_lib
from sae_jax.store.manifest import Manifest, Mask, Shard, StorePlan


class StoreWriter:
  """Writes shards of a store, and seals it.

  Any number of processes may write to the same folder if their plans are equal;
  shards that are complete stay.
  """

  def __init__(self, url: str, plan: StorePlan):
    """Opens the folder, or creates it.

    Args:
      url: the store's folder.
      plan: what all shards have in common.

    Raises:
      UserError: if sizes do not fit, or the folder can't be written, is
        somebody else's or holds shards of another plan.
    """
    checks.check_plan(plan)
    self.url, self.plan = url, plan
    try:
      workdir.check_own(url, 'sae-harvest', {layout.PLAN: ()})
      self._files = files_lib.folder(url)
      data = signed.to_file(plan)
      if not files_lib.create(self._files, layout.PLAN, data):
        self._check_plan()
    except errors.UserError:
      raise
    except Exception as error:
      # Clients of buckets raise errors of many types.
      raise self._error(error) from error

  def agree(self, mask: Mask) -> Mask:
    """Stores the mask unless another process has; returns the stored one.

    Raises:
      UserError: if it can't be written, or is not of this store.
    """
    try:
      data = signed.to_file(mask)
      files_lib.create(self._files, layout.MASK, data)
    except (ValueError, OSError) as error:
      raise self._error(error) from error
    return layout.read_mask(self.url, self.plan)

  def records(self) -> dict[int, Shard]:
    """The records of the shards that are complete, by number."""
    return layout.read_shards(self.url, self.plan)

  def shard(self, number: int) -> 'ShardWriter':
    """Opens a missing shard."""
    return ShardWriter(self, number)

  def complete(self, n_shards: int) -> list[Shard] | None:
    """The records of the first `n_shards` shards, None if one is missing."""
    records = self.records()
    shards = [records.get(number) for number in range(n_shards)]
    return None if None in shards else shards

  def seal(
    self,
    shards: Sequence[Shard],
    *,
    holdout_rows: int = 0,
    mask: dict[str, Any] | None = None,
    sizes: dict[str, Any] | None = None,
  ) -> Manifest:
    """Writes the manifest, after which readers can open the store.

    Args:
      shards: the records of all shards, from `complete`.
      holdout_rows: how many of the last rows are held out.
      mask: see `manifest.make`.
      sizes: see `manifest.make`.

    Returns:
      The manifest, or another process's if that was first.

    Raises:
      UserError: if it can't be written.
    """
    before = layout.read_manifest(self.url)
    manifest = manifest_lib.make(
      self.plan,
      shards,
      version=1 + (before.version if before else 0),
      holdout_rows=holdout_rows,
      mask=mask,
      sizes=sizes,
    )
    if before is not None:
      self._check_sealed(before, manifest)
    try:
      for name, kind in layout.array_kinds(self.plan).items():
        metadata = sharded.metadata(kind, len(shards) * kind.shard)
        self._files.write(f'{name}/{sharded.METADATA}', metadata).result()
      name = layout.manifest_name(manifest.version)
      data = signed.to_file(manifest)
      if not files_lib.create(self._files, name, data):
        # Another process was first, with the same shards.
        return layout.read_manifest(self.url, manifest.version)
    except (ValueError, OSError) as error:
      raise self._error(error) from error
    return layout.read_manifest(self.url, manifest.version)

  def _check_sealed(self, before: Manifest, manifest: Manifest) -> None:
    """Raises UserError if a record is not that of the version before."""
    pairs = zip(
      *(m.checksums[manifest_lib.RECORDS] for m in (before, manifest))
    )
    for number, (old, new) in enumerate(pairs):
      if old != new:
        raise errors.UserError(
          f'{layout.shard_name(number)} of store {self.url} is not what '
          f'{layout.manifest_name(before.version)} was written with: '
          'copy the store again, or use another folder'
        )

  def _check_plan(self):
    stored = layout.read_plan(self.url)
    # Through JSON, so that both have lists and not tuples.
    own = config.from_dict(StorePlan, json.loads(config.to_json(self.plan)))
    changes = config.differences(
      *(dataclasses.replace(plan, software={}) for plan in (stored, own))
    )
    if changes:
      raise errors.UserError(
        f'store {self.url} was begun with another plan ({"; ".join(changes)}): '
        'use another folder or delete this one'
      )

  def _error(self, error: Exception) -> errors.UserError:
    return errors.UserError(
      f'cannot write store {self.url}: {errors.reason(error)}: '
      'check the path, free space and your access; the same command goes on'
    )


class ShardWriter:
  """One shard: contexts are appended in memory, then all of it is written."""

  def __init__(self, writer: StoreWriter, number: int):
    self._writer, self.number = writer, number
    self._plan = writer.plan
    self._pieces = {name: [] for name in layout.array_kinds(self._plan)}
    self._contexts, self._stream = 0, 0
    self.rows = 0

  def has_room(self, tokens: int, rows: int) -> bool:
    """Whether the shard has room for these many tokens and rows."""
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
      positions: int [l] positions in the subject's context, 0 at its start.
      keep_mask: bool [l], tokens whose activations are kept.
      kept: site -> their activations, [keep_mask.sum(), D].

    Raises:
      ValueError: if shapes do not fit, or the shard has no room.
    """
    stream_index = self._stream + np.flatnonzero(keep_mask)
    n_rows = len(stream_index)
    shape = (n_rows, self._plan.d_model)
    for site in self._plan.sites:
      if kept[site].shape != shape:
        raise ValueError(
          f'activations at {site} are {kept[site].shape}, but keep_mask keeps '
          f'{shape[0]} tokens of width {shape[1]}'
        )
    if not len(tokens) == len(documents) == len(positions) == len(keep_mask):
      raise ValueError('tokens, documents, positions, keep_mask differ in size')
    if not self.has_room(len(tokens), n_rows):
      raise ValueError(
        f'{n_rows} rows of {len(tokens)} tokens do not fit a shard of '
        f'{self._plan.shard_rows} and {self._plan.shard_stream} that holds '
        f'{self.rows} and {self._stream}'
      )
    for site in self._plan.sites:
      self._add(layout.array_name(site), kept[site])
    self._add(layout.STREAM_INDEX, stream_index)
    for name, values in zip(layout.STREAM, (tokens, documents, positions)):
      self._add(name, values)
    self._contexts += int((np.asarray(positions) == 0).sum())
    self.rows += n_rows
    self._stream += len(tokens)

  def finish(
    self,
    source_rows: dict[str, int] | None = None,
    masked: dict[str, int] | None = None,
  ) -> Shard:
    """Writes the objects, then the record that completes the shard.

    Args:
      source_rows: source -> rows of this shard that came from it.
      masked: rule -> tokens that were left out.

    Returns:
      The record.

    Raises:
      UserError: if the disk or bucket refuses the data, or another writer has
        written other bytes, which stay.
    """
    kinds = layout.array_kinds(self._plan)
    arrays = {
      name: np.concatenate([np.empty((0, *kind.row), kind.dtype), *pieces])
      for (name, kind), pieces in zip(kinds.items(), self._pieces.values())
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
      checksums={
        name: manifest_lib.sha256(values) for name, values in arrays.items()
      },
    )
    files = self._writer._files
    try:
      for name, values in arrays.items():
        key = sharded.object_name(name, kinds[name], self.number)
        if not files_lib.create(
          files, key, sharded.encode(kinds[name], values)
        ):
          raise self._conflict(key)
      key = layout.shard_name(self.number)
      data = signed.to_file(shard)
      if not files_lib.create(files, key, data) and not self._is_stored(shard):
        raise self._conflict(key)
    except errors.UserError:
      raise
    except (ValueError, OSError) as error:
      raise self._writer._error(error) from error
    return shard

  def _is_stored(self, shard: Shard) -> bool:
    """Whether the stored record says the same, if in other bytes."""
    url, name = self._writer.url, layout.shard_name(self.number)
    content = layout.read_content(url, name)
    digest = signed.digest(dataclasses.asdict(shard))
    return content is not None and signed.digest(content) == digest

  def _add(self, name, values):
    dtype = layout.array_kinds(self._plan)[name].dtype
    self._pieces[name].append(np.asarray(values).astype(dtype))

  def _conflict(self, key):
    return errors.UserError(
      f'{key} of store {self._writer.url} is there with other bytes: another '
      'harvest is writing this store, or one on another machine was ended '
      'here. If none runs, delete that object and start again'
    )


def write(
  url: str,
  plan: StorePlan,
  stretches: Iterable[tuple],
  *,
  holdout_rows: int = 0,
  mask: dict[str, Any] | None = None,
) -> Manifest:
  """Writes and seals a store of activations that the caller has.

  Args:
    url: its folder.
    plan: what its shards have in common.
    stretches: stretches of the token stream in order, each the arguments of
      `ShardWriter.append`. Each is whole contexts, and fits into a shard.
    holdout_rows: see `StoreWriter.seal`.
    mask: see `manifest.make`.

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
