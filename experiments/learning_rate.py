"""Whether the best learning rate falls like 1 / sqrt(n).

Trains autoencoders of several sizes with a grid of learning rates on the same
batches and prints one JSON line: NMSE of each on validation rows and on test
rows, the best rate of each size by the former, and for every size how much
worse than its best, on test rows, the rate is that the smallest size's best
predicts (Gao et al. 2024, appendix A.3: rates are swept in factors of two and
the best is proportional to 1 / sqrt(n)).

  python -m experiments.learning_rate --store=runs/500k --workdir=runs/rates
"""

import dataclasses
import math
import os

from experiments import runs
from sae_jax import config as config_lib
from sae_jax.cli import huge_pages


@dataclasses.dataclass(frozen=True)
class LearningRateConfig(config_lib.Config):
  """The budget of the experiment."""

  n_tokens: int = config_lib.option(
    1_000_000, 'number of tokens of each run', least=1
  )
  n_latents: tuple[str, ...] = config_lib.option(
    ('2048', '8192'), 'numbers of latents, each four times the one before'
  )
  rates: tuple[str, ...] = config_lib.option(
    ('1.6e-2', '8e-3', '4e-3', '2e-3', '1e-3', '5e-4'),
    'learning rates to try, in factors of two',
  )
  k: int = config_lib.option(
    32, 'number of active latents of a token, K', least=1
  )
  batch_size: int = config_lib.option(
    2048, 'number of tokens in a step', least=1
  )
  seed: int = config_lib.option(0, 'seed of weights and order')


def measure(config: LearningRateConfig, store: str, workdir: str) -> dict:
  """Trains the grid and compares."""
  chosen_by, nmse = {}, {}
  for size in map(int, config.n_latents):
    base = runs.short_run(
      config.n_tokens,
      config.batch_size,
      n_latents=size,
      k=config.k,
      dead_after_tokens=config.n_tokens // 4,
      seed=config.seed,
      order_seed=config.seed,
    )
    workdirs = runs.train_rates(
      base,
      tuple(map(float, config.rates)),
      store,
      os.path.join(workdir, str(size)),
    )
    chosen_by[size] = {
      rate: runs.validation(where)['validation_nmse']
      for rate, where in workdirs.items()
    }
    nmse[size] = {
      rate: runs.test(where, store).nmse for rate, where in workdirs.items()
    }
  best = {size: min(row, key=row.get) for size, row in chosen_by.items()}
  smallest = min(best)
  scaled = {}
  for size, row in nmse.items():
    predicted = best[smallest] * math.sqrt(smallest / size)
    nearest = min(row, key=lambda rate: abs(math.log(rate / predicted)))
    scaled[size] = {
      'predicted': predicted,
      'nearest_of_grid': nearest,
      'nmse_over_best': row[nearest] / row[best[size]],
      'unscaled_nmse_over_best': row[best[smallest]] / row[best[size]],
    }
  return {
    'validation_nmse': chosen_by,
    'test_nmse': nmse,
    'best': best,
    'scaled': scaled,
  }


def main() -> None:
  """Entry point."""
  runs.run_experiment(LearningRateConfig, measure, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
