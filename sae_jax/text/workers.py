"""Tokenizing, in this process or in others."""

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

# What is sent to a process at once: so many documents, or the first few that
# have so many characters.
_BATCH_DOCUMENTS = 32
_BATCH_CHARACTERS = 2**18
# Batches a process has at most, the one it works on included.
_BATCHES_AHEAD = 2
_SECONDS_TO_END = 5


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
    raise errors.UserError(f'workers {workers} must be 0 or more')
  if isinstance(tokenizer, str):
    try:
      tokenizer = tokenizers.Tokenizer.from_str(tokenizer)
    except Exception as error:  # The library raises nothing narrower.
      raise errors.UserError(
        f'the tokenizer cannot be read ({error}): give the text of a '
        'tokenizer.json'
      ) from error
  if not workers:
    return _tokenize_here(documents, tokenizer)
  try:
    # Its JSON does not say whether special tokens in a text are text.
    sent = tokenizer.to_str(), tokenizer.encode_special_tokens
  except Exception as error:
    raise errors.UserError(
      f'the tokenizer cannot be sent to other processes ({error}): use '
      'workers 0'
    ) from error
  return _tokenize_there(documents, sent, workers)


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
    raise errors.UserError(
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
        f'from sae_jax.text import workers; workers._serve({theirs.fileno()})'
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

  def _died(self) -> errors.UserError:
    self._line.close()
    code = self._end()
    how = f'with exit code {code}'
    if code < 0:
      how = f'by {signal.Signals(-code).name}'
      if -code == signal.SIGKILL:
        how += ', which is often want of memory'
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
