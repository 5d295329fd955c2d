"""Scores of explanations from answers, each latent's and their means."""

from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from sae_jax.explaining import examples
from sae_jax.explaining.examples import Text
from sae_jax.probing import intervals
from sae_jax.probing.suite import figures

# Share of the active and of the inactive texts that must have an answer.
_LEAST_ANSWERED = 0.5
DEFINITIONS = {
  'sensitivity': 'share of the active texts that are judged active',
  'specificity': 'share of the inactive texts that are judged inactive',
  'balanced_accuracy': 'mean of sensitivity and specificity; 0.5 is chance',
  'auroc': 'chance that an active text has a higher probability than an '
  'inactive one, ties counted half',
  'by_tenth': 'sensitivity on each tenth of the ranks of activations, the '
  'lowest first',
  'by_class': 'specificity on each class of inactive texts',
  'consistency': 'share of pairs of answers in different orders that agree',
  'shrunk': 'balanced accuracy moved towards the mean of the latents, the more '
  'the less is known of it (empirical Bayes): by it latents are ranked',
}
_CHANCE = 0.5


@dataclasses.dataclass(frozen=True)
class Score:
  """How well judgements fit a latent's texts.

  Attributes:
    balanced_accuracy: with the ends of its 95 % interval over texts, as all
      three figures.
    auroc: see DEFINITIONS; of the mean probability over orders.
    sensitivity: answers of different orders are averaged.
    specificity: likewise.
    by_tenth: see DEFINITIONS; None where no text has an answer.
    by_class: by the kind of text.
    consistency: None with one order.
    answered: share of the texts with an answer.
    variance: of the balanced accuracy, by its number of texts.
  """

  balanced_accuracy: tuple[float, float, float]
  auroc: tuple[float, float, float]
  sensitivity: tuple[float, float, float]
  specificity: tuple[float, float, float]
  by_tenth: tuple[float | None, ...]
  by_class: dict[str, float | None]
  consistency: float | None
  answered: float
  variance: float


def score(texts: Sequence[Text], p_XO: np.ndarray) -> Score | None:
  """The score of judgements of a latent's texts.

  Args:
    texts: the texts, X of them.
    p_XO: probability that each is active by each order's answer; nan where
      there is none.

  Returns:
    The score; None if more than half of the active or of the inactive texts
    have no answer.
  """
  label_X = np.array([text.kind == examples.TENTH for text in texts])
  has_X = ~np.isnan(p_XO).all(1)
  if min(has_X[label_X].mean(), has_X[~label_X].mean()) < _LEAST_ANSWERED:
    return None
  right_X, p_X = right(label_X, p_XO), averaged(p_XO)
  ends = [
    intervals.wilson(right_X[own].mean(), own.sum())
    for own in (label_X & has_X, ~label_X & has_X)
  ]
  tenth_X = np.array([text.tenth for text in texts])
  kind_X = np.array([text.kind for text in texts])
  return Score(
    balanced_accuracy=_balanced(*ends),
    auroc=_auroc(p_X[has_X], label_X[has_X]),
    sensitivity=ends[0],
    specificity=ends[1],
    by_tenth=tuple(
      _share(right_X[tenth_X == tenth]) for tenth in range(examples.TENTHS)
    ),
    by_class={
      kind: _share(right_X[kind_X == kind]) for kind in examples.NEGATIVES
    },
    consistency=_consistency(p_XO),
    answered=float(has_X.mean()),
    variance=sum(
      _variance(right_X[own].mean(), own.sum()) / 4
      for own in (label_X & has_X, ~label_X & has_X)
    ),
  )


def right(label_X: np.ndarray, p_XO: np.ndarray) -> np.ndarray:
  """How far each text is judged as it is, averaged over orders; nan for none.

  A probability of a half is half right.
  """
  says_XO = np.where(p_XO == _CHANCE, 0.5, p_XO > _CHANCE)
  right_XO = np.where(label_X[:, None], says_XO, 1 - says_XO)
  return averaged(np.where(np.isnan(p_XO), np.nan, right_XO))


def averaged(of_XO: np.ndarray) -> np.ndarray:
  """The mean over orders with an answer, [X]; nan if there is none."""
  return figures.divided(np.nansum(of_XO, 1), (~np.isnan(of_XO)).sum(1))


def _share(right_X) -> float | None:
  right_X = right_X[~np.isnan(right_X)]
  return float(right_X.mean()) if len(right_X) else None


def _balanced(one, other) -> tuple[float, float, float]:
  """The mean of two independent shares, with its interval.

  By the method of variance estimates recovery (Zou and Donner, Statistics in
  Medicine 27, 2008) from their Wilson intervals.
  """
  value = (one[0] + other[0]) / 2
  low, high = (
    float(np.hypot(one[0] - one[end], other[0] - other[end]) / 2)
    for end in (1, 2)
  )
  return value, value - low, value + high


