"""Intervals by profile likelihood: what values of a figure fit nearly as well.

A value is in the interval if the best fit that has it is worse by less than
the noise explains: by at most s^2 F, with s the scale of the noise and F the
quantile of Fisher's distribution with 1 and the fit's degrees of freedom. The
small number of cells is in F, a bend of the form in the walk along the values.
"""

from collections.abc import Callable
import dataclasses

import numpy as np
from scipy import stats

from sae_jax.scaling import forms, solve
from sae_jax.scaling import law as law_lib
from sae_jax.scaling.law import Law

# Where the walk looks, in standard errors of a linear figure.
_REACH = ((1, 1.9, 2.6), (3.6, 5), (8, 14), (25, 50))


@dataclasses.dataclass(frozen=True)
class Figure:
  """A number that a law gives.

  Attributes:
    measure: function from coefficients [F, P] to the figure [F] and its
      gradient [F, P].
    is_log: whether that is the logarithm of what is reported.
    term: the term whose size it is; None if it is none's.
  """

  measure: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
  is_log: bool = False
  term: int | None = None


@dataclasses.dataclass(frozen=True)
class Profile:
  """An estimate and its interval.

  Attributes:
    estimate: the figure of the best fit.
    low, high: ends of the interval; -inf or inf where none was met.
    value_V: values of the figure that were tried, ascending.
    excess_V: by how much the best fit with each is worse, in units of what is
      allowed: the interval is where it is below 1.
  """

  estimate: float
  low: float
  high: float
  value_V: np.ndarray
  excess_V: np.ndarray


def combination(weight_P) -> Figure:
  """The figure that is a linear combination of coefficients."""
  weight_P = np.asarray(weight_P, float)
  return Figure(
    lambda theta: (theta @ weight_P, np.broadcast_to(weight_P, theta.shape))
  )


def coefficient(law: Law, name: str) -> Figure:
  """A coefficient of plain logarithms, the first of its name."""
  names = [c.name for c in law.form.coefficients]
  return combination(np.linalg.inv(law.to_centred())[names.index(name)])


def slope(law: Law, term: int, variable: str, **at: float) -> Figure:
  """The exponent of a variable in a term, where the others are as given."""
  step = law.columns(**at, **{variable: np.e}) - law.columns(
    **at, **{variable: 1.0}
  )
  return combination(step * (law.form.term_P == term))


def term_size(law: Law, term: int, **at: float) -> Figure:
  """The size of a term at a point."""
  others = {name: 1.0 for name in law.centre if name not in at}
  column = law.columns(**at, **others) * (law.form.term_P == term)
  return dataclasses.replace(combination(column), is_log=True, term=term)


def prediction(law: Law, **at: float) -> Figure:
  """The law itself at a point."""
  columns = law.columns(**at)[None]

  def measure(theta):
    log_FR, gradient_FRP = forms.log_value(law.form, theta, columns)
    return log_FR[:, 0], gradient_FRP[:, 0]

  return Figure(measure, is_log=True)


def profile(law: Law, figure: Figure, confidence: float = 0.95) -> Profile:
  """The interval of a figure of a law."""
  walk = _Walk(law, figure, stats.f.ppf(confidence, 1, law.freedom))
  low, high = walk.end(-1), walk.end(1)
  values, excess = walk.curve()
  ends = np.array([walk.best, low, high])
  if figure.is_log:
    ends, values = np.exp(ends), np.exp(values)
  return Profile(*map(float, ends), values, excess)


