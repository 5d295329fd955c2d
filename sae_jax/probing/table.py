"""Fills the feature table from the scan, its codes and the decoder."""

from collections.abc import Iterable, Iterator
from typing import Any

from absl import logging
import jax
import numpy as np

from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax.checkpoint import Trained
from sae_jax.features import Plan, TableWriter
from sae_jax.probing import lens, neighbours, row_blocks
from sae_jax.probing.examples import FeatureConfig, second_pass
from sae_jax.probing.examples.deciles import TENTHS
from sae_jax.probing.scan import codes as codes_lib
from sae_jax.probing.scan.reducers.statistics import HISTOGRAM_EDGES
from sae_jax.probing.scan.result import ScanResult
from sae_jax.subject import capture, logit_lens, Subject


def fill(
  config: FeatureConfig,
  trained: Trained,
  subject: Subject,
  store: store_lib.Store,
  result: ScanResult,
  url: str,
  scratch: str,
  seed: int,
) -> TableWriter:
  """Writes the latents that are this process's; all processes call it.

  Args:
    config: sizes of the table.
    trained: the autoencoder, on its mesh.
    subject: the model, for the votes.
    store: the text of the rows.
    result: of the scan.
    url: folder of the table.
    scratch: a local folder of this process, see `second_pass`.
    seed: of the examples by decile.

  Returns:
    The writer, which is to be sealed when all processes have returned.

  Raises:
    UserError: if a shard of the table would be of two processes, or see
      `second_pass` and `TableWriter`.
  """
  n_latents = trained.config.n_latents
  directions = _directions(config, trained, subject, store.site)
  low, high = result.bins_in_use
  sizes = {
    'H': high - low,
    'W': config.window_before + 1 + config.window_after,
    'M top': config.top_examples,
    'M random': config.random_examples,
    'deciles': TENTHS,
    'M decile': config.decile_examples,
    'V up': directions['vote_up_ids'].shape[1],
    'V down': directions['vote_down_ids'].shape[1],
    'neighbours': directions['neighbour_ids'].shape[1],
    'tokens': config.firing_tokens,
    'partners': config.partners,
  }
  groups = ['ranks', 'deciles', 'tokens', 'partners']
  kinds = ['top', 'random']
  if result.has_near_misses:
    kinds.append('near')
    sizes['M near'] = config.near_examples
    groups.append('near')
  edges = HISTOGRAM_EDGES[low : high + 1]
  writer = TableWriter(
    url, Plan(n_latents, sizes, tuple(edges.tolist()), tuple(groups))
  )
  blocks = _own_blocks(writer.blocks(), result.own_latents)
  size = max((stop - first for first, stop in blocks), default=1)
  statistics = _by_block(result.blocks(size), blocks)
  own_directions = _by_block(
    (
      (first, first + len(next(iter(columns.values()))), columns)
      for first, columns in row_blocks.owned(directions)
    ),
    blocks,
  )
  waiting = {}

  def example_rows(first, stop):
    columns = next(statistics)
    rows = {kind: columns[f'{kind}_rows'] for kind in kinds}
    if 'near' in kinds:
      rows['near_values'] = columns['near_values']
    waiting[first] = (
      _statistics(columns, result, low, high)
      | {'latent_ids': np.arange(first, stop)}
      | next(own_directions)
    )
    return rows

  codes = codes_lib.open_codes(result.codes)
  for first, columns in second_pass(
    config, codes, store, blocks, example_rows, seed, scratch
  ):
    writer.write(first, waiting.pop(first) | columns)
  return writer


def _own_blocks(
  blocks: Iterable[tuple[int, int]], own: list[tuple[int, int]]
) -> list[tuple[int, int]]:
  """The shards of the table whose latents are this process's.

  Raises:
    UserError: if it has only a part of one.
  """
  inside = []
  for first, stop in blocks:
    n_own = sum(
      max(0, min(stop, end) - max(first, start)) for start, end in own
    )
    if 0 < n_own < stop - first:
      raise errors.UserError(
        f'latents {first} to {stop - 1} are a shard of the feature table, and '
        f'{jax.process_count()} processes share them: use fewer processes'
      )
    if n_own:
      inside.append((first, stop))
  return inside


def _by_block(
  parts: Iterator[tuple[int, int, dict[str, np.ndarray]]],
  blocks: list[tuple[int, int]],
) -> Iterator[dict[str, np.ndarray]]:
  """Columns of blocks, of parts of latents in the same order."""
  rest = None
  for first, stop in blocks:
    pieces, have = [], first
    while have < stop:
      start, end, columns = rest or next(parts)
      cut = min(end, stop) - start
      pieces.append({name: a[:cut] for name, a in columns.items()})
      rest = None
      if end > stop:
        rest = stop, end, {name: a[cut:] for name, a in columns.items()}
      have = min(end, stop)
    yield {
      name: np.concatenate([piece[name] for piece in pieces])
      for name in pieces[0]
    }


def _statistics(
  columns: dict[str, np.ndarray], result: ScanResult, low: int, high: int
) -> dict[str, np.ndarray]:
  """What the table has of the reducers' columns."""
  names = ('count', 'max', 'mean', 'std', 'skew', 'rank_mean', 'margin_mean')
  out = {name: columns[name] for name in names}
  out['density'] = columns['count'] / result.rows
  out['hist_counts'] = columns['hist_counts'][:, low:high]
  if result.has_near_misses:
    out['near_count'] = columns['near_count']
  return out


def _directions(
  config: FeatureConfig, trained: Trained, subject: Subject, site_name: str
) -> dict[str, Any]:
  """Votes and neighbours, which follow from the decoder alone."""
  site = capture.parse_site(site_name)
  if not logit_lens.has_logits(site):
    logging.info('latents at %s have no votes: it is not in the stream', site)
  w_dec_ND = trained.sae.w_dec_ND
  votes = lens.votes(subject, site, w_dec_ND, config.votes)
  nearest = neighbours.nearest(
    w_dec_ND, min(config.neighbours, len(w_dec_ND) - 1)
  )
  return {
    'vote_up_ids': votes.up_ids_NV,
    'vote_up_logits': votes.up_NV,
    'vote_down_ids': votes.down_ids_NV,
    'vote_down_logits': votes.down_NV,
    'neighbour_ids': nearest.ids_NC,
    'neighbour_cosines': nearest.cosines_NC,
  }
