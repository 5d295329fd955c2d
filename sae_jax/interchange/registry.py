"""Autoencoders of other libraries, whatever format they are in."""

import os

from etils import epath

from sae_jax import errors
from sae_jax.interchange import formats, imported
from sae_jax.interchange import place as place_lib
from sae_jax.storage import url as url_lib


def identify(url: str | os.PathLike[str]) -> tuple[str, str]:
  """The format of a folder or file by what is in it, and the reason.

  Args:
    url: local path or URL.

  Raises:
    UserError: if it is of none that is known, or of several, or damaged.
  """
  return _identify(place_lib.Place(url))


def _identify(where: place_lib.Place) -> tuple[str, str]:
  reasons = {}
  for name in formats.NAMES:
    reason = formats.of(name).detect(where)
    if reason:
      reasons[name] = reason
  if len(reasons) == 1:
    return next(iter(reasons.items()))
  if reasons:
    listed = '; '.join(f'{name}, {why}' for name, why in reasons.items())
    raise errors.UserError(
      f'{where.url} may be of {len(reasons)} formats: {listed}: name the format'
    )
  looked_for = '; '.join(
    f'{name}: {formats.of(name).LOOKED_FOR}' for name in formats.NAMES
  )
  what = 'folder' if where.is_folder else 'file'
  raise errors.UserError(
    f'{where.url} is a {what} of no known format, which are {looked_for}'
  )


def read(
  url: str | os.PathLike[str],
  given: imported.Given | None = None,
  name: str | None = None,
) -> imported.Imported:
  """An autoencoder of another library; of its weights, no values are read.

  Args:
    url: local path or URL of its folder or file.
    given: what its format does not say.
    name: its format, one of `formats.NAMES`; None for what `identify` finds.

  Raises:
    UserError: if the format is not known, or something is missing, unknown or
      contradictory.
  """
  where = place_lib.Place(url)
  if name is None:
    name, _ = _identify(where)
  elif name not in formats.NAMES:
    raise errors.UserError(
      f'no format is called {name!r}: use one of {", ".join(formats.NAMES)}'
    )
  return formats.of(name).read(where, given or imported.Given())


def check_written(name: str) -> None:
  """Raises UserError unless a format is one that is written."""
  if name in formats.WRITTEN:
    return
  what = f'{name} is read, not written'
  if name not in formats.NAMES:
    what = f'no format is called {name!r}'
  raise errors.UserError(f'{what}: use one of {", ".join(formats.WRITTEN)}')


def write(
  of: imported.Imported, name: str, url: str | os.PathLike[str]
) -> None:
  """Writes an autoencoder in a format, a block of rows at a time.

  Args:
    of: what it is, of whatever format.
    name: one of `formats.WRITTEN`.
    url: local path or URL of the folder or file, at which nothing is yet.

  Raises:
    UserError: if the format has no word for something, which is named with the
      formats that have one, or something is there already.
    OSError: if it cannot be written.
  """
  check_written(name)
  url = os.fspath(url).rstrip('/') or '/'
  url_lib.backend(url)
  lack = formats.of(name).lack(of)
  if lack:
    others = [
      other for other in formats.WRITTEN if formats.of(other).lack(of) is None
    ]
    raise errors.UserError(
      f'{of.url} ({of.format}) has {lack}, for which {name} has no word: write '
      f'it as {" or ".join(others)}'
    )
  path = epath.Path(url)
  if path.exists() and not (path.is_dir() and not any(path.iterdir())):
    raise errors.UserError(
      f'{url} is there already: write to a path that is not there'
    )
  formats.of(name).write(of, url)
