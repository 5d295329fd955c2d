"""Text files on any file system: finding them."""

from collections.abc import Iterable, Iterator
import glob
import importlib.util
import re
from typing import Any, NamedTuple

import fsspec

from sae_jax import errors
from sae_jax.storage import url as url_lib
from sae_jax.text import rows

_KINDS = ('.txt', '.jsonl', '.parquet')
_PACKED = ('.gz', '.zst')


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
  if not location:
    raise errors.UserError(
      f'source {source!r} names no file: name one, or leave it out'
    )
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
    root, pattern = _pattern(system, path)
    return _Listing(system, root, system.glob(pattern))
  return _Listing(system, None, [])


def _pattern(system, path: str) -> tuple[str, str]:
  """The folder that a glob begins with, and the glob.

  A folder may have a bracket in its own name.
  """
  root, rest = '', path
  while '/' in rest:
    name, _, after = rest.partition('/')
    if re.search(r'[*?\[]', name) and not system.isdir(root + name):
      break
    root, rest = f'{root}{name}/', after
  return root, glob.escape(root) + rest


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


def read(
  files: Files,
  name: str,
  skip_bad: bool = False,
  max_characters: int | None = None,
) -> Iterator[str]:
  """The texts of one of the files, in order.

  Args:
    files: the files.
    name: one of them.
    skip_bad: whether rows without a text are left out.
    max_characters: what is used of a text.

  Raises:
    UserError: see `rows.read`.
  """
  shown = files.source if files.shown is None else files.shown + name

  def open_file():
    path = files.paths[name]
    # A pipe would be waited for, and a text is read more than once.
    if not url_lib.is_web(files.source) and not files.system.isfile(path):
      raise FileNotFoundError('it is not there, or no ordinary file')
    return files.system.open(path, 'rb')

  return rows.read(
    open_file, shown, kind_of(name), files.field, skip_bad, max_characters
  )
