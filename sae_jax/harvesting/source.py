"""The text of a harvest, and the contexts cut from it."""

from collections.abc import Iterator
import itertools

from absl import logging
import tokenizers

from sae_jax import errors
from sae_jax import subject as subject_lib
from sae_jax.harvesting.config import HarvestConfig
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus

# Rough, to cut a document before it is tokenized.
_CHARACTERS_PER_TOKEN = 4
# Control tokens are looked for in so many of the first documents.
_LOOKED_AT = 256


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
    config.skip_bad_rows,
  )


def bos_text(config: HarvestConfig, tokenizer: tokenizers.Tokenizer) -> str:
  """The text of the token that every context begins with; '' for none.

  Raises:
    UserError: if it is no token.
  """
  token = tokenizer_lib.context_start(tokenizer, config.bos)
  return '' if token is None else tokenizer.id_to_token(token)


def contexts(
  config: HarvestConfig,
  text: Iterator[corpus.Document],
  subject: subject_lib.Subject,
  start: contexts_lib.Start = contexts_lib.BEGINNING,
) -> Iterator[contexts_lib.Context]:
  """Contexts for the subject; close the iterator to end its processes.

  Args:
    config: of the harvest.
    text: its `documents`.
    subject: reads them.
    start: where in the text to begin.

  Raises:
    UserError: if the BOS is not a token, a token that a text may give has no
      row in the embedding, or a document cannot be tokenized.
  """
  tokenizer = subject.tokenizer
  bos = tokenizer_lib.context_start(tokenizer, config.bos)
  if config.special_tokens:
    tokenizer = tokenizer_lib.reading_control_tokens(tokenizer)
  tokenizer_lib.check_ids(
    tokenizer, subject.config.vocab_size, subject.name, bos
  )
  if not config.special_tokens and tokenizer.encode_special_tokens:
    text = _watched(text, tokenizer)
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


def _watched(text, tokenizer) -> Iterator[corpus.Document]:
  """The documents; the first that spells a control token is logged."""
  control = [
    token.content
    for token in tokenizer.get_added_tokens_decoder().values()
    if token.special and len(token.content) > 1
  ]
  text = iter(text)
  for document in itertools.islice(text, _LOOKED_AT):
    spelled = [token for token in control if token in document.text]
    yield document
    if spelled:
      logging.warning(
        'document %d, of %s, spells control tokens (%s), which are read as '
        'characters: use --special_tokens to read them as tokens',
        document.number,
        document.source,
        errors.printable(', '.join(spelled), 200),
      )
      break
  yield from text
