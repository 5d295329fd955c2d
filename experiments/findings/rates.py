"""The exponent of the best learning rate in the number of latents."""

import math

import numpy as np

from experiments.findings import cells, effects
from experiments.findings.cells import Study
from experiments.findings.effects import Effect
from experiments.findings.pairs import Budget, run

# The paper's (Gao et al. 2024, appendix A.3), and how near is near.
_CLAIMED, _WIDTH = -0.5, 0.2
_DOUBLINGS = 4


def exponent(study: Study, budget: Budget) -> list[Effect]:
  """By seed, of the best rates of sizes that double down from the budget's.

  The best rate is where a parabola of ln FVU on test rows over ln rate has its
  least, through the best of the rates and its neighbours.
  """
  sizes = [budget.n_latents >> i for i in range(_DOUBLINGS)]
  slopes = []
  for seed in range(budget.seeds):
    arms = {str(n): run(budget, seed, n_latents=n) for n in sizes}
    swept = cells.rates(study, arms)
    best = [least(swept[str(n)]) for n in sizes]
    slopes.append(float(np.polyfit(np.log(sizes), np.log(best), 1)[0]))
  name = f'exponent of n, {sizes[-1]:,} to {sizes[0]:,}'
  return [effects.near(name, '', slopes, _CLAIMED, _WIDTH)]


def least(of_factor: dict[float, cells.Line]) -> float:
  """The rate at the least of a parabola; the best one must be inside."""
  factors = sorted(of_factor)
  at = factors.index(cells.best(of_factor))
  near = [of_factor[factor] for factor in factors[at - 1 : at + 2]]
  bend, tilt, _ = np.polyfit(
    [math.log(line['learning_rate']) for line in near],
    [math.log(cells.fvu(line, 'validation')) for line in near],
    2,
  )
  return math.exp(-tilt / (2 * bend))
