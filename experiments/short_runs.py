"""What short runs should start from, and how their rate should fall.

Trains the defaults and variants that differ from them in one thing, on the same
batches, and prints for each shape the FVU on validation rows, by which defaults
are chosen, and on test rows, with the share of latents that are silent on all
training rows: means over the seeds with 95 % intervals of their spread. Then
the best rate over that of the rule, by shape and over all shapes.

Each run that is finished is a line of --results and is never run again.

  sae-harvest --store=runs/1m --n_tokens=1150000 --mask_norm_multiple=10
  python -m experiments.short_runs --store=runs/1m --workdir=runs/short
"""

from collections.abc import Iterator
import dataclasses
import json
import math
import os
import pathlib
import statistics
from typing import Any

from etils import epath
import numpy as np

from experiments import runs as runs_lib
from experiments.findings import effects
from sae_jax import checkpoint
from sae_jax import config as config_lib
from sae_jax import store as store_lib
from sae_jax.cli import huge_pages
from sae_jax.probing import reconstruction
from sae_jax.training import defaults, train
from sae_jax.training.config import TrainConfig

# What differs from the defaults. A share is of the steps, a factor of the rate
# that the defaults have, or have in a run of so many tokens.
VARIANTS = {
  'defaults': {},
  'random, least squares': {'decoder_init': 'random'},
  'random, norm': {'decoder_init': 'random', 'encoder_gain': 'norm'},
  'Adam b1 0.5': {'adam_b1': 0.5},
  'Adam b1 0.9': {'adam_b1': 0.9},
  'half the rate': {'rate_factor': 0.5},
  '0.7 of the rate': {'rate_factor': 0.7},
  '1.4 times the rate': {'rate_factor': 1.4},
  'twice the rate': {'rate_factor': 2.0},
  'decay over a fifth': {'decay_share': 0.2},
  'decay over all': {'decay_share': 0.95},
  'no warm-up': {'warmup_steps': 0},
  'average 0.99': {'ema_decay': 0.99},
  'dead after 10M': {'dead_after_tokens': 10_000_000},
  'the rate of 1M': {'rate_tokens': 1_000_000},
  '0.7 of the rate of 1M': {'rate_tokens': 1_000_000, 'rate_factor': 0.7},
  'half the rate of 1M': {'rate_tokens': 1_000_000, 'rate_factor': 0.5},
  'random, least squares, the rate of 1M': {
    'rate_tokens': 1_000_000,
    'decoder_init': 'random',
  },
}
_ROWS_AT_A_TIME = 4096


@dataclasses.dataclass(frozen=True)
class ShortRunsConfig(config_lib.Config):
  """Which cells."""

  shapes: tuple[str, ...] = config_lib.option(
    ('2048:16:200000', '4096:32:300000'),
    'latents:k:tokens of each shape',
  )
  variants: tuple[str, ...] = config_lib.option(
    # In a shorter run the rate of 1M is that of the defaults.
    tuple(n for n, of in VARIANTS.items() if 'rate_tokens' not in of),
    'which variants, by name',
  )
  seeds: tuple[str, ...] = config_lib.option(
    ('0', '1', '2'), 'seeds of weights and order'
  )
  batch_size: int = config_lib.option(
    1024, 'number of tokens in a step', least=1
  )
  results: str = config_lib.option(
    'experiments/short_runs.jsonl', 'file of finished cells, a line each'
  )
  machine: str = config_lib.option(
    'cpu', 'what is written beside each figure as the machine'
  )


