"""Text files on any file system: finding them, and reading their texts.

Files are read piece by piece, whatever their size: a text is in memory, never a
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

# A document of a .txt file ends at the first blank line after this many
# characters.
_TEXT_CHARACTERS = 2000
# It ends here if there is no blank line.
_LONGEST_TEXT = 2**27

_KINDS = ('.txt', '.jsonl', '.parquet')
_PACKED = ('.gz', '.zst')
_READ_BYTES = 2**16
# Bytes that are decompressed at a time: zstd can make 128 KiB of 4 bytes.
_ZSTD_BYTES = 512
_PARQUET_ROWS = 256


class Files(NamedTuple):
  """The files of a source, in no particular order, and how to read them.

  Attributes:
    system: the file system they are on.
    paths: name within the source -> path on the file system.
    shown: messages put this before a name; None if the source is one file.
    source: the source without its field.
    field: the field or column of the text.
  """

  system: Any
  paths: dict[str, str]
  shown: str | None
  source: str
  field: str


def kind_of(name: str) -> str | None:
  """The suffix that says how to read a file; None if we cannot read it."""
  name = name.lower()
  for suffix in _PACKED:
    if name.endswith(suffix):
      kind = kind_of(name.removesuffix(suffix))
      return None if kind == '.parquet' else kind
  return next((kind for kind in _KINDS if name.endswith(kind)), None)


def find(source: str, others: Iterable[str]) -> Files:
  """Looks for the files of a source, without reading them.

  Args:
    source: a path, glob or URL, with #field after it where the texts are in
      another field than 'text'.
    others: the other sources that exist, for the message.

  Raises:
    UserError: if there are no such files, or they cannot be read.
  """
  location, mark, field = source.rpartition('#')
  if not mark or kind_of(field) or '/' in field:
    location, mark, field = source, '', 'text'
  # The query of a URL is not part of the file's name.
  name = url_lib.without_query(location)
  try:
    listing = _look(location, has_query=name != location)
  except Exception as error:
    raise errors.UserError(
      f'cannot look for source {source}: {errors.reason(error)}: check the URL '
      'and your access'
    ) from error
  if listing.root is None:
    if kind_of(name) is None:
      raise errors.UserError(
        f'source {source!r} is not known: use {", ".join(others)}, or a '
        '.txt, .jsonl (.gz, .zst) or .parquet file, folder '
        'or glob'
      )
    if not listing.paths:
      raise errors.UserError(f'source {source} does not exist: check the path')
    paths, shown = {name.rpartition('/')[2]: listing.paths[0]}, None
  else:
    paths = _text_files(source, listing)
    shown = listing.root
    if url_lib.has_scheme(location):
      shown = listing.system.unstrip_protocol(shown)
    shown = shown.rstrip('/') + '/'
  _check_readable(source, paths, field if mark else None)
  return Files(listing.system, paths, shown, location, field)


class _Listing(NamedTuple):
  """What a file system has at a location.

  Attributes:
    system: the file system.
    root: of a folder or glob, the part of the path that its files have in
      common; None of a single file.
    paths: the files; none where the location does not exist.
  """

  system: Any
  root: str | None
  paths: list[str]


def _look(location: str, has_query: bool) -> _Listing:
  """Looks at a file, folder or glob; with a query, `?` is no wildcard."""
  system, path = fsspec.url_to_fs(location)
  # A web server has no folders, and asking would fetch the whole file.
  if not url_lib.is_web(location) and system.isdir(path):
    return _Listing(system, path.rstrip('/') + '/', system.find(path))
  if system.exists(path):
    return _Listing(system, None, [path])
  if not has_query and re.search(r'[*?\[]', path):
    root = re.match(r'[^*?\[]*/|', path)[0]
    return _Listing(system, root, system.glob(path))
  return _Listing(system, None, [])


def _text_files(source: str, listing: _Listing) -> dict[str, str]:
  """Name within the source -> path, of the files that can be read."""
  paths = {}
  for path in listing.paths:
    name = path.removeprefix(listing.root)
    # Hidden files, and marks like _SUCCESS, are not data.
    if kind_of(name) and not re.search(r'(^|/)[._]', name):
      paths[name] = path
  if not paths:
    raise errors.UserError(
      f'source {source} holds none of the files that are read (.txt, .jsonl, '
      f'.parquet) among {len(listing.paths)}: check the path'
    )
  return paths


def _check_readable(source: str, names: Iterable[str], field: str | None):
  """Raises UserError where the kinds of files do not fit the request."""
  kinds = {kind_of(name) for name in names}
  if field is not None and '.txt' in kinds:
    raise errors.UserError(
      f'source {source} names a field, but .txt files have none: leave '
      f'#{field} out'
    )
  if '.parquet' in kinds and importlib.util.find_spec('pyarrow') is None:
    raise errors.UserError(
      f'source {source} needs pyarrow: pip install "sae_jax[parquet]"'
    )


def read(files: Files, name: str) -> Iterator[str]:
  """The texts of one of the files, in order.

  Raises:
    UserError: where the file is not of the kind its name says, or is cut off.
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
  """A .zst file's content; zstandard's own reader accepts files cut short."""

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
  """Lines of a plain, .gz or .zst file, line ends included.

  Bytes that are not UTF-8 become lone surrogates; see `_checked`.

  Args:
    open_file: opens the file as bytes.
    shown: its name in messages; the suffix says how it is compressed.
    longest: a longer line is cut into pieces of this many characters.
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
  # File systems raise errors of their own that are not OSErrors.
  except Exception as error:
    raise errors.UserError(
      f'cannot read {shown} after line {count}: {errors.reason(error)}: '
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
  """The text without halves of surrogate pairs, which no tokenizer accepts."""
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
      f'cannot read {shown} after row {number}: {errors.reason(error)}: fetch '
      'the file again'
    ) from error


def _txt_texts(open_file, shown: str) -> Iterator[str]:
  pieces, characters, number = [], 0, 1
  for line in lines(open_file, shown, _LONGEST_TEXT):
    pieces.append(_checked(line, number, shown))
    number += line.endswith(('\n', '\r'))
    characters += len(line)
    blank = characters >= _TEXT_CHARACTERS and not line.strip()
    if blank or characters >= _LONGEST_TEXT:
      yield ''.join(pieces)
      pieces, characters = [], 0
  yield ''.join(pieces)
