"""What is kept of the finished runs of a sweep.

WORKDIR/runs/NAME/         a run, as training writes it
WORKDIR/cells/NAME.json    what it came to; it is there once the run is done
WORKDIR/claims/NAME        which worker has it, while it is trained
"""

from collections.abc import Mapping
import dataclasses
import math
from typing import Any

from etils import epath

import sae_jax
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.autoencoder import metrics
from sae_jax.storage import files, records
from sae_jax.store import Store
from sae_jax.sweeps import cost
from sae_jax.sweeps.grid import Cell
from sae_jax.training import defaults

_CELLS, _RUNS, CLAIMS = 'cells', 'runs', 'claims'
_SUFFIX = '.json'


def run_url(workdir: str, cell: Cell) -> str:
  """The workdir of a run."""
  return f'{workdir}/{_RUNS}/{cell.name}'


def finished(workdir: str) -> set[str]:
  """Names of the runs that are done."""
  folder = epath.Path(workdir) / _CELLS
  if not folder.exists():
    return set()
  names = (path.name for path in folder.iterdir())
  return {
    name.removesuffix(_SUFFIX)
    for name in names
    if name.endswith(_SUFFIX) and not name.startswith('.')
  }


def read_cells(workdir: str) -> list[dict[str, Any]]:
  """The records of all runs that are done, in the order of their names.

  Raises:
    UserError: if there are none, or one is damaged.
  """
  names = sorted(finished(workdir))
  if not names:
    raise errors.UserError(
      f'{workdir} has no finished run of a sweep: run sae-sweep first'
    )
  folder = epath.Path(workdir) / _CELLS
  return [records.read(folder / f'{name}{_SUFFIX}') for name in names]


def write(
  workdir: str,
  cell: Cell,
  data: Store,
  scores: Mapping[str, metrics.Metrics],
  failure: str = '',
) -> None:
  """Records a run that is done.

  Args:
    workdir: of the sweep.
    cell: the run.
    data: its activations.
    scores: its metrics at the end by the name of the rows they are of; empty if
      it failed.
    failure: why it failed, if it did.

  Raises:
    OSError: if it cannot be written.
  """
  config, manifest = cell.config, data.manifest
  content = {
    'name': cell.name,
    'failure': failure,
    'store': cell.store,
    'identity': cell.identity,
    'subject': manifest.subject,
    'weights_sha256': manifest.weights_sha256,
    'site': data.site,
    'activation': config.sae.activation,
    'd_model': config.sae.d_model,
    'n_latents': config.sae.n_latents,
    'k': config.sae.k,
    'tokens': defaults.tokens(config),
    'steps': config.steps,
    'batch_size': config.batch_size,
    'converge': cell.converge,
    'seed': config.seed,
    'order_seed': config.order_seed,
    'learning_rate': config.optimizer.learning_rate,
    'rate_factor': None if math.isnan(cell.rate_factor) else cell.rate_factor,
    'flops': cost.spent(config),
    'dense_flops': cost.dense_equivalent(config),
    'scores': {
      rows: score.scalars() | {'tokens': score.tokens}
      for rows, score in scores.items()
    },
    'config': dataclasses.asdict(config),
    'version': sae_jax.__version__,
  }
  path = epath.Path(workdir) / _CELLS / f'{cell.name}{_SUFFIX}'
  files.write_text(path, config_lib.to_json(content))
