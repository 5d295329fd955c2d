"""Variable projection: only exponents are searched, from many starts.

Given its exponents a form is linear in the factors of its terms, and the best
factors that are not negative are known in closed form (Golub and Pereyra 1973;
the Jacobian is Kaufman's, whose gradient is exact).
"""

import itertools

import numpy as np
from scipy.stats import qmc

from sae_jax.scaling import solve
from sae_jax.scaling.forms import Form

# Where the factor of a term is 0: its logarithm, with 1 at the means.
_NOTHING = -40.0


def _factors(basis_FRJ, weight_FR) -> np.ndarray:
  """Non-negative factors [F, J] for which weighted sums are nearest to 1."""
  n_terms = basis_FRJ.shape[-1]
  weighted = basis_FRJ * weight_FR[..., None]
  gram = np.swapaxes(weighted, 1, 2) @ basis_FRJ
  target = weighted.sum(1)
  best = np.zeros(target.shape)
  best_gain = np.zeros(len(target))
  for size in range(1, n_terms + 1):
    for chosen in itertools.combinations(range(n_terms), size):
      at = list(chosen)
      part = gram[:, at][:, :, at]
      diagonal = np.einsum('fjj->fj', part)
      # Two terms may have the same shape.
      part = part + np.eye(size) * (1e-12 * diagonal.max(-1))[:, None, None]
      values = np.linalg.solve(part, target[:, at, None])[..., 0]
      gain = (values * target[:, at]).sum(-1)
      wins = (values >= 0).all(-1) & (gain > best_gain)
      best_gain[wins] = gain[wins]
      best[wins] = 0
      best[np.ix_(wins, at)] = values[wins]
  return best


def starts(form: Form, columns_RP, y_FR, count: int, seed: int) -> np.ndarray:
  """Coefficients [F, P] that fit relative residuals best, of many starts.

  Minimises the sum of ((L - y) / y)^2.

  Args:
    form: the form.
    columns_RP: from `Form.columns`, of centred logarithms.
    y_FR: what is fitted.
    count: number of starts of each fit, a power of 2: points of a Sobol
      sequence in the box of the exponents.
    seed: of the sequence's scrambling.
  """
  n_fits = len(y_FR)
  lower, upper = form.bounds
  exponents = ~form.is_constant_P
  lower_E, upper_E = lower[exponents], upper[exponents]
  sobol = qmc.Sobol(exponents.sum(), seed=seed)
  # The middle half of the box: its corners overflow no loss that is measured.
  point_SE = 0.25 + 0.5 * sobol.random(count)
  start_SE = lower_E + (upper_E - lower_E) * point_SE
  start = np.tile(start_SE, (n_fits, 1))
  y = np.repeat(y_FR, count, 0)
  residuals = _Residuals(form, columns_RP, y)
  theta, cost = solve.minimise(
    residuals, start, lower_E, upper_E, np.full(y.shape, np.inf)
  )
  best = cost.reshape(n_fits, count).argmin(-1) + count * np.arange(n_fits)
  factors = residuals.factors(theta[best], best)
  coefficients = np.empty((n_fits, len(form.coefficients)))
  coefficients[:, exponents] = theta[best]
  log = np.log(np.maximum(factors, 1e-300))
  coefficients[:, form.is_constant_P] = np.maximum(log, _NOTHING)
  return coefficients


class _Residuals:
  """Relative residuals of exponents, with the best factors in their place."""

  def __init__(self, form: Form, columns_RP, y_FR):
    self._y = y_FR
    self._term_E = form.term_P[~form.is_constant_P]
    self._columns_RE = columns_RP[:, ~form.is_constant_P]
    self._n_terms = len(form.terms)

  def _basis(self, theta_FE, fits) -> np.ndarray:
    log_FRJ = np.stack(
      [
        theta_FE[:, self._term_E == term]
        @ self._columns_RE[:, self._term_E == term].T
        for term in range(self._n_terms)
      ],
      -1,
    )
    return np.exp(log_FRJ) / self._y[fits][..., None]

  def factors(self, theta_FE, fits) -> np.ndarray:
    """The best factor of each term, [F, J]."""
    basis = self._basis(theta_FE, fits)
    return _factors(basis, np.ones(basis.shape[:2]))

  def __call__(self, theta_FE, fits):
    basis = self._basis(theta_FE, fits)
    factors = _factors(basis, np.ones(basis.shape[:2]))
    parts = basis * factors[:, None]
    derivative = parts[..., self._term_E] * self._columns_RE
    used = basis * (factors > 0)[:, None]
    gram = np.swapaxes(used, 1, 2) @ used
    diagonal = np.einsum('fjj->fj', gram)
    ridge = np.where(diagonal > 0, 1e-12 * diagonal, 1.0)
    gram = gram + np.eye(self._n_terms) * ridge[:, None]
    inner = np.linalg.solve(gram, np.swapaxes(used, 1, 2) @ derivative)
    return parts.sum(-1) - 1, derivative - used @ inner
