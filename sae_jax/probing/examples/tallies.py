"""Counts of what recurs, and the first of each group, over flat arrays."""

from collections.abc import Iterable, Sequence

import numpy as np

# Keys that are sorted at a time, and cells that are counted one by one.
CHUNK = 2**20


def key_dtype(cells: int) -> type:
  """The narrowest type of keys below `cells`: narrow keys sort faster."""
  return np.uint32 if cells <= 2**32 else np.uint64


def runs(array_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Where each run of equal entries starts, and its length, int64."""
  is_edge = np.ones(len(array_P) + 1, bool)
  np.not_equal(array_P[1:], array_P[:-1], out=is_edge[1:-1])
  (edges,) = np.nonzero(is_edge)
  return edges[:-1], np.diff(edges)


def places(array_P: np.ndarray) -> np.ndarray:
  """The place of each entry in its run of equal entries, from 0."""
  starts, sizes = runs(array_P)
  return np.arange(len(array_P)) - np.repeat(starts, sizes)


def tally(
  keys: Iterable[np.ndarray], cells: int, total: int
) -> tuple[np.ndarray, np.ndarray]:
  """How often each key occurs.

  Args:
    keys: flat arrays of keys from 0 to cells - 1, of `key_dtype(cells)`.
    cells: number of keys that there may be.
    total: number of keys in all arrays together.

  Returns:
    The keys that occur, ascending, and how often each does, int64. Memory is of
    the order of these and of `CHUNK`.
  """
  if cells <= min(total, CHUNK):
    counts = np.zeros(cells, np.int64)
    for part in _chunks(keys):
      counts += np.bincount(part, minlength=cells)
    (present,) = np.nonzero(counts)
    return present, counts[present]
  kept, counts = np.zeros(0, key_dtype(cells)), np.zeros(0, np.int64)
  for part in _chunks(keys):
    part.sort()
    starts, sizes = runs(part)
    kept, counts = _merge((kept, counts), (part[starts], sizes))
  return kept, counts


def _chunks(keys: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
  """The keys in arrays of some `CHUNK`, which are the caller's to change."""
  parts, size = [], 0
  for part in keys:
    parts.append(part)
    size += len(part)
    if size >= CHUNK:
      yield np.concatenate(parts)
      parts, size = [], 0
  if size:
    yield np.concatenate(parts)


def _merge(
  a: tuple[np.ndarray, np.ndarray], b: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Two tallies as one."""
  if not len(a[0]) or not len(b[0]):
    return b if len(b[0]) else a
  keys, counts = np.concatenate([a[0], b[0]]), np.concatenate([a[1], b[1]])
  order = np.argsort(keys)
  starts, _ = runs(keys[order])
  return keys[order[starts]], np.add.reduceat(counts[order], starts)


def leaders(
  group_P: np.ndarray,
  coarse_P: np.ndarray,
  order: Sequence[np.ndarray],
  most: int,
) -> tuple[np.ndarray, np.ndarray]:
  """The first entries of each group.

  Args:
    group_P: group of each entry, from 0 to 2**31 - 1.
    coarse_P: uint32, never falling along `order`: of two entries of a group the
      one that comes first has the lower number, or both have the same.
    order: arrays by which the entries of a group are ordered, the most
      important first, each ascending.
    most: entries that are wanted of a group.

  Returns:
    Indices of the wanted entries, by group and then in order, and the place of
    each one among its group's, from 0.
  """
  # Most entries are far from the first, and one fast sort tells them apart.
  key_P = group_P.astype(np.uint64) << np.uint64(32) | coarse_P
  sorted_P = np.sort(key_P)
  starts, sizes = runs(sorted_P >> np.uint64(32))
  last = starts + np.minimum(most, sizes) - 1
  bound = np.zeros(int(group_P.max(initial=-1)) + 1, np.uint64)
  bound[sorted_P[starts] >> np.uint64(32)] = sorted_P[last]
  (near,) = np.nonzero(key_P <= bound[group_P])
  ranks = [array[near] for array in (group_P, *order)]
  near = near[np.lexsort(ranks[::-1])]
  place = places(group_P[near])
  wanted = place < most
  return near[wanted], place[wanted]
