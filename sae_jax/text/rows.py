"""The texts of a file: of .txt, .jsonl and .parquet.

Files are read piece by piece, whatever their size: a text is in memory, never a
file.
"""

from collections.abc import Callable, Iterator
import functools
import gzip
import io
import json
from typing import Any
import zlib

import zstandard

from sae_jax import errors
from sae_jax.text import content, txt
from sae_jax.text.bad import Bad, bad_byte, good, not_utf8

# The longest row, in characters. JSON of this length can take 400 MB.
LONGEST = 2**24

_PARQUET_ROWS = 256
# Bytes of a batch of rows.
_PARQUET_BYTES = 2**26

_CUT_SHORT = (EOFError, gzip.BadGzipFile, zlib.error, zstandard.ZstdError)


def read(
  open_file: Callable[[], Any],
  shown: str,
  kind: str,
  field: str,
  skip_bad: bool = False,
  max_characters: int | None = None,
) -> Iterator[str]:
  """The texts of a file, in order.

  Args:
    open_file: opens the file as bytes.
    shown: its name in messages.
    kind: '.txt', '.jsonl' or '.parquet'.
    field: the field or column of the text.
    skip_bad: whether rows without a text are left out, and counted in the log.
    max_characters: what is used of a text; so .txt is cut finer if it is small.

  Raises:
    UserError: where the file is not what its kind says, is cut off, or has a
      bad row.
  """
  if kind == '.parquet':
    rows = _parquet(open_file, shown, field)
  elif kind == '.jsonl':
    rows = _jsonl(lines(open_file, shown, LONGEST), field)
  else:
    read_lines = functools.partial(lines, open_file, shown)
    rows = txt.documents(read_lines, shown, max_characters)
  return good(rows, shown, skip_bad)


def lines(
  open_file: Callable[[], Any], shown: str, longest: int = LONGEST
) -> Iterator[str]:
  """Lines of a file, plain or packed, line ends included.

  Marks of byte order are read over. Bytes that are not UTF-8 become lone
  surrogates.

  Args:
    open_file: opens the file as bytes.
    shown: its name in messages.
    longest: a longer line is cut into pieces of this many characters.

  Raises:
    UserError: if it cannot be opened or read, or is no text.
  """
  count = 0
  try:
    with _open(open_file, shown) as file:
      text = io.TextIOWrapper(
        content.of(file, shown), 'utf-8', 'surrogateescape', newline=''
      )
      while line := text.readline(longest):
        count += line.endswith(('\n', '\r'))
        yield line.removeprefix('\ufeff')
  except Exception as error:
    raise _unreadable(error, shown, f'line {count}') from error


def _open(open_file, shown):
  try:
    return open_file()
  # File systems raise errors of their own that are not OSErrors.
  except Exception as error:
    raise errors.UserError(
      f'cannot open {shown}: {errors.reason(error)}: check the path and your '
      'access'
    ) from error


def _unreadable(error: Exception, shown: str, after: str) -> errors.UserError:
  if isinstance(error, errors.UserError):
    return error
  remedy = 'check the disk or the connection, and try again'
  if isinstance(error, _CUT_SHORT):
    remedy = 'it is damaged, fetch or compress it again'
  return errors.UserError(
    f'cannot read {shown} after {after}: {errors.reason(error)}: {remedy}'
  )


def _jsonl(rows: Iterator[str], field: str) -> Iterator[str | Bad]:
  place, is_rest = 0, False
  for line in rows:
    is_first, is_rest = not is_rest, not line.endswith(('\n', '\r'))
    place += is_first
    # Once, whatever number of pieces it has.
    if is_first and line.strip():
      too_long = is_rest and len(line) >= LONGEST
      yield (
        Bad(
          f'line {place}',
          f'is longer than {LONGEST:,} characters',
          'cut its text into several rows',
        )
        if too_long
        else _row(line, f'line {place}', field)
      )


