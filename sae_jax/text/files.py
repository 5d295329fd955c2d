"""Text files: where they are, on any file system, and their texts as a stream.

Files are read as a stream, whatever their size: a text is in memory, never a
file.
"""

from collections.abc import Iterable, Iterator
import gzip
import importlib.util
import io
import json
import re
from typing import Any, NamedTuple

import fsspec
import zstandard

from sae_jax import errors
from sae_jax.storage import url as url_lib

_TEXT_CHARACTERS = 2000  # A .txt is cut at blank lines into such documents.
_LONGEST_TEXT = 2**27  # And there, if it has no blank lines.

_KINDS = ('.txt', '.jsonl', '.parquet')
_PACKED = ('.gz', '.zst')
_READ_BYTES = 2**16
# Zstd can make 128 KiB of 4 bytes: so much is decompressed at a time.
_ZSTD_BYTES = 512
_PARQUET_ROWS = 256


class Files(NamedTuple):
  """The files of a source, in no order, and how they are read.

  Attributes:
    system: the file system they are on.
    paths: name within the source -> path on the file system.
    shown: what messages put before a name; None if the source is one file.
    source: the source without its field.
    field: the field or column of the text.
  """

  system: Any
  paths: dict[str, str]
  shown: str | None
  source: str
  field: str


def kind_of(name: str) -> str | None:
  """The suffix that says how a file is read; None if it isn't."""
  name = name.lower()
  for suffix in _PACKED:
    if name.endswith(suffix):
      kind = kind_of(name.removesuffix(suffix))
      return None if kind == '.parquet' else kind
  return next((kind for kind in _KINDS if name.endswith(kind)), None)


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).partition('\n')[0]


def find(source: str, others: Iterable[str]) -> Files:
  """Looks for a source's files; reads none.

  Args:
    source: a path, glob or URL, with #field after it where the texts are in
      another field than 'text'.
    others: names that would have been known, for the message.

  Raises:
    UserError: if there are no such files, or they cannot be read.
  """
  place, mark, field = source.rpartition('#')
  if not mark or kind_of(field) or '/' in field:
    place, mark, field = source, '', 'text'
  # What a URL asks its server is no part of the file's name.
  name = url_lib.without_query(place)
  unknown = errors.UserError(
    f'source {source!r} is not known: use {", ".join(others)}, or a '
    '.txt, .jsonl (.gz, .zst) or .parquet file, folder '
    'or glob'
  )
  try:
    system, path = fsspec.url_to_fs(place)
    # A web server is no folder, and asking would fetch the whole file.
    is_folder = not url_lib.is_web(place) and system.isdir(path)
    there = is_folder or system.exists(path)
    is_glob = not there and name == place and bool(re.search(r'[*?\[]', path))
    if is_glob:
      root = re.match(r'[^*?\[]*/|', path)[0]
      found = system.glob(path)
    elif is_folder:
      root = path.rstrip('/') + '/'
      found = system.find(path)
  except Exception as error:
    raise errors.UserError(
      f'cannot look for source {source}: {_first_line(error)}: check the URL '
      'and your access'
    ) from error
  if not (is_glob or is_folder):
    if kind_of(name) is None:
      raise unknown
    if not there:
      raise errors.UserError(f'source {source} does not exist: check the path')
    files = Files(system, {name.rpartition('/')[2]: path}, None, place, field)
  else:
    # Hidden files, and marks like _SUCCESS, are not data.
    named = {path.removeprefix(root): path for path in found}
    paths = {
      name: path
      for name, path in named.items()
      if kind_of(name) and not re.search(r'(^|/)[._]', name)
    }
    if not paths:
      raise errors.UserError(
        f'source {source} holds none of the files that are read (.txt, .jsonl, '
        f'.parquet) among {len(named)}: check the path'
      )
    shown = system.unstrip_protocol(root) if url_lib.has_scheme(place) else root
    shown = shown.rstrip('/') + '/'
    files = Files(system, paths, shown, place, field)
  kinds = {kind_of(name) for name in files.paths}
  if mark and '.txt' in kinds:
    raise errors.UserError(
      f'source {source} names a field, but .txt files have none: leave '
      f'#{field} out'
    )
  if '.parquet' in kinds and importlib.util.find_spec('pyarrow') is None:
    raise errors.UserError(
      f'source {source} needs pyarrow: pip install "sae_jax[parquet]"'
    )
  return files


def read(files: Files, name: str) -> Iterator[str]:
  """The texts of one of the files, in order.

  Raises:
    UserError: where it is not what its name says, or is cut off.
  """
  shown = files.source if files.shown is None else files.shown + name

  def open_file():
    return files.system.open(files.paths[name], 'rb')

  kind = kind_of(name)
  if kind == '.parquet':
    return _parquet_texts(open_file, shown, files.field)
  if kind == '.jsonl':
    return _jsonl_texts(open_file, shown, files.field)
  return _txt_texts(open_file, shown)


