"""Tokenizers from tokenizer.json or GGUF metadata, and the text of tokens."""

from collections.abc import Callable, Sequence
import json
import os
import re
from typing import Any

from etils import epath
import tokenizers
from tokenizers import pre_tokenizers

from sae_jax import errors
from sae_jax.subject.formats import gguf_tokenizer


def from_metadata(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer a GGUF file describes.

  '<|endoftext|>' in a document is read as characters, not as the control token.
  The tokenizer adds no token of its own.

  Args:
    metadata: key -> value of a GGUF file.

  Raises:
    UserError: if it is neither byte-level BPE with a known pre-tokenizer nor
      BPE of SentencePiece, or if metadata is missing.
  """
  result = gguf_tokenizer.build(metadata)
  result.encode_special_tokens = True
  return result


def from_folder(url: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """The tokenizer in a folder's tokenizer.json.

  As with `from_metadata`, control tokens in a text are read as characters. The
  file's own post-processor stays, and may add tokens such as Llama's BOS.

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
    result = tokenizers.Tokenizer.from_str(path.read_text())
  except Exception as error:  # The library raises no narrower class.
    raise errors.UserError(
      f'{path} is not a tokenizer ({errors.reason(error)}): download it again'
    ) from error
  result.encode_special_tokens = True
  return result


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  """Token ids of a text."""
  return tokenizer.encode(text).ids


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
  for i in range(tokenizer.get_vocab_size()):
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
