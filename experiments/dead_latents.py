"""How many latents die, with AuxK and the transposed start and without both.

Trains two autoencoders on the same batches of a store of real activations and
prints one JSON line: the share of latents that fired on none of the last
--window tokens of training (Gao et al. 2024, section 2.4, figure 5), and NMSE
on test rows. Killed, the same command goes on.

  sae-harvest --store=runs/500k --n_tokens=500000 --mask_norm_multiple=10
  python -m experiments.dead_latents --store=runs/500k --workdir=runs/dead
"""

import dataclasses
import os

import jax
import numpy as np

from experiments import runs as runs_lib
from sae_jax import config as config_lib
from sae_jax.cli import huge_pages
from sae_jax.training import train
from sae_jax.training.config import TrainConfig


@dataclasses.dataclass(frozen=True)
class DeadLatentsConfig(config_lib.Config):
  """The budget of the experiment."""

  n_tokens: int = config_lib.option(
    20_000_000, 'number of tokens of training', least=1
  )
  n_latents: int = config_lib.option(8192, 'number of latents, N', least=1)
  k: int = config_lib.option(
    32, 'number of active latents of a token, K', least=1
  )
  batch_size: int = config_lib.option(
    4096, 'number of tokens in a step', least=1
  )
  window: int = config_lib.option(
    1_000_000,
    'number of tokens after which a latent that was active for none of them '
    'counts as dead',
    least=1,
  )
  learning_rate: float = config_lib.option(
    0.0, 'learning rate; 0 for 2e-4 sqrt(2^14 / n_latents)'
  )
  seed: int = config_lib.option(0, 'seed of weights and order')


def configs(config: DeadLatentsConfig) -> dict[str, TrainConfig]:
  """The two runs by name."""
  both = runs_lib.short_run(
    config.n_tokens,
    config.batch_size,
    n_latents=config.n_latents,
    k=config.k,
    dead_after_tokens=config.window,
    learning_rate=config.learning_rate,
    # The paper has no warm-up, and this many steps average more.
    warmup_steps=0,
    ema_decay=0.999,
    seed=config.seed,
    order_seed=config.seed,
  )
  return {
    'auxk_and_transposed': both,
    'neither': dataclasses.replace(
      both,
      sae=dataclasses.replace(both.sae, encoder_init='independent'),
      objective=dataclasses.replace(both.objective, k_aux=0),
    ),
  }


def measure(config: DeadLatentsConfig, store: str, workdir: str) -> dict:
  """Trains both and counts."""
  runs = configs(config)
  place = {name: os.path.join(workdir, name) for name in runs}
  states = train.train_many(
    {place[name]: run for name, run in runs.items()}, store
  )
  result = {'tokens': runs['neither'].steps * config.batch_size}
  for name, where in place.items():
    state = states[where]
    test = runs_lib.test(where, store)
    silent_N = np.asarray(jax.device_get(state.silent_N))
    result[name] = {
      'dead_share': float((silent_N >= config.window).mean()),
      'test_nmse': test.nmse,
      'test_l0': test.l0,
    }
  return dataclasses.asdict(config) | result


def main() -> None:
  """Entry point."""
  runs_lib.run_experiment(DeadLatentsConfig, measure, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
