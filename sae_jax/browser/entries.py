"""Latents of the feature table as JSON: a block of them at a time.

No more than the libraries of the table is imported, so that processes that make
blocks start at once.
"""

import collections
from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import json
import math
from typing import Any

from etils import epath
import numpy as np

from sae_jax import features as features_lib
from sae_jax.features.columns import MOMENTS
from sae_jax.storage import files, finished

_WRITERS = 8  # threads: a bucket's latency, not its bandwidth, is the bound
_KINDS = ('top', 'random')
# The columns that the page shows.
_NAMES = (
  'latent_ids',
  'count',
  *MOMENTS,
  'hist_counts',
  *(
    f'{kind}_{name}'
    for kind in _KINDS
    for name in ('tokens', 'acts', 'peak', 'document')
  ),
  'vote_up_ids',
  'vote_up_logits',
  'vote_down_ids',
  'vote_down_logits',
  'neighbour_ids',
  'neighbour_cosines',
)
# And those that not every table has.
_EFFECTS = tuple(
  f'effect_{name}'
  for name in (
    'kl',
    'ce',
    'up_ids',
    'up_changes',
    'down_ids',
    'down_changes',
  )
)


@dataclasses.dataclass(frozen=True)
class Job:
  """What the blocks of a page have in common.

  Attributes:
    features_url: the feature table.
    vocabulary_size: number of tokens.
    out_url: the page's folder.
    size: latents of a data file.
    digits: significant digits of activations.
    label_tokens: see `BrowseConfig`.
    preview_tokens: see `BrowseConfig`.
  """

  features_url: str
  vocabulary_size: int
  out_url: str
  size: int
  digits: int
  label_tokens: int
  preview_tokens: int


@dataclasses.dataclass(frozen=True)
class Block:
  """What is known of some latents when their data files are written.

  Attributes:
    columns: column -> entries of the latents in JSON, without brackets.
    previews: `tokens` and `percents`, likewise.
    digests: name of each file that was written -> its digest.
    n_latents: how many latents they are.
    n_alive: how many of them fire.
    hist_H: their positive activations in each bin.
  """

  columns: dict[str, str]
  previews: dict[str, str]
  digests: dict[str, str]
  n_latents: int
  n_alive: int
  hist_H: np.ndarray


def maker(job: Job) -> Callable[[tuple[int, int]], Block]:
  """The function that writes the files of latents start to stop."""
  features = features_lib.open(job.features_url, job.vocabulary_size)

  names = _NAMES + tuple(n for n in _EFFECTS if n in features.columns)

  def make(span):
    start, stop = span
    return _block(job, start, features.latents(start, stop, names))

  return make


def dumps(values: Any) -> str:
  """Compact ASCII JSON."""
  return json.dumps(values, separators=(',', ':'), allow_nan=False)


def exact(values: np.ndarray) -> list:
  """float32 as the shortest decimals that read back as the same float32."""
  decimals = np.asarray(values, np.float32).astype(str).astype(np.float64)
  return _finite(decimals)


def _finite(values: np.ndarray) -> list:
  """Numbers as lists, null where they are not finite."""
  if np.isfinite(values).all():
    return values.tolist()
  return np.where(np.isfinite(values), values, None).tolist()


def _block(job: Job, start: int, table: dict[str, np.ndarray]) -> Block:
  """Writes the data files of latents from `start` on."""
  entries = _entries(table, job.digits)
  folder = epath.Path(job.out_url)

  def write(first):
    name = f'data/features/{(start + first) // job.size:05d}.json'
    data = dumps(entries[first : first + job.size]).encode()
    files.write_bytes(folder / name, data)
    return name, finished.sha256(data)

  with futures.ThreadPoolExecutor(_WRITERS) as pool:
    digests = dict(pool.map(write, range(0, len(entries), job.size)))
  return Block(
    _texts(_columns(table, job.label_tokens)),
    _texts(_previews(table, job.preview_tokens)),
    digests,
    len(entries),
    int((table['count'] > 0).sum()),
    table['hist_counts'].sum(0),
  )


def _texts(lists: dict[str, list]) -> dict[str, str]:
  return {name: dumps(values)[1:-1] for name, values in lists.items()}


def _columns(table, limit) -> dict[str, list]:
  """The columns of list and search: name -> one entry per latent."""
  top = [
    [token for token, _ in collections.Counter(row).most_common(limit)]
    for row in _present(_at_peak(table['top_tokens'], table['top_peak']))
  ]
  return {
    'latent': table['latent_ids'].tolist(),
    'count': table['count'].tolist(),
    **{name: exact(table[name]) for name in MOMENTS},
    'top': top,
    'votes': [row[:limit] for row in _present(table['vote_up_ids'])],
  }


def _at_peak(values_NMW, peak_NM):
  """The entry at each example's peak, -1 where there is no example."""
  at_NM1 = np.take_along_axis(
    values_NMW, np.maximum(peak_NM, 0)[..., None], axis=2
  )
  return np.where(peak_NM >= 0, at_NM1[..., 0], -1)


