"""Folders of installed data packages."""

import importlib.util
import pathlib

from sae_jax import errors


def folder(package: str, requirement: str, user: str) -> pathlib.Path:
  """The folder of a package's files, found without importing the package.

  Data packages import modules that are not needed here; one needs a compiled
  llama.cpp.

  Args:
    package: its name in Python.
    requirement: its name for pip, with a version.
    user: name of the thing that needs it, for the error message.

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
