"""An autoencoder of sparsify's, imported, and trained on.

  make test-peers

or, with a Python that has sparsify (../peers/requirements.txt):

  python -m experiments.interchange.finetuned --store=runs/demo/store \\
    --workdir=runs/finetuned --torch_python=.venv-peers/bin/python

sparsify's trainer makes it from the store's training rows, and sparsify says
its FVU on the test rows. Converted it must have the same there, and after a
short fine-tune by sae-train a lower one. The control, of one active latent
fewer, must have another.
"""

import dataclasses
import json
import os
import pathlib
import shutil

from experiments import runs
from experiments.interchange import compare
import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.checkpoint import Trained
from sae_jax.probing import reconstruction
from sae_jax.training.optimizer import OptimizerConfig

MOST = 1e-5
FOLDER = 'of_sparsify'
_ROWS_AT_A_TIME = 4096


@dataclasses.dataclass(frozen=True)
class FinetunedConfig(config_lib.Config):
  """The autoencoder, and how long each trains it."""

  torch_python: str = config_lib.option('', 'Python that has sparsify')
  n: int = config_lib.option(2048, 'number of latents, N', least=1)
  k: int = config_lib.option(32, 'number of active latents of a token, K')
  batch: int = config_lib.option(1024, 'number of rows in a batch', least=1)
  steps: int = config_lib.option(
    250, "number of steps of sparsify's training", least=1
  )
  more_steps: int = config_lib.option(
    200, 'number of steps of ours that follow', least=1
  )
  learning_rate: float = config_lib.option(3e-4, 'of these steps')


def measure(config: FinetunedConfig, store: str, workdir: str) -> dict:
  """Trains, converts, trains on; FVU on test rows.

  Raises:
    UserError: if sparsify fails, or a figure is not what it must be.
  """
  place = pathlib.Path(os.path.abspath(workdir))
  shutil.rmtree(place, ignore_errors=True)
  place.mkdir(parents=True)
  data = store_lib.open_store(store)
  theirs = _sparsify(config, place, data)
  imported, tuned = str(place / 'imported'), str(place / 'tuned')
  sae_jax.convert(sae_jax.ConvertConfig(), str(place / FOLDER), imported, store)
  trained = sae_jax.load(imported)
  fewer = dataclasses.replace(
    trained, config=dataclasses.replace(trained.config, k=config.k - 1)
  )
  run = sae_jax.TrainConfig(
    from_checkpoint=imported,
    batch_size=config.batch,
    steps=config.more_steps,
    optimizer=OptimizerConfig(learning_rate=config.learning_rate),
  )
  sae_jax.train(run, store, tuned)
  result = {
    'sparsify': theirs,
    'imported': _fvu(trained, data),
    'control': _fvu(fewer, data),
    'tuned': _fvu(sae_jax.load(tuned), data),
  }
  bad = wrong(result)
  if bad:
    raise errors.UserError(f'FVU {json.dumps(result)}: {"; ".join(bad)}')
  return result


def wrong(fvu: dict[str, float]) -> list[str]:
  """What does not hold of the four FVUs, in words."""

  def apart(name: str) -> float:
    return abs(fvu[name] / fvu['sparsify'] - 1)

  claims = {
    f'imported it is {apart("imported"):.1e} from what sparsify says': (
      apart('imported') < MOST
    ),
    'the control is not told from it': apart('control') > 10 * MOST,
    'training on has not made it lower': fvu['tuned'] < fvu['imported'],
  }
  return [words for words, holds in claims.items() if not holds]


def _fvu(trained: Trained, data: store_lib.Store) -> float:
  rows = data.test_rows
  return reconstruction.measure(
    trained, data, rows.start, rows.stop, _ROWS_AT_A_TIME, 'test rows'
  ).fvu


def _sparsify(config, place, data) -> float:
  """Has it train one, which it saves in FOLDER; its FVU on test rows."""
  shape = {name: getattr(config, name) for name in ('n', 'k', 'batch', 'steps')}
  return compare.ask(
    config.torch_python,
    'experiments.interchange.sparsify_trained',
    place,
    data,
    {'folder': FOLDER} | shape,
    'fvu.json',
  )['fvu']


def main() -> None:
  """Entry point."""
  runs.run_experiment(FinetunedConfig, measure, __doc__)


if __name__ == '__main__':
  main()
