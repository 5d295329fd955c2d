"""Folders of installed data packages."""

import importlib.util
import pathlib

from sae_jax import errors


def folder(package: str, requirement: str, user: str) -> pathlib.Path:
  """Where a package's files lie; the package is not imported.

  Those that hold data alone import what is not needed here: one would compile
  llama.cpp.

  Args:
    package: its name in Python.
    requirement: its name for pip, with a version.
    user: what needs it, for the error.

  Raises:
    UserError: if it is not installed.
  """
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise errors.UserError(
      f'{user} needs a package that is not installed: '
      f'pip install --no-deps {requirement}'
    )
  return pathlib.Path(spec.submodule_search_locations[0])
