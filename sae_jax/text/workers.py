"""Tokenizing documents, in this process or in others."""

from collections.abc import Callable, Iterable, Iterator
import functools

import numpy as np
import tokenizers

from sae_jax import errors, processes
from sae_jax.text import corpus

# A process is sent a batch of documents at a time. A batch is full at either of
# these.
_BATCH_DOCUMENTS = 32
_BATCH_CHARACTERS = 2**18


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
  failures = []

  def jobs():
    for batch in _batches(documents):
      if isinstance(batch, Exception):
        failures.append(batch)
        return
      yield batch, [document.text for document in batch]

  work = processes.Work(
    'sae_jax.text.workers:_encoder',
    model,
    'tokenizing process',
    'use fewer workers, or 0 to tokenize in the main process',
    {'TOKENIZERS_PARALLELISM': 'false'},
  )
  for batch, result in processes.run(work, jobs(), workers):
    yield from _paired(batch, *result)
  if failures:
    raise failures[0]


def _encoder(model: tuple[str, bool]):
  """The function of a process: texts to their tokens, see `_encode`."""
  text, special_is_text = model
  tokenizer = tokenizers.Tokenizer.from_str(text)
  tokenizer.encode_special_tokens = special_is_text

  def encode(text):
    # Unlike `tokenizer.encode` this lets other threads run.
    return tokenizer.encode_batch([text], add_special_tokens=False)[0]

  return functools.partial(_encode, encode)
