"""The best learning rate of each size, from runs that differ in it alone."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from sae_jax.scaling.cells import Cell


@dataclasses.dataclass(frozen=True)
class BestRate:
  """The best learning rate of one size.

  Attributes:
    n_latents: the size.
    k: its active latents.
    rate: where a parabola through ln loss over ln rate has its least.
    is_inside: whether rates on both sides of it were run; otherwise it is the
      best of those that were.
  """

  n_latents: int
  k: int
  rate: float
  is_inside: bool


def best_rates(cells: Sequence[Cell]) -> list[BestRate]:
  """The best rate of each size that was run at three rates or more.

  The parabola goes through the best rate and its neighbours, whose losses are
  means over the seeds that all three have, or over all if they share none.
  """
  groups = {}
  for cell in cells:
    key = (cell.n_latents, cell.k, cell.tokens, cell.stop)
    by_rate = groups.setdefault(key, {})
    by_rate.setdefault(cell.learning_rate, {})[cell.seed] = np.log(cell.loss)
  best = {}
  for (n_latents, k, tokens, _), by_rate in groups.items():
    if len(by_rate) >= 3:
      rate, is_inside = _least(by_rate)
      # Of several numbers of tokens the largest counts.
      if tokens >= best.get((n_latents, k), (0,))[0]:
        best[n_latents, k] = tokens, BestRate(n_latents, k, rate, is_inside)
  return [entry for _, (_, entry) in sorted(best.items())]


def _least(by_rate: dict) -> tuple[float, bool]:
  rates = sorted(by_rate)
  common = set.intersection(*(set(by_rate[rate]) for rate in rates))
  losses = [
    np.mean([by_rate[rate][s] for s in (common or by_rate[rate])])
    for rate in rates
  ]
  at = int(np.argmin(losses))
  if at in (0, len(rates) - 1):
    return rates[at], False
  near = slice(at - 1, at + 2)
  bend, tilt, _ = np.polyfit(np.log(rates[near]), losses[near], 2)
  return float(np.exp(-tilt / (2 * bend))), True
