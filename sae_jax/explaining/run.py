"""From a finished sae-probe to explanations with scores: all steps in turn.

The texts (`texts.jsonl`) and the answers (`responses.jsonl`) are kept, and the
same command goes on from them.
"""

from collections.abc import Iterable, Mapping
from concurrent import futures
import dataclasses
import json
from typing import Any

from etils import epath
import numpy as np

from sae_jax import checkpoint as checkpoint_lib
from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import store as store_lib
from sae_jax import subject as subject_lib
from sae_jax.explaining import (
  activations,
  asking,
  client,
  examples,
  interchange,
  report,
  requests,
)
from sae_jax.explaining import config as options
from sae_jax.explaining import windows as windows_lib
from sae_jax.explaining.config import ExplainConfig
from sae_jax.explaining.examples import Drawn
from sae_jax.features import explanations, Features, results
from sae_jax.probing import explain as probed_lib
from sae_jax.storage import claim, files, records
from sae_jax.subject.formats import tokenizer as tokenizer_lib

_TEXTS = 'texts.jsonl'
# Raised with every change after which the same inputs give other texts.
_TEXTS_VERSION = 1
_READERS = 8  # threads: a bucket's latency is the bound


@dataclasses.dataclass(frozen=True)
class Waiting:
  """Requests that are to be answered by another tool.

  Attributes:
    kind: `requests.EXPLAIN` or `requests.DETECT`.
    count: how many they are.
    folder: where requests.jsonl is, and responses.jsonl is to be.
  """

  kind: str
  count: int
  folder: str


def explain_latents(
  config: ExplainConfig, checkpoint: str, store_url: str, workdir: str
) -> dict[str, Any] | Waiting:
  """Explains latents of finished results of sae-probe, and scores that.

  Explanations are made of texts of one half of the test documents, and scored
  by detection on the other half. `explained/` in the workdir gets the texts,
  the answers, explanations.jsonl and explain_report.json.

  Args:
    config: options.
    checkpoint: the workdir of the training run that was probed.
    store_url: the store that was probed.
    workdir: the finished results of sae-probe; local path or URL, as all.

  Returns:
    The report; or what waits for answers if there is no endpoint.

  Raises:
    UserError: if the results are not of this checkpoint and store, a latent is
      not there, or the endpoint takes no requests.
  """
  probed = results.read_report(workdir)
  key = client.key_of(config.api_key_env) if config.endpoint else ''
  given, other = None, None
  if config.import_explanations:
    given = interchange.read(config.import_explanations)
  if config.compare:
    other = explanations.read(config.compare)
  features = results.open_features(workdir, probed)
  folder = str(explanations.folder(workdir))
  with claim.claim(folder), requests.Responses(folder) as responses:
    latents = _latents(config, features, given)
    drawn = _texts(config, checkpoint, store_url, workdir, probed, latents)
    examples.check_split(drawn.values())
    able = {n: one for n, one in drawn.items() if not one.skipped}
    tokenizer = subject_lib.load_recorded_tokenizer(
      probed['subject'], probed.get('weights_sha256', ''), config.subject
    )
    vocabulary = tokenizer_lib.token_texts(tokenizer)
    explained = {n: given[n] for n in able} if given else None
    asked = None
    if explained is None:
      votes = _votes(config, features, able)
      wanted = asking.explain_requests(config, able.values(), votes, vocabulary)
      asked = asking.ask(config, key, folder, responses, wanted)
      if isinstance(asked, int):
        return Waiting(requests.EXPLAIN, asked, folder)
      explained = {r.latent: asked.of[r.id] for r in wanted if r.id in asked.of}
    density_N = features.column('density')
    partner = partners(explained, density_N)
    pairs = [(n, n) for n in explained]
    pairs += list(partner.items())[: config.control_latents]
    wanted = asking.detect_requests(config, able, explained, pairs, vocabulary)
    judged = asking.ask(config, key, folder, responses, wanted)
    if isinstance(judged, int):
      return Waiting(requests.DETECT, judged, folder)
    p_XO = asking.probabilities(config, able, wanted, judged)
    lines, record = report.make(
      config,
      probed,
      drawn,
      explained,
      p_XO,
      asked,
      judged,
      density_N,
      features.column('count') * features.column('mean').astype(np.float64),
      other,
    )
    (epath.Path(folder) / requests.REQUESTS).unlink(missing_ok=True)
    explanations.write(workdir, lines, record)
  _export(config, probed, able, explained, p_XO, lines, vocabulary)
  return record


def _latents(
  config: ExplainConfig, features: Features, given: Mapping[int, str] | None
) -> np.ndarray:
  """The numbers of the latents, ascending."""
  chosen = options.chosen(config.latents)
  beyond = [n for n in chosen if n >= features.n_latents]
  if beyond:
    raise errors.UserError(
      f'latents has {beyond[0]}: the results have 0 to {features.n_latents - 1}'
    )
  if given is not None:
    absent = [n for n in chosen if n not in given]
    if absent:
      raise errors.UserError(
        f'{config.import_explanations} has no explanation of latent '
        f'{absent[0]}, one of {len(absent)}: leave them out of --latents'
      )
  if chosen:
    return np.array(chosen)
  active = np.flatnonzero(features.column('count') > 0)
  if given is not None:
    active = np.intersect1d(active, np.array(list(given), np.int64))
  if not len(active):
    raise errors.UserError(
      'no latent is active that could be explained: probe more rows, or give '
      'explanations of these latents'
    )
  rng = np.random.default_rng(config.seed)
  return np.sort(rng.permutation(active)[: config.n_latents])


