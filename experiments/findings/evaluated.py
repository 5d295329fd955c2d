"""Findings of evaluation: trained autoencoders, probed by the suite.

Two numbers of latents and two of active ones, the budget's and a quarter of it,
with every seed; rates are those of the run's rule. What is compared is measured
on the same test documents, by the same draws.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any

from etils import epath

from experiments.findings import cells, effects
from experiments.findings.cells import Line, Study
from experiments.findings.effects import Effect
from experiments.findings.pairs import Budget, run
from sae_jax import subject as subject_lib
from sae_jax.probing import report
from sae_jax.probing.config import ProbeConfig
from sae_jax.probing.examples import FeatureConfig
from sae_jax.probing.suite import evaluations
from sae_jax.sweeps import cells as sweep_cells
from sae_jax.sweeps.grid import Cell
from sae_jax.training.config import TrainConfig

_SHARES = (0.25, 1)
OF_TOPK = ('ablation', 'n2g', 'probes', 'refinement')
OF_RELU = ('refinement',)
# Weights of the L1 penalty, of which neither leaves fewer than a few latents of
# a token active nor more than a tenth of them.
WEIGHTS = (0.05, 0.1)
# Rows that latents are counted on, and that the report scores.
_ROWS, _EVAL_ROWS = 65_536, 16_384
_TASKS = 8
_ITSELF = 'trained'
# In points of percent, of the range of the effect, and in nats.
_LEAST_POINTS, _LEAST_SPARSITY, _LEAST_NATS = 1.0, 0.5, 0.002
# A shrinkage of so many points is none.
_NO_SHRINKAGE = 2.0

Figures = dict[str, dict[str, dict[str, float]]]


def shrinkage(study: Study, budget: Budget) -> list[Effect]:
  """How much smaller activations are than those that reconstruct best."""

  def percent(line: Line) -> float:
    return 100 * value(line, 'refinement', 'shrinkage')

  result = [
    effects.near(
      f'TopK, {name}: smaller by', '%', list(map(percent, of)), 0, _NO_SHRINKAGE
    )
    for name, of in _topk(study, budget).items()
  ]
  sizes = [int(share * budget.n_latents) for share in _SHARES]
  configs = {
    (n, weight, seed): run(
      budget,
      seed,
      n_latents=n,
      activation='relu',
      k_aux=0,
      sparsity_weight=weight,
    )
    for n in sizes
    for weight in WEIGHTS
    for seed in range(budget.seeds)
  }
  of_relu = lines(study, configs, OF_RELU)
  for n in sizes:
    for weight in WEIGHTS:
      own = [of_relu[n, weight, seed] for seed in range(budget.seeds)]
      l0 = sum(cells.l0(line) for line in own) / len(own)
      result.append(
        effects.above(
          f'ReLU, n {n:,}, L0 {l0:.0f}: smaller by',
          '%',
          list(map(percent, own)),
          _LEAST_POINTS,
        )
      )
  return result


def ablation(study: Study, budget: Budget) -> list[Effect]:
  """The share of logits that an active latent acts on, beside a channel's."""
  return _compared(
    study,
    budget,
    'fewer logits than a channel, by',
    'points',
    lambda line: (
      100
      * (
        value(line, 'ablation', 'sparsity', 'channels')
        - value(line, 'ablation', 'sparsity')
      )
    ),
    _LEAST_SPARSITY,
  )


def probes(study: Study, budget: Budget) -> list[Effect]:
  """Held-out loss of the best latent beside channels and random directions."""
  result = []
  for control, title in (
    ('channel', 'the best channel'),
    ('random', 'the best random direction'),
  ):
    result += _compared(
      study,
      budget,
      f'loss lower than of {title}, by',
      'nats',
      functools.partial(_lower_loss, control),
      _LEAST_NATS,
    )
  return result


def patterns(study: Study, budget: Budget) -> list[Effect]:
  """Recall of explanations by token patterns less their precision."""
  return _compared(
    study,
    budget,
    'recall above precision, by',
    'points',
    lambda line: (
      100 * (value(line, 'n2g', 'recall') - value(line, 'n2g', 'precision'))
    ),
    _LEAST_POINTS,
  )


