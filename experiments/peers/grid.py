"""The cells of the comparison: which there are, which are done, who is best.

A cell is one run of one trainer: a shape, a rate, a seed. Its line of JSON in
the results says all that it depends on, and a cell that has a line is not run
again.
"""

from collections.abc import Iterable, Sequence
import dataclasses
import json
import math
import pathlib
from typing import Any

# Each shape's latents, active latents and tokens.
SHAPES = ('2048:16:200000', '4096:32:300000', '8192:32:1000000')
BATCH = 256
# A grid is extended no further than this many times by a factor of two.
_MOST_RATES = 12


@dataclasses.dataclass(frozen=True)
class Cell:
  """One run of one trainer.

  Attributes:
    trainer: its name.
    n: latents.
    k: active latents of a row.
    tokens: least number of tokens trained on; the last step is a whole one.
    batch: tokens of a step.
    rate: learning rate.
    seed: of the weights, and of the order of the rows.
    rows: digest of the rows, see `files.digest`.
    settings: what else the trainer was given.
  """

  trainer: str
  n: int
  k: int
  tokens: int
  batch: int
  rate: float
  seed: int
  rows: str
  settings: str = ''

  @property
  def steps(self) -> int:
    """Steps of training."""
    return -(-self.tokens // self.batch)

  @property
  def group(self) -> 'Cell':
    """What cells that differ in rate and seed alone have in common."""
    return dataclasses.replace(self, rate=0.0, seed=0)


Results = dict[Cell, dict[str, Any]]


def shapes(texts: Iterable[str]) -> list[tuple[int, int, int]]:
  """Shapes n, k, tokens from texts such as '2048:16:200000'."""
  return [tuple(map(int, text.split(':'))) for text in texts]


def warmup_steps(steps: int) -> int:
  """Steps of the linear warm-up; the rate then falls linearly to 0."""
  return steps // 20


def read(folder: str) -> Results:
  """The results of all cells in a folder's files of JSON lines."""
  names = {field.name for field in dataclasses.fields(Cell)}
  results = {}
  for path in sorted(pathlib.Path(folder).glob('*.jsonl')):
    for line in path.read_text().splitlines():
      record = json.loads(line)
      cell = Cell(**{name: record.pop(name) for name in names})
      results[cell] = record
  return results


def append(path: str, cell: Cell, result: dict[str, Any]) -> None:
  """Adds a cell's line to a file."""
  pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
  with open(path, 'a') as file:
    file.write(json.dumps(dataclasses.asdict(cell) | result) + '\n')


def line(cell: Cell, result: dict[str, Any]) -> str:
  """What is shown of a cell that was just run."""
  return (
    f'{cell.trainer} n {cell.n} k {cell.k} tokens {cell.tokens} rate '
    f'{cell.rate:g} seed {cell.seed}: test FVU {_shown(result["test_fvu"])}, '
    f'silent on training rows {_shown(result["train_silent"])}, '
    f'{result["train_seconds"]:.1f} s'
  )


def _shown(value: float | None) -> str:
  return 'none' if value is None else f'{value:.4f}'


def validation_by_rate(
  group: Cell, seeds: Sequence[int], results: Results
) -> dict[float, float]:
  """The mean FVU on validation rows of rates whose seeds are all done."""
  rates = {cell.rate for cell in results if cell.group == group}
  fvus = {}
  for rate in sorted(rates):
    cells = [dataclasses.replace(group, rate=rate, seed=s) for s in seeds]
    if all(cell in results for cell in cells):
      of_seeds = [results[cell]['validation_fvu'] for cell in cells]
      # A run that diverged has none.
      fvus[rate] = sum(math.inf if f is None else f for f in of_seeds)
      fvus[rate] /= len(of_seeds)
  return fvus


def wanted(
  group: Cell, rates: Sequence[float], seeds: Sequence[int], results: Results
) -> list[Cell]:
  """The cells that are still to be run, none once the best rate is known.

  Args:
    group: a cell without rate and seed.
    rates: the rates to begin with.
    seeds: the seeds.
    results: the cells that are done.

  Returns:
    The missing cells of these rates; if there are none and the best rate is at
    an edge, those of the rate a factor of two beyond it.
  """
  cells = [
    dataclasses.replace(group, rate=rate, seed=seed)
    for rate in sorted(rates)
    for seed in seeds
  ]
  missing = [cell for cell in cells if cell not in results]
  if missing:
    return missing
  fvus = validation_by_rate(group, seeds, results)
  best = min(fvus, key=fvus.get)
  if len(fvus) >= _MOST_RATES:
    return []
  if best == max(fvus):
    return wanted(group, [*fvus, 2 * best], seeds, results)
  if best == min(fvus):
    return wanted(group, [*fvus, best / 2], seeds, results)
  return []
