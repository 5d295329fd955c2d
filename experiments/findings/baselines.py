"""TopK beside ReLU with an L1 penalty and JumpReLU with an L0 one, at equal L0.

For each size the baseline's rate is the best at the first of its penalties, and
its penalty then the best at that rate: by FVU on validation rows over that of a
TopK of the same L0, as by FVU alone those would win that leave more latents
active. JumpReLU's penalties differ in the width of its kernel too: the
published one is of runs a thousand times as long. Then, for every seed, TopK is
trained with k at the baseline's L0, at the rate that is its own best.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from experiments.findings import cells, effects
from experiments.findings.cells import Line, Study
from experiments.findings.effects import Effect
from experiments.findings.pairs import Budget, run
from sae_jax import errors
from sae_jax.training.config import TrainConfig

# In percent of the baseline's FVU, and in points of that.
_LEAST_GAIN = 0.5
# The sizes: a share of the budget's latents, and all.
_SHARES = (0.25, 1)
# At which multiples of the budget's k TopK's FVU is known; between them its
# logarithm is interpolated in that of k.
_KNOWN = (0.25, 0.5, 1, 2, 4)

RELU = tuple({'sparsity_weight': weight} for weight in (0.1, 0.05, 0.2, 0.4))
JUMPRELU = tuple(
  {'sparsity_weight': weight, 'jump_bandwidth': width}
  for width in (0.1, 0.03)
  for weight in (3e-3, 1e-3, 1e-2)
)


def relu(study: Study, budget: Budget) -> list[Effect]:
  """TopK beside ReLU with an L1 penalty."""
  return _beside(study, budget, 'relu', RELU)


def jumprelu(study: Study, budget: Budget) -> list[Effect]:
  """TopK beside JumpReLU with an L0 penalty."""
  return _beside(study, budget, 'jumprelu', JUMPRELU)


def _beside(
  study: Study,
  budget: Budget,
  activation: str,
  penalties: Sequence[dict[str, Any]],
) -> list[Effect]:
  sizes = [int(share * budget.n_latents) for share in _SHARES]
  gains = [_gains(study, budget, n, activation, penalties) for n in sizes]
  more = [large - small for small, large in zip(*gains)]
  return [
    *(
      effects.above(f'n {n:,}: FVU lower by', '%', of_n, _LEAST_GAIN)
      for n, of_n in zip(sizes, gains)
    ),
    effects.above(
      f'more at n {sizes[1]:,} than at {sizes[0]:,}, by',
      'points',
      more,
      _LEAST_GAIN,
    ),
  ]


def _gains(study, budget, n_latents, activation, penalties) -> list[float]:
  """By how much TopK's test FVU is lower at equal L0, in percent, by seed."""

  # Both without AuxK: it is TopK's answer to dead latents.
  def config(seed: int, **fields: Any) -> TrainConfig:
    return run(budget, seed, n_latents=n_latents, k_aux=0, **fields)

  swept = cells.rates(study, {'topk': config(0)})['topk']
  topk_factor = cells.best(swept)
  ks = [max(1, int(share * budget.k)) for share in _KNOWN]
  known = cells.lines(
    study, {k: cells.with_rate(config(0, k=k), topk_factor) for k in ks}
  )

  def score(line: Line) -> float:
    """The FVU over that of a TopK of the same L0; no FVU far from its k."""
    if line['failure'] or not ks[0] <= cells.l0(line, 'validation') <= ks[-1]:
      return float('inf')
    log_topk = np.interp(
      np.log(cells.l0(line, 'validation')),
      np.log(ks),
      [np.log(cells.fvu(known[k], 'validation')) for k in ks],
    )
    return cells.fvu(line, 'validation') / float(np.exp(log_topk))

  first = config(0, activation=activation, **penalties[0])
  swept = cells.rates(
    study,
    {activation: first},
    # The rate of baselines is the paper's, of far longer runs.
    factors=(4.0, 8.0, 16.0),
    score=lambda arm, line: score(line),
  )[activation]
  factor = cells.best(swept, score)
  # A config's own rate depends on its size alone.
  tried = cells.lines(
    study,
    {
      i: cells.with_rate(config(0, activation=activation, **fields), factor)
      for i, fields in enumerate(penalties)
    },
  )
  scores = [score(tried[i]) for i in range(len(penalties))]
  if min(scores) == float('inf'):
    l0s = ', '.join(f'{cells.l0(line):.0f}' for line in tried.values())
    raise errors.UserError(
      f'{activation} has L0 {l0s} at n {n_latents}, none from {ks[0]} to '
      f'{ks[-1]}: it needs other weights of its penalty'
    )
  penalty = penalties[int(np.argmin(scores))]
  seeds = range(budget.seeds)
  of_baseline = cells.lines(
    study,
    {
      seed: cells.with_rate(
        config(seed, activation=activation, **penalty), factor
      )
      for seed in seeds
    },
  )
  of_topk = cells.lines(
    study,
    {
      seed: cells.with_rate(
        config(seed, k=max(1, round(cells.l0(line, 'validation')))),
        topk_factor,
      )
      for seed, line in of_baseline.items()
    },
  )
  return [
    100 * (1 - cells.fvu(of_topk[seed]) / cells.fvu(of_baseline[seed]))
    for seed in seeds
  ]
