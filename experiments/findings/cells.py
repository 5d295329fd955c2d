"""Trains what a finding compares, and keeps each run's figures.

A finished run is a line of a file of results and is never run again: its name
is a digest of its whole config and of the store's rows. Runs that are missing
are trained by a worker of a sweep, on one reading where they share it.
"""

from collections.abc import Callable, Mapping
import dataclasses
import json
import math
import pathlib
from typing import Any

from etils import epath

from sae_jax import checkpoint, errors
from sae_jax import store as store_lib
from sae_jax.checkpoint import Trained
from sae_jax.probing import reconstruction
from sae_jax.storage import records
from sae_jax.sweeps import cells as sweep_cells
from sae_jax.sweeps import grid, work
from sae_jax.sweeps.grid import Cell
from sae_jax.training import defaults
from sae_jax.training.config import TrainConfig

# Training rows of which is counted which latents are silent, and test rows that
# are read at other k.
_SILENT_ROWS, _OTHER_K_ROWS = 262_144, 8192
_ROWS_AT_A_TIME = 4096
# Multiples of k at which a code of k is read.
WIDTHS = (0.25, 0.5, 1, 2, 4)
# A sweep of rates that needs more than this many has no best one.
_MOST_RATES = 9
# What a line of results has of a sweep's record of a run.
_KEPT = (
  'name', 'identity', 'site', 'activation', 'd_model', 'n_latents', 'k',
  'tokens', 'batch_size', 'seed', 'learning_rate', 'scores',
)  # fmt: skip

Line = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
  """Where runs are trained, and where their figures are kept.

  Attributes:
    store: URL of the activations.
    workdir: of the sweep of the runs that are missing.
    results: file of finished runs, a line of JSON each.
    evaluations: file of finished evaluations, a line of JSON each.
    machine: what is written beside figures as the machine.
    site: of the store's activations; empty if it has one.
  """

  store: str
  workdir: str
  results: str
  evaluations: str
  machine: str = 'cpu'
  site: str = ''


def lines(study: Study, configs: Mapping[Any, TrainConfig]) -> dict[Any, Line]:
  """The figures of runs, of which those that are missing are trained.

  Args:
    study: where.
    configs: the runs, by any key.

  Returns:
    The lines by the same keys: with `failure` where a loss was not finite.

  Raises:
    UserError: if the sweep was stopped.
  """
  return once(study, study.results, configs, '', _line)


def once(
  study: Study,
  path: str,
  configs: Mapping[Any, TrainConfig],
  kind: str,
  line_of: Callable[[Study, Cell], Line],
) -> dict[Any, Line]:
  """A line of each run, of a file where each is made once.

  Args:
    study: where.
    path: the file.
    configs: the runs, by any key; those that are missing are trained, and
      deleted when their lines are made.
    kind: of the line, if a run has several in the file.
    line_of: a trained cell's line, which has its name.

  Raises:
    UserError: if the sweep was stopped.
  """
  cells = {}
  for key, config in configs.items():
    of_site = dataclasses.replace(config, site=study.site)
    (cells[key],) = grid.grid(of_site, [study.store], {})
  done = _read(path)
  missing = {
    cell.name: cell for cell in cells.values() if (cell.name, kind) not in done
  }
  if missing:
    left = work.work(work.WorkConfig(), list(missing.values()), study.workdir)
    if left:
      raise errors.UserError(
        f'{left} runs are left: give the same command again to go on'
      )
    for name, cell in missing.items():
      line = {'name': name} | ({'kind': kind} if kind else {})
      done[name, kind] = line | line_of(study, cell)
      _append(path, done[name, kind])
      _remove(study, cell)
  return {key: done[cell.name, kind] for key, cell in cells.items()}


def recorded(study: Study, cell: Cell) -> Line:
  """What a line has of a trained cell's record."""
  record = records.read(_record(study, cell))
  line = {name: record[name] for name in _KEPT}
  return line | {'failure': record['failure'], 'machine': study.machine}


def _record(study: Study, cell: Cell) -> epath.Path:
  return epath.Path(study.workdir) / 'cells' / f'{cell.name}.json'


def _remove(study: Study, cell: Cell) -> None:
  """Removes a run, and its record, so that another line trains it again."""
  folder = epath.Path(sweep_cells.run_url(study.workdir, cell))
  _record(study, cell).unlink(missing_ok=True)
  if folder.exists():
    folder.rmtree()


