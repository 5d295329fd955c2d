"""Documents to contexts: tokenized, then cut or packed.

The contexts are a pure function of the documents, the tokenizer and how they
are cut. How many processes tokenize changes nothing.
"""

from collections.abc import Iterable, Iterator
import contextlib
import itertools
from typing import NamedTuple

import numpy as np
import tokenizers

from sae_jax import errors
from sae_jax.text import corpus
from sae_jax.text import workers as workers_lib


class Place(NamedTuple):
  """Where a context begins, from where `contexts` can go on.

  Attributes:
    document: the corpus's number of the document.
    offset: tokens of it that come before, a BOS among them.
    number: the document's number in the contexts.
  """

  document: int = 0
  offset: int = 0
  number: int = 0


START = Place()


class Context(NamedTuple):
  """Tokens the subject sees at once.

  Attributes:
    tokens: int32 [l] token ids.
    documents: int32 [l] number of each token's document, ascending.
    sources: the source of each document of the context, in their order.
    place: where it begins.
  """

  tokens: np.ndarray
  documents: np.ndarray
  sources: tuple[str, ...]
  place: Place

  @property
  def positions(self) -> np.ndarray:
    """int32 [l] places in the context, 0 at its start."""
    return np.arange(len(self.tokens), dtype=np.int32)

  def segments(self) -> list[tuple[int, str, slice]]:
    """Each document's number, source and place in the context, in order."""
    starts = np.flatnonzero(np.diff(self.documents, prepend=-1))
    ends = [*starts[1:].tolist(), len(self.tokens)]
    return [
      (int(self.documents[start]), source, slice(start, end))
      for source, start, end in zip(self.sources, starts.tolist(), ends)
    ]


def contexts(
  documents: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer | str,
  *,
  context_length: int,
  max_contexts_per_document: int | None = None,
  min_context_tokens: int = 1,
  pack: bool = False,
  bos: int | None = None,
  workers: int = 0,
  start: Place = START,
) -> Iterator[Context]:
  """Contexts of documents, in their order.

  Documents are numbered from 0; those that give no context have no number.
  Close the iterator to end its processes early.

  Args:
    documents: the texts.
    tokenizer: a tokenizer, or the text of its tokenizer.json.
    context_length: most tokens in a context.
    max_contexts_per_document: a document is cut off after the tokens of so
      many contexts; None for no limit.
    min_context_tokens: shorter contexts are left out; of packed ones, only
      the last can be shorter than context_length.
    pack: lay documents end to end and cut every context_length tokens, so
      that a context may hold several and a document go on in the next one.
      Else each document begins a context.
    bos: token id that is put before each document; None for none.
    workers: processes that tokenize; 0 to do it in this one.
    start: the place of a context, with which they begin; documents before it
      are not tokenized.

  Raises:
    UserError: if a number is out of range, the tokenizer cannot be read or
      sent, a document cannot be tokenized, or a process dies; and what
      reading the documents raises, after the contexts that came before.
  """
  least = {
    'context_length': (context_length, 1),
    'min_context_tokens': (min_context_tokens, 1),
    'max_contexts_per_document': (max_contexts_per_document or 1, 1),
    'bos': (bos or 0, 0),
  }
  for name, (value, lowest) in least.items():
    if value < lowest:
      raise errors.UserError(f'{name} {value} must be {lowest} or more')
  if min_context_tokens > context_length:
    raise errors.UserError(
      f'min_context_tokens {min_context_tokens} is above context_length '
      f'{context_length}: no context would be left'
    )
  limit = None
  if max_contexts_per_document is not None:
    limit = max_contexts_per_document * context_length
  join = _packed if pack else _cut
  rest = itertools.dropwhile(lambda d: d.number < start.document, documents)
  return join(
    _with_offsets(
      workers_lib.tokenize(rest, tokenizer, workers),
      limit,
      np.array([] if bos is None else [bos], np.int32),
      start,
    ),
    context_length,
    min_context_tokens,
    start.number,
  )


def _with_offsets(tokenized, limit, bos, start):
  """Documents, their tokens from an offset on, and the offset."""
  with contextlib.closing(tokenized):
    for document, tokens in tokenized:
      if len(tokens):
        tokens = np.concatenate([bos, tokens])[:limit]
      offset = start.offset if document.number == start.document else 0
      yield document, tokens[offset:], offset


def _cut(tokenized, length, least, number) -> Iterator[Context]:
  with contextlib.closing(tokenized):
    for document, tokens, offset in tokenized:
      found = False
      for begin in range(0, len(tokens), length):
        piece = tokens[begin : begin + length]
        if len(piece) >= least:
          found = True
          yield Context(
            piece,
            np.full(len(piece), number, np.int32),
            (document.source,),
            Place(document.number, offset + begin, number),
          )
      number += found


def _packed(tokenized, length, least, number) -> Iterator[Context]:
  held, room = [], length
  with contextlib.closing(tokenized):
    for document, tokens, offset in tokenized:
      if not len(tokens):
        continue
      while len(tokens):
        part, tokens = tokens[:room], tokens[room:]
        place = Place(document.number, offset, number)
        held.append((part, document.source, place))
        offset += len(part)
        room -= len(part)
        if not room:
          yield _joined(held)
          held, room = [], length
      number += 1
    if length - room >= least:
      yield _joined(held)


def _joined(held: list[tuple[np.ndarray, str, Place]]) -> Context:
  tokens, sources, places = zip(*held)
  numbers = np.array([place.number for place in places], np.int32)
  return Context(
    np.concatenate(tokens),
    np.repeat(numbers, [len(part) for part in tokens]),
    sources,
    places[0],
  )
