"""Words of a vocabulary, and prompts that ask for their first letters.

The prompts are those of SAEBench 0.6's absorption, after Chanin et al., "A is
for absorption" (2024): other words with their answers, then the word itself.
"""

import re
from typing import NamedTuple

import numpy as np
import tokenizers

from sae_jax.subject.formats import tokenizer as tokenizer_lib

LETTERS = 'abcdefghijklmnopqrstuvwxyz'
# Answered questions that each prompt begins with.
EXAMPLES = 10
_QUESTION = ' has the first letter:'
_WORD = re.compile(' ?[A-Za-z]+')


class Prompts(NamedTuple):
  """Prompts of words, W of them.

  Attributes:
    words: as the vocabulary spells them, some with a space before.
    letter_W: number of the first letter of each, from 0.
    tokens_WT: int32, padded on the right with the last token.
    at_W: position of the word, int32: six before the end, if the question is
      five tokens.
  """

  words: list[str]
  letter_W: np.ndarray
  tokens_WT: np.ndarray
  at_W: np.ndarray


def words(tokenizer: tokenizers.Tokenizer) -> list[str]:
  """Tokens of letters alone, with or without a space before them, in id order.

  Left out are those that are not one token in the prompt, so that every
  question has as many tokens.
  """
  tail = tokenizer_lib.encode(tokenizer, _QUESTION)
  out = []
  for token, text in enumerate(tokenizer_lib.token_texts(tokenizer)):
    if not isinstance(text, str) or not _WORD.fullmatch(text):
      continue
    ids = tokenizer_lib.encode(tokenizer, _line(text))
    before = len(ids) - len(tail) - 1
    alone = tokenizer_lib.encode(tokenizer, '\n')
    if ids[before:] == [token, *tail] and before == len(alone):
      out.append(text)
  return out


def number(word: str) -> int:
  """The number of a word's first letter, from 0."""
  return LETTERS.index(word.strip()[0].lower())


def drawn(known: list[str], count: int, rng: np.random.Generator) -> list[str]:
  """Words at random, as many of each letter as can be; all if they are few."""
  order = [known[place] for place in rng.permutation(len(known))]
  by_letter = [[] for _ in LETTERS]
  for word in order:
    by_letter[number(word)].append(word)
  out, turn = [], 0
  while len(out) < min(count, len(known)):
    out += [of[turn] for of in by_letter if turn < len(of)]
    turn += 1
  return out[:count]


def prompts(
  tokenizer: tokenizers.Tokenizer,
  asked: list[str],
  known: list[str],
  start: list[int],
  rng: np.random.Generator,
) -> Prompts:
  """A prompt of each word, each with examples of its own.

  Args:
    tokenizer: the subject's.
    asked: the words.
    known: words of which examples are drawn, more than `EXAMPLES`.
    start: tokens that every text begins with.
    rng: draws the examples, none of which is the word itself.
  """
  n_tail = len(tokenizer_lib.encode(tokenizer, _QUESTION))
  texts = []
  for word in asked:
    places = rng.choice(len(known), EXAMPLES + 1, replace=False)
    others = [known[place] for place in places if known[place] != word]
    lines = [_line(of) + f' {_first(of)}' for of in others[:EXAMPLES]]
    text = ''.join(lines) + _line(word)
    texts.append(start + tokenizer_lib.encode(tokenizer, text))
  width = max(map(len, texts))
  tokens_WT = np.array([of + of[-1:] * (width - len(of)) for of in texts])
  at_W = np.array([len(of) - n_tail - 1 for of in texts], np.int32)
  letter_W = np.array([number(word) for word in asked])
  return Prompts(asked, letter_W, tokens_WT.astype(np.int32), at_W)


def _line(word: str) -> str:
  return f'\n{word}{_QUESTION}'


def _first(word: str) -> str:
  return word.strip()[0].upper()
