"""Findings on settings: two arms that differ in one, each at its best rate.

The rate of each is the best on validation rows with the first seed; effects are
on test rows, between runs of one seed, which have the same first weights and
batches.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any

from experiments import runs
from experiments.findings import cells, effects
from experiments.findings.cells import Line, Study
from experiments.findings.effects import Effect
from sae_jax import config as config_lib
from sae_jax.training.config import TrainConfig

# In percent of the FVU: less does not matter, and is what seeds differ by.
LEAST_CHANGE = 0.5


@dataclasses.dataclass(frozen=True)
class Budget(config_lib.Config):
  """What every run of a finding has."""

  n_latents: int = config_lib.option(4096, 'number of latents, N', least=1)
  k: int = config_lib.option(
    32, 'number of active latents of a token, K', least=1
  )
  n_tokens: int = config_lib.option(
    500_000, 'number of tokens of each run', least=1
  )
  batch_size: int = config_lib.option(
    2048, 'number of tokens in a step', least=1
  )
  seeds: int = config_lib.option(3, 'number of seeds, from 0 on', least=2)


def run(budget: Budget, seed: int, **fields: Any) -> TrainConfig:
  """A run with the paper's start and optimiser but for some fields."""
  values = {'n_latents': budget.n_latents, 'k': budget.k} | fields
  return runs.short_run(
    budget.n_tokens,
    budget.batch_size,
    seed=seed,
    order_seed=seed,
    checkpoint_every=0,
    **values,
  )


def at_best_rates(
  study: Study, budget: Budget, arms: Mapping[str, dict[str, Any]]
) -> dict[tuple[str, int], Line]:
  """Lines by arm and seed, each arm at its best rate."""
  swept = cells.rates(
    study, {arm: run(budget, 0, **fields) for arm, fields in arms.items()}
  )
  factor = {arm: cells.best(of_factor) for arm, of_factor in swept.items()}
  return cells.lines(
    study,
    {
      (arm, seed): cells.with_rate(run(budget, seed, **fields), factor[arm])
      for arm, fields in arms.items()
      for seed in range(budget.seeds)
    },
  )


def gain(
  of: Mapping[tuple[str, int], Line], arm: str, beside: str, seeds: int
) -> list[float]:
  """By how much of the other's FVU an arm's is lower, in percent, by seed."""
  return [
    100 * (1 - cells.fvu(of[arm, seed]) / cells.fvu(of[beside, seed]))
    for seed in range(seeds)
  ]


def projection(study: Study, budget: Budget) -> list[Effect]:
  """The decoder's gradient without its component along each row."""
  return _one_setting(
    study, budget, 'projected', {}, {'project_gradient': False}
  )


def median(study: Study, budget: Budget) -> list[Effect]:
  """b_pre from the geometric median beside the mean."""
  return _one_setting(study, budget, 'median', {}, {'bias_init': 'mean'})


def _one_setting(study, budget, name, fields, control) -> list[Effect]:
  of = at_best_rates(study, budget, {name: fields, 'control': control})
  return [
    effects.above(
      'FVU lower by', '%', gain(of, name, 'control', budget.seeds), LEAST_CHANGE
    )
  ]


def average(study: Study, budget: Budget) -> list[Effect]:
  """The moving average beside the last weights of the same run.

  With a constant rate, as in the paper, and with one that falls to 0.
  """
  steps = runs.short_run(budget.n_tokens, budget.batch_size).steps
  result = []
  for name, decay in (
    ('constant rate', 0),
    ('rate that falls over the last half', steps // 2),
  ):
    arms = {
      'average': {'decay_steps': decay},
      'last': {'decay_steps': decay, 'ema_decay': 0.0},
    }
    of = at_best_rates(study, budget, arms)
    result.append(
      effects.above(
        f'{name}: FVU lower by',
        '%',
        gain(of, 'average', 'last', budget.seeds),
        LEAST_CHANGE,
      )
    )
  return result


def multi_topk(study: Study, budget: Budget) -> list[Effect]:
  """Multi-TopK beside a single k: codes of k, read at other k too."""
  arms = {'multi': {'multi_topk': 4}, 'single': {}}
  of = at_best_rates(study, budget, arms)
  result = []
  for k in cells.other_k(budget.k):
    multi, single = (
      [of[arm, seed]['fvu_at_k'][str(k)] for seed in range(budget.seeds)]
      for arm in arms
    )
    values = [100 * (1 - a / b) for a, b in zip(multi, single)]
    result.append(
      effects.above(f'read at k {k}: FVU lower by', '%', values, LEAST_CHANGE)
    )
  return result