def _row(line: str, place: str, field: str) -> str | Bad:
  """The text of a line of JSON."""
  byte = bad_byte(line)
  if byte is not None:
    return not_utf8(place, byte)
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    row = None
  if isinstance(row, dict):
    has = f'it has {", ".join(row)[:200]}'
    return _text(row.get(field, _Absent), field, place, has, 'file#field')
  problem = 'is not a JSON object'
  return Bad(place, problem, f'correct it, a line is {{"{field}": "..."}}')


class _Absent:
  """In place of a value that a row does not have."""


def _text(
  value: Any, field: str, place: str, has: str, other: str
) -> str | Bad:
  """The value of a row's field, if it is a text."""
  remedy = f'correct it, name another one as {other}'
  if isinstance(value, str):
    if value.isascii():
      return value
    # Without halves of surrogate pairs, which no tokenizer accepts.
    return value.encode('utf-8', 'ignore').decode()
  if value is _Absent:
    return Bad(place, f'has no `{field}`, {has}', remedy)
  if value is None:
    return Bad(place, f'has null for `{field}`', remedy)
  kind = type(value).__name__
  if isinstance(value, list):
    remedy += ' (of a chat, the text that its template makes)'
  return Bad(place, f'has no text for `{field}` but {kind} ({has})', remedy)


def _parquet(open_file, shown: str, field: str) -> Iterator[str | Bad]:
  from pyarrow import parquet

  number = 0
  try:
    with _open(open_file, shown) as file:
      _check_parquet(file, shown)
      metadata = parquet.read_metadata(file)
      names = metadata.schema.to_arrow_schema().names
      has = f'it has {", ".join(names)[:200]}'
      if field not in names:
        raise errors.UserError(
          f'{shown} has no column `{field}`, {has}: '
          'name the column as file#column'
        )
      columns = map(metadata.schema.column, range(metadata.num_columns))
      table = parquet.ParquetFile(
        file,
        metadata=metadata,
        pre_buffer=False,
        buffer_size=content.READ_BYTES,
        # A text that many rows repeat is in memory once.
        read_dictionary=[x.path for x in columns if x.path == field],
      )
      for batch in table.iter_batches(
        _batch_rows(metadata, field), columns=[field]
      ):
        for value in batch.column(0):
          number += 1
          yield _cell(value, field, f'row {number}', has)
  except Exception as error:
    # Arrow's errors of the content have no number, those of a disk do.
    if isinstance(error, OSError) and error.errno is None:
      error = EOFError(errors.reason(error))
    raise _unreadable(error, shown, f'row {number}') from error


def _check_parquet(file, shown: str) -> None:
  """Raises UserError if a file does not begin as parquet does."""
  head = file.read(content.READ_BYTES)
  file.seek(0)
  if not head.startswith(b'PAR1'):
    content.check_text(head, shown)
    raise errors.UserError(
      f'{shown} does not begin as parquet does: let its name end in .jsonl or '
      '.txt if it is text, or else fetch it again'
    )


def _batch_rows(metadata, field: str) -> int:
  """Rows of a batch: few, where rows are long."""
  longest = 1
  for number in range(metadata.num_row_groups):
    group = metadata.row_group(number)
    for column in map(group.column, range(group.num_columns)):
      if column.path_in_schema.partition('.')[0] == field and group.num_rows:
        mean = column.total_uncompressed_size // group.num_rows
        longest = max(longest, mean)
  return max(1, min(_PARQUET_ROWS, _PARQUET_BYTES // longest))


def _cell(value, field: str, place: str, has: str) -> str | Bad:
  """The text of a cell; some writers do not say that bytes are text."""
  try:
    text = value.as_py()
    if isinstance(text, bytes):
      text = text.decode()
  except UnicodeDecodeError as error:
    return not_utf8(place, error.object[error.start])
  if isinstance(text, str) and len(text) > LONGEST:
    return Bad(
      place,
      f'is longer than {LONGEST:,} characters',
      'cut its text into several rows',
    )
  return _text(text, field, place, has, 'file#column')
