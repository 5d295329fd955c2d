"""Documents to contexts: tokenized, then cut or packed.

Where there is a BOS, every context begins with it, and so does every document
in a context. A BOS that a text begins with itself is that one.

The contexts are a pure function of the documents, the tokenizer and the
settings. The number of processes that tokenize changes nothing.
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


class Start(NamedTuple):
  """Where a context begins in the text; `contexts` can begin there.

  Attributes:
    document: the document's number in the corpus.
    offset: tokens of the document's text before the context.
    number: the document's number in the contexts.
  """

  document: int = 0
  offset: int = 0
  number: int = 0


BEGINNING = Start()


class Context(NamedTuple):
  """Tokens that the subject reads together.

  Attributes:
    tokens: int32 [l] token ids.
    documents: int32 [l] number of each token's document, ascending.
    sources: the source of each document of the context, in their order.
    start: where it begins in the text.
  """

  tokens: np.ndarray
  documents: np.ndarray
  sources: tuple[str, ...]
  start: Start

  @property
  def positions(self) -> np.ndarray:
    """int32 [l], position of each token in the context, from 0."""
    return np.arange(len(self.tokens), dtype=np.int32)

  def segments(self) -> list[tuple[int, str, slice]]:
    """Number, source and slice of the context of each document, in order."""
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
  start: Start = BEGINNING,
) -> Iterator[Context]:
  """Contexts of documents, in the documents' order.

  Documents are numbered from 0; those that give no context have no number.
  Close the iterator to end its processes early.

  Args:
    documents: the texts.
    tokenizer: a tokenizer, or the text of its tokenizer.json.
    context_length: largest number of tokens in a context.
    max_contexts_per_document: a document is cut off after the text of this
      many contexts; None for no limit.
    min_context_tokens: shorter contexts are left out. When packing, only the
      last context can be shorter than context_length.
    pack: lay documents end to end and cut every context_length tokens: a
      context may hold several documents, and a document may go on in the next
      context. Without it each document begins a context.
    bos: token id that begins each context, and each document in it; None for
      none.
    workers: processes that tokenize; 0 tokenizes in this process.
    start: `start` of the context to begin with; documents before it are not
      tokenized.

  Raises:
    UserError: if a number is out of range, the tokenizer cannot be read or
      sent, a document cannot be tokenized, or a process dies. An error in
      reading the documents is raised after the contexts that came before it.
  """
  _check_settings(
    context_length, max_contexts_per_document, min_context_tokens, bos
  )
  begin = np.array([] if bos is None else [bos], np.int32)
  limit = None
  if max_contexts_per_document is not None:
    limit = max_contexts_per_document * (context_length - len(begin))
  join = _packed if pack else _cut
  rest = itertools.dropwhile(lambda d: d.number < start.document, documents)
  return join(
    _with_offsets(
      workers_lib.tokenize(rest, tokenizer, workers), limit, begin, start
    ),
    begin,
    context_length,
    min_context_tokens,
    start.number,
  )


def _check_settings(
  context_length, max_contexts_per_document, min_context_tokens, bos
):
  lower_bounds = {
    'context_length': (context_length, 1),
    'min_context_tokens': (min_context_tokens, 1),
    'max_contexts_per_document': (max_contexts_per_document or 1, 1),
    'bos': (bos or 0, 0),
  }
  for name, (value, lowest) in lower_bounds.items():
    if value < lowest:
      raise errors.UserError(f'{name} {value} must be {lowest} or more')
  if bos is not None and context_length < 2:
    raise errors.UserError(
      f'context_length {context_length} has room for a BOS alone: use 2 or more'
    )
  if min_context_tokens > context_length:
    raise errors.UserError(
      f'min_context_tokens {min_context_tokens} is above context_length '
      f'{context_length}: no context would be left'
    )


def _with_offsets(tokenized, limit, begin, start):
  """Each document with its tokens from an offset on, and the offset."""
  with contextlib.closing(tokenized):
    for document, tokens in tokenized:
      if len(begin) and np.array_equal(tokens[:1], begin):
        tokens = tokens[1:]
      offset = start.offset if document.number == start.document else 0
      yield document, tokens[offset:limit], offset


def _cut(tokenized, begin, length, min_tokens, number) -> Iterator[Context]:
  """Contexts of one document each, numbered from `number`."""
  step = length - len(begin)
  with contextlib.closing(tokenized):
    for document, tokens, offset in tokenized:
      has_context = False
      for place in range(0, len(tokens), step):
        piece = np.concatenate([begin, tokens[place : place + step]])
        if len(piece) >= min_tokens:
          has_context = True
          yield Context(
            piece,
            np.full(len(piece), number, np.int32),
            (document.source,),
            Start(document.number, offset + place, number),
          )
      number += has_context


def _packed(tokenized, begin, length, min_tokens, number) -> Iterator[Context]:
  """Contexts of documents end to end, numbered from `number`."""
  pieces, room = [], length
  with contextlib.closing(tokenized):
    for document, tokens, offset in tokenized:
      if not len(tokens):
        continue
      while len(tokens):
        piece = np.concatenate([begin, tokens[: room - len(begin)]])
        start = Start(document.number, offset, number)
        pieces.append((piece, document.source, start))
        taken = len(piece) - len(begin)
        tokens, offset = tokens[taken:], offset + taken
        room -= len(piece)
        if not room:
          yield _joined(pieces)
          pieces, room = [], length
      number += 1
    if length - room >= min_tokens:
      yield _joined(pieces)


def _joined(pieces: list[tuple[np.ndarray, str, Start]]) -> Context:
  """The context of pieces of documents, laid end to end."""
  tokens, sources, starts = zip(*pieces)
  numbers = np.array([start.number for start in starts], np.int32)
  return Context(
    np.concatenate(tokens),
    np.repeat(numbers, [len(piece) for piece in tokens]),
    sources,
    starts[0],
  )
