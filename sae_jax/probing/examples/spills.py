"""Spills: files of the codes of consecutive rows, sorted by latent.

The pairs of any block of latents are a slice of each spill, which also holds
the text of its rows, and the rows before and after its own that a window may
reach: a window needs one spill alone.
"""

from collections.abc import Callable, Iterable
import dataclasses
import pathlib
from typing import Any, NamedTuple

import numpy as np

from sae_jax import store as store_lib
from sae_jax.probing.examples import tallies

# Entries of the codes of a spill: some 40 MB while it is made.
ENTRIES = 2**20
_SLOTS = np.uint64(2**32 - 1)
_HALF = np.uint64(32)


@dataclasses.dataclass(frozen=True)
class Spill:
  """Files of the codes of consecutive rows.

  Attributes:
    folder: where they are.
    start: the spill's first row of the store.
    stop: the row after its last.
    first: the first row whose pairs it holds, for windows.
    last: the row after the last of those.
    k: most active latents of a row.
    n_pairs: positive codes of rows first to last and of wanted latents.
    n_tokens: tokens of the stream that windows of its rows may show.
  """

  folder: str
  start: int
  stop: int
  first: int
  last: int
  k: int
  n_pairs: int
  n_tokens: int

  def array(self, name: str) -> np.ndarray:
    """An array of it, mapped from its file.

    pairs [P] uint64, latent * 2**32 + (row - first) * k + rank, ascending, and
    values [P] float32; latents [stop - start, K] int32, -1 if not active;
    places [last - first] int64, each row's place among the tokens; befores
    [L + 1] int64, how many of the rows lie before a token; tokens, documents,
    and each one's context as begins and ends, its first token and the one after
    its last, [L] int32.
    """
    dtype, shape = {
      'pairs': (np.uint64, (self.n_pairs,)),
      'values': (np.float32, (self.n_pairs,)),
      'latents': (np.int32, (self.stop - self.start, self.k)),
      'places': (np.int64, (self.last - self.first,)),
      'befores': (np.int64, (self.n_tokens + 1,)),
    }.get(name, (np.int32, (self.n_tokens,)))
    if not np.prod(shape):
      return np.zeros(shape, dtype)
    return np.memmap(_file(self.folder, self.start, name), dtype, 'r', 0, shape)


class Sizes(NamedTuple):
  """Entries of a spill's own rows, counted.

  Attributes:
    latents: latents that are active.
    rows: number of rows on which each is.
    tokens: token ids of the rows.
    occurrences: rows of each token.
  """

  latents: np.ndarray
  rows: np.ndarray
  tokens: np.ndarray
  occurrences: np.ndarray


class Pairs(NamedTuple):
  """Pairs of a row and a latent that is active there, by latent, then row.

  Attributes:
    latent_P: int64 number, from 0 for the first latent that was asked for.
    row_P: int64, row less the spill's `first`.
    value_P: float32 activation.
  """

  latent_P: np.ndarray
  row_P: np.ndarray
  value_P: np.ndarray


# Pairs of some latents, of each spill in the order of rows, to be read again.
Pieces = Callable[[], Iterable[tuple[Spill, Pairs]]]


def _file(folder: str, start: int, name: str) -> pathlib.Path:
  return pathlib.Path(folder, f'{start:012d}.{name}')


