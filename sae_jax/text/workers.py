"""Tokenizing documents, in this process or in others."""

import collections
from collections.abc import Callable, Iterable, Iterator
import contextlib
from multiprocessing import connection
import os
import queue
import signal
import socket
import subprocess
import sys
import threading

import numpy as np
import tokenizers

from sae_jax import errors
from sae_jax.text import corpus

# A process is sent a batch of documents at a time. A batch is full at either of
# these.
_BATCH_DOCUMENTS = 32
_BATCH_CHARACTERS = 2**18
# Largest number of batches sent to a process, the one it works on included.
_BATCHES_AHEAD = 2
_SECONDS_TO_END = 5


def tokenize(
  documents: Iterable[corpus.Document],
  tokenizer: tokenizers.Tokenizer | str,
  workers: int = 0,
) -> Iterator[tuple[corpus.Document, np.ndarray]]:
  """Documents with their int32 [l] token ids, in their order.

  Args:
    documents: the texts; a few batches are read ahead.
    tokenizer: a tokenizer, or the text of its tokenizer.json; tokens that its
      post-processor adds are left out.
    workers: processes that tokenize; 0 tokenizes in this process.

  Raises:
    UserError: as `contexts` does.
  """
  if workers < 0:
    raise errors.UserError(f'workers {workers} must be 0 or more')
  if isinstance(tokenizer, str):
    try:
      tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
      tokenizer.no_padding()
      tokenizer.no_truncation()
    except BaseException as error:  # The library raises nothing narrower.
      if not errors.is_failure(error):
        raise
      raise errors.UserError(
        f'the tokenizer cannot be read ({errors.reason(error)}): give the text '
        'of a tokenizer.json'
      ) from error
  if not workers:
    return _tokenize_here(documents, tokenizer)
  try:
    # The JSON does not hold `encode_special_tokens`.
    model = tokenizer.to_str(), tokenizer.encode_special_tokens
  except Exception as error:
    raise errors.UserError(
      'the tokenizer cannot be sent to other processes '
      f'({errors.reason(error)}): use workers 0'
    ) from error
  return _tokenize_there(documents, model, workers)


def _encode(
  encode: Callable[[str], tokenizers.Encoding], texts: list[str]
) -> tuple[list[np.ndarray], str | None]:
  """Token ids of the texts before the first that fails, and its error."""
  tokens = []
  for text in texts:
    try:
      tokens.append(np.asarray(encode(text).ids, np.int32))
    except BaseException as error:
      if not errors.is_failure(error):
        raise
      return tokens, errors.reason(error)
  return tokens, None


def _paired(batch, tokens, failure):
  """Documents of a batch with their tokens, then an error for a failure."""
  yield from zip(batch, tokens)
  if failure is not None:
    document = batch[len(tokens)]
    raise errors.UserError(
      f'document {document.number}, of {document.source}, cannot be tokenized '
      f'({failure}): leave it out'
    )


def _tokenize_here(documents, tokenizer):
  def encode(text):
    return tokenizer.encode(text, add_special_tokens=False)

  for document in documents:
    yield from _paired([document], *_encode(encode, [document.text]))


def _batches(documents) -> Iterator[list[corpus.Document] | Exception]:
  """Batches of documents; last the error that reading them raised, if any."""
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


def _tokenize_there(documents, model, workers):
  failure, waiting = None, collections.deque()
  with contextlib.ExitStack() as stack:
    processes = []
    for number, batch in enumerate(_batches(documents)):
      if isinstance(batch, Exception):
        failure = batch
        break
      if len(processes) < workers:
        processes.append(_Worker(model, len(processes) + 1, workers))
        stack.callback(processes[-1].close)
      elif len(waiting) == _BATCHES_AHEAD * workers:
        oldest, worker = waiting.popleft()
        yield from _paired(oldest, *worker.receive())
      # Processes take batches in turn: so results come in the batches' order.
      worker = processes[number % workers]
      worker.send([document.text for document in batch])
      waiting.append((batch, worker))
    for batch, worker in waiting:
      yield from _paired(batch, *worker.receive())
  if failure is not None:
    raise failure


class _Worker:
  """A process that tokenizes; it ends when our end of the line is closed.

  The kernel closes the line however this process ends. multiprocessing is not
  used: it would import the main program again, and with it JAX.
  """

  def __init__(self, model, number: int, workers: int):
    self._name = f'tokenizing process {number} of {workers}'
    ours, theirs = socket.socketpair()
    with theirs:
      code = (
        f'from sae_jax.text import workers; workers._serve({theirs.fileno()})'
      )
      path = os.pathsep.join(folder or os.getcwd() for folder in sys.path)
      self._process = subprocess.Popen(
        [sys.executable, '-c', code],
        env=os.environ
        | {'PYTHONPATH': path, 'TOKENIZERS_PARALLELISM': 'false'},
        stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()],
        # Ctrl-C goes to the whole group of the main process, which says when to
        # end: there it would be a traceback while Python starts.
        process_group=0,
      )
    self._line = connection.Connection(ours.detach())
    self.send(model)

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

  def _died(self) -> errors.UserError:
    self._line.close()
    code = self._end()
    how = f'with exit code {code}'
    if code < 0:
      how = f'by {signal.Signals(-code).name}'
      if -code == signal.SIGKILL:
        how += ', which often means too little memory'
    return errors.UserError(
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
  """Runs a worker until the other end of the line is closed."""
  line = connection.Connection(descriptor)
  jobs = queue.SimpleQueue()

  def listen():
    try:
      while True:
        jobs.put(line.recv())
    except (EOFError, OSError):
      os._exit(0)

  # A thread receives jobs while others run: otherwise both ends could wait for
  # the other to read. It also ends a long job when the line is closed.
  threading.Thread(target=listen, daemon=True).start()
  text, special_is_text = jobs.get()
  tokenizer = tokenizers.Tokenizer.from_str(text)
  tokenizer.encode_special_tokens = special_is_text

  def encode(text):
    # Unlike `tokenizer.encode` this lets other threads run.
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]

  while True:
    result = _encode(encode, jobs.get())
    try:
      line.send(result)
    except OSError:
      os._exit(0)
