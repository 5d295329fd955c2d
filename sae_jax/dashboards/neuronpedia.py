"""The rows of Neuronpedia's tables that a latent of a feature table has.

A row has the names of the columns of that table in Neuronpedia's database. All
rows of a file have the same names, as the import takes those of the first.
"""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from sae_jax import errors
from sae_jax.explaining import interchange

# Of a latent's activations, each a fifth of the way to the largest, or as near
# to it as an edge of the histogram is.
_INTERVALS = 5
# Their mark of the highest activations, which are of no interval.
_TOP = -1
_COLUMNS = (
  'latent_ids', 'density', 'max', 'hist_counts', 'vote_up_ids',
  'vote_up_logits', 'vote_down_ids', 'vote_down_logits', 'neighbour_ids',
  'neighbour_cosines',
)  # fmt: skip
_EXAMPLES = ('tokens', 'acts', 'peak')
_MODEL = re.compile(r'[A-Za-z0-9][A-Za-z0-9_.-]{0,127}')
_SOURCE = re.compile(r'(?:\d+|e)-([A-Za-z0-9_.-]+?)(?:__[A-Za-z0-9_.-]+)?')


@dataclasses.dataclass(frozen=True)
class Source:
  """What a dashboard is of, as Neuronpedia calls it.

  Attributes:
    model: id of the subject.
    id: layer and set, such as 5-res.
    created: the time of the rows, in ISO 8601.

  Raises:
    UserError: if an id is not of Neuronpedia's form.
  """

  model: str
  id: str
  created: str

  def __post_init__(self):
    if not _MODEL.fullmatch(self.model):
      raise errors.UserError(
        f'{self.model!r} is no id of a model in Neuronpedia, of letters, '
        'digits, - . and _: give --neuronpedia_model, such as gpt2-small'
      )
    if not _SOURCE.fullmatch(self.id):
      raise errors.UserError(
        f'{self.id!r} is no id of a source in Neuronpedia, LAYER-SET: give '
        '--neuronpedia_source, such as 5-res'
      )

  @property
  def set(self) -> str:
    """The name of its set."""
    return _SOURCE.fullmatch(self.id)[1]


def columns(kinds: Sequence[str]) -> list[str]:
  """The columns of the feature table that rows are made of.

  Args:
    kinds: of examples, from `kinds`.
  """
  return [*_COLUMNS, *(f'{kind}_{n}' for kind in kinds for n in _EXAMPLES)]


def kinds(names: Sequence[str]) -> tuple[str, str]:
  """The examples of a table that are shown: the highest, and others.

  Args:
    names: its columns.
  """
  return 'top', 'decile' if 'decile_peak' in names else 'random'


def latents(
  block: Mapping[str, np.ndarray],
  edges: np.ndarray,
  source: Source,
  words: Sequence[str],
) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
  """The row of each latent, and those of its activations.

  Args:
    block: `columns` of some latents.
    edges: of the histograms, [H + 1].
    source: what they are of.
    words: the text of each token.
  """
  shown = kinds(list(block))
  intervals = _intervals(block, edges)
  examples = {
    kind: [_flat(block[f'{kind}_{name}'], name) for name in _EXAMPLES]
    for kind in shown
  }
  for place, latent in enumerate(block['latent_ids'].tolist()):
    own = {name: block[name][place] for name in _COLUMNS}
    about = {
      'modelId': source.model,
      'layer': source.id,
      'index': str(latent),
      'creatorId': interchange.NEURONPEDIA_CREATOR,
      'createdAt': source.created,
    }
    activations = []
    for kind in shown:
      tokens_MW, acts_MW, peak_M = (of[place] for of in examples[kind])
      for example in np.flatnonzero(peak_M >= 0).tolist():
        peak = int(peak_M[example])
        activations.append(
          about
          | {'id': f'{source.model}_{source.id}_{latent}_{len(activations)}'}
          | _window(tokens_MW[example], acts_MW[example], peak, words)
          | intervals.of(place, kind == 'top', float(acts_MW[example, peak]))
        )
    yield about | _feature(latent, own, edges, source, words), activations


def _flat(of_N: np.ndarray, name: str) -> np.ndarray:
  """Examples by latent and number, those of all deciles in order."""
  rest = of_N.shape[-1:] if name != 'peak' else ()
  return of_N.reshape(len(of_N), -1, *rest)