def _auroc(p_X, label_X) -> tuple[float, float, float]:
  above = p_X[label_X][:, None] - p_X[~label_X]
  value = float(((above > 0) + (above == 0) / 2).mean())
  return value, *intervals.auc_interval(p_X, label_X)


def _variance(share: float, count: int) -> float:
  """The variance of a share, never 0 (Agresti and Coull 1998)."""
  moved = (share * count + 2) / (count + 4)
  return float(moved * (1 - moved) / (count + 4))


def _consistency(p_XO) -> float | None:
  """See DEFINITIONS: over all pairs of orders."""
  says_XO = p_XO > _CHANCE
  agree, pairs = 0, 0
  for one in range(p_XO.shape[1]):
    for other in range(one):
      both_X = ~np.isnan(p_XO[:, one]) & ~np.isnan(p_XO[:, other])
      agree += (says_XO[:, one] == says_XO[:, other])[both_X].sum()
      pairs += both_X.sum()
  return float(agree / pairs) if pairs else None


def has_token(texts: Sequence[Text], tokens: Sequence[int]) -> np.ndarray:
  """The baseline's judgement [X, 1]: 1 for texts with one of some tokens."""
  wanted = set(tokens)
  return np.array([[float(bool(wanted & set(t.tokens)))] for t in texts])


def shrunk(scores: Sequence[Score]) -> np.ndarray:
  """Balanced accuracies moved towards their mean (empirical Bayes).

  Each latent's own is taken as normal about a true one, those as normal about
  their mean; the variance of the true ones is that of the latents less the mean
  variance of a latent, or 0 (Morris, JASA 78, 1983).
  """
  values = np.array([one.balanced_accuracy[0] for one in scores])
  own = np.array([one.variance for one in scores])
  if len(values) < 2:
    return values
  between = max(0.0, values.var(ddof=1) - own.mean())
  mean = values.mean()
  return mean + between / (between + own) * (values - mean)


_MEAN = figures.Statistic(
  'mean', 'mean over latents', figures.ratio('value', 'latents')
)


def mean(values: Mapping[int, float | None]) -> dict[str, Any]:
  """The mean over latents by latent, with its interval over latents."""
  return _plain(figures.figure(_MEAN, _sample(values)))


def difference(
  one: Mapping[int, float], other: Mapping[int, float], paired: bool
) -> dict[str, Any] | None:
  """The mean of one less that of another; None if they have no latents.

  Args:
    one: values by latent.
    other: values by latent.
    paired: whether latents of one number are the same.
  """
  if not one or not other or (paired and not one.keys() & other.keys()):
    return None
  return _plain(figures.difference(_MEAN, _sample(one), _sample(other), paired))


def _sample(values) -> figures.Sample:
  values = {unit: v for unit, v in values.items() if v is not None}
  units = np.array(list(values), np.int64)
  numbers = np.array(list(values.values()), np.float64)
  sums = {'value': numbers, 'latents': np.ones(len(units))}
  return figures.Sample(units, np.zeros(len(units), np.int64), sums)


_POOLED = figures.Statistic(
  'balanced accuracy',
  'of all texts together',
  lambda sums: (
    (
      figures.divided(sums['right_active'], sums['active'])
      + figures.divided(sums['right_inactive'], sums['inactive'])
    )
    / 2
  ),
)


def by_document(
  judged: Sequence[tuple[Sequence[Text], np.ndarray]],
) -> dict[str, Any]:
  """Balanced accuracy of all latents' texts, with its interval over documents.

  Latents share documents, whose texts may all be hard: this is what other
  documents would have given, where `mean` is what other latents would.

  Args:
    judged: texts and p_XO of each latent, see `score`.
  """
  terms = {
    'active': [],
    'right_active': [],
    'inactive': [],
    'right_inactive': [],
  }
  documents = []
  for texts, p_XO in judged:
    label_X = np.array([text.kind == examples.TENTH for text in texts])
    right_X = right(label_X, p_XO)
    has_X = ~np.isnan(right_X)
    documents += [text.document for text in texts]
    for name, own_X in (('active', label_X), ('inactive', ~label_X)):
      terms[name].append(has_X & own_X)
      terms[f'right_{name}'].append(np.where(has_X & own_X, right_X, 0))
  if not documents:
    return mean({})
  sums = {name: np.concatenate(of) for name, of in terms.items()}
  sample = figures.Sample(
    np.array(documents), np.zeros(len(documents), np.int64), sums
  )
  return _plain(figures.figure(_POOLED, sample))


def _plain(figure: figures.Figure) -> dict[str, Any]:
  """Value, interval and number of units, as JSON has them."""
  out = dataclasses.asdict(figure)
  del out['least_difference']
  return out
