"""The text of a harvest, and the contexts cut from it."""

from collections.abc import Iterator

import tokenizers

from sae_jax import errors
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus

# Rough, to cut a document before it is tokenized.
_CHARACTERS_PER_TOKEN = 4


def documents(config: HarvestConfig) -> Iterator[corpus.Document]:
  """The documents of a harvest, in their order.

  Raises:
    UserError: if a source does not exist or cannot be read.
  """
  return corpus.documents(
    config.sources,
    config.seed,
    config.max_contexts_per_document
    * config.context_length
    * _CHARACTERS_PER_TOKEN,
  )


def contexts(
  config: HarvestConfig,
  text: Iterator[corpus.Document],
  tokenizer: tokenizers.Tokenizer,
  start: contexts_lib.Start = contexts_lib.BEGINNING,
) -> Iterator[contexts_lib.Context]:
  """Contexts for the subject; close the iterator to end its processes.

  Args:
    config: of the harvest.
    text: its `documents`.
    tokenizer: the subject's.
    start: where in the text to begin.

  Raises:
    UserError: if the BOS is not a token, or a document cannot be tokenized.
  """
  bos = tokenizer.token_to_id(config.bos) if config.bos else None
  if config.bos and bos is None:
    raise errors.UserError(
      f'bos {config.bos!r} is no token of subject {config.subject}: use one '
      'that is, or none'
    )
  return contexts_lib.contexts(
    text,
    tokenizer,
    context_length=config.context_length,
    max_contexts_per_document=config.max_contexts_per_document,
    min_context_tokens=config.min_context_tokens,
    pack=config.pack,
    bos=bos,
    workers=config.tokenizer_workers,
    start=start,
  )
