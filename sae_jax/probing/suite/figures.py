"""From what an evaluation sums over units to figures with intervals.

A unit is a document, or a latent: what a figure would vary with if the
evaluation were done on others. A statistic is a function of sums over units, so
that its interval, its spread over draws and the difference of two autoencoders
on the same units follow in one way for all of them.
"""

from collections.abc import Callable
import dataclasses
import math
from typing import Any, Literal

import numpy as np
from scipy import special

from sae_jax.probing import intervals
from sae_jax.probing.intervals import Sums

# The values that a share can have.
SHARE = (0.0, 1.0)


@dataclasses.dataclass(frozen=True)
class Statistic:
  """A figure's meaning, and how it follows from sums over units.

  Attributes:
    title: a few words, such as 'delta CE'.
    definition: what it is, in a sentence for a reader who knows no code.
    of: sums by name, arrays of equal shape, -> the statistic, of that shape;
      nan where there is none. It must not depend on the scale of all sums
      together, as a mean does not.
    unit: of the figure, such as 'nats'; '' for a plain number.
    better: whether a good autoencoder has a low or a high one; '' for neither.
    points: of a curve, the name of its x; '' for a single figure.
    ends: the least and the greatest value that it can have: an interval ends
      there.
    orders: whether it tells a true dictionary from a trained one, and that from
      a random one, as experiments/planted.py measures: only then it is in the
      summary of the report.
  """

  title: str
  definition: str
  of: Callable[[Sums], np.ndarray]
  unit: str = ''
  better: Literal['low', 'high', ''] = ''
  points: str = ''
  ends: tuple[float, float] = (-math.inf, math.inf)
  orders: bool = False


def ratio(top: str, bottom: str) -> Callable[[Sums], np.ndarray]:
  """The statistic of one sum over another; nan where that is 0."""
  return lambda sums: divided(sums[top], sums[bottom])


def divided(top, bottom) -> np.ndarray:
  """top / bottom in float64; nan where bottom is 0."""
  top, bottom = np.broadcast_arrays(
    np.asarray(top, np.float64), np.asarray(bottom, np.float64)
  )
  out = np.full(top.shape, np.nan)
  return np.divide(top, bottom, out=out, where=bottom != 0)


@dataclasses.dataclass(frozen=True)
class Sample:
  """What an evaluation summed over each unit, of one autoencoder.

  Attributes:
    unit_U: number of each unit, such as its document; one number may stand in
      several entries, which are then one unit.
    draw_U: which draw each entry is of, from 0. Every draw is a sample of its
      own, as another seed would have given.
    sums: by term, [U] or, for the points of a curve, [U, P].
  """

  unit_U: np.ndarray
  draw_U: np.ndarray
  sums: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Figure:
  """One figure of one autoencoder; lists for the points of a curve.

  Attributes:
    value: the statistic; None if there is none.
    low: lower end of its 95 % interval over units; None of a single unit.
    high: upper end.
    least_difference: the smallest difference that two runs of the evaluation
      with other seeds can show, by the spread of the draws; None of one draw.
    units: number of units.
  """

  value: Any
  low: Any
  high: Any
  least_difference: Any
  units: int


def figure(statistic: Statistic, sample: Sample) -> Figure:
  """The figure of a sample."""
  units, sums_UX = intervals.by_unit(sample.unit_U, sample.sums)
  value, low, high = intervals.jackknife(statistic.of, sums_UX)
  low, high = (np.clip(end, *statistic.ends) for end in (low, high))
  return Figure(
    *map(_plain, (value, low, high)),
    _plain(_least_difference(statistic, sample)),
    len(units),
  )


def difference(
  statistic: Statistic, one: Sample, other: Sample, paired: bool
) -> Figure:
  """The statistic of one sample less that of another.

  Args:
    statistic: the figure.
    one: the sample that is compared.
    other: what it is compared with.
    paired: whether units of one number are the same in both, as documents are:
      then those in common are left out of both at once. Otherwise the samples
      are independent, as those of latents of two autoencoders.

  Raises:
    ValueError: if they are paired and have no unit in common.
  """
  (units, sums), (other_units, other_sums) = (
    intervals.by_unit(of.unit_U, of.sums) for of in (one, other)
  )
  if paired:
    common = np.intersect1d(units, other_units)
    if not len(common):
      raise ValueError('the samples have no unit in common')
    joined = {}
    for side, of_units, of in ((0, units, sums), (1, other_units, other_sums)):
      rows = np.searchsorted(of_units, common)
      joined |= {(side, term): of_U[rows] for term, of_U in of.items()}
    value, low, high = intervals.jackknife(
      lambda sums: statistic.of(_side(sums, 0)) - statistic.of(_side(sums, 1)),
      joined,
    )
    return Figure(*map(_plain, (value, low, high)), None, len(common))
  ends = [intervals.jackknife(statistic.of, of) for of in (sums, other_sums)]
  value = ends[0][0] - ends[1][0]
  reach = np.hypot(*(of[2] - of[0] for of in ends))
  return Figure(
    *map(_plain, (value, value - reach, value + reach)),
    None,
    min(len(units), len(other_units)),
  )


def _side(sums, side):
  return {term: of for (of_side, term), of in sums.items() if of_side == side}


def _least_difference(statistic: Statistic, sample: Sample) -> np.ndarray:
  """See `Figure`: by Student's quantile of the draws' spread."""
  draws = np.unique(sample.draw_U)

  def of_draw(draw):
    is_of_U = sample.draw_U == draw
    return statistic.of(
      {term: of_U[is_of_U].sum(0) for term, of_U in sample.sums.items()}
    )

  values = np.array(list(map(of_draw, draws)))
  if len(draws) < 2:
    return np.full(values.shape[1:], np.nan)
  reach = special.stdtrit(len(draws) - 1, 0.975)
  # Of all draws together; two such runs differ by sqrt(2) of it.
  return reach * math.sqrt(2 / len(draws)) * values.std(0, ddof=1)


def _plain(of: np.ndarray) -> Any:
  """A number or list of numbers for JSON; None for one that is not finite."""
  of = np.asarray(of, np.float64)
  if of.ndim:
    return [_plain(entry) for entry in of]
  return float(of) if np.isfinite(of) else None
