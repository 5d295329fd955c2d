"""Whether single latents, or a few, stand for properties of whole texts."""

import dataclasses
import math
import zlib

import numpy as np

from sae_jax import progress
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome

TITLE = 'Probes of binary tasks'
ABOUT = """For each of the tasks of sae-probe (--n_tasks, --task_names), such as
whether a text is French, every latent is made a classifier by itself: logistic
regression on its pooled pre-activation, and the one with the least loss on
training prompts is scored on held-out ones. Its training loss is lower by
chance, as it is the best of many: the gap to the held-out loss says how much.

Beside it stand the best latent after the labels were shuffled ("permuted"), the
best of as many random directions, the best channel and the best principal
component; and what classifiers of many inputs reach: logistic regression on the
whole activation, the direction between the class means, and on the 16 latents
that differ most between the classes. Gao et al. (2024), section 4.2; Kantamneni
et al. (2025) for the last three.

The five draws split the same prompts into training and held-out ones in five
ways, with labels shuffled and directions drawn anew; the first is the report's,
and the table is of it. They share prompts: what other prompts would have given
is in the interval over tasks alone."""
UNIT = 'tasks'
_K = 16
_NAMES = {
  'mean_difference': 'mean difference',
  'logistic': 'logistic regression',
}


@dataclasses.dataclass(frozen=True)
class Size:
  """Nothing of its own: the tasks are those of the report."""


SIZES = {'quick': Size(), 'all': Size()}

STATISTICS = {
  'test_ce': Statistic(
    'held-out loss',
    'Cross-entropy of held-out prompts; mean over tasks. ln 2 = 0.693 is what '
    'knowing nothing gives.',
    ratio('test_ce', 'with test_ce'),
    'nats',
    'low',
  ),
  'test_auc': Statistic(
    'held-out AUC',
    'Chance that a held-out prompt with the property scores above one without; '
    'mean over tasks.',
    ratio('test_auc', 'with test_auc'),
    better='high',
    ends=SHARE,
  ),
  'optimism': Statistic(
    'optimism',
    'Held-out loss less training loss; mean over tasks.',
    ratio('optimism', 'with optimism'),
    'nats',
  ),
}


def measure(context: Context) -> Outcome:
  tasks = context.probed or {}
  if not tasks:
    raise CannotMeasure('the report has no probe tasks: give --n_tasks=4')
  # The report's own split is the first.
  of_draws = [tasks]
  with progress.bar(
    total=context.draws, initial=1, unit='split', desc='probes'
  ) as bar:
    for draw in range(1, context.draws):
      of_draws.append(context.probed_again(draw))
      bar.update(1)
  scores = {}
  for draw, of_draw in enumerate(of_draws):
    for task, of_task in of_draw.items():
      for name, score in _kinds(context.name, of_task).items():
        scores.setdefault(name, {})[draw, task] = score
  names = list(tasks)
  return Outcome(
    {name: _sample(of, names, context.draws) for name, of in scores.items()},
    tables={'Tasks': _table(context.name, tasks)},
  )


def _kinds(name: str, task: dict) -> dict[str, dict]:
  """The autoencoder's score on a task, and those beside it."""
  kinds = {name: task['latent']} | task['controls']
  kinds |= {words: task['references'][kind] for kind, words in _NAMES.items()}
  return kinds | {
    f'{_K} latents': of
    for of in task['references']['k_sparse']
    if of['k'] == _K
  }


def _sample(
  scores: dict[tuple[int, str], dict], names: list[str], draws: int
) -> Sample:
  """Scores of tasks by draw and task, some of which may lack some of them."""
  # The same of a task wherever it stands.
  unit_U = np.array([zlib.crc32(task.encode()) for task in names] * draws)
  draw_U = np.repeat(np.arange(draws), len(names))
  terms = ('test_ce', 'test_auc', 'optimism')
  sums = {name: np.zeros(len(unit_U)) for name in terms}
  sums |= {f'with {name}': np.zeros(len(unit_U)) for name in terms}
  for (draw, task), score in scores.items():
    place = draw * len(names) + names.index(task)
    values = {name: score.get(name) for name in terms}
    if score.get('train_ce') is not None and values['test_ce'] is not None:
      values['optimism'] = values['test_ce'] - score['train_ce']
    for name, value in values.items():
      if value is not None and math.isfinite(value):
        sums[name][place] = value
        sums[f'with {name}'][place] = 1
  return Sample(unit_U, draw_U, sums)


def _table(name: str, tasks: dict[str, dict]) -> list[list]:
  rows = [['task', 'best latent', 'AUC', 'permuted', 'logistic regression']]
  for task, scores in tasks.items():
    rows.append(
      [
        task,
        int(scores['latent']['best_latent']),
        *(
          _number(score['test_auc'])
          for score in (
            scores['latent'],
            scores['controls']['permuted'],
            scores['references']['logistic'],
          )
        ),
      ]
    )
  return rows


def _number(value: float | None) -> str:
  return 'none' if value is None or math.isnan(value) else f'{value:.3f}'
