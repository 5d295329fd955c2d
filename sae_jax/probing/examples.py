"""Builds the feature table: examples and statistics of every latent."""

import dataclasses

from absl import logging
import numpy as np

from sae_jax import config as config_lib
from sae_jax import store as store_lib
from sae_jax.checkpoint import Trained
from sae_jax.features import table as table_lib
from sae_jax.probing import codes as codes_lib
from sae_jax.probing import lens, reducers
from sae_jax.subject import capture, Subject

# Latents that are compared with those of examples, at a time.
_COMPARED = 2**25


# A table with so many of a thing for each latent is beyond what a page shows.
_MOST = 10_000


@dataclasses.dataclass(frozen=True)
class FeatureConfig(config_lib.Config):
  """The size of the feature table."""

  feature_rows: int = config_lib.option(
    1_000_000,
    "most rows of the store from which latents' examples and statistics are "
    'taken',
    least=1,
  )
  top_examples: int = config_lib.option(
    16,
    'number of examples of each latent with its highest activations, at most '
    'one per document',
    least=1,
    most=_MOST,
  )
  random_examples: int = config_lib.option(
    8,
    'number of examples of each latent drawn at random among its positive '
    'activations',
    least=1,
    most=_MOST,
  )
  window_before: int = config_lib.option(
    24,
    'number of tokens shown before the token of an example',
    least=0,
    most=_MOST,
  )
  window_after: int = config_lib.option(
    8,
    'number of tokens shown after the token of an example',
    least=0,
    most=_MOST,
  )
  votes: int = config_lib.option(
    10,
    'number of tokens listed whose logits each latent raises most, and as many'
    ' that it lowers most',
    least=1,
    most=_MOST,
  )
  neighbours: int = config_lib.option(
    5,
    'number of latents listed as nearest to each latent, by the cosine of '
    'decoder rows',
    least=1,
    most=_MOST,
  )


def build(
  config: FeatureConfig,
  trained: Trained,
  subject: Subject,
  store: store_lib.Store,
  batch_rows: int,
  seed: int,
) -> dict[str, np.ndarray]:
  """Gathers all latents' statistics, examples, votes and neighbours.

  The store is encoded once; examples and their activations come from these
  codes.

  Args:
    config: sizes of the table.
    trained: the autoencoder.
    subject: the model, for the votes.
    store: activations and their text.
    batch_rows: rows that are encoded at a time.
    seed: seed of the random examples.

  Returns:
    The arrays that `features.table.ARRAYS` declares.
  """
  n_latents = trained.config.n_latents
  stop = min(store.manifest.n_rows, config.feature_rows)
  codes = codes_lib.encode_rows(trained, store, 0, stop, batch_rows)
  document_R = store.documents()[store.stream_index()[:stop]]

  stats = reducers.LatentStats(n_latents)
  top = reducers.TopExamples(n_latents, config.top_examples)
  random = reducers.TopExamples(n_latents, config.random_examples)
  for start in range(0, stop, batch_rows):
    take = slice(start, min(stop, start + batch_rows))
    vals_BK, idx_BK = codes.vals_RK[take], codes.idx_RK[take]
    stats.update(vals_BK, idx_BK)
    token, _ = place = np.nonzero(vals_BK > 0)
    rows, latents = start + token, idx_BK[place]
    top.update(latents, vals_BK[place], rows, document_R[rows])
    chance = reducers.random_scores(rows, latents, seed)
    random.update(latents, chance, rows, rows)

  arrays = _statistics(stats) | _directions(
    config, trained, subject, store.site
  )
  for kind, rows_NM in (('top', top.row_NM), ('random', random.row_NM)):
    examples = windows(
      codes, store, rows_NM, config.window_before, config.window_after
    )
    arrays |= {f'{kind}_{name}': array for name, array in examples.items()}
  return table_lib.make(arrays)


