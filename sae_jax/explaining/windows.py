"""The texts of test documents, cut into windows, and whose they are.

Contexts are cut into windows of so many tokens, one after the other, from their
first token that is not masked on. None has tokens of two documents, nor a
masked token, on which nobody knows whether a latent is active. Documents are
split by a hash of their tokens, so that two of the same text are on the same
side: explanations are made of one side and scored on the other.
"""

import hashlib
from typing import NamedTuple

import numpy as np

from sae_jax import errors
from sae_jax import store as store_lib

EXPLAINER, SCORER = 0, 1
# A shorter window, as a part of the whole ones, is no text to judge.
_SHORTEST = 4


class Windows(NamedTuple):
  """Windows of consecutive test rows, W of them, in the order of the stream.

  Attributes:
    first_row: the first of the store's rows that they are of.
    tokens_L: tokens of the stream from the first row's on, masked ones too.
    place_R: of each row its place among the tokens, ascending.
    window_R: of each row its window; -1 if that was left out, as it is too
      short or has a masked token.
    start_W: where each window begins among the tokens.
    stop_W: past its last token.
    document_W: the document that it is of.
    side_W: EXPLAINER or SCORER.
  """

  first_row: int
  tokens_L: np.ndarray
  place_R: np.ndarray
  window_R: np.ndarray
  start_W: np.ndarray
  stop_W: np.ndarray
  document_W: np.ndarray
  side_W: np.ndarray

  def tokens(self, window: int) -> np.ndarray:
    """The tokens of a window."""
    return self.tokens_L[self.start_W[window] : self.stop_W[window]]

  def rows(self, window: int) -> range:
    """Its rows, counted from `first_row`."""
    ends = self.start_W[window], self.stop_W[window]
    return range(*np.searchsorted(self.place_R, ends).tolist())


def side(tokens: np.ndarray) -> int:
  """The side of a document: a hash of its tokens mod 2."""
  data = np.ascontiguousarray(tokens, '<i4').tobytes()
  return hashlib.blake2b(data, digest_size=8).digest()[0] % 2


def cut(store: store_lib.Store, most_rows: int, width: int) -> Windows:
  """Windows of the first test documents of a store.

  Args:
    store: the store.
    most_rows: rows that they have at most; a document is whole or left out.
    width: tokens of a window. Shorter ones, at the end of a context, are kept
      from a quarter of it on.

  Raises:
    UserError: if there is no whole document, or no documents of one side.
  """
  rows = store.test_rows
  stop = min(rows.stop, rows.start + most_rows)
  place_R = store.stream_index(rows.start, stop)
  first, last = int(place_R[0]), store.manifest.n_stream
  if stop < rows.stop:
    last = int(store.stream_index(stop, stop + 1)[0]) + 1
  tokens_L, document_L, position_L = store.stream(first, last)
  place_R = place_R - first
  if stop < rows.stop:
    # The document of the first row that is too much.
    length = int(np.searchsorted(document_L, document_L[-1]))
    tokens_L, document_L, position_L = (
      of[:length] for of in (tokens_L, document_L, position_L)
    )
    place_R = place_R[: np.searchsorted(place_R, length)]
  if not len(place_R):
    raise errors.UserError(
      f'rows {most_rows} of store {store.url} are less than its first test '
      'document: give more'
    )
  kept_L = np.zeros(len(tokens_L), bool)
  kept_L[place_R] = True
  start_W, stop_W = _bounds(kept_L, document_L, position_L, width)
  before = np.append(0, np.cumsum(kept_L))
  has_W = before[stop_W] - before[start_W] == stop_W - start_W
  has_W &= stop_W - start_W >= width / _SHORTEST
  number_W = np.where(has_W, np.cumsum(has_W) - 1, -1)
  # Every row is in a window, as those begin with one.
  window_R = number_W[np.searchsorted(start_W, place_R, 'right') - 1]
  start_W, stop_W = start_W[has_W], stop_W[has_W]
  document_W = document_L[start_W]
  side_W = _sides(tokens_L, document_L)[start_W]
  for number, name in ((EXPLAINER, 'explainer'), (SCORER, 'scorer')):
    if not (side_W == number).any():
      raise errors.UserError(
        f'the {len(np.unique(document_W))} test documents of store {store.url} '
        f'are none of them for the {name}: harvest more documents, or give '
        'more --rows'
      )
  return Windows(
    rows.start, tokens_L, place_R, window_R, start_W, stop_W, document_W, side_W
  )


def _bounds(kept_L, document_L, position_L, width):
  """Where windows begin and end: at contexts, documents and every `width`."""
  begins_L = np.append(True, document_L[1:] != document_L[:-1])
  begins_L |= position_L == 0
  place_L = np.arange(len(document_L))
  run_L = np.cumsum(begins_L) - 1
  first_U = np.full(run_L[-1] + 1, len(place_L))
  np.minimum.at(first_U, run_L[kept_L], place_L[kept_L])
  within_L = place_L - first_U[run_L]
  start_W = np.flatnonzero((within_L >= 0) & (within_L % width == 0))
  ends = np.append(np.flatnonzero(begins_L), len(place_L))
  next_W = np.append(start_W[1:], len(place_L))
  return start_W, np.minimum(next_W, ends[run_L[start_W] + 1])


def _sides(tokens_L: np.ndarray, document_L: np.ndarray) -> np.ndarray:
  """The side of each token's document."""
  starts = np.flatnonzero(np.append(True, document_L[1:] != document_L[:-1]))
  stops = np.append(starts[1:], len(document_L))
  sides = [side(tokens_L[a:b]) for a, b in zip(starts, stops)]
  return np.repeat(sides, stops - starts)
