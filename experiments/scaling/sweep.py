"""Scaling laws of a real model: the sweep, and its table.

Each run that is finished is a line of --cells and is never run again; the table
that the laws are fitted to is made of all lines. Several processes with the
same command share the runs of a workdir.

  sae-harvest --store=runs/2m --n_tokens=2300000 --dtype=bfloat16 \\
    --sites=blocks.7.resid_post,blocks.14.resid_post --mask_norm_multiple=10
  python -m experiments.scaling.sweep --store=runs/2m --workdir=runs/sweep
  sae-sweep fit --table=experiments/scaling/cells.csv --workdir=runs/fits
"""

from collections.abc import Mapping, Sequence
import dataclasses
import json
from typing import Any

from etils import epath

from experiments import runs
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.cli import huge_pages
from sae_jax.scaling import sweep_runs, table
from sae_jax.storage import files
from sae_jax.sweeps import cells as cells_lib
from sae_jax.sweeps import grid, work
from sae_jax.sweeps.grid import Cell
from sae_jax.training.config import TrainConfig

_HERE = 'experiments/scaling'
KS = (8, 16, 32, 64)
# All parts but the grid are of one k, and seeds are repeated at these sizes.
K, SEEDED = 32, (256, 1024, 4096)
_WIDEST_CONVERGED = 4096
# A run to convergence ends where its loss falls by less; see `convergence`.
_CONVERGE = 0.002
# What a line has not of a run's record: where things lay, and the whole config,
# of which the name has a digest.
_LEFT_OUT = ('store', 'config')

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SweepConfig(config_lib.Config):
  """The sweep's parts, and where figures are kept."""

  parts: tuple[str, ...] = config_lib.option(
    ('grid', 'tokens', 'seeds', 'converged'), 'which parts, by name'
  )
  sites: tuple[str, ...] = config_lib.option(
    ('blocks.14.resid_post', 'blocks.7.resid_post'),
    'sites of the store; all parts but the grid are of the first',
  )
  widths: tuple[str, ...] = config_lib.option(
    ('256', '512', '1024', '2048', '4096', '8192'),
    'numbers of latents; the widest takes as long as all others together',
  )
  tokens: int = config_lib.option(
    2_070_000, 'number of tokens of a whole run', least=1
  )
  runs_at_a_time: int = config_lib.option(
    8, 'most runs that share a reading of the store', least=1
  )
  cells: str = config_lib.option(
    f'{_HERE}/cells.jsonl', 'file of finished runs, a line each'
  )
  table: str = config_lib.option(
    f'{_HERE}/cells.csv', 'file of the table that laws are fitted to'
  )


def _numbers(widths: Sequence[str]) -> tuple[int, ...]:
  try:
    return tuple(map(int, widths))
  except ValueError:
    raise errors.UserError(
      f'widths {",".join(widths)} are no numbers of latents: write '
      '--widths=256,512'
    ) from None


def cells(config: SweepConfig, store: str) -> list[Cell]:
  """All runs of the parts.

  Raises:
    UserError: if there is no such part, a width is no number, or the store has
      no such site.
  """
  first, tokens = config.sites[0], config.tokens
  widths = _numbers(config.widths)
  seeded = tuple(n for n in widths if n in SEEDED)
  grids = {
    'grid': {
      'site': config.sites,
      'n_latents': widths,
      'k': KS,
      'tokens': (tokens,),
    },
    'tokens': {
      'site': (first,),
      'n_latents': widths,
      'k': (K,),
      'tokens': (tokens // 8, tokens // 4, tokens // 2),
    },
    'seeds': {
      'site': (first,),
      'n_latents': seeded,
      'k': (K,),
      'tokens': (tokens,),
      'seed': (1,),
    },
    'converged': {
      'site': (first,),
      'n_latents': tuple(n for n in widths if n <= _WIDEST_CONVERGED),
      'k': (K,),
      'tokens': (tokens,),
    },
  }
  unknown = sorted(set(config.parts) - set(grids))
  if unknown:
    raise errors.UserError(
      f'no part is called {", ".join(unknown)}: use some of {", ".join(grids)}'
    )
  result = []
  for name in config.parts:
    run, converge = TrainConfig(), 0.0
    if name == 'converged':
      # Its rate cannot fall at an end that it does not know.
      optimizer = dataclasses.replace(run.optimizer, decay_steps=0)
      run, converge = dataclasses.replace(run, optimizer=optimizer), _CONVERGE
    # Not every part has a run of every width.
    if grids[name]['n_latents']:
      result += grid.grid(run, [store], grids[name], converge)
  return result


def measure(config: SweepConfig, store: str, workdir: str) -> dict:
  """Trains the runs that are missing, and keeps all.

  Returns:
    How many runs are kept, and how many are left.
  """
  wanted = cells(config, store)
  kept = keep(config.cells, workdir)
  missing = [cell for cell in wanted if cell.name not in kept]
  left = 0
  if missing:
    options = work.WorkConfig(
      keep_runs=False, runs_at_a_time=config.runs_at_a_time
    )
    left = work.work(options, missing, workdir)
    kept = keep(config.cells, workdir)
  table.write(sweep_runs.of_records(kept.values()), config.table)
  return {'kept': len(kept), 'left': left}


def keep(path: str, workdir: str) -> Mapping[str, Record]:
  """Adds the finished runs of a sweep to a file; all records by name."""
  kept = {record['name']: record for record in _lines(path)}
  if cells_lib.finished(workdir):
    for record in cells_lib.read_cells(workdir):
      kept[record['name']] = {
        name: value for name, value in record.items() if name not in _LEFT_OUT
      }
  kept = dict(sorted(kept.items()))
  text = ''.join(json.dumps(record) + '\n' for record in kept.values())
  files.write_text(epath.Path(path), text)
  return kept


def _lines(path: str) -> Sequence[Record]:
  file = epath.Path(path)
  text = file.read_text() if file.exists() else ''
  return [json.loads(line) for line in text.splitlines()]


def main() -> None:
  """Entry point."""
  runs.run_experiment(SweepConfig, measure, __doc__)


if __name__ == '__main__':
  huge_pages.use_huge_pages()
  main()
