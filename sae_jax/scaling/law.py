"""Fitting a form to measured rows: many starts, then a robust polish."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import numpy as np
from scipy import stats

from sae_jax import errors
from sae_jax.scaling import forms, projection, solve
from sae_jax.scaling.forms import Form

# Huber's loss turns linear here, in standard deviations of the noise: of normal
# noise it loses 1 % of what the rows say.
TURN = 2.0
# Means under a standard normal of the derivative of Huber's loss, squared, and
# of its second derivative.
_INSIDE = 1 - 2 * stats.norm.sf(TURN)
SQUARE = (
  _INSIDE - 2 * TURN * stats.norm.pdf(TURN) + 2 * TURN**2 * stats.norm.sf(TURN)
)
# A difference of 2 Huber losses times this is that of squares over a variance
# (Huber and Ronchetti 2009, section 13.3).
DEVIANCE = _INSIDE / SQUARE
# Noise below this is rounding.
_LEAST_SCALE = 1e-11
# Floors that fits start from, as shares of the least that was measured.
_FLOORS = np.array([0.3, 0.8])


@dataclasses.dataclass(frozen=True)
class Law:
  """A form that was fitted to rows.

  Attributes:
    form: what was fitted.
    centre: the mean logarithm of each variable over the rows.
    columns_RP: `Form.columns` of the rows' logarithms less the centre.
    log_y_R: logarithms of what was fitted.
    theta_P: coefficients, of centred logarithms.
    scale: standard deviation of the noise of log y.
    freedom: degrees of freedom that `scale` rests on.
    branch_FP: coefficients of the best fits with other floors, from which
      walks start too.
  """

  form: Form
  centre: Mapping[str, float]
  columns_RP: np.ndarray
  log_y_R: np.ndarray
  theta_P: np.ndarray
  scale: float
  freedom: int
  branch_FP: np.ndarray

  @property
  def residual_R(self) -> np.ndarray:
    """Fitted less measured, of logarithms."""
    log_FR, _ = forms.log_value(self.form, self.theta_P[None], self.columns_RP)
    return log_FR[0] - self.log_y_R

  def columns(self, **variables: Any) -> np.ndarray:
    """The columns of points at variables, [..., P]."""
    logs = {
      name: np.log(np.asarray(x, float)) - self.centre[name]
      for name, x in variables.items()
    }
    return self.form.columns(logs)

  def value(self, **variables: Any) -> np.ndarray:
    """The law at points, which broadcast against each other."""
    columns = self.columns(**variables)
    flat_RP = columns.reshape(-1, columns.shape[-1])
    log_FR, _ = forms.log_value(self.form, self.theta_P[None], flat_RP)
    return np.exp(log_FR[0]).reshape(columns.shape[:-1])

  def to_centred(self) -> np.ndarray:
    """The matrix [P, P] from coefficients of plain logarithms to `theta_P`."""
    # The columns of plain logarithms are combinations of the centred ones,
    # read off at points that tell them all apart.
    names = sorted(self.centre)
    points = np.array(np.meshgrid(*[[0.0, 1.0]] * len(names))).reshape(
      len(names), -1
    )
    centred = self.form.columns(dict(zip(names, points)))
    plain = self.form.columns(
      {
        name: row + self.centre[name]
        for name, row in zip(names, points, strict=True)
      }
    )
    matrix = np.zeros((centred.shape[1],) * 2)
    for term in range(len(self.form.terms)):
      at = self.form.term_P == term
      matrix[np.ix_(at, at)] = np.linalg.lstsq(
        centred[:, at], plain[:, at], rcond=None
      )[0]
    return matrix

  @property
  def coefficients_P(self) -> np.ndarray:
    """Coefficients of plain logarithms, as the form's text has them."""
    return np.linalg.solve(self.to_centred(), self.theta_P)


def log_residuals(form: Form, columns_RP, log_y_FR, scale_F=None):
  """Function for `solve.minimise`: (log L - log y) / scale and its Jacobian."""

  def residuals(theta_FP, fits):
    log_FR, gradient_FRP = forms.log_value(form, theta_FP, columns_RP)
    residual = log_FR - log_y_FR[fits]
    if scale_F is None:
      return residual, gradient_FRP
    scale = scale_F[fits, None]
    return residual / scale, gradient_FRP / scale[..., None]

  return residuals


def robust_scale(residual_FR, freedom: int) -> np.ndarray:
  """Huber's scale [F] of residuals, that of normal noise where it is normal."""
  scale = np.sqrt((residual_FR**2).sum(-1) / freedom)
  for _ in range(60):
    scale = np.maximum(scale, _LEAST_SCALE)
    psi = np.minimum(np.abs(residual_FR) / scale[:, None], TURN)
    scale = scale * np.sqrt((psi**2).sum(-1) / (freedom * SQUARE))
  return np.maximum(scale, _LEAST_SCALE)