def _present(ids_NM):
  """Rows as lists, their -1 left out."""
  return [[i for i in row if i >= 0] for row in ids_NM.tolist()]


def _previews(table, width) -> dict[str, list]:
  """Tokens around the best example's peak; activations in % of the peak's."""
  tokens_NW, acts_NW, peak_N1 = (
    table[f'top_{name}'][:, :1] for name in ('tokens', 'acts', 'peak')
  )
  if not tokens_NW.shape[1]:
    none = [[] for _ in peak_N1]
    return {'tokens': none, 'percents': none}
  whole_N1 = _at_peak(acts_NW, peak_N1).astype(np.float64)
  tokens_NW, acts_NW = tokens_NW[:, 0], acts_NW[:, 0].astype(np.float64)
  place_W = np.arange(tokens_NW.shape[1])
  stop_N1 = np.minimum(peak_N1 + 1 + width // 4, len(place_W))
  shown_NW = (place_W < stop_N1) & (place_W >= stop_N1 - width)
  shown_NW &= (peak_N1 >= 0) & (tokens_NW >= 0)
  # In float64, as float32 has no hundred times its largest number.
  shares_NW = 100 * acts_NW / np.where(whole_N1 > 0, whole_N1, np.inf)
  percents_NW = np.clip(np.rint(shares_NW), 0, 100).astype(int)
  return {
    'tokens': _ragged(tokens_NW, shown_NW),
    'percents': _ragged(percents_NW, shown_NW),
  }


def _ragged(values_NW, kept_NW) -> list[list]:
  """The entries of each row that are kept."""
  flat = values_NW[kept_NW].tolist()
  ends = np.cumsum(kept_NW.sum(-1)).tolist()
  return [flat[start:stop] for start, stop in zip([0, *ends], ends)]


def _entries(table, digits) -> list[dict]:
  """Each latent's entry in a data file."""
  parts = {
    'latent': table['latent_ids'].tolist(),
    'histogram': table['hist_counts'].tolist(),
    **{kind: _examples(table, kind, digits) for kind in _KINDS},
    **{
      f'votes_{way}': _pairs(
        table, f'vote_{way}_ids', f'vote_{way}_logits', ('tokens', 'logits')
      )
      for way in ('up', 'down')
    },
    'neighbours': _pairs(
      table, 'neighbour_ids', 'neighbour_cosines', ('latents', 'cosines')
    ),
    'effect': _effects(table),
  }
  return [dict(zip(parts, entry)) for entry in zip(*parts.values())]


def _effects(table) -> list[dict | None]:
  """What ablating each latent does; None where that was not measured."""
  if 'effect_kl' not in table:
    return [None] * len(table['latent_ids'])
  up, down = (
    _pairs(
      table, f'effect_{way}_ids', f'effect_{way}_changes', ('tokens', 'changes')
    )
    for way in ('up', 'down')
  )
  figures = exact(table['effect_kl']), exact(table['effect_ce'])
  return [
    None if kl is None else {'kl': kl, 'ce': ce, 'up': up[i], 'down': down[i]}
    for i, (kl, ce) in enumerate(zip(*figures))
  ]


def _pairs(table, ids, values, names: Sequence[str]) -> list[dict]:
  """Ids and values of each latent, under two names; -1 left out."""
  present_NV = table[ids] >= 0
  lists = (
    _ragged(table[ids], present_NV),
    _ragged(np.array(exact(table[values]), object), present_NV),
  )
  return [dict(zip(names, pair)) for pair in zip(*lists)]


def _examples(table, kind, digits) -> list[list[dict]]:
  """Examples of each latent; `fired` are the places with an activation."""
  tokens_NMW, acts_NMW, peak_NM, document_NM = (
    table[f'{kind}_{name}'] for name in ('tokens', 'acts', 'peak', 'document')
  )
  present_NM = peak_NM >= 0
  # Of the examples that there are, E in all.
  tokens_EW, acts_EW = tokens_NMW[present_NM], acts_NMW[present_NM]
  kept_EW = tokens_EW >= 0
  # How many tokens there are before each place.
  before_EW = np.cumsum(kept_EW, axis=-1) - kept_EW
  peak_E1 = peak_NM[present_NM][:, None]
  fired_EW = kept_EW & (acts_EW != 0)
  acts = [
    [_rounded(value, digits) for value in row]
    for row in _ragged(acts_EW, fired_EW)
  ]
  flat = [
    {'tokens': t, 'fired': f, 'acts': a, 'peak': p, 'document': d}
    for t, f, a, p, d in zip(
      _ragged(tokens_EW, kept_EW),
      _ragged(before_EW, fired_EW),
      acts,
      np.take_along_axis(before_EW, peak_E1, axis=1)[:, 0].tolist(),
      document_NM[present_NM].tolist(),
    )
  ]
  ends = np.cumsum(present_NM.sum(-1)).tolist()
  return [flat[start:stop] for start, stop in zip([0, *ends], ends)]


def _rounded(value: float, digits: int) -> float | None:
  """A value with `digits` significant digits, null where not finite."""
  return float(f'{value:.{digits}g}') if math.isfinite(value) else None