class _Zstd(io.RawIOBase):
  """A .zst file's content; zstandard's reader takes a cut file for whole."""

  def __init__(self, file):
    self._file = file
    self._frame = None
    self._raw, self._content = b'', b''

  def readable(self):
    return True

  def readinto(self, buffer):
    while not self._content:
      self._raw = self._raw or memoryview(self._file.read(_READ_BYTES))
      if not self._raw:
        if self._frame is not None:
          raise EOFError('it ends within a frame')
        return 0
      if self._frame is None:
        self._frame = zstandard.ZstdDecompressor().decompressobj()
      piece, self._raw = self._raw[:_ZSTD_BYTES], self._raw[_ZSTD_BYTES:]
      self._content = memoryview(self._frame.decompress(piece))
      if self._frame.eof:
        # What follows is the next frame.
        rest = self._frame.unused_data
        self._raw, self._frame = memoryview(rest + bytes(self._raw)), None
    count = min(len(buffer), len(self._content))
    buffer[:count] = self._content[:count]
    self._content = self._content[count:]
    return count


def lines(open_file, shown: str, longest: int = -1) -> Iterator[str]:
  """Lines of a plain, .gz or .zst file with their ends.

  Bytes that are not UTF-8 come as lone surrogates; see `_checked`.

  Args:
    open_file: opens it as bytes.
    shown: its name in messages; the suffix says how it is compressed.
    longest: a longer line comes in pieces of so many characters.
  """
  count = 0
  try:
    with open_file() as file:
      raw, lower = file, shown.partition('?')[0].lower()
      if lower.endswith('.gz'):
        raw = gzip.GzipFile(fileobj=file)
      elif lower.endswith('.zst'):
        raw = io.BufferedReader(_Zstd(file), _READ_BYTES)
      text = io.TextIOWrapper(raw, 'utf-8', 'surrogateescape', newline='')
      while line := text.readline(longest):
        count += 1
        yield line
  # A file system has errors of its own that are no OSError.
  except Exception as error:
    raise errors.UserError(
      f'cannot read {shown} after line {count}: {_first_line(error)}: '
      'fetch or compress the file again'
    ) from error


def _checked(line: str, number: int, shown: str) -> str:
  """The line, if it was UTF-8."""
  if not line.isascii():
    try:
      line.encode()
    except UnicodeEncodeError as error:
      byte = ord(line[error.start]) - 0xDC00
      raise errors.UserError(
        f'line {number} of {shown} is not UTF-8 (byte 0x{byte:02x}): convert '
        'the file, say with iconv -f latin1 -t utf-8'
      ) from None
  return line


def _without_surrogates(text: str) -> str:
  """Half of a surrogate pair is no character, and no tokenizer takes it."""
  return text.encode('utf-8', 'ignore').decode()


def _jsonl_texts(open_file, shown: str, field: str) -> Iterator[str]:
  for number, line in enumerate(lines(open_file, shown), 1):
    if not line.strip():
      continue
    _checked(line, number, shown)
    try:
      row = json.loads(line)
    except (ValueError, RecursionError):
      row = None
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
      has = f', it has {", ".join(row)[:200]}' if isinstance(row, dict) else ''
      raise errors.UserError(
        f'line {number} of {shown} is not a JSON object with a string '
        f'`{field}`{has}: correct it, leave it out or name the field as '
        'file#field'
      )
    yield _without_surrogates(text)


def _parquet_texts(open_file, shown: str, field: str) -> Iterator[str]:
  from pyarrow import parquet

  number = 0
  try:
    with open_file() as file:
      table = parquet.ParquetFile(
        file, pre_buffer=False, buffer_size=_READ_BYTES
      )
      names = table.schema_arrow.names
      if field not in names:
        raise errors.UserError(
          f'{shown} has no column `{field}`, it has {", ".join(names)[:200]}: '
          'name the column as file#column'
        )
      for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
        for value in batch.column(0):
          number += 1
          text = value.as_py()
          if not isinstance(text, str):
            raise errors.UserError(
              f'row {number} of {shown} has no string `{field}` but '
              f'{type(text).__name__}: leave it out or name another column as '
              'file#column'
            )
          yield text
  except errors.UserError:
    raise
  except UnicodeDecodeError as error:
    raise errors.UserError(
      f'row {number} of {shown} is not UTF-8: write the file again'
    ) from error
  except Exception as error:
    raise errors.UserError(
      f'cannot read {shown} after row {number}: {_first_line(error)}: fetch '
      'the file again'
    ) from error


def _txt_texts(open_file, shown: str) -> Iterator[str]:
  parts, characters, number = [], 0, 1
  for line in lines(open_file, shown, _LONGEST_TEXT):
    parts.append(_checked(line, number, shown))
    number += line.endswith(('\n', '\r'))
    characters += len(line)
    blank = characters >= _TEXT_CHARACTERS and not line.strip()
    if blank or characters >= _LONGEST_TEXT:
      yield ''.join(parts)
      parts, characters = [], 0
  yield ''.join(parts)
