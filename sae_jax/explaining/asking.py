"""The requests of each step, and their answers as they are read."""

import collections
from collections.abc import Iterable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np

from sae_jax.explaining import answers, client, prompts, requests
from sae_jax.explaining import config as config_lib
from sae_jax.explaining.config import ExplainConfig
from sae_jax.explaining.examples import Drawn
from sae_jax.explaining.requests import DETECT, EXPLAIN, Request, Responses

UNANSWERED = 'unanswered'
# Beyond them an answer is not of the form that is asked for.
_EXPLANATION_TOKENS = 400
_DETECTION_TOKENS = 16, 4  # and for each text
_ALTERNATIVES = 5
Votes = tuple[tuple[int, ...], tuple[int, ...]]


@dataclasses.dataclass(frozen=True)
class Read:
  """What answers say.

  Attributes:
    of: what the answer to each request says, by id: an explanation, or
      probabilities and whether they are the model's own.
    failures: why requests have nothing, by kind (`answers.FAILURES`,
      `client.FAILURES`, UNANSWERED) -> how many.
    asked: number of requests.
  """

  of: dict[str, Any]
  failures: dict[str, int]
  asked: int


def explain_requests(
  config: ExplainConfig,
  drawn: Iterable[Drawn],
  votes: Mapping[int, Votes],
  vocabulary: list[str | bytes],
) -> list[Request]:
  """A request for an explanation of each latent."""
  settings = _settings(config, {'max_tokens': _EXPLANATION_TOKENS})
  return [
    Request(
      EXPLAIN,
      one.latent,
      prompts.explain(one, votes[one.latent], vocabulary),
      settings,
    )
    for one in drawn
  ]


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


def detect_requests(
  config: ExplainConfig,
  drawn: Mapping[int, Drawn],
  explained: Mapping[int, str],
  pairs: Iterable[tuple[int, int]],
  vocabulary: list[str | bytes],
) -> list[Request]:
  """Requests that judge all texts of latents in each order.

  Args:
    config: how many in one, and orders.
    drawn: texts by latent.
    explained: explanations by latent.
    pairs: a latent, and the one whose explanation its texts are judged by.
    vocabulary: the text or bytes of each token.
  """
  out = []
  for latent, other in pairs:
    texts = drawn[latent].scored
    for order in range(config.permutations):
      rng = np.random.default_rng([config.seed, latent, order])
      places = rng.permutation(len(texts)).tolist()
      for first in range(0, len(places), config.texts_per_request):
        own = tuple(places[first : first + config.texts_per_request])
        messages = prompts.detect(
          explained[other], [texts[place] for place in own], vocabulary
        )
        settings = _detect_settings(config, len(own))
        out.append(
          Request(DETECT, latent, messages, settings, own, order, other)
        )
  return out


def _detect_settings(config, n_texts):
  tokens = _DETECTION_TOKENS[0] + _DETECTION_TOKENS[1] * n_texts
  own = {'max_tokens': tokens}
  if config.logprobs:
    own |= {'logprobs': True, 'top_logprobs': _ALTERNATIVES}
  return _settings(config, own)


def _settings(config, own) -> dict[str, Any]:
  """All fields of a request but the messages."""
  base = {'model': config.model, 'temperature': 0, **own}
  merged = base | config_lib.fields(config.settings)
  return {name: value for name, value in merged.items() if value is not None}


def ask(
  config: ExplainConfig,
  key: str,
  folder: str,
  responses: Responses,
  wanted: Sequence[Request],
) -> Read | int:
  """The answers to requests, asked for where there are none.

  Args:
    config: the endpoint, if there is one.
    key: of the endpoint.
    folder: where requests.jsonl is written if there is none.
    responses: the answers that there are, and that are added to.
    wanted: the requests, of one kind.

  Returns:
    What the answers say; or how many requests wait in requests.jsonl.

  Raises:
    UserError: see `client.ask_all`.
  """
  left = requests.unanswered(wanted, responses)
  if config.retry_failed:
    left += [one for one in wanted if _is_failed(one, responses)]
  some = any(request.id in responses.by_id for request in wanted)
  failed = {}
  if left and config.endpoint:
    endpoint = client.Endpoint(
      config.endpoint, config.timeout_s, config.retries, key
    )
    failed = client.ask_all(
      endpoint, left, config.concurrency, responses.add, wanted[0].kind, some
    )
  elif left and not (config.partial and some):
    requests.write(folder, left)
    return len(left)
  return _read(wanted, responses, failed)


def _is_failed(request: Request, responses: Responses) -> bool:
  response = responses.by_id.get(request.id)
  return response is not None and isinstance(
    _said(request, response), answers.Unusable
  )


def _said(request: Request, response: dict[str, Any]) -> Any:
  """What an answer says, or why nothing."""
  if request.kind == EXPLAIN:
    return answers.explanation(response)
  return answers.detection(response, len(request.texts))


def _read(wanted, responses, failed) -> Read:
  of, failures = {}, collections.Counter()
  for request in wanted:
    response = responses.by_id.get(request.id)
    if response is None:
      failures[failed.get(request.id, UNANSWERED)] += 1
      continue
    said = _said(request, response)
    if isinstance(said, answers.Unusable):
      failures[said.kind] += 1
    else:
      of[request.id] = said
  return Read(of, dict(sorted(failures.items())), len(wanted))


def probabilities(
  config: ExplainConfig,
  drawn: Mapping[int, Drawn],
  wanted: Sequence[Request],
  read: Read,
) -> dict[tuple[int, int], np.ndarray]:
  """The judgements of all texts, by latent and that of the explanation.

  Returns:
    The probability that each text is active by the answer in each order,
    [X, orders]; nan where there is none.
  """
  out = {}
  for request in wanted:
    pair = request.latent, request.explained
    if pair not in out:
      shape = len(drawn[request.latent].scored), config.permutations
      out[pair] = np.full(shape, np.nan)
    if request.id in read.of:
      p, _ = read.of[request.id]
      out[pair][list(request.texts), request.order] = p
  return out


def own_share(read: Read) -> float | None:
  """Share of the answers whose probabilities are the model's own."""
  own = [is_own for _, is_own in read.of.values()]
  return sum(own) / len(own) if own else None
