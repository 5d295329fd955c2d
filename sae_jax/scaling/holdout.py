"""Prediction of what was left out: the largest n, the largest k."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np

from sae_jax import errors
from sae_jax.scaling import law as law_lib
from sae_jax.scaling import profile
from sae_jax.scaling.forms import Form


@dataclasses.dataclass(frozen=True)
class Holdout:
  """How well the other rows predict those with the largest value.

  Attributes:
    variable: what the largest value is of.
    value: that value.
    rows: rows that were left out.
    error: root mean square of predicted over measured less 1.
    bias: mean of the same.
    covered: share of the rows that lie in the prediction's interval, widened
      by the noise of one run.
    refusal: why nothing was predicted; '' if it was.
  """

  variable: str
  value: float
  rows: int
  error: float = np.nan
  bias: float = np.nan
  covered: float = np.nan
  refusal: str = ''


def leave_largest_out(
  form: Form,
  variables: Mapping[str, Any],
  y_R,
  variable: str,
  starts: int = 64,
  seed: int = 0,
  confidence: float = 0.95,
) -> Holdout:
  """Fits without the rows of a variable's largest value and predicts them."""
  values = np.asarray(variables[variable], float)
  y_R = np.asarray(y_R, float)
  largest = values.max()
  out = values == largest
  arrays = {name: np.asarray(x, float) for name, x in variables.items()}
  kept = {name: x[~out] for name, x in arrays.items()}
  try:
    law = law_lib.fit(form, kept, y_R[~out], starts, seed)
  except errors.UserError as error:
    return Holdout(variable, float(largest), int(out.sum()), refusal=str(error))
  points = {name: x[out] for name, x in arrays.items()}
  ratio = law.value(**points) / y_R[out]
  covered = []
  ends = {}
  for row, measured in enumerate(y_R[out]):
    at = {name: float(x[row]) for name, x in points.items()}
    key = tuple(at.values())
    if key not in ends:
      walked = profile.profile(law, profile.prediction(law, **at), confidence)
      ends[key] = np.log(
        [max(walked.low, 1e-300), walked.estimate, walked.high]
      )
    low, middle, high = ends[key]
    reach = 2 * law.scale
    below, above = np.hypot(middle - low, reach), np.hypot(high - middle, reach)
    covered.append(-below <= np.log(measured) - middle <= above)
  return Holdout(
    variable,
    float(largest),
    int(out.sum()),
    float(np.sqrt(np.mean((ratio - 1) ** 2))),
    float(np.mean(ratio - 1)),
    float(np.mean(covered)),
  )
