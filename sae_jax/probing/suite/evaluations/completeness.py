"""Whether a concept has a latent of its own, by how frequent it is."""

import dataclasses
import functools
import zlib

import jax
import numpy as np

from sae_jax import progress
from sae_jax.probing.suite import arrays, wordnet
from sae_jax.probing.suite import scored as scored_lib
from sae_jax.probing.suite.context import CannotMeasure, Context
from sae_jax.probing.suite.figures import ratio, Sample, SHARE, Statistic
from sae_jax.probing.suite.outcome import Outcome
from sae_jax.subject.formats import tokenizer as tokenizer_lib

TITLE = 'Completeness'
ABOUT = """Concepts are words of WordNet: kinds of animals, foods and chemical
elements, and cities. Of each the latent is found, on training documents, that
fires on it and not on the other concepts. On test documents the concept has a
latent of its own if that one fires on at least half of its occurrences, and at
least half of its firing on concepts, each concept counting the same, is on this
one.

Rare concepts have none: a dictionary gives its latents to what is frequent. The
curve says from which frequency on a concept has one. In Templeton et al.,
"Scaling Monosemanticity" (2024), half of the concepts had one at a frequency of
somewhat less than 1 / (latents that fire)."""
UNIT = 'concepts'
OPTIONS = ('wordnet',)


@dataclasses.dataclass(frozen=True)
class Size:
  """What is measured.

  Attributes:
    concepts: most of a draw, the most frequent first.
    occurrences: most of each concept, in training and in test documents each.
  """

  concepts: int
  occurrences: int
  batch_rows: int = 512


SIZES = {'quick': Size(40, 16), 'all': Size(1000, 64)}
# Fewer occurrences of a concept say nothing.
_LEAST = 2
# Edges of the curve, half a decade apart.
_EDGES = 10 ** np.arange(-7.0, -1.9, 0.5)

STATISTICS = {
  'own': Statistic(
    'concepts with a latent',
    'Share of the concepts that have a latent of their own.',
    ratio('own', 'concepts'),
    better='high',
    ends=SHARE,
  ),
  'own_by_frequency': Statistic(
    'concepts with a latent',
    'The same of concepts of like frequency: occurrences for each token of '
    'text.',
    ratio('own_points', 'concepts_points'),
    better='high',
    points='frequency',
    ends=SHARE,
  ),
}


def measure(context: Context) -> Outcome:
  size = SIZES[context.size]
  if not context.wordnet:
    raise CannotMeasure(
      'there are no concepts: give --wordnet=/usr/share/wordnet, of the Debian '
      'package wordnet-base'
    )
  concepts = _drawn(context, _occurrences(context), size)
  places = np.concatenate([np.concatenate(of.rows) for of in concepts])
  rows, inverse = np.unique(places, return_inverse=True)
  raw_BD = _read(context, rows)
  ends = np.cumsum([len(part) for of in concepts for part in of.rows])[:-1]
  parts = np.split(inverse, ends)
  frequency_U = np.array([of.frequency for of in concepts])
  bin_U = np.clip(np.digitize(frequency_U, _EDGES) - 1, 0, len(_EDGES) - 2)
  is_bin_UP = bin_U[:, None] == np.arange(len(_EDGES) - 1)
  unit_U = np.array([zlib.crc32(of.word.encode()) for of in concepts])
  draw_U = np.arange(len(concepts)) % context.draws
  samples = {}
  for name, scored in context.scored.items():
    codes = _codes(context, scored, raw_BD, size, name)
    own_U = _own(codes, parts)
    samples[name] = Sample(
      unit_U,
      draw_U,
      {
        'own': own_U,
        'concepts': np.ones(len(own_U)),
        'own_points': own_U[:, None] * is_bin_UP,
        'concepts_points': is_bin_UP.astype(np.float64),
      },
    )
  counts = dict.fromkeys(wordnet.ROOTS, 0)
  for of in concepts:
    counts[of.category] += 1
  table = [['category', 'concepts'], *map(list, counts.items())]
  return Outcome(
    samples,
    {'frequency': np.sqrt(_EDGES[:-1] * _EDGES[1:])},
    remarks=_remarks(context, samples[context.name]),
    tables={'Concepts': table},
  )


@dataclasses.dataclass(frozen=True)
class Concept:
  """A word and where it is.

  Attributes:
    word: as WordNet spells it.
    category: one of `wordnet.ROOTS`.
    frequency: occurrences for each token of the training text.
    rows: rows of the store of its last token, of training and test documents.
  """

  word: str
  category: str
  frequency: float
  rows: tuple[np.ndarray, np.ndarray]


