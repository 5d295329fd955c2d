"""The fits of a place, and what fits.json says of them."""

from collections.abc import Sequence
import dataclasses
from typing import Any

from sae_jax.scaling import cells as cells_lib
from sae_jax.scaling import forms, words
from sae_jax.scaling.advise import Advice
from sae_jax.scaling.study import Study

FITS_VERSION = 1


@dataclasses.dataclass(frozen=True)
class PlaceFits:
  """All that was fitted to the cells of one place.

  Attributes:
    place: what was read, `Cell.place`.
    cells: its cells.
    studies: its laws.
    advice: for the budget, a row for each k; () without one.
    spent_share: FLOPs spent over dense-equivalent ones, least and most; None
      if they were not counted.
  """

  place: tuple[str, str, int, str]
  cells: tuple[cells_lib.Cell, ...]
  studies: tuple[Study, ...]
  advice: tuple[Advice, ...]
  spent_share: tuple[float, float] | None

  def study(self, name: str) -> Study | None:
    """The study of a question's name that was fitted."""
    return next(
      (
        item
        for item in self.studies
        if item.question.name == name and item.law is not None
      ),
      None,
    )


def of_study(study: Study) -> dict[str, Any]:
  """A study as JSON has it; an end of an interval that is null has no bound."""
  question = study.question
  start = {
    'name': question.name,
    'title': question.title,
    'form': question.form.text,
    'rows': len(question.cell_R),
    'cells': len(set(question.cell_R)),
    'refusal': study.refusal,
  }
  if study.law is None:
    return start
  names = [c.name for c in question.form.coefficients]
  law = study.law
  values, excess, _ = study.floor_curve or ((), (), None)
  return start | {
    'coefficients': dict(
      zip(names, map(float, law.coefficients_P), strict=True)
    ),
    'noise_of_a_run': law.scale,
    'degrees_of_freedom': law.freedom,
    'noise_between_seeds': dataclasses.asdict(study.noise),
    'misfit': dataclasses.asdict(study.misfit),
    'figures': [dataclasses.asdict(item) for item in study.findings],
    'profile_of_the_floor': {
      'value': list(map(float, values)),
      'excess': list(map(float, excess)),
    },
    'left_out': [dataclasses.asdict(item) for item in study.holdouts],
    'further_cells': {
      name: dataclasses.asdict(plan) | {'words': words.of_further(plan)}
      for name, plan in study.further.items()
    },
  }


def of_places(
  places: Sequence[PlaceFits], table: str, metric: str
) -> dict[str, Any]:
  """All of fits.json but the config."""
  return {
    'version': FITS_VERSION,
    'table': table,
    'metric': metric,
    'published': dataclasses.asdict(forms.PAPER) | {'form': forms.SURFACE.text},
    'places': [
      {
        'place': dict(
          zip(('subject', 'site', 'layer', 'store'), fits.place, strict=True)
        ),
        'cells': len(fits.cells),
        'spent_over_dense_flops': fits.spent_share,
        'laws': [of_study(study) for study in fits.studies],
        'advice': [dataclasses.asdict(row) for row in fits.advice],
      }
      for fits in places
    ],
  }
