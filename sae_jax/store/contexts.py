"""The text of a store's test rows, context by context."""

from typing import NamedTuple

import numpy as np

from sae_jax import errors
from sae_jax.store.text import Text


class Contexts(NamedTuple):
  """Whole contexts of a store's token stream, C of them.

  Attributes:
    tokens_CT: int32, padded on the right with the context's last token.
    length_C: number of tokens of each context.
    kept_CT: whether the store holds the token's activation (it is not masked).
    document_C: the document that each context is of.
  """

  tokens_CT: np.ndarray
  length_C: np.ndarray
  kept_CT: np.ndarray
  document_C: np.ndarray


def test_contexts(store: Text, n_tokens: int) -> Contexts:
  """Whole contexts of test documents, in the order of the token stream.

  A context of a single token is left out: there is nothing to predict. So is a
  packed one that begins with a document of another split.

  Args:
    store: the text.
    n_tokens: contexts are added until they hold this many tokens or no more
      are left.

  Raises:
    UserError: if there is no such context.
  """
  documents = store.documents()
  place_R = store.stream_index()
  document = documents[place_R[store.test_rows.start]]
  first = np.searchsorted(documents, document)
  return _contexts(store, int(first), len(documents), n_tokens, 'test')


def training_contexts(store: Text, n_tokens: int) -> Contexts:
  """Whole contexts of the first training documents; see `test_contexts`."""
  last = store.stream_index()[store.n_train - 1]
  return _contexts(store, 0, int(last) + 1, n_tokens, 'training')


def _contexts(
  store: Text, first: int, stop: int, n_tokens: int, split: str
) -> Contexts:
  """Contexts among tokens first to stop of the stream."""
  place_R, positions = store.stream_index(), store.positions()
  documents = store.documents()
  starts = first + np.flatnonzero(positions[first:stop] == 0)
  ends = np.append(starts[1:], stop)
  long = ends - starts > 1
  starts, ends = starts[long], ends[long]
  if not len(starts):
    raise errors.UserError(
      f'the {split} documents have no context of their own of two or more '
      'tokens: '
      'harvest with a min_context_tokens of 2 or more, or a larger '
      'holdout_fraction'
    )
  enough = np.searchsorted(np.cumsum(ends - starts), n_tokens) + 1
  starts, ends = starts[:enough], ends[:enough]
  kept = np.zeros(len(positions), bool)
  kept[place_R] = True
  longest = int((ends - starts).max())
  length = store.manifest.context_length or longest
  if longest > length:
    raise errors.UserError(
      f'store {store.url} has a context of {longest} tokens, its manifest says '
      f'that the longest has {length}: harvest it again'
    )
  shape = (len(starts), length)
  tokens_CT, kept_CT = np.zeros(shape, np.int32), np.zeros(shape, bool)
  for row, (start, end) in enumerate(zip(starts, ends)):
    tokens_CT[row, : end - start] = store.tokens()[start:end]
    # One of another context may have an embedding that is not finite.
    tokens_CT[row, end - start :] = store.tokens()[end - 1]
    kept_CT[row, : end - start] = kept[start:end]
  return Contexts(tokens_CT, ends - starts, kept_CT, documents[starts])
