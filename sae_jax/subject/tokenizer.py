"""Tokenizers from tokenizer.json or GGUF metadata, and single tokens' text."""

from collections.abc import Callable, Sequence
import json
import os
import re
from typing import Any

from etils import epath
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from sae_jax import config as config_lib

# GGUF's tokenizer.ggml.token_type.
_CONTROL = 3
_USER_DEFINED = 4

# tokenizer.ggml.pre -> whether each digit stands alone.
_DIGITS_ALONE = {'smollm': True, 'gpt-2': False}


def from_metadata(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer a GGUF file describes.

  It reads text as text: '<|endoftext|>' in a document is not the control
  token, but the characters. It adds no token of its own.

  Args:
    metadata: key -> value of a GGUF file.

  Raises:
    UserError: if it is not byte-level BPE with a known pre-tokenizer.
  """
  model = metadata.get('tokenizer.ggml.model')
  splitter = metadata.get('tokenizer.ggml.pre')
  if model != 'gpt2' or splitter not in _DIGITS_ALONE:
    raise config_lib.UserError(
      f'tokenizer {model!r} with pre-tokenizer {splitter!r} is not supported: '
      f"use a GGUF file with 'gpt2' and one of {', '.join(_DIGITS_ALONE)}"
    )
  for key in ('tokenizer.ggml.tokens', 'tokenizer.ggml.merges'):
    if key not in metadata:
      raise config_lib.UserError(
        f'the GGUF file does not hold {key}: convert the model again'
      )
  texts = metadata['tokenizer.ggml.tokens']
  merges = metadata['tokenizer.ggml.merges']
  kinds = metadata.get('tokenizer.ggml.token_type', [])
  result = tokenizers.Tokenizer(
    models.BPE(
      {text: i for i, text in enumerate(texts)},
      [tuple(merge.split(' ')) for merge in merges],
    )
  )
  stages = [pre_tokenizers.ByteLevel(add_prefix_space=False)]
  if _DIGITS_ALONE[splitter]:
    stages.insert(0, pre_tokenizers.Digits(individual_digits=True))
  result.pre_tokenizer = pre_tokenizers.Sequence(stages)
  result.decoder = decoders.ByteLevel()
  for kind, add in (
    (_CONTROL, result.add_special_tokens),
    (_USER_DEFINED, result.add_tokens),
  ):
    add(
      [
        tokenizers.AddedToken(text, special=kind == _CONTROL, normalized=False)
        for text, its_kind in zip(texts, kinds)
        if its_kind == kind
      ]
    )
  result.encode_special_tokens = True
  return result


def from_folder(url: str | os.PathLike[str]) -> tokenizers.Tokenizer:
  """The tokenizer in a folder's tokenizer.json.

  As with `from_metadata` control tokens in a text are text. What the file's
  own post-processor adds, as Llama's BOS, stays.

  Raises:
    UserError: if there is no such file, or not a tokenizer.
  """
  path = epath.Path(url) / 'tokenizer.json'
  if not path.is_file():
    raise config_lib.UserError(
      f'{url} has no tokenizer.json: save the fast tokenizer of the model '
      'there too'
    )
  try:
    result = tokenizers.Tokenizer.from_str(path.read_text())
  except Exception as error:  # The library raises no narrower class.
    raise config_lib.UserError(
      f'{path} is not a tokenizer ({" ".join(str(error).split())}): download '
      'it again'
    ) from error
  result.encode_special_tokens = True
  return result


def encode(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
  """Token ids of a text."""
  return tokenizer.encode(text).ids


def decode(tokenizer: tokenizers.Tokenizer, tokens: Sequence[int]) -> str:
  """The text of token ids, control tokens shown; undoes `encode`."""
  return tokenizer.decode(list(tokens), skip_special_tokens=False)


def token_strings(tokenizer: tokenizers.Tokenizer) -> list[str]:
  """Readable text of each token id on its own, in id order.

  A token is a run of bytes and may hold a piece of a character: bytes that
  are not whole UTF-8 are shown like '\\xe2'. An id that no token has is
  shown as ''.
  """
  added = tokenizer.get_added_tokens_decoder()
  spell = _spell_bytes() if _is_byte_level(tokenizer) else _spell_pieces
  strings = []
  for i in range(tokenizer.get_vocab_size()):
    text = tokenizer.id_to_token(i) or ''
    strings.append(text if i in added else spell(text))
  return strings


def _is_byte_level(tokenizer: tokenizers.Tokenizer) -> bool:
  parts = json.loads(tokenizer.to_str())
  return any(
    'ByteLevel' in json.dumps(parts[name])
    for name in ('decoder', 'pre_tokenizer')
  )


def _spell_bytes() -> Callable[[str], str]:
  """Of byte-level BPE (GPT-2, Llama 3, Qwen)."""
  to_byte = _byte_alphabet()

  def spell(text):
    spelled = bytes(to_byte[character] for character in text)
    return spelled.decode('utf-8', 'backslashreplace')

  return spell


def _spell_pieces(text: str) -> str:
  """Of SentencePiece (Llama 2, Gemma): '▁' is a space, '<0xE2>' a byte."""
  match = re.fullmatch('<0x([0-9A-F]{2})>', text)
  if match:
    return bytes.fromhex(match[1]).decode('utf-8', 'backslashreplace')
  return text.replace('▁', ' ')


def _byte_alphabet() -> dict[str, int]:
  """Character -> byte of byte-level BPE.

  Printable Latin-1 bytes stand for themselves, the others take the characters
  from 256 on, in order (GPT-2).
  """
  alphabet = set(pre_tokenizers.ByteLevel.alphabet())
  plain = [byte for byte in range(256) if chr(byte) in alphabet]
  moved = [byte for byte in range(256) if chr(byte) not in alphabet]
  return {chr(byte): byte for byte in plain} | {
    chr(256 + n): byte for n, byte in enumerate(moved)
  }
