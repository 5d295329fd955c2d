"""Which further cells would identify a figure at least cost.

The rows' Jacobian says how wide the interval becomes with cells that are not
run yet: each adds its own outer product to the information.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np
from scipy import stats

from sae_jax.scaling import forms
from sae_jax.scaling.law import Law
from sae_jax.scaling.profile import Figure

_MOST_RUNS = 40
# Seeds of one cell share what the form misses of it.
_MOST_SEEDS = 4
# Latents for each active one, below which sparsity means little.
_LEAST_RATIO = 8


@dataclasses.dataclass(frozen=True)
class Candidate:
  """A cell that could be run: n_latents, k, and what one seed of it costs."""

  n_latents: int
  k: int
  flops: float


@dataclasses.dataclass(frozen=True)
class Further:
  """Cells to run.

  Attributes:
    runs: (n_latents, k, seeds) of each cell.
    flops: what they cost, dense-equivalent.
    width: the interval's expected width with them.
    wanted: the width that identifies the figure.
    assumed: the figure's value that this was computed at.
  """

  runs: tuple[tuple[int, int, int], ...]
  flops: float
  width: float
  wanted: float
  assumed: float

  @property
  def is_enough(self) -> bool:
    """Whether they are expected to identify the figure."""
    return self.width <= self.wanted


def candidates(
  n_latents: Sequence[int],
  ks: Sequence[int],
  flops: Callable[[int, int], float],
) -> list[Candidate]:
  """Cells at each k, of sizes in factors of 2 around those there are.

  From a quarter of the smallest to 16 times the largest.
  """
  low, high = min(n_latents), max(n_latents)
  sizes = [low // 4, low // 2, *sorted(set(n_latents))]
  sizes += [high * factor for factor in (2, 4, 8, 16)]
  return [
    Candidate(int(n), int(k), flops(n, k))
    for n in sizes
    for k in sorted(set(ks))
    if n >= _LEAST_RATIO * k
  ]


def choose(
  law: Law,
  figure: Figure,
  options: Sequence[Candidate],
  wanted: float,
  confidence: float = 0.95,
) -> Further | None:
  """The cheapest cells that are expected to make an interval narrow enough.

  Cells are added by what they take off the logarithm of the variance for a
  FLOP, those that are not needed are taken away again, and the cheapest cell
  that is enough with seeds of its own is taken where it costs less.

  Args:
    law: the law.
    figure: what is to be identified.
    options: cells that could be run, at variables `law.centre` names.
    wanted: width of the interval, in units of the figure itself.
    confidence: of the interval.

  Returns:
    The cells; None if the law says nothing of the figure, so that none can be
    chosen.
  """
  model = _Information(law, figure, confidence)
  if not model.is_known or not options:
    return None
  rows_OP = model.rows(options)
  flops_O = np.array([option.flops for option in options])
  plans = [_greedy(model, rows_OP, flops_O, wanted)]
  plans += [
    counts for counts in _single(model, rows_OP, wanted) if counts is not None
  ]
  widths = [model.width(rows_OP, counts) for counts in plans]
  costs = [float(counts @ flops_O) for counts in plans]
  enough = [i for i, width in enumerate(widths) if width <= wanted]
  best = min(enough, key=costs.__getitem__) if enough else 0
  runs = tuple(
    (option.n_latents, option.k, int(count))
    for option, count in zip(options, plans[best], strict=True)
    if count
  )
  return Further(runs, costs[best], float(widths[best]), wanted, model.value)


class _Information:
  """What rows say of a figure, by the Jacobian at the best fit."""

  def __init__(self, law: Law, figure: Figure, confidence: float):
    theta = law.theta_P[None]
    value, gradient = figure.measure(theta)
    self.value = float(np.exp(value[0]) if figure.is_log else value[0])
    # Of what is reported, not of its logarithm.
    self._factor = float(np.exp(value[0])) if figure.is_log else 1.0
    self._gradient = gradient[0]
    _, jacobian = forms.log_value(law.form, theta, law.columns_RP)
    self._hessian = jacobian[0].T @ jacobian[0] / law.scale**2
    ridge = 1e-9 * np.diag(self._hessian).max() * np.eye(len(self._hessian))
    self._hessian = self._hessian + ridge
    self._law, self._tail = law, (1 + confidence) / 2
    # A term that is gone has no gradient by which to choose.
    self.is_known = self._factor > 1e-8 and bool(np.any(self._gradient))

  def rows(self, options: Sequence[Candidate]) -> np.ndarray:
    """The information's root of one seed of each candidate, [O, P]."""
    law = self._law
    columns = law.columns(
      n=[option.n_latents for option in options],
      **({'k': [option.k for option in options]} if 'k' in law.centre else {}),
    )
    _, jacobian = forms.log_value(law.form, law.theta_P[None], columns)
    return jacobian[0] / law.scale

  def inverse(self, rows_OP, count_O) -> np.ndarray:
    """The covariance of coefficients with counts of further rows."""
    return np.linalg.inv(self._hessian + (rows_OP.T * count_O) @ rows_OP)

  def variance(self, inverse) -> float:
    """Of the figure."""
    return float(self._gradient @ inverse @ self._gradient)

  def gains(self, inverse, rows_OP) -> np.ndarray:
    """What one more of each row takes off the figure's log variance."""
    cross_O = rows_OP @ inverse @ self._gradient
    own_O = np.einsum('op,pq,oq->o', rows_OP, inverse, rows_OP)
    share = cross_O**2 / (1 + own_O) / self.variance(inverse)
    return -np.log1p(-np.minimum(share, 1 - 1e-12))

  def width(self, rows_OP, count_O) -> float:
    """The interval's expected width."""
    freedom = self._law.freedom + count_O.sum()
    variance = self.variance(self.inverse(rows_OP, count_O))
    reach = stats.t.ppf(self._tail, freedom)
    return 2 * reach * self._factor * np.sqrt(variance)


def _greedy(model, rows_OP, flops_O, wanted) -> np.ndarray:
  count_O = np.zeros(len(flops_O))
  while model.width(rows_OP, count_O) > wanted and count_O.sum() < _MOST_RUNS:
    inverse = model.inverse(rows_OP, count_O)
    gain_O = model.gains(inverse, rows_OP) / flops_O
    if (count_O >= _MOST_SEEDS).all():
      break
    count_O[np.where(count_O < _MOST_SEEDS, gain_O, -1).argmax()] += 1
  for option in np.argsort(-flops_O):
    while count_O[option]:
      count_O[option] -= 1
      if model.width(rows_OP, count_O) > wanted:
        count_O[option] += 1
        break
  return count_O


def _single(model, rows_OP, wanted):
  """For each option the counts of it alone that are enough, or None."""
  for option in range(len(rows_OP)):
    for count in range(1, _MOST_SEEDS + 1):
      count_O = np.zeros(len(rows_OP))
      count_O[option] = count
      if model.width(rows_OP, count_O) <= wanted:
        yield count_O
        break
    else:
      yield None