def spans(codes: Any, before: int, after: int) -> list[tuple[int, int]]:
  """Rows of each spill: the first and the one after the last."""
  # The rows around a spill's own are read twice.
  rows = max(ENTRIES // max(1, codes.k), before + after + 1)
  end = codes.start + codes.n_rows
  return [
    (start, min(end, start + rows)) for start in range(codes.start, end, rows)
  ]


def write(
  folder: str,
  codes: Any,
  store: store_lib.Text,
  span: tuple[int, int],
  before: int,
  after: int,
  wanted: list[tuple[int, int]],
) -> tuple[Spill, Sizes]:
  """Writes the spill of some rows.

  Args:
    folder: a local folder.
    codes: see `second_pass`.
    store: the text.
    span: the first row and the one after the last.
    before: tokens that a window shows before its own.
    after: tokens that it shows after.
    wanted: ranges of latents, ascending, whose pairs it holds.
  """
  start, stop = span
  end = codes.start + codes.n_rows
  first, last = max(codes.start, start - before), min(end, stop + after)
  vals_RK, idx_RK = codes.read(first, last)
  k = vals_RK.shape[1]
  active_RK = vals_RK > 0
  (slots,) = np.nonzero(active_RK.reshape(-1))
  pairs_P = idx_RK.reshape(-1)[slots].astype(np.uint64) << _HALF
  pairs_P |= slots.astype(np.uint64)
  # Slots ascend with rows, so that one sort of one key orders both.
  pairs_P.sort()
  slots_P = pairs_P & _SLOTS
  own_P = (slots_P >= (start - first) * k) & (slots_P < (stop - first) * k)
  latents_P = (pairs_P >> _HALF)[own_P].astype(np.int64)
  starts, counts = tallies.runs(latents_P)
  edges = np.searchsorted(
    pairs_P, np.array(wanted, np.uint64).reshape(-1) << _HALF
  )
  pairs_P = np.concatenate(
    [pairs_P[low:high] for low, high in edges.reshape(-1, 2)]
  )
  own = slice(start - first, stop - first)
  arrays = {
    'pairs': pairs_P,
    'values': vals_RK.reshape(-1)[pairs_P & _SLOTS],
    'latents': np.where(active_RK, idx_RK, -1)[own],
    **_text(codes, store, (start, stop, first, last), before, after),
  }
  for name, array in arrays.items():
    array.tofile(_file(folder, start, name))
  spill = Spill(
    folder, start, stop, first, last, k, len(pairs_P), len(arrays['tokens'])
  )
  sizes = Sizes(
    latents_P[starts],
    counts,
    *np.unique(arrays['tokens'][arrays['places'][own]], return_counts=True),
  )
  return spill, sizes


def _text(codes, store, rows, before, after) -> dict[str, np.ndarray]:
  """The tokens that windows of a spill's rows may show, and their contexts."""
  start, stop, first, last = rows
  end = codes.start + codes.n_rows
  places_R = store.stream_index(first, last)
  # Tokens of rows that have no codes would look silent.
  least, most = 0, store.manifest.n_stream
  if codes.start:
    (place,) = store.stream_index(codes.start - 1, codes.start)
    least = place + 1
  if end < store.manifest.n_rows:
    (most,) = store.stream_index(end, end + 1)
  low = max(least, places_R[start - first] - before)
  high = min(most, places_R[stop - 1 - first] + after + 1)
  tokens_L, documents_L, positions_L = store.stream(low, high)
  context_L = np.arange(len(tokens_L)) - positions_L
  starts, sizes = tallies.runs(context_L)
  return {
    'places': (places_R - low).astype(np.int64),
    'befores': np.searchsorted(places_R - low, np.arange(len(tokens_L) + 1)),
    'tokens': tokens_L,
    'documents': documents_L,
    'begins': np.repeat(starts, sizes).astype(np.int32),
    'ends': np.repeat(starts + sizes, sizes).astype(np.int32),
  }


def read(spill: Spill, first: int, stop: int, own: bool = True) -> Pairs:
  """The pairs of latents first to stop in a spill.

  Args:
    spill: the spill.
    first: the first latent.
    stop: the latent after the last.
    own: whether only pairs of the spill's own rows are wanted.
  """
  pairs_P, values_P = spill.array('pairs'), spill.array('values')
  edges = np.array([first, stop], np.uint64) << _HALF
  here = slice(*np.searchsorted(pairs_P, edges))
  pairs_P, values_P = np.array(pairs_P[here]), np.array(values_P[here])
  rows_P = ((pairs_P & _SLOTS) // np.uint64(max(1, spill.k))).astype(np.int64)
  latents_P = (pairs_P >> _HALF).astype(np.int64) - first
  if own and (spill.first, spill.last) != (spill.start, spill.stop):
    own_P = rows_P >= spill.start - spill.first
    own_P &= rows_P < spill.stop - spill.first
    latents_P, rows_P, values_P = (
      array[own_P] for array in (latents_P, rows_P, values_P)
    )
  return Pairs(latents_P, rows_P, values_P)
