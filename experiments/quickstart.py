"""From text to features on one CPU: harvest, train, probe, browse.

`make demo` runs this. Each stage is one public function, its output lies
under --workdir, and a stage that is finished is reused.

  python experiments/quickstart.py --workdir=runs/demo
"""

import dataclasses
import os
import time

import sae_jax
from sae_jax.cli import flags, huge_pages


@dataclasses.dataclass(frozen=True)
class QuickstartConfig(sae_jax.Config):
  """The budget of the demo."""

  n_tokens: int = sae_jax.option(100_000, 'number of activations to harvest')
  n_latents: int = sae_jax.option(4096, 'number of latents, N')
  k: int = sae_jax.option(32, 'number of active latents of a token, K')
  steps: int = sae_jax.option(1000, 'number of training steps')
  batch_size: int = sae_jax.option(1024, 'number of tokens in a training step')
  task_prompts: int = sae_jax.option(
    200, 'number of prompts of each probe task'
  )
  downstream_tokens: int = sae_jax.option(
    4096, 'number of test tokens on which delta CE and KL are measured'
  )
  seed: int = sae_jax.option(0, 'seed of text, weights and order')


def stages(
  config: QuickstartConfig,
) -> tuple[
  sae_jax.HarvestConfig,
  sae_jax.TrainConfig,
  sae_jax.ProbeConfig,
  sae_jax.BrowseConfig,
]:
  """The configs of the four stages."""
  harvesting = sae_jax.HarvestConfig(
    n_tokens=config.n_tokens,
    # A token in eight thousand is a sink with a hundred times the norm.
    mask_norm_multiple=10.0,
    seed=config.seed,
  )
  training = sae_jax.TrainConfig(
    sae=sae_jax.SaeConfig(n_latents=config.n_latents, k=config.k),
    steps=config.steps,
    batch_size=config.batch_size,
    checkpoint_every=max(1, config.steps // 4),
    seed=config.seed,
    order_seed=config.seed,
  )
  probing = sae_jax.ProbeConfig(
    task_prompts=config.task_prompts,
    downstream_tokens=config.downstream_tokens,
    seed=config.seed,
  )
  browsing = sae_jax.BrowseConfig(title='SmolLM2-135M, features after block 14')
  return harvesting, training, probing, browsing


def quickstart(config: QuickstartConfig, workdir: str) -> dict:
  """Runs the four stages and returns the report."""
  harvesting, training, probing, browsing = stages(config)
  place = {
    name: os.path.join(workdir, name)
    for name in ('store', 'train', 'probe', 'browser')
  }
  began = time.monotonic()
  sae_jax.harvest(harvesting, place['store'])
  sae_jax.train(training, place['store'], place['train'])
  report = sae_jax.probe(
    probing, place['train'], place['store'], place['probe']
  )
  page = sae_jax.browse(browsing, place['probe'], place['browser'])
  print('\n' + '\n'.join(sae_jax.report_lines(report)))
  print(f'\ntook {time.monotonic() - began:.0f} s')
  for name, url in place.items():
    print(f'  {name:8} {url}')
  print(f'open the page: python -m http.server -d {place["browser"]}')
  print(f'then http://localhost:8000 in a browser ({page})')
  return report


def main() -> None:
  """Entry point."""
  flags.define(QuickstartConfig)
  flags.define_url(
    'workdir', 'folder for the store, the run, its evaluation and the page'
  )
  flags.run(
    lambda: quickstart(flags.read(QuickstartConfig), flags.url('workdir')),
    __doc__,
  )


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
