"""TopK beside ReLU with an L1 penalty, at the same number of active latents.

On the first seed each method gets one of --rates: TopK the best at k 32, and
ReLU, at the first of --weights, the one that does best beside a TopK of its own
L0 (by NMSE alone a rate would win that leaves more latents active). Then, for
every seed and penalty, a ReLU autoencoder is trained and a TopK one with k set
to the ReLU's L0. Rates and k are chosen on validation rows. Prints one JSON
line: L0 and NMSE on test rows of every pair, and for each penalty the mean of
NMSE(ReLU) - NMSE(TopK) with its 95 % interval over seeds (Student's t), which
is above 0 where TopK is better (Gao et al. 2024, figure 2).

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

  def trained(name, rates, **fields):
    """Workdirs by learning rate of runs that differ in nothing else."""
    run = runs.short_run(
      config.n_tokens,
      config.batch_size,
      n_latents=config.n_latents,
      # Both methods without AuxK: it is TopK's answer to dead latents.
      k_aux=0,
      decay_steps=steps // 5,
      **fields,
    )
    return runs.train_rates(run, rates, store, os.path.join(workdir, name))

  def relu(rates, seed, weight):
    return trained(
      f'relu_{weight:g}_seed{seed}', rates,
      activation='relu', sparsity_weight=weight, seed=seed,
    )  # fmt: skip

  def topk(rates, seed, l0):
    k = max(1, round(l0))
    return trained(f'topk_{k}_seed{seed}', rates, k=k, seed=seed)

  def validation(workdirs, name='nmse'):
    return {
      rate: runs.validation(where)[f'validation_{name}']
      for rate, where in workdirs.items()
    }

  rates = tuple(map(float, config.rates))
  weights = tuple(map(float, config.weights))
  nmse = {'topk': validation(topk(rates, 0, 32))}
  topk_rate = min(nmse['topk'], key=nmse['topk'].get)
  of_rates = relu(rates, 0, weights[0])
  nmse['relu'], l0 = validation(of_rates), validation(of_rates, 'l0')
  beside = {
    rate: nmse['relu'][rate]
    / validation(topk((topk_rate,), 0, l0[rate]))[topk_rate]
    for rate in rates
  }
  relu_rate = min(beside, key=beside.get)
  pairs = []
  for weight in weights:
    for seed in range(config.seeds):
      of_relu = relu((relu_rate,), seed, weight)
      l0 = validation(of_relu, 'l0')[relu_rate]
      of_topk = topk((topk_rate,), seed, l0)
      relu_test = runs.test(of_relu[relu_rate], store)
      topk_test = runs.test(of_topk[topk_rate], store)
      pairs.append(
        {
          'weight': weight,
          'seed': seed,
          'relu_l0': relu_test.l0,
          'topk_l0': topk_test.l0,
          'relu_nmse': relu_test.nmse,
          'topk_nmse': topk_test.nmse,
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
    'validation_nmse': nmse,
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