def polish(form: Form, columns_RP, log_y_FR, start_FP, rounds: int = 4):
  """Huber's fit of all coefficients to log y, from starts.

  Returns:
    Coefficients [F, P], scales [F] and losses [F] in units of the scales.
  """
  lower, upper = form.bounds
  freedom = log_y_FR.shape[1] - len(form.coefficients)
  infinite = np.full(log_y_FR.shape, np.inf)
  theta, _ = solve.minimise(
    log_residuals(form, columns_RP, log_y_FR), start_FP, lower, upper, infinite
  )
  for _ in range(rounds):
    log_FR, _ = forms.log_value(form, theta, columns_RP)
    scale = robust_scale(log_FR - log_y_FR, freedom)
    theta, cost = solve.minimise(
      log_residuals(form, columns_RP, log_y_FR, scale),
      theta,
      lower,
      upper,
      np.full(log_y_FR.shape, TURN),
    )
  return theta, scale, cost


def fit(
  form: Form,
  variables: Mapping[str, Any],
  y_R: Any,
  starts: int = 64,
  seed: int = 0,
) -> Law:
  """Fits a form to rows.

  Args:
    form: the form.
    variables: each of its variables, [R].
    y_R: what is fitted, above 0.
    starts: number of starts, a power of 2.
    seed: of the starts.

  Raises:
    UserError: if the rows cannot tell the coefficients apart.
  """
  y_R = np.asarray(y_R, float)
  logs = {name: np.log(np.asarray(x, float)) for name, x in variables.items()}
  centre = {name: float(log.mean()) for name, log in logs.items()}
  columns = form.columns({name: logs[name] - centre[name] for name in logs})
  check(form, columns)
  start = projection.starts(form, columns, y_R[None], starts, seed)
  log_y = np.log(y_R)
  starts_FP = _with_floors(form, start[0], log_y)
  log_y_FR = np.broadcast_to(log_y, (len(starts_FP), len(log_y)))
  theta, scale, _ = polish(form, columns, log_y_FR, starts_FP)
  best = scale.argmin()
  freedom = len(y_R) - len(form.coefficients)
  return Law(
    form,
    centre,
    columns,
    log_y,
    theta[best],
    float(scale[best]),
    freedom,
    _branches(form, columns, log_y, starts_FP),
  )


def _with_floors(form: Form, theta_P, log_y_R) -> np.ndarray:
  """Coefficients as they are, and with other floors at the means, [F, P].

  A floor of 0 has no gradient in its logarithm, so that no fit leaves it.
  """
  if form.floor is None:
    return theta_P[None]
  at = np.flatnonzero(form.is_constant_P)[form.floor]
  starts_FP = np.tile(theta_P, (1 + len(_FLOORS), 1))
  starts_FP[1:, at] = log_y_R.min() + np.log(_FLOORS)
  return starts_FP


def _branches(form: Form, columns_RP, log_y_R, starts_FP) -> np.ndarray:
  """The best fits with each of the floors, [F, P]."""
  if form.floor is None:
    return starts_FP
  at = np.flatnonzero(form.is_constant_P)[form.floor]
  free = np.arange(len(form.coefficients)) != at
  lower, upper = form.bounds
  lines = log_residuals(
    form, columns_RP, np.broadcast_to(log_y_R, (len(starts_FP), len(log_y_R)))
  )

  def residuals(theta_FP, fits):
    whole = starts_FP[fits].copy()
    whole[:, free] = theta_FP
    residual, jacobian = lines(whole, fits)
    return residual, jacobian[..., free]

  branches = starts_FP.copy()
  branches[:, free], _ = solve.minimise(
    residuals,
    starts_FP[:, free],
    lower[free],
    upper[free],
    np.full((len(starts_FP), len(log_y_R)), np.inf),
    most_steps=100,
  )
  return branches


def check(form: Form, columns_RP) -> None:
  """Raises UserError if rows cannot tell the coefficients apart."""
  needed = len(form.coefficients) + 1
  rows = len(columns_RP)
  if rows < needed:
    raise errors.UserError(
      f'{form.text} has {needed - 1} coefficients and {rows} cells: '
      f'run {needed} cells or more'
    )
  for term, coefficients in enumerate(form.terms):
    part = columns_RP[:, form.term_P == term]
    if np.linalg.matrix_rank(part, tol=1e-9 * rows) < len(coefficients):
      names = ', '.join(c.name for c in coefficients)
      raise errors.UserError(
        f'the cells cannot tell {names} of {form.text} apart: '
        'run cells at more values of each variable'
      )