def _feature(
  latent: int,
  own: Mapping[str, np.ndarray],
  edges: np.ndarray,
  source: Source,
  words: Sequence[str],
) -> dict[str, Any]:
  """What the row of a latent has beside its name."""
  votes = {}
  for theirs, way in (('pos', 'up'), ('neg', 'down')):
    is_vote = own[f'vote_{way}_ids'] >= 0
    ids = own[f'vote_{way}_ids'][is_vote].tolist()
    votes[f'{theirs}_str'] = [words[token] for token in ids]
    votes[f'{theirs}_values'] = list(
      map(_number, own[f'vote_{way}_logits'][is_vote].tolist())
    )
  counts_H = own['hist_counts']
  used = np.flatnonzero(counts_H)
  bars = slice(used[0], used[-1] + 1) if len(used) else slice(0)
  middles_H = (edges[:-1].astype(np.float64) + edges[1:]) / 2
  is_near = own['neighbour_ids'] >= 0
  near = own['neighbour_ids'][is_near].tolist()
  # Their page takes the first for the latent itself.
  cosines = [1.0, *own['neighbour_cosines'][is_near].tolist()] if near else []
  return {
    'sourceSetName': source.set,
    'maxActApprox': _number(float(own['max'])),
    'hasVector': False,
    'topkCosSimIndices': [latent, *near] if near else [],
    'topkCosSimValues': list(map(_number, cosines)),
    **votes,
    'frac_nonzero': _number(float(own['density'])),
    'freq_hist_data_bar_heights': counts_H[bars].tolist(),
    'freq_hist_data_bar_values': list(map(_number, middles_H[bars].tolist())),
  }


def _window(
  tokens_W: np.ndarray, acts_W: np.ndarray, peak: int, words: Sequence[str]
) -> dict[str, Any]:
  """The text of an example, without what is outside its window."""
  (inside,) = np.nonzero(tokens_W >= 0)
  acts = acts_W[inside]
  highest = int(acts.argmax())
  return {
    'tokens': [words[token] for token in tokens_W[inside].tolist()],
    'values': [_number(act) for act in acts.tolist()],
    'maxValue': _number(float(acts[highest])),
    'maxValueTokenIndex': highest,
    'minValue': _number(float(acts.min())),
    'qualifyingTokenIndex': int(np.searchsorted(inside, peak)),
  }


@dataclasses.dataclass(frozen=True)
class _Intervals:
  """The intervals of the activations of some latents.

  Attributes:
    cut_NI: the activations that divide them, one fewer than there are.
    max_N: the largest activations.
    share_NI: the share of all tokens in each.
  """

  cut_NI: np.ndarray
  max_N: np.ndarray
  share_NI: np.ndarray

  def of(self, place: int, is_top: bool, act: float) -> dict[str, float]:
    """The interval of an activation of a latent."""
    most = float(self.max_N[place])
    if is_top:
      return _interval(_TOP, most, _TOP)
    cuts = self.cut_NI[place].tolist()
    number = int(np.searchsorted(self.cut_NI[place], act, 'right'))
    share = float(self.share_NI[place, number])
    return _interval(
      ([0.0, *cuts])[number], min(most, ([*cuts, most])[number]), share
    )


def _interval(low: float, high: float, share: float) -> dict[str, float]:
  return {
    'binMin': _number(low),
    'binMax': _number(high),
    'binContains': _number(share),
  }


def _intervals(
  block: Mapping[str, np.ndarray], edges: np.ndarray
) -> _Intervals:
  """Intervals whose shares the histogram knows exactly."""
  max_N = np.nan_to_num(block['max'].astype(np.float64))
  parts_I = np.arange(1, _INTERVALS) / _INTERVALS
  wanted_NI = max_N[:, None] * parts_I
  edges = edges.astype(np.float64)
  # The first and the last bin also hold what is beyond them.
  last = max(1, len(edges) - 2)
  above_NI = np.searchsorted(edges, wanted_NI).clip(1, len(edges) - 1)
  is_below_NI = wanted_NI - edges[above_NI - 1] < edges[above_NI] - wanted_NI
  place_NI = (above_NI - is_below_NI).clip(1, last)
  counts_NH = block['hist_counts']
  before_NH = np.pad(np.cumsum(counts_NH, 1), ((0, 0), (1, 0)))
  total_N1 = before_NH[:, -1:]
  at_NI = np.take_along_axis(before_NH, place_NI, 1)
  inside_NI = np.diff(at_NI, axis=1, prepend=0, append=total_N1)
  density_N1 = np.nan_to_num(block['density'].astype(np.float64))[:, None]
  share_NI = density_N1 * inside_NI / np.maximum(total_N1, 1)
  return _Intervals(edges[place_NI], max_N, share_NI)


def _number(value: float) -> float:
  """A number of few digits, as a float32 has no more; 0 for none."""
  if not value or not math.isfinite(value):
    return 0
  return float(f'{value:.6g}')
