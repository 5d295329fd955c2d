"""Confidence intervals of scores on few prompts."""

import numpy as np
from scipy import special


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
