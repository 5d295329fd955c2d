"""From a finished sae-probe to explanations with scores: all steps in turn.

The texts (`texts.jsonl`) and the answers (`responses.jsonl`) are kept, and the
same command goes on from them.
"""

from collections.abc import Iterable, Mapping
from concurrent import futures
import dataclasses
from typing import Any

from etils import epath
import numpy as np

from sae_jax import errors
from sae_jax import subject as subject_lib
from sae_jax.explaining import (
  asking,
  client,
  examples,
  interchange,
  report,
  requests,
  scores,
  texts,
)
from sae_jax.explaining import config as options
from sae_jax.explaining.config import ExplainConfig, PROTOCOL, Protocol
from sae_jax.features import explanations, Features, results
from sae_jax.storage import claim
from sae_jax.subject.formats import tokenizer as tokenizer_lib

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
  config: ExplainConfig,
  checkpoint: str,
  store_url: str,
  workdir: str,
  protocol: Protocol = PROTOCOL,
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
    protocol: how many texts.

  Returns:
    The report; or what waits for answers if there is no endpoint.

  Raises:
    UserError: if the results are not of this checkpoint and store, a latent is
      not there, or the endpoint takes no requests.
  """
  probed = results.read_report(workdir)
  key = client.key_of(config.api_key_env) if config.endpoint else ''
  given, other = None, None
  for folder in (config.export_delphi, config.export_neuronpedia):
    if folder:
      interchange.check_empty(folder)
  if config.import_explanations:
    given = interchange.read(config.import_explanations)
  if config.compare:
    other = explanations.read(config.compare)
  features = results.open_features(workdir, probed)
  folder = str(explanations.folder(workdir))
  with claim.claim(folder), requests.Responses(folder) as responses:
    latents = _latents(config, features, given)
    drawn = texts.of_latents(
      config, protocol, checkpoint, store_url, workdir, probed, latents
    )
    examples.check_split(drawn.values())
    able = {n: one for n, one in drawn.items() if not one.skipped}
    tokenizer = subject_lib.load_recorded_tokenizer(
      probed['subject'], probed.get('weights_sha256', ''), config.subject
    )
    vocabulary = tokenizer_lib.token_texts(tokenizer)
    explained = {n: given[n] for n in able} if given else None
    asked = None
    if explained is None:
      votes = _votes(protocol.votes, features, able)
      wanted = asking.explain_requests(config, able.values(), votes, vocabulary)
      asked = asking.ask(config, key, folder, responses, wanted)
      if isinstance(asked, int):
        return Waiting(requests.EXPLAIN, asked, folder)
      explained = {r.latent: asked.of[r.id] for r in wanted if r.id in asked.of}
    density_N = features.column('density')
    partner = asking.partners(explained, density_N)
    pairs = [(n, n) for n in explained]
    pairs += list(partner.items())[: config.control_latents]
    wanted = asking.detect_requests(config, able, explained, pairs, vocabulary)
    judged = asking.ask(config, key, folder, responses, wanted)
    if isinstance(judged, int):
      return Waiting(requests.DETECT, judged, folder)
    p_XO = asking.probabilities(config, able, wanted, judged)
    lines, record = report.make(
      config,
      protocol,
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
    if not config.partial:
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


def _votes(
  most: int, features: Features, latents: Iterable[int]
) -> dict[int, asking.Votes]:
  """The tokens that each latent promotes and suppresses."""
  names = 'vote_up_ids', 'vote_down_ids'

  def read(latent):
    block = features.latents(latent, latent + 1, names)
    rows = (block[name][0] for name in names)
    return tuple(tuple(ids[ids >= 0][:most].tolist()) for ids in rows)

  latents = list(latents)
  with futures.ThreadPoolExecutor(_READERS) as pool:
    return dict(zip(latents, pool.map(read, latents)))


def _export(config, probed, drawn, explained, p_XO, lines, vocabulary) -> None:
  """Writes what others read."""
  if config.export_delphi:
    judged = {
      n: (drawn[n].scored, scores.averaged(p_XO[n, n]))
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
      config.neuronpedia_source
      or interchange.neuronpedia_source(probed['site']),
      config.model,
      lines,
    )
