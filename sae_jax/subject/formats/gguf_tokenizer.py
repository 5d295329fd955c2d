"""Tokenizers from the metadata of GGUF files.

Source: the GGUF specification, github.com/ggml-org/ggml/blob/master/docs,
the files that its converter writes, and the tokenizer.json of each family.
"""

import dataclasses
from typing import Any

from absl import logging
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from sae_jax import errors

# Values of tokenizer.ggml.token_type; 5 is an unused token.
_NORMAL = 1
_UNKNOWN = 2
_CONTROL = 3
_USER_DEFINED = 4
_BYTE = 6

# SentencePiece's sign for a space.
_SPACE = '▁'

# Alternatives of patterns; the first that matches is taken.
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD = r'[^\r\n\p{L}\p{N}]?\p{L}+'
_DIGIT = r'\p{N}'
_UP_TO_3_DIGITS = r'\p{N}{1,3}'
_SIGNS = r' ?[^\s\p{L}\p{N}]+[\r\n]*'
_SIGNS_OR_PATH = r' ?[^\s\p{L}\p{N}]+[\r\n/]*'
_BLANKS = r'\s*[\r\n]+|\s+(?!\S)|\s+'
# Words that end before a capital.
_UPPER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]'
_LOWER = r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
_CASED_WORD = (
  rf'[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+'
  rf'|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*'
)


@dataclasses.dataclass(frozen=True)
class _Splitter:
  """One `tokenizer.ggml.pre`: how text is cut before bytes are merged.

  Attributes:
    pattern: alternatives of a regular expression; empty for GPT-2's, which is
      built into `tokenizers`.
    digits_alone: whether each digit is cut off first.
    composed: whether the text is normalised to NFC. GGUF files do not have
      this; the family's tokenizer.json does.
    whole_first: whether a piece that is a token stays whole, whatever the
      merges are.
    begins_with_bos: whether texts begin with a BOS, unless the file denies it.
  """

  pattern: tuple[str, ...] = ()
  digits_alone: bool = False
  composed: bool = False
  whole_first: bool = False
  begins_with_bos: bool = False


_SPLITTERS = {
  'gpt-2': _Splitter(),
  'smollm': _Splitter(digits_alone=True),
  # Both are GPT-NeoX's: the converter recognises a tokenizer by how it cuts a
  # text, and has called this one MPT's and then OLMo's.
  'olmo': _Splitter(composed=True),
  'mpt': _Splitter(composed=True),
  'llama-bpe': _Splitter(
    (_CONTRACTION, _WORD, _UP_TO_3_DIGITS, _SIGNS, _BLANKS),
    whole_first=True,
    begins_with_bos=True,
  ),
  'qwen2': _Splitter(
    (_CONTRACTION, _WORD, _DIGIT, _SIGNS, _BLANKS), composed=True
  ),
  # Used by Mistral's later models.
  'tekken': _Splitter(
    (_CASED_WORD, _DIGIT, _SIGNS_OR_PATH, _BLANKS),
    whole_first=True,
    begins_with_bos=True,
  ),
}


