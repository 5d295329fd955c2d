"""Names that are read from data and become names of files."""

from typing import Any

from sae_jax import errors

# Bytes that Linux's file systems give a name.
_LONGEST = 255


def plain(name: Any, where: str) -> str:
  """A name, once it is known to stay in the folder that it is joined to.

  Args:
    name: what was read.
    where: where it was read, for the error.

  Raises:
    UserError: if it is not a text, empty, '.' or '..', too long, or holds a
      separator of paths or a character that cannot be printed.
  """
  if not _is_plain(name):
    raise errors.UserError(
      f'{where} names the file {name!r}, which is no plain file name: the file '
      'may be made to reach other folders; get it from its source again'
    )
  return name


def _is_plain(name: Any) -> bool:
  return (
    isinstance(name, str)
    and name.isprintable()
    and 0 < len(name.encode()) <= _LONGEST
    and name not in ('.', '..')
    and not set('/\\:') & set(name)
  )