def _texts(
  config: ExplainConfig,
  checkpoint: str,
  store_url: str,
  workdir: str,
  probed: Mapping[str, Any],
  latents: np.ndarray,
) -> dict[int, Drawn]:
  """The texts of latents, by latent, drawn if they are not there."""
  made_from = probed['made_from']
  head = config_lib.through_json(
    {
      'version': _TEXTS_VERSION,
      'sae_fingerprint': made_from['sae_fingerprint'],
      'store': made_from.get('store'),
      'examples': dataclasses.asdict(config.examples),
      'seed': config.seed,
      'latents': latents.tolist(),
    }
  )
  path = explanations.folder(workdir) / _TEXTS
  if path.exists():
    lines, damaged = records.parse_lines(path.read_bytes())
    if not damaged and lines[:1] == [head] and len(lines) == len(latents) + 1:
      drawn = examples.from_lines(lines[1:], str(path))
      return {one.latent: one for one in drawn}
  drawn = _drawn(config, checkpoint, store_url, workdir, probed, latents)
  lines = [head, *examples.to_lines(drawn)]
  text = ''.join(json.dumps(line) + '\n' for line in lines)
  files.write_text(path, text)
  return {one.latent: one for one in drawn}


def _drawn(
  config, checkpoint, store_url, workdir, probed, latents
) -> list[Drawn]:
  made_from = probed['made_from']
  trained = checkpoint_lib.load(
    checkpoint,
    average=made_from['probe_config']['average'],
    step=made_from['step'],
  )
  probed_lib.check_same(trained, probed, workdir)
  dataset = trained.metadata.dataset
  store = store_lib.open_store(store_url, dataset['site'])
  if store.manifest.identity != made_from.get('store'):
    raise errors.UserError(
      f'the results are not of store {store_url}: give the one that sae-probe '
      'was given; without a store (--stream) there are no rows to read'
    )
  sizes = config.examples
  windows = windows_lib.cut(store, sizes.rows, sizes.window)
  peaks = activations.peaks(
    trained,
    store,
    windows,
    latents,
    config.batch_rows,
    sizes.baseline_tokens,
  )
  places = [
    examples.places(
      sizes,
      windows,
      latent,
      peaks.peak_WU[:, u],
      peaks.near_WU[:, u],
      peaks.frequent[u],
      config.seed,
    )
    for u, latent in enumerate(latents.tolist())
  ]
  wanted = [(w, u) for u, place in enumerate(places) for w in place.all()]
  acts = activations.of_windows(
    trained, store, windows, latents, wanted, config.batch_rows
  )
  return [
    examples.filled(place, windows, {w: acts[w, u] for w in place.all()})
    for u, place in enumerate(places)
  ]


def _votes(
  config: ExplainConfig, features: Features, latents: Iterable[int]
) -> dict[int, asking.Votes]:
  """The tokens that each latent promotes and suppresses."""
  names = 'vote_up_ids', 'vote_down_ids'

  def read(latent):
    block = features.latents(latent, latent + 1, names)
    rows = (block[name][0] for name in names)
    most = config.examples.votes
    return tuple(tuple(ids[ids >= 0][:most].tolist()) for ids in rows)

  latents = list(latents)
  with futures.ThreadPoolExecutor(_READERS) as pool:
    return dict(zip(latents, pool.map(read, latents)))


def partners(explained: Iterable[int], density_N: np.ndarray) -> dict[int, int]:
  """Of each latent another of the most similar density, by its logarithm.

  Returns:
    By latent; none of a single one.
  """
  latents = np.array(sorted(explained), np.int64)
  order = latents[np.argsort(density_N[latents], kind='stable')].tolist()
  logs = np.log(np.maximum(density_N[order], np.finfo(np.float32).tiny))
  out = {}
  for place, latent in enumerate(order):
    near = [p for p in (place - 1, place + 1) if 0 <= p < len(order)]
    if near:
      best = min(near, key=lambda p: abs(logs[p] - logs[place]))
      out[latent] = order[best]
  return dict(sorted(out.items()))


def _export(config, probed, drawn, explained, p_XO, lines, vocabulary) -> None:
  """Writes what others read."""
  if config.export_delphi:
    judged = {
      n: (drawn[n].scored, report.mean_probability(p_XO[n, n]))
      for n in explained
      if (n, n) in p_XO
    }
    interchange.write_delphi(
      config.export_delphi, probed['site'], explained, judged, vocabulary
    )
  if config.export_neuronpedia:
    interchange.write_neuronpedia(
      config.export_neuronpedia,
      config.neuronpedia_model or epath.Path(probed['subject']).name,
      config.neuronpedia_source or probed['site'],
      config.model,
      lines,
    )
