"""What experiments on a store share: flags, short runs, held-out figures."""

from collections.abc import Callable, Sequence
import json
from typing import Any, TypeVar

from etils import epath

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import flags
from sae_jax.storage import records
from sae_jax.training import train
from sae_jax.training.config import TrainConfig

_Config = TypeVar('_Config')


def run_experiment(
  kind: type[_Config],
  measure: Callable[[_Config, str, str], dict],
  description: str,
) -> None:
  """Runs an experiment on a store and prints its result as a line of JSON.

  Args:
    kind: the experiment's config, whose fields become flags.
    measure: of the config, the store's URL and the workdir's.
    description: what --help says first.
  """
  flags.define(kind)
  flags.define_url('store', 'finished store of activations to train on')
  flags.define_url(
    'workdir', 'folder for the runs; runs that are there are resumed'
  )

  def work():
    result = measure(flags.read(kind), flags.url('store'), flags.url('workdir'))
    print(json.dumps(result))

  flags.run(work, description)


def short_run(n_tokens: int, batch_size: int, **fields: Any) -> TrainConfig:
  """A run that is compared with others by its held-out figures.

  The learning rate warms up over a twentieth of the steps, as the first steps
  of a fresh Adam are large, and the weights are averaged over some 100 steps.

  Args:
    n_tokens: tokens of training; the last step is a whole one.
    batch_size: tokens of a step.
    **fields: of the config, nested ones included, in place of these or of the
      defaults.

  Raises:
    TypeError: if there is no such field.
    UserError: if a value is not allowed.
  """
  known = {field.name for field in config_lib.leaves(TrainConfig)}
  if not known.issuperset(fields):
    raise TypeError(f'a run has no {", ".join(sorted(set(fields) - known))}')
  steps = -(-n_tokens // batch_size)
  values = {
    'steps': steps,
    'batch_size': batch_size,
    'warmup_steps': steps // 20,
    'ema_decay': 0.99,
    'log_every': 100,
    'checkpoint_every': 250,
  }
  return config_lib.from_flat(TrainConfig, values | fields)


def heldout_by_rate(
  config: TrainConfig, rates: Sequence[float], store: str, workdir: str
) -> dict[float, dict[str, float]]:
  """Trains with each learning rate; the held-out metrics of each.

  Args:
    config: what the runs have in common.
    rates: the learning rates.
    store: the URL of the activations.
    workdir: each run gets a folder in it.
  """
  runs = train.sweep(config, workdir, learning_rate=tuple(rates))
  train.train_many(runs, store)
  return {
    run.optimizer.learning_rate: heldout(where) for where, run in runs.items()
  }


def heldout(workdir: str) -> dict[str, float]:
  """The held-out metrics at the end of a finished run, averaged weights.

  Raises:
    UserError: if the run is not finished.
  """
  folder = epath.Path(workdir)
  steps = records.read(folder / 'config.json')['steps']
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'heldout_nmse' in row]
  if not rows or rows[-1]['step'] < steps:
    raise errors.UserError(
      f'{workdir} was stopped before step {steps}: run it again to go on'
    )
  return rows[-1]
