"""Tokenizers from tokenizer.json or GGUF metadata, and the text of tokens."""

from collections.abc import Callable, Sequence
import json
import os
import re
from typing import Any

from absl import logging
from etils import epath
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from sae_jax import errors
from sae_jax.storage import records
from sae_jax.subject.formats import gguf_tokenizer

# In place of a token's text: what the model's files say.
AUTO = 'auto'
# More than any vocabulary has.
_MOST_IDS = 2**24
_AGAIN = 'download it again'


def from_metadata(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer a GGUF file describes.

  '<|endoftext|>' in a document is read as characters, not as the control token.
  `encode` adds no token of its own; `context_start` says what contexts begin
  with.

  Args:
    metadata: key -> value of a GGUF file.

  Raises:
    UserError: if it is neither byte-level BPE with a known pre-tokenizer nor
      BPE of SentencePiece, or if metadata is missing or not as it should be.
  """
  try:
    result = gguf_tokenizer.build(metadata)
    start = gguf_tokenizer.bos(metadata)
  except BaseException as error:
    if isinstance(error, errors.UserError) or not errors.is_failure(error):
      raise
    raise errors.UserError(
      'the tokenizer in the GGUF file is not as it should be '
      f'({errors.reason(error)}): convert the model again'
    ) from error
  return _settle(result, [] if start is None else [start])


def from_folder(url: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """The tokenizer in a folder's tokenizer.json.

  As with `from_metadata`, control tokens in a text are read as characters.
  Padding, truncation and BPE's dropout, which some files were saved with, are
  off. The BOS that contexts begin with is that of tokenizer_config.json's
  `add_bos_token`, or else of the file's post-processor.

  Raises:
    UserError: if there is no such file, or it is not a tokenizer.
  """
  path = epath.Path(url) / 'tokenizer.json'
  if not path.is_file():
    raise errors.UserError(
      f'{url} has no tokenizer.json: save the fast tokenizer of the model '
      'there too'
    )
  try:
    data = path.read_bytes()
    records.check(data)
    result = tokenizers.Tokenizer.from_str(data.decode('utf-8-sig'))
    largest = max(result.get_vocab().values(), default=0)
    if largest >= _MOST_IDS:
      raise ValueError(f'a token has the id {largest}')
    _name_other_ids(result, json.loads(data.decode('utf-8-sig')), path)
    start = _start(result, epath.Path(url))
  except BaseException as error:
    if isinstance(error, errors.UserError) or not errors.is_failure(error):
      raise
    raise errors.UserError(
      f'{path} is not a tokenizer ({errors.reason(error)}): {_AGAIN}'
    ) from error
  return _settle(result, start)


def _name_other_ids(
  tokenizer: tokenizers.Tokenizer, fields: dict[str, Any], path: epath.Path
) -> None:
  """Warns of tokens that are not read as the ids that a file gives them.

  An id may stand there twice, and `tokenizers` counts up the ids of added
  tokens, whatever the file says.
  """
  vocab = fields['model']['vocab']
  said = list(
    vocab.items()
    if isinstance(vocab, dict)
    else ((piece[0], i) for i, piece in enumerate(vocab))
  )
  said += [(x['content'], x['id']) for x in fields.get('added_tokens') or ()]
  other = [x for x in said if tokenizer.id_to_token(x[1]) != x[0]]
  if other:
    text, token = other[0]
    logging.warning(
      '%s gives %d tokens an id that is not read as theirs, as %r %d, which is '
      'read as %r',
      path,
      len(other),
      text[:40],
      token,
      (tokenizer.id_to_token(token) or '')[:40],
    )


def _start(tokenizer: tokenizers.Tokenizer, folder: epath.Path) -> list[int]:
  """Ids that a folder's files put before a text."""
  before, after = _around(tokenizer)
  if after:
    logging.warning(
      'the tokenizer of %s ends every text with %s, which contexts do not get: '
      'they are cut out of texts',
      folder,
      ', '.join(repr(tokenizer.id_to_token(token)) for token in after),
    )
  settings = _settings(folder)
  wanted = settings.get('add_bos_token')
  if wanted is None or (wanted and before):
    return before
  if not wanted:
    return []
  text = settings.get('bos_token')
  # As a token with its settings.
  text = text.get('content') if isinstance(text, dict) else text
  token = tokenizer.token_to_id(text) if isinstance(text, str) else None
  if token is None:
    logging.warning(
      'the tokenizer of %s begins texts with a BOS, but its bos_token %r is no '
      'token: contexts begin without, unless --bos names one',
      folder,
      text,
    )
    return []
  return [token]


def _settings(folder: epath.Path) -> dict[str, Any]:
  """What tokenizer_config.json says, and special_tokens_map.json beside it."""
  settings = {}
  for name in ('special_tokens_map.json', 'tokenizer_config.json'):
    path = folder / name
    if path.is_file():
      settings |= records.read(path, _AGAIN)
  return settings


def _around(tokenizer: tokenizers.Tokenizer) -> tuple[list[int], list[int]]:
  """Ids that a tokenizer's post-processor puts before and after a text."""
  if tokenizer.post_processor is None:
    return [], []
  word = tokenizers.Tokenizer(models.WordLevel({'x': 0}, 'x')).encode('x')
  whole = tokenizer.post_processor.process(word)
  if 0 not in whole.sequence_ids:
    raise errors.UserError(
      'the post-processor of the tokenizer leaves out every text: save the '
      'tokenizer again'
    )
  own = whole.sequence_ids.index(0)
  after = [
    token
    for token, text in zip(whole.ids[own:], whole.sequence_ids[own:])
    if text is None
  ]
  return whole.ids[:own], after


def _settle(
  tokenizer: tokenizers.Tokenizer, start: list[int]
) -> tokenizers.Tokenizer:
  """Leaves text -> tokens of a tokenizer, and what contexts begin with."""
  tokenizer.no_padding()
  tokenizer.no_truncation()
  if getattr(tokenizer.model, 'dropout', None) is not None:
    tokenizer.model.dropout = None
  tokenizer.encode_special_tokens = True
  tokenizer.post_processor = None
  if start:
    # By plain names, for a template has signs of its own.
    pieces = [
      {
        'id': f'start{i}',
        'ids': [token],
        'tokens': [tokenizer.id_to_token(token) or ''],
      }
      for i, token in enumerate(start)
    ]
    tokenizer.post_processor = processors.TemplateProcessing(
      single=[*(piece['id'] for piece in pieces), '$A'], special_tokens=pieces
    )
  return tokenizer


def context_start(
  tokenizer: tokenizers.Tokenizer, bos: str = AUTO
) -> int | None:
  """The id of the BOS that every context begins with; None for none.

  Args:
    tokenizer: a subject's.
    bos: the token's text; 'auto' for what the model's files say; '' for none.

  Raises:
    UserError: if it is no token, or the files say more than one.
  """
  if bos == AUTO:
    start, _ = _around(tokenizer)
    if len(start) > 1:
      raise errors.UserError(
        f'the tokenizer begins texts with {len(start)} tokens, contexts begin '
        'with one at the most: name it with --bos'
      )
    return start[0] if start else None
  token = tokenizer.token_to_id(bos) if bos else None
  if bos and token is None:
    raise errors.UserError(
      f'bos {bos!r} is no token of the subject: use one that is, or none'
    )
  return token


def reading_control_tokens(
  tokenizer: tokenizers.Tokenizer,
) -> tokenizers.Tokenizer:
  """A copy that reads control tokens in a text as these tokens.

  Raises:
    UserError: if it has parts in Python, which cannot be copied.
  """
  try:
    result = tokenizers.Tokenizer.from_str(tokenizer.to_str())
  except Exception as error:
    raise errors.UserError(
      f'the tokenizer cannot be copied ({errors.reason(error)}): leave '
      'special_tokens off, or set encode_special_tokens of your own to False'
    ) from error
  result.encode_special_tokens = False
  return result


def check_ids(
  tokenizer: tokenizers.Tokenizer,
  n_rows: int,
  subject: str,
  bos: int | None = None,
) -> None:
  """Raises UserError if contexts may hold a token without an embedding.

  JAX would read the embedding's last row for it. Control tokens that were added
  to the vocabulary do not count where a text does not give them.

  Args:
    tokenizer: the subject's.
    n_rows: rows of the embedding.
    subject: the subject's name.
    bos: what contexts begin with, if not what the model's files say.
  """
  reachable = tokenizer.get_vocab(with_added_tokens=False)
  for token in [*_around(tokenizer)[0], *([] if bos is None else [bos])]:
    reachable[tokenizer.id_to_token(token) or f'[{token}]'] = token
  for token, added in tokenizer.get_added_tokens_decoder().items():
    if not (added.special and tokenizer.encode_special_tokens):
      reachable[added.content] = token
  text = max(reachable, key=reachable.get, default='')
  if text and reachable[text] >= n_rows:
    raise errors.UserError(
      f'token {text!r} of subject {subject} has the id {reachable[text]}, the '
      f'embedding has {n_rows} rows: resize the embedding, or use the '
      "model's own tokenizer"
    )


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  """Token ids of a text, and no others.

  Raises:
    UserError: if the tokenizer cannot read it.
  """
  try:
    return tokenizer.encode(text, add_special_tokens=False).ids
  except BaseException as error:
    if not errors.is_failure(error):
      raise
    raise errors.UserError(
      f'{text[:40]!r} cannot be tokenized ({errors.reason(error)}): leave it '
      'out'
    ) from error


def decode(tokenizer: tokenizers.Tokenizer, tokens: Sequence[int]) -> str:
  """The text of token ids, control tokens included.

  It undoes `encode`, except for texts that the tokenizer does not tell apart:
  GPT-NeoX's and Qwen's compose characters (NFC), and in SentencePiece '▁' is a
  space.
  """
  return tokenizer.decode(list(tokens), skip_special_tokens=False)


def token_texts(tokenizer: tokenizers.Tokenizer) -> list[str | bytes]:
  """The text of each token id on its own, in id order.

  A token is a run of bytes and may hold a piece of a character: where its bytes
  are not whole UTF-8, they are given as they are. An id without a token is ''.
  """
  byte_level = _is_byte_level(tokenizer)
  spell = _spell_bytes() if byte_level else _spell_pieces
  # Added tokens are not written in bytes; Gemma's contain '▁'.
  whole = tokenizer.get_added_tokens_decoder() if byte_level else {}
  texts = []
  # Ids may have holes.
  for i in range(1 + max(tokenizer.get_vocab().values(), default=-1)):
    text = tokenizer.id_to_token(i) or ''
    texts.append(text if i in whole else spell(text))
  return texts


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
  fields = json.loads(tokenizer.to_str())
  return any(
    'ByteLevel' in json.dumps(fields[name])
    for name in ('decoder', 'pre_tokenizer')
  )


def _spell_bytes() -> Callable[[str], str | bytes]:
  """Spells tokens of byte-level BPE (GPT-2, Llama 3, Qwen)."""
  to_byte = _byte_alphabet()

  def spell(text):
    try:
      return _text(bytes(to_byte[character] for character in text))
    except KeyError:  # It is not written in bytes.
      return text

  return spell


def _spell_pieces(text: str) -> str | bytes:
  """Spells tokens of SentencePiece: '▁' is a space, '<0xE2>' a byte."""
  match = re.fullmatch('<0x([0-9A-F]{2})>', text)
  return _text(bytes.fromhex(match[1])) if match else text.replace('▁', ' ')


def _text(data: bytes) -> str | bytes:
  """The characters that bytes spell, or the bytes if they are not whole."""
  try:
    return data.decode()
  except UnicodeDecodeError:
    return data


def _byte_alphabet() -> dict[str, int]:
  """Character -> byte, in byte-level BPE.

  Printable Latin-1 bytes stand for themselves; the others are the characters
  from 256 on, in order (GPT-2).
  """
  alphabet = set(pre_tokenizers.ByteLevel.alphabet())
  plain = [byte for byte in range(256) if chr(byte) in alphabet]
  moved = [byte for byte in range(256) if chr(byte) not in alphabet]
  return {chr(byte): byte for byte in plain} | {
    chr(256 + n): byte for n, byte in enumerate(moved)
  }
