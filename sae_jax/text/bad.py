"""Rows and lines that give no text: named, or left out."""

from collections.abc import Iterator
from typing import NamedTuple

from absl import logging

from sae_jax import errors


class Bad(NamedTuple):
  """A row or a line that gives no text.

  Attributes:
    place: its number, as 'line 3'.
    problem: what is wrong with it.
    remedy: what the user can do.
  """

  place: str
  problem: str
  remedy: str


def good(
  rows: Iterator[str | Bad], shown: str, skip_bad: bool
) -> Iterator[str]:
  """The texts; a bad row raises UserError, or is left out."""
  n_good, n_bad, first = 0, 0, None
  for row in rows:
    if isinstance(row, str):
      n_good += 1
      yield row
      continue
    message = f'{row.place} of {shown} {row.problem}'
    if not skip_bad:
      raise errors.UserError(
        f'{message}: {row.remedy}, or leave out such rows with --skip_bad_rows'
      )
    n_bad += 1
    if first is None:
      first = row
      logging.warning('%s: it is left out', errors.printable(message))
  if n_bad and not n_good:
    raise errors.UserError(
      f'none of the {n_bad} rows of {shown} has a text; '
      f'{first.place} {first.problem}: {first.remedy}'
    )
  if n_bad > 1:
    logging.warning(
      '%d of the %d rows of %s were left out', n_bad, n_bad + n_good, shown
    )


def bad_byte(line: str) -> int | None:
  """The first byte of a line that was not UTF-8."""
  if not line.isascii():
    try:
      line.encode()
    except UnicodeEncodeError as error:
      return ord(line[error.start]) - 0xDC00
  return None


def not_utf8(place: str, byte: int) -> Bad:
  return Bad(
    place,
    f'is not UTF-8 (byte 0x{byte:02x})',
    'convert the file with iconv -f ENCODING -t UTF-8, where ENCODING is what '
    'it was written in, often WINDOWS-1252',
  )