def run_config(
  shape: str, variant: str, seed: int, config: ShortRunsConfig
) -> TrainConfig:
  """The config of a cell, with what is left to the run in place.

  Args:
    shape: latents:k:tokens.
    variant: a name in VARIANTS.
    seed: of weights and order.
    config: the batch size.
  """
  n_latents, k, tokens = map(int, shape.split(':'))
  changes = dict(VARIANTS[variant])
  factor = changes.pop('rate_factor', 1.0)
  rate_tokens = changes.pop('rate_tokens', tokens)
  share = changes.pop('decay_share', None)
  steps = -(-tokens // config.batch_size)
  if share is not None:
    changes['decay_steps'] = int(share * steps)
  values = {
    'n_latents': n_latents,
    'k': k,
    'steps': steps,
    'batch_size': config.batch_size,
    'seed': seed,
    'order_seed': seed,
    'log_every': 100,
    'checkpoint_every': 0,
  }
  made = config_lib.from_flat(TrainConfig, values | changes)
  if factor == 1.0 and rate_tokens == tokens:
    return made
  basis = values | {'steps': -(-rate_tokens // config.batch_size)}
  rate = factor * defaults.learning_rate(
    config_lib.from_flat(TrainConfig, basis)
  )
  return config_lib.from_flat(
    TrainConfig, values | changes | {'learning_rate': rate}
  )


def silent_share(workdir: str, store: str) -> float:
  """The share of a run's latents that are active for no training row."""
  trained = checkpoint.load(workdir)
  data = store_lib.open_store(store, trained.metadata.dataset['site'])
  return reconstruction.measure(
    trained, data, 0, data.n_train, _ROWS_AT_A_TIME, 'training rows'
  ).dead_fraction


def cells(config: ShortRunsConfig) -> Iterator[tuple[str, int, list[str]]]:
  """Shapes and seeds, with the variants that are not in the results yet."""
  done = {
    (line['shape'], line['seed'], line['batch_size'], line['variant'])
    for line in lines(config.results)
  }
  for shape in config.shapes:
    for seed in map(int, config.seeds):
      missing = [
        variant
        for variant in config.variants
        if (shape, seed, config.batch_size, variant) not in done
      ]
      if missing:
        yield shape, seed, missing


def lines(path: str) -> list[dict[str, Any]]:
  """The finished cells."""
  file = pathlib.Path(path)
  return (
    list(map(json.loads, file.read_text().splitlines()))
    if file.exists()
    else []
  )


def measure(config: ShortRunsConfig, store: str, workdir: str) -> dict:
  """Runs the missing cells; means and intervals of all."""
  for shape, seed, variants in cells(config):
    # All variants of a seed are trained on one reading.
    place = {
      variant: os.path.join(
        workdir,
        f'{shape.replace(":", "_")}_{seed}_{config.batch_size}',
        variant.replace(' ', '_').replace(',', ''),
      )
      for variant in variants
    }
    train.train_many(
      {
        where: run_config(shape, variant, seed, config)
        for variant, where in place.items()
      },
      store,
    )
    for variant, where in place.items():
      trained = runs_lib.validation(where)
      test = runs_lib.test(where, store)
      line = {
        'shape': shape,
        'batch_size': config.batch_size,
        'variant': variant,
        'seed': seed,
        'validation_fvu': trained['validation_fvu'],
        'validation_last_fvu': trained['validation_last_fvu'],
        'test_fvu': test.fvu,
        'test_l0': test.l0,
        'test_silent': test.dead_fraction,
        'train_silent': silent_share(where, store),
        'machine': config.machine,
      }
      with open(config.results, 'a') as file:
        file.write(json.dumps(line) + '\n')
      epath.Path(where).rmtree()
  results = lines(config.results)
  return {'cells': table(results), 'best_rate_over_rule': best_rates(results)}


def best_rates(results: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
  """The best learning rate over the rule's, by shape and over the shapes.

  Of each seed it is where a parabola of ln FVU on validation rows over ln rate
  has its least, through the best of the rates that were run and its neighbours.
  Intervals are Student's, of ln ratio: of a shape over its seeds, in all over
  the means of the shapes.
  """
  by_seed = {}
  for line in results:
    if VARIANTS[line['variant']].keys() <= {'rate_factor', 'rate_tokens'}:
      shape = f'{line["shape"]} by {line["batch_size"]}'
      of_seed = by_seed.setdefault(shape, {}).setdefault(line['seed'], {})
      of_seed[_factor(line)] = line['validation_fvu']
  logs = {
    shape: [
      best
      for of_seed in seeds.values()
      if (best := _log_best(of_seed)) is not None
    ]
    for shape, seeds in by_seed.items()
  }
  logs = {shape: of for shape, of in logs.items() if of}
  rows = {shape: _ratio(of) for shape, of in logs.items()}
  return rows | {
    'all shapes': _ratio(list(map(statistics.fmean, logs.values())))
  }


def _factor(line: dict[str, Any]) -> float:
  """The learning rate of a cell over that of the rule."""
  config = ShortRunsConfig(batch_size=line['batch_size'])
  rate, rule = (
    defaults.learning_rate(run_config(line['shape'], variant, 0, config))
    for variant in (line['variant'], 'defaults')
  )
  return rate / rule


def _log_best(of_factor: dict[float, float]) -> float | None:
  """ln of the best factor; None if it is at an end of those that were run."""
  factors = sorted(of_factor)
  at = factors.index(min(factors, key=of_factor.get))
  if at in (0, len(factors) - 1):
    return None
  near = factors[at - 1 : at + 2]
  bend, tilt, _ = np.polyfit(
    np.log(near), np.log([of_factor[factor] for factor in near]), 2
  )
  return float(-tilt / (2 * bend))


def _ratio(logs: list[float]) -> dict[str, Any]:
  """The ratio of a mean of logarithms, with its interval if there are two."""
  summary = {'of': len(logs), 'ratio': math.exp(statistics.fmean(logs))}
  if len(logs) > 1:
    _, *ends = effects.interval(logs)
    summary['interval'] = [math.exp(end) for end in ends]
  return summary


def table(results: list[dict[str, Any]]) -> dict[str, dict[str, dict]]:
  """For each shape and variant the means over seeds, with 95 % intervals.

  A change is that of the test FVU against the defaults with the same seed and
  the same batches: seeds may differ by more.
  """
  groups = {}
  for line in results:
    shape = f'{line["shape"]} by {line["batch_size"]}'
    group = groups.setdefault(shape, {}).setdefault(line['variant'], [])
    group.append(line)
  return {
    shape: {
      variant: _summary(rows, variants.get('defaults', []))
      for variant, rows in variants.items()
    }
    for shape, variants in groups.items()
  }


def _summary(
  rows: list[dict[str, Any]], defaults_rows: list[dict[str, Any]]
) -> dict[str, Any]:
  """Means of a cell's seeds; half the width of their 95 % interval by t."""
  summary = {'seeds': len(rows)}
  columns = {
    name: [row[name] for row in rows]
    for name in ('validation_fvu', 'test_fvu', 'train_silent')
  }
  fvu_of = {row['seed']: row['test_fvu'] for row in defaults_rows}
  columns['change'] = [
    row['test_fvu'] / fvu_of[row['seed']] - 1
    for row in rows
    if row['seed'] in fvu_of
  ]
  for name, values in columns.items():
    if not values:
      continue
    summary[name] = round(statistics.fmean(values), 4)
    if len(values) > 1:
      mean, low, _ = effects.interval(values)
      summary[f'{name}_pm'] = round(mean - low, 4)
  return summary


def main() -> None:
  """Entry point."""
  runs_lib.run_experiment(ShortRunsConfig, measure, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
