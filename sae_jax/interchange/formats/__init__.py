"""The formats of autoencoders, a module each.

A format is a file here, and its name is that of the file. `Format` lists what
the file defines.
"""

import importlib
import pkgutil
from typing import Protocol

from sae_jax.interchange import imported, place

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


class Format(Protocol):
  """The functions and constants that every module of this folder defines.

  Attributes:
    LOOKED_FOR: what `detect` looks for, in words.
  """

  LOOKED_FOR: str

  def detect(self, where: place.Place) -> str | None:
    """Why a place is of the format, in words; None if it is not.

    Raises:
      UserError: if what is there is damaged.
    """

  def read(
    self, where: place.Place, given: imported.Given
  ) -> imported.Imported:
    """What the place holds; of the weights, no values are read.

    Raises:
      UserError: if something is missing, unknown or contradictory.
    """


class Written(Format, Protocol):
  """What a format that is written defines besides."""

  def lack(self, of: imported.Imported) -> str | None:
    """What an autoencoder has that the format has no word for, in words.

    None if it can be written. Thresholds may be read for it.
    """

  def write(self, of: imported.Imported, url: str) -> None:
    """Writes an autoencoder of which there is no `lack`, by blocks of rows.

    Every file is whole or absent, and the config is the last one.

    Raises:
      UserError: if what is there contradicts it.
      OSError: if it cannot be written.
    """


def of(name: str) -> Format | Written:
  """The module of a format."""
  return importlib.import_module(f'{__name__}.{name}')


WRITTEN = tuple(name for name in NAMES if hasattr(of(name), 'write'))
