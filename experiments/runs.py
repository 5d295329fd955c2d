"""What experiments on a store share: flags, short runs, their figures.

What is chosen is chosen by the runs' metrics on validation rows, and what is
reported is measured on test rows, which no run sees and nothing chooses by.
"""

from collections.abc import Callable
import json
from typing import Any, TypeVar

from etils import epath

from sae_jax import checkpoint, errors
from sae_jax import config as config_lib
from sae_jax import store as store_lib
from sae_jax.autoencoder import metrics
from sae_jax.cli import flags
from sae_jax.probing import reconstruction
from sae_jax.storage import records
from sae_jax.training.config import TrainConfig

_Config = TypeVar('_Config')
# Test rows that are encoded at a time.
_TEST_BATCH = 4096


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
  """A run that is compared with others.

  Baselines are compared with TopK, so nothing is left to the run, which would
  favour TopK: start and optimiser are the paper's, but that the learning rate
  warms up over a twentieth of the steps, as the first steps of a fresh Adam are
  large, and that the weights are averaged over some 100 steps.

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
    'decay_steps': 0,
    'adam_b1': 0.9,
    'ema_decay': 0.99,
    'decoder_init': 'random',
    'encoder_gain': 'norm',
    'dead_after_tokens': 10_000_000,
    'log_every': 100,
    'checkpoint_every': 250,
  }
  return config_lib.from_flat(TrainConfig, values | fields)


def validation(workdir: str) -> dict[str, float]:
  """A finished run's metrics on validation rows at its end, to choose by.

  Those of averaged weights begin with `validation_`, those of the last weights
  with `validation_last_`.

  Raises:
    UserError: if the run is not finished.
  """
  folder = epath.Path(workdir)
  steps = records.read(folder / 'config.json')['steps']
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  rows = [row for row in map(json.loads, lines) if 'validation_nmse' in row]
  if not rows or rows[-1]['step'] < steps:
    raise errors.UserError(
      f'{workdir} was stopped before step {steps}: run it again to go on; or '
      'it is of a version of sae_jax without validation rows: delete it'
    )
  return rows[-1]


def test(workdir: str, store: str, average: bool = True) -> metrics.Metrics:
  """A finished run's metrics on all test rows of its store, to report.

  Args:
    workdir: the run's.
    store: the URL of the activations.
    average: whether of the averaged weights, or of the last ones.

  Raises:
    UserError: if the run is not finished, or a row cannot be scored.
  """
  # Raises if the run is not finished.
  _ = validation(workdir)
  trained = checkpoint.load(workdir, average=average)
  about = trained.metadata.dataset
  data = store_lib.open_store(
    store, about['site'], trained.metadata.dataset_version
  )
  rows = data.test_rows
  return reconstruction.measure(
    trained, data, rows.start, rows.stop, _TEST_BATCH, 'test'
  )