class _Walk:
  """Best fits whose figure is held at one value after another."""

  def __init__(self, law: Law, figure: Figure, allowed: float):
    self._law, self._figure, self._allowed = law, figure, allowed
    theta = law.theta_P[None]
    value, gradient = figure.measure(theta)
    self.best = value[0]
    self._least = self._loss(theta)[0]
    _, jac = forms.log_value(law.form, theta, law.columns_RP)
    jac = jac[0] / law.scale
    hessian = jac.T @ jac
    # A coefficient that the rows say nothing of has no error of its own.
    ridge = 1e-10 * np.diag(hessian).max()
    self._direction = np.linalg.solve(
      hessian + ridge * np.eye(len(hessian)), gradient[0]
    )
    self._error = np.sqrt(max(gradient[0] @ self._direction, 1e-300))
    self._gone = self._without_term()
    self._values = [self.best]
    self._thetas = [law.theta_P]
    self._roots = [0.0]

  def _loss(self, theta_FP) -> np.ndarray:
    law = self._law
    log_FR, _ = forms.log_value(law.form, theta_FP, law.columns_RP)
    residual = (log_FR - law.log_y_R) / law.scale
    return solve.huber(residual, law_lib.TURN).sum(-1)

  def _hold(self, target_F, start_FP) -> None:
    """Adds best fits whose figure is near targets."""
    law = self._law
    rows = len(law.log_y_R)
    count = 1 + len(law.branch_FP)
    target_F = np.tile(target_F, count)
    start_FP = np.concatenate(
      [start_FP, np.repeat(law.branch_FP, len(start_FP), 0)]
    )
    width = 0.05 * min(self._error, 1.0)

    def residuals(theta, fits):
      log_FR, gradient_FRP = forms.log_value(law.form, theta, law.columns_RP)
      value_F, slope_FP = self._figure.measure(theta)
      pull_F = (value_F - target_F[fits]) / width
      residual = (log_FR - law.log_y_R) / law.scale
      return (
        np.concatenate([residual, pull_F[:, None]], 1),
        np.concatenate(
          [gradient_FRP / law.scale, slope_FP[:, None] / width], 1
        ),
      )

    delta = np.append(np.full(rows, law_lib.TURN), np.inf)
    lower, upper = law.form.bounds
    theta, cost = solve.minimise(
      residuals,
      start_FP,
      lower,
      upper,
      np.broadcast_to(delta, (len(target_F), rows + 1)),
      most_steps=60,
      tolerance=1e-6,
    )
    best = cost.reshape(count, -1).argmin(0)
    theta = theta.reshape(count, -1, theta.shape[-1])[
      best, np.arange(best.size)
    ]
    # The best fit for a soft pull is the best of those with its own figure.
    value, _ = self._figure.measure(theta)
    excess = 2 * law_lib.DEVIANCE * (self._loss(theta) - self._least)
    root = np.sqrt(np.maximum(excess, 0) / self._allowed)
    self._values.extend(value)
    self._thetas.extend(theta)
    self._roots.extend(root)

  def _starts(self, target_F) -> np.ndarray:
    """The nearest fits, moved so that their figures are the targets."""
    values = np.array(self._values)
    nearest = np.abs(values[:, None] - target_F).argmin(0)
    start = np.array(self._thetas)[nearest]
    gap = target_F - values[nearest]
    move = self._direction / self._error**2
    limited = np.clip(gap, -3 * self._error, 3 * self._error)
    return start + limited[:, None] * move

  def _targets(self, sign: int) -> list[np.ndarray]:
    error = self._error
    if self._figure.is_log:
      # A law that is nearly flat in it would send the walk out of the world.
      error = min(error, 0.5)
    return [self.best + sign * error * np.array(reach) for reach in _REACH]

  def end(self, sign: int) -> float:
    """Where the excess meets what is allowed, on one side."""
    targets = self._targets(sign)
    if sign < 0 and self._gone is not None and self._gone <= 1:
      # There is no end to find; these are for the curve.
      self._hold(targets[0], self._starts(targets[0]))
      return -np.inf
    for target in targets:
      self._hold(target, self._starts(target))
      if self._bracket(sign) is not None:
        break
    for _ in range(3):
      bracket = self._bracket(sign)
      if bracket is None:
        return sign * np.inf
      inner, outer, at = bracket
      if abs(outer - inner) < 0.05 * abs(at - self.best):
        break
      target = np.array([at + 0.1 * (outer - at), at + 0.1 * (inner - at)])
      self._hold(target, self._starts(target))
    bracket = self._bracket(sign)
    return bracket[2]

  def _without_term(self) -> float | None:
    """The excess without the figure's term, in units of what is allowed."""
    law, term = self._law, self._figure.term
    if term is None:
      return None
    form = law.form.without(term)
    keep = law.form.term_P != term
    start = law.theta_P[None, keep]
    lower, upper = form.bounds
    columns = law.columns_RP[:, keep]
    _, cost = solve.minimise(
      law_lib.log_residuals(
        form, columns, law.log_y_R[None], np.array([law.scale])
      ),
      start,
      lower,
      upper,
      np.full((1, len(columns)), law_lib.TURN),
    )
    excess = 2 * law_lib.DEVIANCE * (cost[0] - self._least)
    return max(excess, 0) / self._allowed

  def curve(self) -> tuple[np.ndarray, np.ndarray]:
    """Values tried, ascending, and their excess.

    The first is that of a law without the figure's term, if it has one.
    """
    order = np.argsort(self._values)
    values = np.array(self._values)[order]
    excess = np.array(self._roots)[order] ** 2
    if self._gone is not None:
      values = np.insert(values, 0, -np.inf)
      excess = np.insert(excess, 0, self._gone)
    return values, excess

  def _bracket(self, sign: int):
    """Values on both sides of the end, and where a line between meets it."""
    values, roots = np.array(self._values), np.array(self._roots)
    side = sign * (values - self.best) >= 0
    values, roots = values[side], roots[side]
    order = np.argsort(sign * values)
    values, roots = values[order], roots[order]
    over = np.flatnonzero(roots >= 1)
    if not len(over) or over[0] == 0:
      return None
    last, first = over[0] - 1, over[0]
    share = (1 - roots[last]) / (roots[first] - roots[last])
    at = values[last] + share * (values[first] - values[last])
    return values[last], values[first], at
