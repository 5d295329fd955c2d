"""Noise between seeds, and whether it explains what a law misses."""

from collections.abc import Sequence
import dataclasses
import math

import numpy as np
from scipy import stats

from sae_jax.scaling.law import Law


@dataclasses.dataclass(frozen=True)
class Noise:
  """Noise of ln loss between runs that differ in their seed alone.

  Attributes:
    scale: its standard deviation; nan if no cell has two seeds.
    freedom: degrees of freedom that this rests on.
    cells: cells that have two seeds or more.
  """

  scale: float
  freedom: int
  cells: int


def between_seeds(cell_R: Sequence, log_y_R) -> Noise:
  """The noise, pooled over cells.

  Args:
    cell_R: what each row's run shares with those of other seeds.
    log_y_R: logarithms of what was measured.
  """
  groups = {}
  for cell, log in zip(cell_R, log_y_R, strict=True):
    groups.setdefault(cell, []).append(log)
  several = [np.array(logs) for logs in groups.values() if len(logs) > 1]
  freedom = sum(len(logs) - 1 for logs in several)
  squares = sum(((logs - logs.mean()) ** 2).sum() for logs in several)
  scale = math.sqrt(squares / freedom) if freedom else math.nan
  return Noise(scale, freedom, len(several))


@dataclasses.dataclass(frozen=True)
class Misfit:
  """What a law misses beside the noise between seeds.

  Attributes:
    scale: standard deviation of ln loss around the law beyond what seeds
      explain, of one run.
    freedom: its degrees of freedom.
    p: chance of a ratio as large if the form is right; nan if unknown.
  """

  scale: float
  freedom: int
  p: float


def misfit(law: Law, cell_R: Sequence, noise: Noise) -> Misfit:
  """Compares what a law misses with the noise (the F test of lack of fit)."""
  squares = float((law.residual_R**2).sum())
  pure = noise.scale**2 * noise.freedom if noise.freedom else 0.0
  freedom = len(set(cell_R)) - len(law.form.coefficients)
  if not noise.freedom or freedom < 1 or not pure:
    return Misfit(math.nan, freedom, math.nan)
  between = max(squares - pure, 0) / freedom
  ratio = between / noise.scale**2
  return Misfit(
    math.sqrt(between),
    freedom,
    float(stats.f.sf(ratio, freedom, noise.freedom)),
  )


def with_misfit(law: Law, lack: Misfit) -> Law:
  """The law with the scale that its intervals should rest on.

  Seeds of a cell share what the form misses of it, so that where the form is
  seen to be wrong (p < 0.05) cells count, not runs.
  """
  if not lack.p < 0.05:
    return law
  return dataclasses.replace(
    law, scale=max(lack.scale, law.scale), freedom=lack.freedom
  )
