"""Confidence intervals of figures from few prompts or documents."""

from collections.abc import Callable, Mapping

import numpy as np
from scipy import special

# By the name of a term, [U] or [U, P].
Sums = Mapping[str, np.ndarray]


def auc_interval(
  score_P, labels_P, confidence: float = 0.95
) -> tuple[float, float]:
  """Interval of an AUC over prompts, for a score fixed beforehand.

  At each end the wider of two. Newcombe's (Statistics in Medicine 25, 2006,
  method 5) has a width where the scores separate the classes, but assumes that
  both classes spread alike. DeLong's variance (Biometrics 44, 1988) on the
  logit of the AUC assumes nothing, but is 0 where they are separated.

  Args:
    score_P: one score for each prompt.
    labels_P: 0 or 1, both present.
    confidence: probability covered.

  Returns:
    The interval's lower and upper end; nan if a score is nan.
  """
  score_P, labels_P = np.asarray(score_P, np.float64), np.asarray(labels_P)
  if np.isnan(score_P).any():
    return np.nan, np.nan
  zeros, ones = (score_P[labels_P == label] for label in (0, 1))
  above_ones = _share_below(ones, zeros)
  below_zeros = 1 - _share_below(zeros, ones)
  estimate = above_ones.mean()
  reach = special.ndtri(0.5 + confidence / 2)
  low, high = _newcombe(estimate, len(zeros), len(ones), reach)
  if 0 < estimate < 1 and min(len(zeros), len(ones)) > 1:
    variance = sum(
      shares.var(ddof=1) / len(shares) for shares in (above_ones, below_zeros)
    )
    reach *= np.sqrt(variance) / (estimate * (1 - estimate))
    middle = special.logit(estimate)
    low = min(low, special.expit(middle - reach))
    high = max(high, special.expit(middle + reach))
  return float(low), float(high)


def _share_below(scores: np.ndarray, others: np.ndarray) -> np.ndarray:
  """For each score the share of the others below it, ties counted half."""
  others = np.sort(others)
  places = sum(
    np.searchsorted(others, scores, side) for side in ('left', 'right')
  )
  return places / 2 / len(others)


def _newcombe(
  estimate: float, n_zeros: int, n_ones: int, reach: float
) -> tuple[float, float]:
  """The AUCs from which the estimate is `reach` standard errors away."""
  half = (n_zeros + n_ones) / 2 - 1

  def is_outside(auc):
    spread = 1 + half * (1 - auc) / (2 - auc) + half * auc / (1 + auc)
    variance = auc * (1 - auc) * spread / (n_zeros * n_ones)
    return (auc - estimate) ** 2 > reach**2 * variance

  ends = []
  for outside in (0.0, 1.0):
    inside = estimate
    for _ in range(60):
      middle = (outside + inside) / 2
      if is_outside(middle):
        outside = middle
      else:
        inside = middle
    ends.append(outside)
  return ends[0], ends[1]


def wilson(
  share: float, count: int, confidence: float = 0.95
) -> tuple[float, float, float]:
  """A share of trials, and the ends of its interval.

  Wilson's score interval (JASA 22, 1927), which has a width where the share is
  0 or 1.

  Args:
    share: of the trials; nan if there are none.
    count: number of trials.
    confidence: probability covered.
  """
  square = special.ndtri(0.5 + confidence / 2) ** 2
  spread = np.sqrt(square * (share * (1 - share) + square / 4 / count) / count)
  ends = (
    (share + square / 2 / count + sign * spread) / (1 + square / count)
    for sign in (-1, 1)
  )
  low, high = ends
  return float(share), max(0.0, float(low)), min(1.0, float(high))


def jackknife(
  of: Callable[[Sums], np.ndarray], sums_UX: Sums
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """A statistic of all units, and the ends of its 95 % interval.

  Quenouille's jackknife (Biometrika 43, 1956), each unit left out in turn, with
  Student's quantile. A percentile bootstrap of few units is too narrow: of two
  it holds the truth in half of all cases.

  Args:
    of: the statistic, for sums of any shape.
    sums_UX: what each unit adds, [U] or [U, P].

  Returns:
    The value and both ends, which are nan of a single unit.
  """
  total = {term: of_UX.sum(0) for term, of_UX in sums_UX.items()}
  value = np.asarray(of(total), np.float64)
  n = len(next(iter(sums_UX.values())))
  if n < 2:
    return value, np.full_like(value, np.nan), np.full_like(value, np.nan)
  without = np.asarray(
    of({term: total[term] - of_UX for term, of_UX in sums_UX.items()})
  )
  error = np.sqrt((n - 1) * without.var(0))
  reach = special.stdtrit(n - 1, 0.975) * error
  return value, value - reach, value + reach


def by_unit(
  unit_U: np.ndarray, sums: Sums
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
  """Sums of entries that are of one unit.

  Args:
    unit_U: number of each entry's unit.
    sums: what each entry adds, by term, [U] or [U, P].

  Returns:
    The numbers of the units, ascending, and what each adds, float64.
  """
  units, member_U = np.unique(unit_U, return_inverse=True)

  def added(of_U):
    of_UX = np.zeros((len(units), *of_U.shape[1:]))
    np.add.at(of_UX, member_U, of_U)
    return of_UX

  return units, {term: added(np.asarray(of)) for term, of in sums.items()}
