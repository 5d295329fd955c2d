"""From figures of several seeds to an effect, its interval and a verdict."""

from collections.abc import Sequence
import dataclasses
import math
import statistics

from scipy import stats

FOUND, NOT_FOUND, CANNOT_TELL = 'found', 'not found', 'cannot tell'


@dataclasses.dataclass(frozen=True)
class Effect:
  """One figure that a claim is about.

  Attributes:
    name: what it is and where it was measured.
    unit: of the figures.
    mean: over seeds.
    low: lower end of its 95 % interval.
    high: upper end.
    seeds: how many there were.
    verdict: FOUND, NOT_FOUND or CANNOT_TELL.
  """

  name: str
  unit: str
  mean: float
  low: float
  high: float
  seeds: int
  verdict: str


def interval(values: Sequence[float]) -> tuple[float, float, float]:
  """The mean of independent values and the ends of its 95 % interval by t.

  They are nan where a value is.

  Raises:
    ValueError: of fewer than two.
  """
  if any(map(math.isnan, values)):
    return math.nan, math.nan, math.nan
  mean = statistics.fmean(values)
  error = statistics.stdev(values) / math.sqrt(len(values))
  half = float(stats.t.ppf(0.975, len(values) - 1)) * error
  return mean, mean - half, mean + half


def above(
  name: str, unit: str, values: Sequence[float], least: float
) -> Effect:
  """The effect that a claim says is above 0.

  It is found where the interval is above 0, not found where all of it is below
  the least effect that would matter, and otherwise cannot be told.

  Args:
    name: see `Effect`.
    unit: see `Effect`.
    values: the effect with each seed.
    least: the least effect that would matter.
  """
  mean, low, high = interval(values)
  verdict = CANNOT_TELL
  if low > 0:
    verdict = FOUND
  elif high < least:
    verdict = NOT_FOUND
  return Effect(name, unit, mean, low, high, len(values), verdict)


def near(
  name: str, unit: str, values: Sequence[float], claimed: float, width: float
) -> Effect:
  """The effect that a claim says is a number.

  It is found where the interval holds the number and no end of it is further
  away than `width`, not found where it does not hold it, and otherwise cannot
  be told.

  Args:
    name: see `Effect`.
    unit: see `Effect`.
    values: the figure with each seed.
    claimed: the number.
    width: how near both ends must be.
  """
  mean, low, high = interval(values)
  verdict = CANNOT_TELL
  if not low <= claimed <= high:
    verdict = NOT_FOUND
  elif max(claimed - low, high - claimed) <= width:
    verdict = FOUND
  return Effect(name, unit, mean, low, high, len(values), verdict)