def _occurrences(context: Context) -> list[Concept]:
  """All concepts that occur often enough on either side."""
  store, tokenizer = context.store, context.subject.tokenizer
  tokens, documents = store.tokens(), store.documents()
  order = np.argsort(tokens, kind='stable')
  in_order = tokens[order]
  row_of = np.full(len(tokens), -1)
  row_of[store.stream_index()] = np.arange(store.manifest.n_rows)
  goes_on_V = np.array(
    [
      isinstance(text, str) and text[:1].isalpha()
      for text in tokenizer_lib.token_texts(tokenizer)
    ]
  )
  n_train = int((row_of[row_of >= 0] < store.n_train).sum())
  test = store.test_rows
  out = []
  for category, words in wordnet.concepts(context.wordnet).items():
    for word in words:
      ids = tokenizer_lib.encode(tokenizer, f' {word}')
      low, high = np.searchsorted(in_order, (ids[-1], ids[-1] + 1))
      at = order[low:high]
      at = at[at >= len(ids) - 1]
      for back, token in enumerate(reversed(ids)):
        at = at[tokens[at - back] == token]
      at = at[documents[at] == documents[at - len(ids) + 1]]
      # Of a longer word it is only the beginning.
      after = np.minimum(at + 1, len(tokens) - 1)
      at = at[~goes_on_V[tokens[after]] | (documents[after] != documents[at])]
      rows = np.sort(row_of[at])
      rows = rows[rows >= 0]
      sides = (
        rows[rows < store.n_train],
        rows[(rows >= test.start) & (rows < test.stop)],
      )
      if min(map(len, sides)) >= _LEAST:
        frequency = len(sides[0]) / max(n_train, 1)
        out.append(Concept(word, category, frequency, sides))
  return out


def _drawn(context: Context, concepts: list[Concept], size: Size):
  """The most frequent concepts, with some of their occurrences."""
  if len(concepts) < context.draws:
    raise CannotMeasure(
      f'{len(concepts)} concepts occur {_LEAST} times in training and in test '
      f'documents, {context.draws} are the fewest: harvest more text'
    )
  concepts = sorted(concepts, key=lambda of: (-of.frequency, of.word))
  concepts = concepts[: size.concepts * context.draws]

  def some(of: Concept) -> Concept:
    rng = context.rng('concept', of.word)
    rows = (
      np.sort(rng.permutation(side)[: size.occurrences]) for side in of.rows
    )
    return dataclasses.replace(of, rows=tuple(rows))

  return list(map(some, concepts))


def _read(context: Context, rows: np.ndarray) -> np.ndarray:
  """Rows of the store, in order; neighbours are read together."""
  starts = np.flatnonzero(np.append(True, np.diff(rows) > 1))
  ends = np.append(starts[1:], len(rows))
  parts = []
  with progress.bar(total=len(rows), unit='tok', desc='concepts') as bar:
    for start, end in zip(starts, ends):
      first = int(rows[start])
      parts.append(context.store.finite_rows(first, first + int(end - start)))
      bar.update(int(end - start))
  return np.concatenate(parts)


def _codes(context, scored, raw_BD, size, name) -> list[np.ndarray]:
  """The active latents of each row."""
  shape, sae = scored
  out = []
  with progress.bar(
    total=len(raw_BD), unit='tok', desc=f'completeness: {name}'
  ) as bar:
    for start, stop in arrays.batches(
      size.batch_rows, len(raw_BD), context.mesh
    ):
      part = arrays.on_data(raw_BD[start:stop], size.batch_rows, context.mesh)
      vals_BK, idx_BK = (
        arrays.to_host(of, stop - start) for of in _active(shape, sae, part)
      )
      out += [idx_K[vals_K > 0] for vals_K, idx_K in zip(vals_BK, idx_BK)]
      bar.update(stop - start)
  return out


@functools.partial(jax.jit, static_argnums=0)
def _active(shape, sae, raw_BD):
  return arrays.whole(scored_lib.codes(shape, sae, raw_BD), shape.mesh)


def _own(codes: list[np.ndarray], parts: list[np.ndarray]) -> np.ndarray:
  """Whether each concept has a latent of its own.

  Args:
    codes: active latents of rows.
    parts: rows of each concept, of training and test documents in turn.
  """
  sides = [[_shares(codes, rows) for rows in parts[side::2]] for side in (0, 1)]
  # Of each latent the sum of its shares over the concepts.
  totals = []
  for shares in sides:
    total = {}
    for of in shares:
      for latent, share in of.items():
        total[latent] = total.get(latent, 0) + share
    totals.append(total)
  own = []
  for training, test in zip(*sides):
    # Recall and precision at once: F1.
    best = max(
      training,
      key=lambda latent: (
        2 * training[latent] / (1 + totals[0][latent]),
        -latent,
      ),
      default=None,
    )
    recall = test.get(best, 0)
    precision = recall / totals[1][best] if recall else 0
    own.append(recall >= 0.5 and precision >= 0.5)
  return np.array(own, np.float64)


def _shares(codes, rows) -> dict[int, float]:
  """On which share of a concept's occurrences each latent fires."""
  latents, counts = np.unique(
    np.concatenate([codes[row] for row in rows]), return_counts=True
  )
  return dict(zip(latents.tolist(), (counts / len(rows)).tolist()))


def _remarks(context: Context, sample: Sample) -> tuple[str, ...]:
  """From which frequency on half of the concepts have a latent."""
  total_P = sample.sums['concepts_points'].sum(0)
  own_P = sample.sums['own_points'].sum(0)
  there = total_P > 0
  share_P = own_P[there] / total_P[there]
  middle_P = np.sqrt(_EDGES[:-1] * _EDGES[1:])[there]
  above = np.flatnonzero(share_P >= 0.5)
  live = int((context.counts_N > 0).sum())
  if not len(above):
    return (
      f'Half of the concepts have a latent at no frequency; {live:,} fire.',
    )
  frequency = middle_P[above[0]]
  return (
    f'Half of the concepts have a latent from a frequency of {frequency:.2g} '
    f'on, {frequency * live:.2g} / (the {live:,} latents that fire).',
  )
