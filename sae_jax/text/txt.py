"""Plain text cut into documents."""

from collections.abc import Callable, Iterator
import itertools
import re

from absl import logging

from sae_jax.text.bad import Bad, bad_byte, not_utf8

# A document ends at the first blank line after this many characters, or else at
# the first end of a line after twice as many, or white space after three times
# as many, or after four times as many.
_SIZE = 2000
# Where fewer of its characters than these are used, it is as much smaller.
_WHOLE = 4096
# If this is in the first characters of a file, documents end there alone, or
# after _LONGEST characters.
_SEPARATOR = '<|endoftext|>'
_HEAD = 2**16
_LONGEST = 2**24


def documents(
  lines: Callable[[int], Iterator[str]],
  shown: str,
  max_characters: int | None = None,
) -> Iterator[str | Bad]:
  """The documents of a file.

  Args:
    lines: gives the lines, cut into pieces of so many characters.
    shown: the file's name in messages.
    max_characters: what is used of a document.
  """
  size = max(1, min(_SIZE, _SIZE * (max_characters or _WHOLE) // _WHOLE))
  pieces = _numbered(lines(size))
  head, read = [], 0
  for piece in pieces:
    head.append(piece)
    read += len(piece)
    if read >= _HEAD:
      break
  text = ''.join(piece for piece in head if isinstance(piece, str))
  if re.match(r'\s*\{\s*"\w+":', text):
    logging.warning(
      '%s looks like JSON and is read as plain text: if it has a JSON object a '
      'line, let its name end in .jsonl',
      shown,
    )
  pieces = itertools.chain(head, pieces)
  return _separated(pieces) if _SEPARATOR in text else _cut(pieces, size)


def _numbered(pieces: Iterator[str]) -> Iterator[str | Bad]:
  """The pieces, with those that are not UTF-8 named by their line."""
  number = 1
  for piece in pieces:
    byte = bad_byte(piece)
    yield piece if byte is None else not_utf8(f'line {number}', byte)
    number += piece.endswith(('\n', '\r'))


def _separated(pieces: Iterator[str | Bad]) -> Iterator[str | Bad]:
  """What stands between separators, without white space at its ends."""
  text = ''
  for piece in pieces:
    if isinstance(piece, Bad):
      yield piece
      continue
    # A separator may be cut in two.
    place = max(0, len(text) - len(_SEPARATOR))
    text += piece
    while (end := text.find(_SEPARATOR, place)) >= 0:
      yield text[:end].strip()
      text, place = text[end + len(_SEPARATOR) :], 0
    if len(text) >= _LONGEST:
      yield text.strip()
      text = ''
  yield text.strip()


def _cut(pieces: Iterator[str | Bad], size: int) -> Iterator[str | Bad]:
  """Documents that end at blank lines, or lines, or white space."""
  document, length = [], 0
  for piece in pieces:
    if isinstance(piece, Bad):
      yield piece
      continue
    document.append(piece)
    length += len(piece)
    end = _end(piece, length / size)
    if end is not None:
      document[-1] = piece[:end]
      yield ''.join(document)
      document, length = [piece[end:]], len(piece) - end
  yield ''.join(document)


def _end(piece: str, sizes: float) -> int | None:
  """Where in its last piece a document of so many sizes ends."""
  if sizes >= 1 and not piece.strip():
    return len(piece)
  if sizes >= 2 and piece.endswith(('\n', '\r')):
    return len(piece)
  if sizes >= 3:
    blank = max(piece.rfind(' '), piece.rfind('\t'))
    if blank >= 0:
      return blank + 1
  return len(piece) if sizes >= 4 else None
