"""Fills the feature table from the scan, its codes and the decoder."""

from collections.abc import Iterable, Mapping
from typing import Any

from absl import logging
import jax
import numpy as np

from sae_jax import errors
from sae_jax.checkpoint import Trained
from sae_jax.features import Plan, TableWriter
from sae_jax.feed.rows import Rows
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
  store: Rows,
  result: ScanResult,
  url: str,
  scratch: str,
  seed: int,
  probe_ce_NT: jax.Array | None = None,
  effects: Mapping[str, np.ndarray] | None = None,
) -> TableWriter:
  """Writes this process's share of the latents; all processes call it.

  Args:
    config: sizes of the table.
    trained: the autoencoder, on its mesh.
    subject: the model, for the votes.
    store: the text of the rows.
    result: of the scan.
    url: folder of the table.
    scratch: a local folder of this process, see `second_pass`.
    seed: of the examples by decile.
    probe_ce_NT: training losses of the latents' probes, see
      `task_scores.Scores`; None for no such column.
    effects: the group of columns of that name, of all latents; None for none.

  Returns:
    The writer, which is to be sealed when all processes have returned.

  Raises:
    UserError: if no process has all latents of a shard of the table, or see
      `second_pass` and `TableWriter`.
  """
  n_latents = trained.config.n_latents
  written = trained.config.target_site or store.site
  directions = _directions(config, trained, subject, written)
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
  by_latent = directions
  if probe_ce_NT is not None:
    by_latent = directions | {'probe_train_ce': probe_ce_NT}
    sizes['tasks'] = probe_ce_NT.shape[1]
    groups.append('probes')
  if effects:
    sizes['V effect'] = effects['effect_up_ids'].shape[1]
    groups.append('effects')
  writer = TableWriter(
    url, Plan(n_latents, sizes, tuple(edges.tolist()), tuple(groups))
  )
  blocks = _own_blocks(
    writer.blocks(), result.held_latents, jax.process_index()
  )
  waiting = {}

  def example_rows(first, stop):
    columns = result.columns(first, stop)
    rows = {kind: columns[f'{kind}_rows'] for kind in kinds}
    if 'near' in kinds:
      rows['near_values'] = columns['near_values']
    waiting[first] = (
      _statistics(columns, result, low, high)
      | {'latent_ids': np.arange(first, stop)}
      | {
        name: row_blocks.local(array, first, stop)
        for name, array in by_latent.items()
      }
      | {name: of[first:stop] for name, of in (effects or {}).items()}
    )
    return rows

  codes = codes_lib.open_codes(result.codes)
  for first, columns in second_pass(
    config, codes, store, blocks, example_rows, seed, scratch
  ):
    writer.write(first, waiting.pop(first) | columns)
  return writer


def _own_blocks(
  blocks: Iterable[tuple[int, int]],
  held: Mapping[int, list[tuple[int, int]]],
  process: int,
) -> list[tuple[int, int]]:
  """The shards of the table that are a process's to write.

  Those who hold the same latents take turns.

  Args:
    blocks: first latent and one past the last of each shard.
    held: latents of each process, see `row_blocks.held`.
    process: its number.

  Raises:
    UserError: if no process has all latents of a shard.
  """
  own = []
  for number, (first, stop) in enumerate(blocks):
    able = [
      holder
      for holder, parts in held.items()
      if stop - first
      == sum(max(0, min(stop, end) - max(first, at)) for at, end in parts)
    ]
    if not able:
      raise errors.UserError(
        f'latents {first} to {stop - 1} are a shard of the feature table, and '
        f'none of {len(held)} processes has them all: use fewer processes'
      )
    if able[number % len(able)] == process:
      own.append((first, stop))
  return own


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
