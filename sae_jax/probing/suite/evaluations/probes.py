"""Whether single latents, or a few, stand for properties of whole texts."""

import dataclasses
import math
import zlib

import numpy as np

from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, Statistic
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
et al. (2025) for the last three."""
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
  scores = {}
  for place, task in enumerate(tasks.values()):
    kinds = {context.name: task['latent']} | task['controls']
    kinds |= {words: task['references'][name] for name, words in _NAMES.items()}
    kinds |= {
      f'{_K} latents': of
      for of in task['references']['k_sparse']
      if of['k'] == _K
    }
    for name, score in kinds.items():
      scores.setdefault(name, {})[place] = score
  return Outcome(
    {name: _sample(of, list(tasks)) for name, of in scores.items()},
    tables={'Tasks': _table(context.name, tasks)},
  )


def _sample(of_task: dict[int, dict], names: list[str]) -> Sample:
  """Scores of tasks, some of which may lack some of them."""
  count = len(names)
  # The same of a task wherever it stands.
  unit_U = np.array([zlib.crc32(task.encode()) for task in names])
  terms = ('test_ce', 'test_auc', 'optimism')
  sums = {name: np.zeros(count) for name in terms}
  sums |= {f'with {name}': np.zeros(count) for name in terms}
  for place, score in of_task.items():
    values = {name: score.get(name) for name in terms}
    if score.get('train_ce') is not None and values['test_ce'] is not None:
      values['optimism'] = values['test_ce'] - score['train_ce']
    for name, value in values.items():
      if value is not None and math.isfinite(value):
        sums[name][place] = value
        sums[f'with {name}'][place] = 1
  # All tasks are of one draw: another seed splits the prompts otherwise.
  return Sample(unit_U, np.zeros(count, int), sums)


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
