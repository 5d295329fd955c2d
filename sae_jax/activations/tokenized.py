"""Documents to contexts: tokenized here or in other processes, cut or packed.

The contexts are a pure function of the documents, the tokenizer and how they
are cut. How many processes tokenize changes nothing.
"""

import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
import itertools
from multiprocessing import connection
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from typing import NamedTuple

import numpy as np
import tokenizers

from sae_jax import config
from sae_jax.activations import corpus

# What is sent to a process at once: so many documents, or the first few that
# have so many characters.
_BATCH_DOCUMENTS = 32
_BATCH_CHARACTERS = 2**18
# Batches a process has at most, the one it works on included.
_BATCHES_AHEAD = 2
_SECONDS_TO_END = 5


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
      raise config.UserError(f'{name} {value} must be {lowest} or more')
  if min_context_tokens > context_length:
    raise config.UserError(
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
      tokenize(rest, tokenizer, workers),
      limit,
      np.array([] if bos is None else [bos], np.int32),
      start,
    ),
    context_length,
    min_context_tokens,
    start.number,
  )


def tokenize(
  documents: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer | str,
  workers: int = 0,
) -> Iterator[tuple[corpus.Document, np.ndarray]]:
  """Documents with their int32 [l] token ids, in their order.

  Args:
    documents: the texts; at most some batches are read ahead.
    tokenizer: a tokenizer, or the text of its tokenizer.json.
    workers: processes that tokenize; 0 to do it in this one.

  Raises:
    UserError: as `contexts` does.
  """
  if workers < 0:
    raise config.UserError(f'workers {workers} must be 0 or more')
  if isinstance(tokenizer, str):
    try:
      tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
    except Exception as error:  # The library raises nothing narrower.
      raise config.UserError(
        f'the tokenizer cannot be read ({error}): give the text of a '
        'tokenizer.json'
      ) from error
  if not workers:
    return _tokenize_here(documents, tokenizer)
  try:
    # Its JSON does not say whether special tokens in a text are text.
    sent = tokenizer.to_str(), tokenizer.encode_special_tokens
  except Exception as error:
    raise config.UserError(
      f'the tokenizer cannot be sent to other processes ({error}): use '
      'workers 0'
    ) from error
  return _tokenize_there(documents, sent, workers)


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


def _encode(
  encode: Callable[[str], tokenizers.Encoding], texts: list[str]
) -> tuple[list[np.ndarray], str | None]:
  """Token ids of texts up to the first that fails, and why it does."""
  found = []
  for text in texts:
    try:
      found.append(np.asarray(encode(text).ids, np.int32))
    except Exception as error:
      return found, f'{type(error).__name__}: {error}'.partition('\n')[0]
  return found, None


def _paired(batch, found, failure):
  yield from zip(batch, found)
  if failure is not None:
    document = batch[len(found)]
    raise config.UserError(
      f'document {document.number}, of {document.source}, cannot be tokenized '
      f'({failure}): leave it out'
    )


def _tokenize_here(documents, tokenizer):
  for document in documents:
    yield from _paired([document], *_encode(tokenizer.encode, [document.text]))


def _batches(documents) -> Iterator[list[corpus.Document] | Exception]:
  """Batches, then the error that ended the documents, if one did."""
  batch, characters, failure = [], 0, None
  documents = iter(documents)
  while failure is None:
    try:
      document = next(documents)
    except StopIteration:
      break
    except Exception as error:
      failure = error
      break
    batch.append(document)
    characters += len(document.text)
    if len(batch) == _BATCH_DOCUMENTS or characters >= _BATCH_CHARACTERS:
      yield batch
      batch, characters = [], 0
  if batch:
    yield batch
  if failure is not None:
    yield failure


def _tokenize_there(documents, sent, workers):
  failure, waiting = None, collections.deque()
  with contextlib.ExitStack() as stack:
    started = []
    for number, batch in enumerate(_batches(documents)):
      if isinstance(batch, Exception):
        failure = batch
        break
      if len(started) < workers:
        started.append(_Worker(sent, len(started) + 1, workers))
        stack.callback(started[-1].close)
      elif len(waiting) == _BATCHES_AHEAD * workers:
        done, worker = waiting.popleft()
        yield from _paired(done, *worker.receive())
      # In turn, so that who does what, and the order, are known.
      worker = started[number % workers]
      worker.send([document.text for document in batch])
      waiting.append((batch, worker))
    for done, worker in waiting:
      yield from _paired(done, *worker.receive())
  if failure is not None:
    raise failure


class _Worker:
  """A process that tokenizes; it ends when this end of its line is closed.

  The kernel closes it however this process ends. It is no child of
  multiprocessing: that would import the main program again, and with it JAX.
  """

  def __init__(self, sent, number: int, workers: int):
    self._name = f'tokenizing process {number} of {workers}'
    ours, theirs = socket.socketpair()
    with theirs:
      code = (
        'from sae_jax.activations import tokenized; '
        f'tokenized._serve({theirs.fileno()})'
      )
      path = os.pathsep.join(place or os.getcwd() for place in sys.path)
      self._process = subprocess.Popen(
        [sys.executable, '-c', code],
        env=os.environ
        | {'PYTHONPATH': path, 'TOKENIZERS_PARALLELISM': 'false'},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
      )
    self._line = connection.Connection(ours.detach())
    self.send(sent)

  def send(self, job) -> None:
    try:
      self._line.send(job)
    except OSError as error:
      raise self._died() from error

  def receive(self):
    try:
      return self._line.recv()
    except (EOFError, OSError) as error:
      raise self._died() from error

  def _died(self) -> config.UserError:
    self._line.close()
    code = self._end()
    how = f'with exit code {code}'
    if code < 0:
      how = f'by {signal.Signals(-code).name}'
      if -code == signal.SIGKILL:
        how += ', which is often want of memory'
    return config.UserError(
      f'{self._name} was ended {how}: use fewer workers, or 0 to tokenize in '
      'the main process'
    )

  def _end(self) -> int:
    try:
      return self._process.wait(_SECONDS_TO_END)
    except subprocess.TimeoutExpired:
      self._process.kill()
      return self._process.wait()

  def close(self) -> None:
    self._line.close()
    self._end()


def _serve(descriptor: int) -> None:
  """What a worker does, until the other end is closed."""
  # Ctrl-C goes to the whole group; the main process says when to end.
  signal.signal(signal.SIGINT, signal.SIG_IGN)
  line = connection.Connection(descriptor)
  jobs = queue.SimpleQueue()

  def listen():
    try:
      while True:
        jobs.put(line.recv())
    except (EOFError, OSError):
      os._exit(0)

  # Jobs are taken in while others are done: else both ends might wait for
  # the other to read. And the end of the line ends a job that takes long.
  threading.Thread(target=listen, daemon=True).start()
  text, special_is_text = jobs.get()
  tokenizer = tokenizers.Tokenizer.from_str(text)
  tokenizer.encode_special_tokens = special_is_text

  def encode(text):
    # Lets other threads run, which `tokenizer.encode` does not.
    return tokenizer.encode_batch([text])[0]

  while True:
    found = _encode(encode, jobs.get())
    try:
      line.send(found)
    except OSError:
      os._exit(0)
