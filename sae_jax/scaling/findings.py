"""Figures of a law with intervals, and a refusal where data leave them open."""

from collections.abc import Sequence
import dataclasses
import math

from sae_jax.scaling import bootstrap, profile
from sae_jax.scaling.law import Law

KINDS = ('floor', 'exponent', 'prediction')


@dataclasses.dataclass(frozen=True)
class Finding:
  """A figure of a law.

  Attributes:
    name: short, and unique in its law.
    words: what it is.
    kind: one of KINDS.
    estimate: the figure of the best fit.
    low, high: ends of its interval by profile; infinite where data give none.
    drawn_low, drawn_high: percentiles of the bootstrap over seeds, then cells.
    refusal: why it is not identified, in one sentence; '' if it is.
  """

  name: str
  words: str
  kind: str
  estimate: float
  low: float
  high: float
  drawn_low: float
  drawn_high: float
  refusal: str

  @property
  def width(self) -> float:
    """Of the interval."""
    return self.high - self.low


@dataclasses.dataclass(frozen=True)
class Asked:
  """A figure to measure: what `Finding` says of it, and how it is computed.

  Attributes:
    name, words, kind: see `Finding`.
    figure: of the law.
    least_loss: of a floor: the least loss measured among the runs that it is
      under.
  """

  name: str
  words: str
  kind: str
  figure: profile.Figure
  least_loss: float = math.inf


def measure(
  law: Law,
  asked: Sequence[Asked],
  draw_FP,
  widest: float,
  confidence: float = 0.95,
) -> list[tuple[Finding, profile.Profile]]:
  """Each figure with its interval, and the profile that this is of.

  Args:
    law: the law.
    asked: the figures.
    draw_FP: from `bootstrap.draws`.
    widest: share of its value that an interval may be wide.
    confidence: of the intervals.
  """
  pairs = []
  for item in asked:
    walked = profile.profile(law, item.figure, confidence)
    finding = Finding(
      item.name,
      item.words,
      item.kind,
      walked.estimate,
      walked.low,
      walked.high,
      *bootstrap.interval(item.figure, draw_FP, confidence),
      refusal='',
    )
    reason = refusal_of(finding, item.least_loss, widest)
    pairs.append((dataclasses.replace(finding, refusal=reason), walked))
  return pairs


def refusal_of(finding: Finding, least_loss: float, widest: float) -> str:
  """Why a figure is not identified, in one sentence; '' if it is."""
  low, high = finding.low, finding.high
  interval = f'its interval, {number(low)} to {number(high)},'
  reasons = []
  if finding.kind == 'floor':
    if low <= 0:
      reasons.append('holds 0')
    if high >= least_loss:
      reasons.append(f'reaches the least loss measured, {number(least_loss)}')
  if finding.kind == 'exponent' and low <= 0 <= high:
    reasons.append('holds 0')
  if not reasons and not finding.width <= widest * abs(finding.estimate):
    reasons.append(
      f'is wider than {widest:.0%} of its value, {number(finding.estimate)}'
    )
  if not reasons:
    return ''
  return (
    f'{finding.words} is not identified: {interval} {" and ".join(reasons)}'
  )


def number(value: float) -> str:
  """Three digits that tell something; in words where there is no number."""
  if math.isinf(value):
    return 'no upper bound' if value > 0 else 'no lower bound'
  if math.isnan(value):
    return 'unknown'
  size = abs(value)
  if size < 1e-12:
    return '0'
  if size >= 1e6 or 0 < size < 1e-4:
    return f'{value:.2e}'
  if size >= 1000:
    return f'{value:,.0f}'
  return f'{value:.3g}' if size >= 1 else f'{value:.4f}'
