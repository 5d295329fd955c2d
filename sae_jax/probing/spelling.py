"""Tokens as text that a terminal shows as it is, with nothing invisible.

The page spells tokens alike (`browser/page/spelling.js`).
"""

from collections.abc import Iterable
import unicodedata

_NAMED = {'\n': '↵', '\t': '⇥', ' ': ' '}
# What Python makes of a byte that is in no character, less the byte.
_BYTE = 0xDC00


def visible(tokens: Iterable[str | bytes]) -> str:
  """The text of tokens in a row; bytes that are no character in hexadecimal."""
  data = b''.join(
    token if isinstance(token, bytes) else token.encode(errors='surrogatepass')
    for token in tokens
  )
  return ''.join(map(_shown, data.decode(errors='surrogateescape')))


def _shown(character: str) -> str:
  if character in _NAMED:
    return _NAMED[character]
  code = ord(character)
  if 0x80 <= code - _BYTE <= 0xFF:
    return f'⟨x{code - _BYTE:02X}⟩'
  if unicodedata.category(character)[0] in 'CZ':
    return f'⟨{code:02X}⟩'
  return character


def alone(token: str | bytes) -> str:
  """The text of a token that stands alone, its leading spaces as dots."""
  text = visible([token])
  # A mark without a letter needs something to stand on.
  if text and unicodedata.category(text[0])[0] == 'M':
    text = f'◌{text}'
  kept = text.lstrip(' ')
  return '·' * (len(text) - len(kept)) + kept or '∅'


def columns(text: str) -> int:
  """The columns of a terminal that a visible text takes."""
  return sum(map(_columns, text))


def _columns(character: str) -> int:
  if unicodedata.category(character) in ('Mn', 'Me'):
    return 0
  return 2 if unicodedata.east_asian_width(character) in 'WF' else 1


def cut(text: str, most: int) -> str:
  """The beginning of a visible text, in so many columns."""
  if columns(text) <= most:
    return text
  kept, left = '', most - 1
  for character in text:
    left -= _columns(character)
    if left < 0:
      break
    kept += character
  return kept + '…' if most > 0 else ''


def cut_left(text: str, most: int) -> str:
  """The end of a visible text, in so many columns."""
  return cut(text[::-1], most)[::-1]