def build(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
  """The tokenizer that a file's metadata describes.

  It adds no token of its own.

  Args:
    metadata: key -> value of the file.

  Raises:
    UserError: if it is neither byte-level BPE with a known pre-tokenizer nor
      BPE of SentencePiece, or if metadata is missing.
  """
  model = metadata.get('tokenizer.ggml.model')
  splitter = metadata.get('tokenizer.ggml.pre')
  _check_lengths(metadata)
  if model == 'llama':
    return _sentencepiece(metadata)
  if model == 'gpt2' and splitter in _SPLITTERS:
    return _byte_level(metadata, _SPLITTERS[splitter])
  raise errors.UserError(
    f'tokenizer {model!r} with pre-tokenizer {splitter!r} is not supported: '
    f"use a GGUF file with 'gpt2' and one of {', '.join(_SPLITTERS)}, "
    "or with 'llama'"
  )


def bos(metadata: dict[str, Any]) -> int | None:
  """The id of the token that texts begin with; None for none.

  Where the file does not say whether there is one, the defaults are those of
  llama.cpp (src/llama-vocab.cpp): Llama's and Mistral's tokenizers have one.

  Args:
    metadata: key -> value of the file.
  """
  pieces = metadata.get('tokenizer.ggml.model') == 'llama'
  splitter = _SPLITTERS.get(metadata.get('tokenizer.ggml.pre'), _Splitter())
  if metadata.get('tokenizer.ggml.add_eos_token'):
    logging.warning(
      'the GGUF file ends every text with a token, which contexts do not get: '
      'they are cut out of texts'
    )
  if not metadata.get(
    'tokenizer.ggml.add_bos_token', pieces or splitter.begins_with_bos
  ):
    return None
  token = metadata.get('tokenizer.ggml.bos_token_id', 1 if pieces else None)
  n_tokens = len(_value(metadata, 'tokens'))
  if not isinstance(token, int) or not 0 <= token < n_tokens:
    logging.warning(
      'the GGUF file begins texts with token %s, which is none of its %d: '
      'contexts begin without, unless --bos names one',
      token,
      n_tokens,
    )
    return None
  return token


def _check_lengths(metadata) -> None:
  tokens = _value(metadata, 'tokens')
  for name in ('token_type', 'scores'):
    values = metadata.get(f'tokenizer.ggml.{name}', tokens)
    if len(values) != len(tokens):
      raise errors.UserError(
        f'the GGUF file has {len(tokens)} tokens and {len(values)} entries of '
        f'tokenizer.ggml.{name}: convert the model again'
      )


def _ids(texts) -> dict[str, int]:
  """Text -> id; of equal texts the last one is read."""
  ids = {text: i for i, text in enumerate(texts)}
  again = [i for i, text in enumerate(texts) if ids[text] != i]
  if again:
    logging.warning(
      '%d tokens of the GGUF file have the text of a later one, as %d and %d '
      'both %r: no text gives them',
      len(again),
      again[0],
      ids[texts[again[0]]],
      texts[again[0]],
    )
  return ids


def _byte_level(metadata, splitter) -> tokenizers.Tokenizer:
  """Byte-level BPE, as of GPT-2, GPT-NeoX, Llama 3 and Qwen."""
  texts = _value(metadata, 'tokens')
  result = tokenizers.Tokenizer(
    models.BPE(
      _ids(texts),
      _pairs(_value(metadata, 'merges')),
      ignore_merges=splitter.whole_first,
    )
  )
  if splitter.composed:
    result.normalizer = normalizers.NFC()
  stages = []
  if splitter.digits_alone:
    stages.append(pre_tokenizers.Digits(individual_digits=True))
  if splitter.pattern:
    pattern = tokenizers.Regex('|'.join(splitter.pattern))
    stages.append(pre_tokenizers.Split(pattern, 'isolated'))
  stages.append(
    pre_tokenizers.ByteLevel(
      add_prefix_space=False, use_regex=not splitter.pattern
    )
  )
  result.pre_tokenizer = pre_tokenizers.Sequence(stages)
  result.decoder = decoders.ByteLevel()
  kinds = metadata.get('tokenizer.ggml.token_type', [])
  _add(result, texts, kinds, normalized=False)
  return result


def _sentencepiece(metadata) -> tokenizers.Tokenizer:
  """BPE of SentencePiece, as of Llama 2, Mistral and Gemma."""
  kinds = _value(metadata, 'token_type')
  prefix = metadata.get('tokenizer.ggml.add_space_prefix', True)
  # SentencePiece looks for user-defined tokens after spaces became '▁'. With a
  # space prefix `tokenizers` must look before that: it would prefix the token.
  spelled = (_SPACE, ' ') if prefix else (' ', _SPACE)
  texts = [
    text.replace(*spelled) if kind == _USER_DEFINED else text
    for text, kind in zip(_value(metadata, 'tokens'), kinds)
  ]
  # The converter may have typed it as a control token.
  unknown = metadata.get('tokenizer.ggml.unknown_token_id')
  if unknown is None and _UNKNOWN in kinds:
    unknown = kinds.index(_UNKNOWN)
  merges = metadata.get('tokenizer.ggml.merges')
  if merges:
    merges = _pairs(merges)
  else:
    merges = _merges(texts, kinds, _value(metadata, 'scores'))
  result = tokenizers.Tokenizer(
    models.BPE(
      _ids(texts),
      merges,
      unk_token=None if unknown is None else texts[unknown],
      fuse_unk=True,
      byte_fallback=_BYTE in kinds,
    )
  )
  spaces = normalizers.Replace(' ', _SPACE)
  result.normalizer = (
    normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
    if prefix
    else spaces
  )
  stages = [
    decoders.Replace(_SPACE, ' '),
    decoders.ByteFallback(),
    decoders.Fuse(),
  ]
  if prefix:
    stages.append(decoders.Strip(' ', 1, 0))
  result.decoder = decoders.Sequence(stages)
  _add(result, texts, kinds, normalized=not prefix)
  return result


def _merges(texts, kinds, scores) -> list[tuple[str, str]]:
  """All pairs of pieces that merge into a piece, best piece first.

  SentencePiece has no list of merges: it merges the two neighbours whose piece
  has the best score, the leftmost of equals. Runs of spaces have equal scores
  in Llama 2; with longer left pieces first they grow from the left.
  """
  # Other tokens are not merged: user-defined ones are matched first.
  score_of = {
    text: score
    for text, kind, score in zip(texts, kinds, scores)
    if kind == _NORMAL
  }
  pairs = [
    (-score, -cut, piece[:cut], piece[cut:])
    for piece, score in score_of.items()
    for cut in range(1, len(piece))
    if piece[:cut] in score_of and piece[cut:] in score_of
  ]
  if len(pairs) > 1 and len({pair[0] for pair in pairs}) == 1:
    raise errors.UserError(
      'the GGUF file gives every piece of its tokenizer the same score: '
      'convert the model again with its tokenizer.model'
    )
  # A stable sort: equal pairs stay in the vocabulary's order.
  pairs.sort(key=lambda pair: pair[:2])
  return [pair[2:] for pair in pairs]


def _add(result, texts, kinds, normalized) -> None:
  """Registers a tokenizer's control tokens and user-defined tokens."""
  for group in ((_UNKNOWN, _CONTROL), (_USER_DEFINED,)):
    special = _CONTROL in group
    add = result.add_special_tokens if special else result.add_tokens
    add(
      [
        tokenizers.AddedToken(
          text, special=special, normalized=normalized and not special
        )
        for text, kind in zip(texts, kinds)
        if kind in group
      ]
    )


def _pairs(merges) -> list[tuple[str, str]]:
  return [tuple(merge.split(' ')) for merge in merges]


def _value(metadata, name) -> Any:
  key = f'tokenizer.ggml.{name}'
  if key not in metadata:
    raise errors.UserError(
      f'the GGUF file does not hold {key}: convert the model again'
    )
  return metadata[key]