def progressive(study: Study, budget: Budget) -> list[Effect]:
  """FVU with four times as many latents of a token as trained with."""
  arms = {'Multi-TopK': {'multi_topk': 4}, 'TopK': {}}
  configs = {
    (arm, n, k, seed): run(budget, seed, n_latents=n, k=k, **fields)
    for arm, fields in arms.items()
    for n, k in _shapes(budget)
    for seed in range(budget.seeds)
  }
  of = cells.lines(study, configs)
  return [
    effects.above(
      f'{arm}, n {n:,}, k {k}: FVU lower at 4 k than at k, by',
      '%',
      [_lower_at_four(of[arm, n, k, s], k) for s in range(budget.seeds)],
      _LEAST_POINTS,
    )
    for arm in arms
    for n, k in _shapes(budget)
  ]


def _lower_at_four(line: Line, k: int) -> float:
  at_k = line['fvu_at_k']
  return 100 * (1 - at_k[str(4 * k)] / at_k[str(k)])


def _lower_loss(control: str, line: Line) -> float:
  return value(line, 'probes', 'test_ce', control) - value(
    line, 'probes', 'test_ce'
  )


def _compared(
  study: Study,
  budget: Budget,
  title: str,
  unit: str,
  effect: Callable[[Line], float],
  least: float,
) -> list[Effect]:
  """An effect that is a figure of each run, by shape."""
  return [
    effects.above(f'{name}: {title}', unit, list(map(effect, of)), least)
    for name, of in _topk(study, budget).items()
  ]


def _shapes(budget: Budget) -> list[tuple[int, int]]:
  """Numbers of latents and of active ones."""
  return [
    (int(share * budget.n_latents), int(of_k * budget.k))
    for share in _SHARES
    for of_k in _SHARES
  ]


def _topk(study: Study, budget: Budget) -> dict[str, list[Line]]:
  """Evaluations of TopK autoencoders by shape, one of each seed."""
  configs = {
    (n, k, seed): run(budget, seed, n_latents=n, k=k)
    for n, k in _shapes(budget)
    for seed in range(budget.seeds)
  }
  of = lines(study, configs, OF_TOPK)
  return {
    f'n {n:,}, k {k}': [of[n, k, seed] for seed in range(budget.seeds)]
    for n, k in _shapes(budget)
  }


def value(line: Line, evaluation: str, figure: str, of: str = _ITSELF) -> float:
  """A figure of an evaluation; nan where the data did not allow it."""
  figures = line['evaluations'].get(evaluation, {})
  number = figures.get(figure, {}).get(of)
  return math.nan if number is None else number


def lines(
  study: Study, configs: dict[Any, TrainConfig], suite: Sequence[str]
) -> dict[Any, Line]:
  """Runs with the figures of evaluations, of which the missing are made.

  Args:
    study: where; its store's subject must be the packaged one or where it was.
    configs: the runs, by any key.
    suite: names of the evaluations, which are on small samples.

  Returns:
    The lines by the same keys, with the figures as `evaluations`.
  """
  return cells.once(
    dataclasses.replace(study, workdir=f'{study.workdir}/evaluated'),
    study.evaluations,
    configs,
    '+'.join(suite),
    functools.partial(_line, suite=tuple(suite)),
  )


def _line(study: Study, cell: Cell, suite: tuple[str, ...]) -> Line:
  line = cells.recorded(study, cell)
  if line['failure']:
    return line | {'evaluations': {}}
  folder = epath.Path(study.workdir) / 'probes' / cell.name
  config = ProbeConfig(
    features=FeatureConfig(feature_rows=_ROWS),
    eval_rows=_EVAL_ROWS,
    n_tasks=_TASKS if 'probes' in suite else 1,
    suite=(evaluations.QUICK, *suite),
  )
  made = report.probe(
    config,
    sweep_cells.run_url(study.workdir, cell),
    study.store,
    str(folder),
    _subject(study.store, study.site),
  )
  folder.rmtree()
  return line | {'evaluations': _figures(made)}


@functools.lru_cache(maxsize=1)
def _subject(store: str, site: str) -> subject_lib.Subject:
  manifest = cells.store_lib.open_store(store, site).manifest
  return subject_lib.load_recorded(
    manifest.subject, manifest.weights_sha256, ''
  )


def _figures(made: dict[str, Any]) -> Figures:
  """What each figure of a report is of each that was scored."""
  return {
    evaluation: {
      name: {who: of['value'] for who, of in figure['of'].items()}
      for name, figure in record.get('figures', {}).items()
    }
    for evaluation, record in made['evaluations'].items()
  }