def _line(study: Study, cell: Cell) -> Line:
  line = recorded(study, cell)
  if line['failure']:
    return line
  trained = checkpoint.load(sweep_cells.run_url(study.workdir, cell))
  data = store_lib.open_store(study.store, trained.metadata.dataset['site'])
  line |= _silent(trained, data)
  if trained.config.activation == 'topk':
    line |= _at_other_k(trained, data)
  return line


def _silent(trained: Trained, data: store_lib.Store) -> dict[str, float]:
  """The share of latents that are active for none of the first rows."""
  rows = min(_SILENT_ROWS, data.n_train)
  figures = reconstruction.measure(
    trained, data, 0, rows, _ROWS_AT_A_TIME, 'training rows'
  )
  return {'silent': figures.dead_fraction, 'silent_rows': rows}


def _at_other_k(trained: Trained, data: store_lib.Store) -> dict[str, Any]:
  """The FVU of the first test rows with other numbers of active latents."""
  rows, by_k = data.test_rows[:_OTHER_K_ROWS], {}
  for k in other_k(trained.config.k):
    read = dataclasses.replace(
      trained, config=dataclasses.replace(trained.config, k=k)
    )
    by_k[str(k)] = reconstruction.measure(
      read, data, rows.start, rows.stop, _ROWS_AT_A_TIME, f'k {k}'
    ).fvu
  return {'fvu_at_k': by_k, 'fvu_at_k_rows': len(rows)}


def other_k(k: int) -> list[int]:
  """At which k a code of k is read too."""
  return [max(1, int(width * k)) for width in WIDTHS]


def _read(path: str) -> dict[tuple[str, str], Line]:
  """Lines by the run's name and their kind."""
  file = pathlib.Path(path)
  text = file.read_text() if file.exists() else ''
  lines_ = map(json.loads, text.splitlines())
  return {(line['name'], line.get('kind', '')): line for line in lines_}


def _append(path: str, line: Line) -> None:
  with open(path, 'a') as file:
    file.write(json.dumps(line) + '\n')


def fvu(line: Line, rows: str = 'test') -> float:
  """A line's FVU on validation or test rows; infinite if the run failed."""
  return math.inf if line['failure'] else line['scores'][rows]['fvu']


def l0(line: Line, rows: str = 'test') -> float:
  """A line's mean number of active latents."""
  return line['scores'][rows]['l0']


def with_rate(config: TrainConfig, factor: float) -> TrainConfig:
  """The config at a multiple of the rate that it has, or that the rule has."""
  rate = factor * defaults.learning_rate(config)
  return dataclasses.replace(
    config,
    optimizer=dataclasses.replace(config.optimizer, learning_rate=rate),
  )


def rates(
  study: Study,
  arms: Mapping[str, TrainConfig],
  factors: tuple[float, ...] = (0.5, 1.0, 2.0),
  score: Callable[[str, Line], float] = lambda arm, line: fvu(
    line, 'validation'
  ),
) -> dict[str, dict[float, Line]]:
  """Lines of each arm by the factor on its rate, with its best one inside.

  Factors of two are added below and above until the best has worse ones on
  both sides.

  Args:
    study: where.
    arms: the runs by name.
    factors: what is tried first.
    score: of an arm's name and line; less is better.

  Raises:
    UserError: if the best is at an end of as many as are tried.
  """
  tried = {arm: set(factors) for arm in arms}
  while True:
    flat = lines(
      study,
      {
        (arm, factor): with_rate(arms[arm], factor)
        for arm, own in tried.items()
        for factor in own
      },
    )
    by_arm = {
      arm: {factor: flat[arm, factor] for factor in sorted(own)}
      for arm, own in tried.items()
    }
    more = False
    for arm, own in by_arm.items():
      at = best(own, lambda line, arm=arm: score(arm, line))
      ends = {min(own): min(own) / 2, max(own): max(own) * 2}
      wider = {ends[at]} if at in ends else set()
      if math.isinf(score(arm, own[at])):
        # None is any good: nothing says on which side a better one is.
        wider = set(ends.values())
      tried[arm] |= wider
      more |= bool(wider)
      if wider and len(tried[arm]) > _MOST_RATES:
        raise errors.UserError(
          f'{arm} is best at {at:g} times its rate, an end of '
          f'{len(own)} rates: its config does not train'
        )
    if not more:
      return by_arm


def best(
  of_factor: Mapping[float, Line],
  score: Callable[[Line], float] = lambda line: fvu(line, 'validation'),
) -> float:
  """The factor with the least score, by default FVU on validation rows."""
  return min(of_factor, key=lambda factor: score(of_factor[factor]))
