"""TopK beside ReLU with an L1 penalty, at the same number of active latents.

On the first seed each method gets one of --rates: TopK the best at k 32, and
ReLU, at the first of --weights, the one that does best beside a TopK of its own
L0 (by NMSE alone a rate would win that leaves more latents active). Then, for
every seed and penalty, a ReLU autoencoder is trained and a TopK one with k set
to the ReLU's L0 on held-out rows. Prints one JSON line: L0 and held-out NMSE of
every pair, and for each penalty the mean of NMSE(ReLU) - NMSE(TopK) with its
95 % interval over seeds (Student's t), which is above 0 where TopK is better
(Gao et al. 2024, figure 2). Rates are chosen on the rows that are reported, for
both alike.

  python -m experiments.topk_vs_relu --store=runs/500k --workdir=runs/relu
"""

import dataclasses
import math
import os

import numpy as np
from scipy import stats

from experiments import runs
from sae_jax import config as config_lib
from sae_jax.cli import huge_pages


@dataclasses.dataclass(frozen=True)
class TopkVsReluConfig(config_lib.Config):
  """The budget of the experiment."""

  n_tokens: int = config_lib.option(
    500_000, 'number of tokens of each run', least=1
  )
  n_latents: int = config_lib.option(4096, 'number of latents, N', least=1)
  seeds: int = config_lib.option(3, 'number of seeds, from 0 on', least=2)
  weights: tuple[str, ...] = config_lib.option(
    ('0.1', '0.15'), "weights of ReLU's L1 penalty to try"
  )
  rates: tuple[str, ...] = config_lib.option(
    ('4e-3', '2e-3', '1e-3'), 'learning rates to choose from'
  )
  batch_size: int = config_lib.option(
    2048, 'number of tokens in a step', least=1
  )


def measure(config: TopkVsReluConfig, store: str, workdir: str) -> dict:
  """Trains all pairs and compares."""
  steps = -(-config.n_tokens // config.batch_size)

  def score(name, rates, **fields):
    """Held-out metrics by learning rate of runs that differ in nothing else."""
    run = runs.short_run(
      config.n_tokens,
      config.batch_size,
      n_latents=config.n_latents,
      # Both methods without AuxK: it is TopK's answer to dead latents.
      k_aux=0,
      decay_steps=steps // 5,
      **fields,
    )
    return runs.heldout_by_rate(run, rates, store, os.path.join(workdir, name))

  def relu(rates, seed, weight):
    return score(
      f'relu_{weight:g}_seed{seed}', rates,
      activation='relu', sparsity_weight=weight, seed=seed,
    )  # fmt: skip

  def topk(rates, seed, l0):
    k = max(1, round(l0))
    return score(f'topk_{k}_seed{seed}', rates, k=k, seed=seed)

  def best(metrics):
    return min(metrics, key=lambda rate: metrics[rate]['heldout_nmse'])

  rates = tuple(map(float, config.rates))
  weights = tuple(map(float, config.weights))
  by_method = {'topk': topk(rates, 0, 32)}
  topk_rate = best(by_method['topk'])
  by_method['relu'] = relu(rates, 0, weights[0])
  beside = {
    rate: row['heldout_nmse']
    / topk((topk_rate,), 0, row['heldout_l0'])[topk_rate]['heldout_nmse']
    for rate, row in by_method['relu'].items()
  }
  relu_rate = min(beside, key=beside.get)
  pairs = []
  for weight in weights:
    for seed in range(config.seeds):
      of_relu = relu((relu_rate,), seed, weight)[relu_rate]
      of_topk = topk((topk_rate,), seed, of_relu['heldout_l0'])[topk_rate]
      pairs.append(
        {
          'weight': weight,
          'seed': seed,
          'relu_l0': of_relu['heldout_l0'],
          'topk_l0': of_topk['heldout_l0'],
          'relu_nmse': of_relu['heldout_nmse'],
          'topk_nmse': of_topk['heldout_nmse'],
        }
      )
  summary = {}
  for weight in weights:
    gains = [
      pair['relu_nmse'] - pair['topk_nmse']
      for pair in pairs
      if pair['weight'] == weight
    ]
    half = stats.t.ppf(0.975, len(gains) - 1) * np.std(gains, ddof=1)
    half /= math.sqrt(len(gains))
    mean = float(np.mean(gains))
    summary[weight] = {'gain': mean, 'interval': [mean - half, mean + half]}
  return {
    'rates': {
      name: {rate: row['heldout_nmse'] for rate, row in rows.items()}
      for name, rows in by_method.items()
    },
    'relu_over_topk_by_rate': beside,
    'pairs': pairs,
    'gain_of_topk': summary,
  }


def main() -> None:
  """Entry point."""
  runs.run_experiment(TopkVsReluConfig, measure, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
