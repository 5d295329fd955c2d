"""Where probe tasks come from: a module each.

A new source is a file here. `Source` lists what it defines. Flaws of its tasks
are listed in `text.flaws`.
"""

import importlib
import pkgutil
from typing import Protocol

# The source of the tasks that are taken first.
_FIRST = 'sae_probes'
NAMES = tuple(
  sorted(
    (module.name for module in pkgutil.iter_modules(__path__)),
    key=lambda name: (name != _FIRST, name),
  )
)


class Source(Protocol):
  """What every module of this folder defines.

  Attributes:
    ORIGIN: who made the tasks, and where they are from.
    LICENCE: the licence of what is read; of the texts in it, what is known.
  """

  ORIGIN: str
  LICENCE: str

  def names(self) -> list[str]:
    """Names of all its tasks, flawed ones too, in their order.

    No two sources have a task of the same name.

    Raises:
      UserError: if the source is not there, with how to get it.
    """

  def read(self, name: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """A task by name.

    Returns:
      The names of its classes in sorted order, and the class of each prompt: a
      prompt counts once whatever its case and spacing, and not at all if it
      is of both classes. Of a task with more than two classes, three or more
      names and no prompts.
    """


def of(name: str) -> Source:
  """A source by its name, one of `NAMES`."""
  return importlib.import_module(f'{__name__}.{name}')


def records() -> dict[str, dict[str, str]]:
  """Origin and licence of every source, by its name."""
  return {
    name: {'origin': of(name).ORIGIN, 'licence': of(name).LICENCE}
    for name in NAMES
  }