def _statistics(stats: reducers.LatentStats) -> dict[str, np.ndarray]:
  """Counts, moments and the histogram over the bins that are in use."""
  mean_N, std_N, skew_N = stats.moments()
  used = np.flatnonzero(stats.hist_NH.sum(0))
  low, high = (used[0], used[-1] + 1) if len(used) else (0, 1)
  return {
    'latent_ids': np.arange(len(stats.count_N)),
    'count': stats.count_N,
    'density': stats.count_N / stats.tokens,
    'max': stats.max_N,
    'mean': mean_N,
    'std': std_N,
    'skew': skew_N,
    'hist_edges': reducers.HISTOGRAM_EDGES[low : high + 1],
    'hist_counts': stats.hist_NH[:, low:high],
  }


def _directions(
  config: FeatureConfig, trained: Trained, subject: Subject, site_name: str
) -> dict[str, np.ndarray]:
  """Votes and neighbours, which follow from the decoder alone."""
  site = capture.parse_site(site_name)
  if not lens.has_votes(site):
    logging.info('latents at %s have no votes: it is not in the stream', site)
  w_dec_ND = np.asarray(trained.sae.w_dec_ND)
  up_ids, up, down_ids, down = lens.votes(subject, site, w_dec_ND, config.votes)
  near_ids, cosines = lens.neighbours(
    w_dec_ND, min(config.neighbours, len(w_dec_ND) - 1)
  )
  return {
    'vote_up_ids': up_ids,
    'vote_up_logits': up,
    'vote_down_ids': down_ids,
    'vote_down_logits': down,
    'neighbour_ids': near_ids,
    'neighbour_cosines': cosines,
  }


def windows(
  codes: codes_lib.Codes,
  store: store_lib.Store,
  rows_NM: np.ndarray,
  before: int,
  after: int,
) -> dict[str, np.ndarray]:
  """The text around each latent's examples, with its activation per token.

  Args:
    codes: codes of consecutive rows, which include all examples.
    store: the text.
    rows_NM: row of each latent's examples, -1 for none.
    before: tokens shown before the token of the example.
    after: tokens shown after it. A window ends where its context does, and
      before the first row that is not encoded.

  Returns:
    tokens and acts [N, M, W], peak and document [N, M], as
    `features.table.ARRAYS` declares them.
  """
  place_R = store.stream_index()
  position, document = store.positions(), store.documents()
  start, stop = codes.start, codes.start + len(codes.vals_RK)
  code_of = np.full(len(position), -1, np.int64)
  code_of[place_R[start:stop]] = np.arange(stop - start)

  present_NM = rows_NM >= 0
  centre_NM = place_R[np.maximum(rows_NM, 0)]
  place_NMW = centre_NM[:, :, None] + np.arange(-before, after + 1)
  # Tokens of rows that were not encoded would look silent.
  begin = place_R[start - 1] + 1 if start else 0
  end = place_R[stop] if stop < len(place_R) else len(position)
  inside = (place_NMW >= begin) & (place_NMW < end)
  place_NMW = np.clip(place_NMW, 0, len(position) - 1)
  context_start = np.arange(len(position)) - position
  inside &= (
    context_start[place_NMW] == context_start[centre_NM][:, :, None]
  ) & present_NM[:, :, None]

  code_NMW = code_of[place_NMW]
  latent, example, token = np.nonzero(inside & (code_NMW >= 0))
  rows = code_NMW[latent, example, token]
  acts_NMW = np.zeros(place_NMW.shape, np.float32)
  # In pieces: each compares K latents of a token with one.
  step = max(1, _COMPARED // max(1, codes.idx_RK.shape[1]))
  for start in range(0, len(rows), step):
    part = slice(start, start + step)
    own = codes.idx_RK[rows[part]] == latent[part, None]
    acts_NMW[latent[part], example[part], token[part]] = np.where(
      own, codes.vals_RK[rows[part]], 0
    ).sum(-1)
  return {
    'tokens': np.where(inside, store.tokens()[place_NMW], -1).astype(np.int32),
    'acts': acts_NMW,
    'peak': np.where(present_NM, before, -1).astype(np.int32),
    'document': np.where(present_NM, document[centre_NM], -1).astype(np.int32),
  }
