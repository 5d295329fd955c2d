"""Bootstrap over seeds, then cells: what a law owes to single cells."""

from collections.abc import Sequence

import numpy as np

from sae_jax.scaling import forms, solve
from sae_jax.scaling.law import Law


def draws(law: Law, cell_R: Sequence, count: int, seed: int) -> np.ndarray:
  """Coefficients [count, P] of fits to tables that were drawn from the table.

  A draw takes cells with replacement, and for each time that a cell is taken
  as many of its seeds, with replacement. Each fit starts from the law.

  Args:
    law: the law.
    cell_R: what each row shares with other seeds.
    count: number of draws.
    seed: of the draws.
  """
  rng = np.random.default_rng(seed)
  cells = list(dict.fromkeys(cell_R))
  rows = [[r for r, c in enumerate(cell_R) if c == cell] for cell in cells]
  weight_FR = np.zeros((count, len(cell_R)))
  for weight_R in weight_FR:
    for cell in rng.integers(len(cells), size=len(cells)):
      seeds = rng.choice(rows[cell], size=len(rows[cell]))
      np.add.at(weight_R, seeds, 1)
  root_FR = np.sqrt(weight_FR) / law.scale

  def residuals(theta_FP, fits):
    log_FR, gradient_FRP = forms.log_value(law.form, theta_FP, law.columns_RP)
    root = root_FR[fits]
    return root * (log_FR - law.log_y_R), root[..., None] * gradient_FRP

  lower, upper = law.form.bounds
  theta_FP, _ = solve.minimise(
    residuals,
    np.tile(law.theta_P, (count, 1)),
    lower,
    upper,
    np.full(weight_FR.shape, np.inf),
    most_steps=60,
  )
  return theta_FP


def interval(figure, theta_FP, confidence: float = 0.95) -> tuple[float, float]:
  """Percentiles of a `profile.Figure` over draws."""
  values, _ = figure.measure(theta_FP)
  tail = (1 - confidence) / 2
  ends = np.quantile(values, [tail, 1 - tail])
  if figure.is_log:
    ends = np.exp(ends)
  return float(ends[0]), float(ends[1])
