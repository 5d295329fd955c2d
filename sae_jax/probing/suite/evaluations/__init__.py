"""The evaluations of an autoencoder: a module each, in this folder.

The module's name is what `--suite` takes. `Evaluation` lists what it defines.
"""

from collections.abc import Sequence
import importlib
import pkgutil
from typing import Any, Protocol

from etils import epath

from sae_jax import errors

QUICK, ALL = 'quick', 'all'

NAMES = tuple(sorted(module.name for module in pkgutil.iter_modules(__path__)))


class Evaluation(Protocol):
  """What every module of this folder defines.

  Attributes:
    TITLE: a few words.
    ABOUT: what it measures, how and after whom, for a reader who never saw the
      project; paragraphs are parted by an empty line.
    UNIT: what its figures vary with: 'documents', 'latents', 'draws', 'tasks',
      'concepts' or 'letters'.
    STATISTICS: its figures and curves, `figures.Statistic` by name.
    SIZES: by the size of the suite, QUICK and ALL, how much is measured: a
      dataclass whose fields are named in the report.
    OPTIONS: flags beside the size that it depends on; may be left out for none.
    ONE_SITE: whether it needs latents that act where they are encoded, which
      those of a transcoder do not; may be left out if it does not.
  """

  TITLE: str
  ABOUT: str
  UNIT: str
  STATISTICS: dict[str, Any]
  SIZES: dict[str, Any]

  def measure(self, context: Any) -> Any:
    """Measures the autoencoders of a `context.Context`: an `outcome.Outcome`.

    Raises:
      CannotMeasure: if the data do not allow it.
    """


def of(name: str) -> Evaluation:
  """The module of an evaluation."""
  return importlib.import_module(f'{__name__}.{name}')


def asked(words: Sequence[str]) -> tuple[list[str], str]:
  """The evaluations that `--suite` names, and their size.

  Args:
    words: QUICK or ALL, names, or QUICK and names.

  Raises:
    UserError: if there is no such evaluation.
  """
  names = [word for word in words if word not in (QUICK, ALL)]
  for name in names:
    if name not in NAMES:
      raise errors.UserError(
        f'suite {name!r} is no evaluation: give {QUICK}, {ALL} or of '
        f'{", ".join(NAMES)}'
      )
  size = QUICK if QUICK in words else ALL
  return (names or list(NAMES)) if words else [], size


def options(name: str, loss_curve: str, wordnet: str) -> dict[str, Any]:
  """What an evaluation depends on beside its size, by the name of the flag.

  Args:
    name: of the evaluation.
    loss_curve: URL of a table, see `loss_curve.read`; empty for none.
    wordnet: folder of WordNet's files; empty for none.

  Returns:
    The table's text, and whether there are WordNet's files: the same wherever
    they lie.
  """
  curve = epath.Path(loss_curve).read_text() if loss_curve else ''
  given = {'loss_curve': curve, 'wordnet': bool(wordnet)}
  return {flag: given[flag] for flag in getattr(of(name), 'OPTIONS', ())}
