"""The second pass: what the codes say of each latent, by blocks of latents.

The codes are swept once into files sorted by latent (`spills`). Then each block
of latents is worked out from its slices of them: examples by decile, the text
around all examples, the tokens that latents fire on, and their partners. A
block's columns depend on the codes, the store and the seed alone, so that any
process may make any block. Memory depends on the size of a block, not on the
number of rows; of all latents only the number of rows of each is kept.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import concurrent.futures
import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import shutil
from typing import Any

import numpy as np

from sae_jax import errors, progress
from sae_jax import store as store_lib
from sae_jax.probing.examples import (
  deciles,
  excerpts,
  firing_tokens,
  partners,
  spills,
  tallies,
)
from sae_jax.probing.examples.config import FeatureConfig

_FOLDER = 'second_pass'
# More have more blocks in memory at once.
_MOST_THREADS = 8


@dataclasses.dataclass(frozen=True)
class _Swept:
  """The codes after their sweep.

  Attributes:
    spills: files of the codes, by row.
    active_N: number of rows on which each of all latents is active.
    rows_V: number of rows of each token.
  """

  spills: list[spills.Spill]
  active_N: np.ndarray
  rows_V: np.ndarray


def second_pass(
  config: FeatureConfig,
  codes: Any,
  store: store_lib.Text,
  latent_blocks: Iterable[tuple[int, int]],
  example_rows: Callable[[int, int], dict[str, np.ndarray]],
  seed: int,
  scratch: str | os.PathLike,
) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
  """Columns of the feature table that follow from the codes on disk.

  Args:
    config: sizes of the table.
    codes: codes of consecutive rows, with the first one as `start`, their
      number as `n_rows`, the most active latents of one as `k`, and
      `read(start, stop)`, which gives vals_RK float32 and idx_RK int32 of rows
      of the store; values that are not positive are no activations.
    store: the text of the rows.
    latent_blocks: the first latent of each block, and the one after its last.
    example_rows: gives, for a block, the rows of each kind of examples, such as
      top, random and near, int64 [n, M], -1 for none. An array whose name ends
      in _values is a column as it is. It is called by the caller's thread.
    seed: seed of the examples by decile.
    scratch: a local folder that no other process uses, for files of some
      16 K + 32 bytes a row; they are removed at the end, and what a killed pass
      left is removed at the start.

  Yields:
    The first latent of each block in turn, and its columns: of each kind of
    examples, and of those by decile, KIND_tokens, KIND_acts, KIND_peak and
    KIND_document (`excerpts`, `deciles`), then token_ids, token_counts and
    token_shares (`firing_tokens`), partner_ids, partner_counts and
    partner_scores (`partners`).

  Raises:
    UserError: if the store or the codes cannot be read, or the files cannot be
      written.
    ValueError: if an example is of a row that has no codes.
  """
  blocks = list(latent_blocks)
  if not blocks:
    # Of a process whose latents are all those of one before it.
    return
  folder = pathlib.Path(scratch, _FOLDER)
  shutil.rmtree(folder, ignore_errors=True)
  try:
    swept = _sweep(config, codes, store, blocks, _made(folder))

    def columns(block):
      return _columns(config, swept, *block, seed)

    asked = ((*block, example_rows(*block)) for block in blocks)
    with (
      contextlib.closing(_in_order(columns, asked)) as results,
      progress.bar(
        total=sum(stop - first for first, stop in blocks),
        unit='latent',
        desc='examples',
      ) as bar,
    ):
      for first, stop in blocks:
        yield first, next(results)
        bar.update(stop - first)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _made(folder: pathlib.Path) -> pathlib.Path:
  try:
    folder.mkdir(parents=True)
  except OSError as error:
    raise _error(folder, error) from error
  return folder


def _error(folder: pathlib.Path, error: OSError) -> errors.UserError:
  return errors.UserError(
    f'cannot write the sorted codes to {folder}: {errors.reason(error)}: free '
    'some space, or lower --feature_rows'
  )


def _in_order(function: Callable, items: Iterable) -> Iterator:
  """Results in the order of the items, made by threads that wait for none."""
  threads = min(_MOST_THREADS, os.cpu_count() or 1)
  waiting = collections.deque()
  with concurrent.futures.ThreadPoolExecutor(threads) as pool:
    try:
      for item in items:
        if len(waiting) == threads:
          yield waiting.popleft().result()
        waiting.append(pool.submit(function, item))
      while waiting:
        yield waiting.popleft().result()
    finally:
      pool.shutdown(wait=False, cancel_futures=True)


def _sweep(
  config: FeatureConfig,
  codes: Any,
  store: store_lib.Text,
  blocks: list[tuple[int, int]],
  folder: pathlib.Path,
) -> _Swept:
  """Reads all codes once."""
  before, after = config.window_before, config.window_after

  def write(span):
    return spills.write(
      str(folder), codes, store, span, before, after, sorted(blocks)
    )

  written = []
  active_N = np.zeros(max([0, *(stop for _, stop in blocks)]), np.int64)
  rows_V = np.zeros(0, np.int64)
  try:
    with progress.bar(total=codes.n_rows, unit='tok', desc='sort codes') as bar:
      for spill, sizes in _in_order(write, spills.spans(codes, before, after)):
        written.append(spill)
        active_N = _added(active_N, sizes.latents, sizes.rows)
        rows_V = _added(rows_V, sizes.tokens, sizes.occurrences)
        bar.update(spill.stop - spill.start)
  except OSError as error:
    raise _error(folder, error) from error
  return _Swept(written, active_N, rows_V)


def _added(
  total_N: np.ndarray, ids: np.ndarray, counts: np.ndarray
) -> np.ndarray:
  """Counts with those of some ids added, and longer if one is new."""
  more = int(ids.max(initial=-1)) + 1 - len(total_N)
  if more > 0:
    total_N = np.pad(total_N, (0, more))
  total_N[ids] += counts
  return total_N


def _columns(
  config: FeatureConfig,
  swept: _Swept,
  first: int,
  stop: int,
  examples: dict[str, np.ndarray],
  seed: int,
) -> dict[str, np.ndarray]:
  """The columns of latents first to stop."""
  groups = [
    _group(config, swept, range(first + low, first + high), seed)
    for low, high in _groups(swept, first, stop)
  ]
  columns = {
    name: np.concatenate([group[name] for group in groups])
    for name in groups[0]
  }
  rows = examples | {'decile': columns.pop('decile')}
  columns |= {
    name: rows.pop(name) for name in examples if name.endswith('_values')
  }
  for kind, windows in _windows(config, swept, first, stop, rows).items():
    columns |= {f'{kind}_{name}': array for name, array in windows.items()}
  return columns


def _windows(
  config: FeatureConfig,
  swept: _Swept,
  first: int,
  stop: int,
  rows: dict[str, np.ndarray],
) -> dict[str, dict[str, np.ndarray]]:
  """The text around the examples of each kind.

  Args:
    config: sizes of the table.
    swept: the codes.
    first: the first latent.
    stop: the latent after the last.
    rows: rows of the examples of each kind, [stop - first, ...].

  Raises:
    ValueError: if a row has no codes.
  """
  row_E = np.concatenate([array.reshape(-1) for array in rows.values()])
  latent_E = np.concatenate(
    [
      np.repeat(np.arange(stop - first), math.prod(array.shape[1:]))
      for array in rows.values()
    ]
  )
  width = config.window_before + 1 + config.window_after
  columns = {
    'tokens': np.full((len(row_E), width), -1, np.int32),
    'acts': np.zeros((len(row_E), width), np.float32),
    'peak': np.full(len(row_E), -1, np.int32),
    'document': np.full(len(row_E), -1, np.int32),
  }
  (present,) = np.nonzero(row_E >= 0)
  starts = np.array([spill.start for spill in swept.spills])
  least, most = row_E[present].min(initial=2**62), row_E.max(initial=-1)
  if len(present) and not starts[0] <= least <= most < swept.spills[-1].stop:
    raise ValueError(
      f'examples of rows {least} to {most}, of codes of rows {starts[0]} to '
      f'{swept.spills[-1].stop - 1}'
    )
  # Within a spill they stay by latent, as the pairs are.
  spill_E = np.searchsorted(starts, row_E[present], 'right') - 1
  order = present[np.argsort(spill_E, kind='stable')]
  sizes = np.bincount(spill_E, minlength=len(starts))
  edges = np.append(0, np.cumsum(sizes))
  for spill, low, high in zip(swept.spills, edges, edges[1:]):
    if low < high:
      here = order[low:high]
      pairs = spills.read(spill, first, stop, own=False)
      excerpts.write(
        columns,
        spill,
        pairs,
        here,
        latent_E[here],
        row_E[here],
        config.window_before,
      )
  windows, start = {}, 0
  for kind, array in rows.items():
    take = slice(start, start + array.size)
    windows[kind] = {
      name: column[take].reshape(*array.shape, *column.shape[1:])
      for name, column in columns.items()
    }
    start += array.size
  return windows


def _groups(swept: _Swept, first: int, stop: int) -> Iterator[tuple[int, int]]:
  """Parts of a block whose pairs and whose partners fit in memory."""
  count_N = swept.active_N[first:stop]
  k = swept.spills[0].k if swept.spills else 1
  most_partners_N = np.minimum(count_N * k, len(swept.active_N))
  size_N = np.cumsum(np.maximum(count_N, most_partners_N))
  cuts = [0]
  while cuts[-1] < len(count_N):
    before = size_N[cuts[-1] - 1] if cuts[-1] else 0
    cut = int(np.searchsorted(size_N, before + tallies.CHUNK, 'right'))
    cuts.append(max(cut, cuts[-1] + 1))
  return itertools.pairwise(cuts)


def _group(
  config: FeatureConfig, swept: _Swept, latents: range, seed: int
) -> dict[str, np.ndarray]:
  """What the pairs of latents say, and the rows of their decile examples."""
  count_N = swept.active_N[latents.start : latents.stop]
  total = int(count_N.sum())

  def pieces():
    for spill in swept.spills:
      pairs = spills.read(spill, latents.start, latents.stop)
      if len(pairs.row_P):
        yield spill, pairs

  read = pieces
  if total <= tallies.CHUNK:
    read = list(pieces()).copy
  return {
    'decile': deciles.draw(
      read, latents.start, count_N, config.decile_examples, seed
    ),
    **firing_tokens.most_frequent(
      read, len(latents), total, swept.rows_V, config.firing_tokens
    ),
    **partners.strongest(
      read,
      latents,
      swept.active_N,
      sum(spill.stop - spill.start for spill in swept.spills),
      swept.spills[0].k if swept.spills else 1,
      config.partners,
    ),
  }
