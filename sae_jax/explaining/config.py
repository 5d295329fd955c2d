"""What sae-explain is asked for."""

import dataclasses
import json
from typing import Any
import urllib.parse

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax import subject as subject_lib


@dataclasses.dataclass(frozen=True)
class Protocol:
  """How many texts of each kind a latent has; scores of one are comparable.

  Attributes:
    top: that the explainer reads, with the highest activations, one a document.
    of_tenth: that it reads of each tenth of the ranks of activations.
    near: that it reads, on which the latent is nearest to being active.
    votes: tokens that it reads that the latent promotes, and as many that it
      suppresses.
    scored_of_tenth: active texts of each tenth that are judged, at most.
    scored_random: random inactive ones.
    scored_near: inactive ones on which the latent is nearest to being active.
    scored_token: inactive ones with the token on which it is active most often.
    baseline_tokens: that the baseline without a language model looks for.
  """

  top: int = 10
  of_tenth: int = 2
  near: int = 5
  votes: int = 10
  scored_of_tenth: int = 10
  scored_random: int = 50
  scored_near: int = 25
  scored_token: int = 25
  baseline_tokens: int = 10


PROTOCOL = Protocol()


@dataclasses.dataclass(frozen=True)
class ExplainConfig(config_lib.Config):
  """Options of explanations and their scores."""

  subject: str = config_lib.option('', subject_lib.MOVED)
  latents: tuple[str, ...] = config_lib.option(
    (), 'numbers of the latents; empty for n_latents drawn at random'
  )
  n_latents: int = config_lib.option(
    300,
    'number of latents drawn at random of those that are active on the rows '
    'of the feature table',
    least=1,
  )
  seed: int = config_lib.option(
    0, 'seed of the latents, of the texts and of their order', least=0
  )
  rows: int = config_lib.option(
    1_000_000,
    'most test rows of the store from which texts are taken',
    least=1,
  )
  window: int = config_lib.option(
    32, 'number of tokens of a text', least=2, most=1024
  )
  least_examples: int = config_lib.option(
    20,
    "fewest active texts that a latent must have among the explainer's "
    "documents and among the scorer's, and fewest inactive ones among these: "
    'others are skipped, and counted',
    least=10,
  )
  batch_rows: int = config_lib.option(
    4096, 'number of rows of activations that are encoded at a time', least=1
  )
  endpoint: str = config_lib.option(
    '',
    'URL of a server with the chat API of OpenAI, such as http://host/v1; '
    'empty to write requests.jsonl for another tool to answer',
  )
  model: str = config_lib.option(
    '', 'name of the language model, as the endpoint has it'
  )
  api_key_env: str = config_lib.option(
    'OPENAI_API_KEY',
    "environment variable with the endpoint's key, which is written nowhere; "
    'without the variable no key is sent',
  )
  settings: str = config_lib.option(
    '',
    'JSON mapping of more fields of every request, such as '
    '{"max_tokens": 4000} for a model that reasons; null leaves a field out',
  )
  logprobs: bool = config_lib.option(
    True,
    'ask for log-probabilities, where the endpoint has them: a score is then '
    'of the probability of an answer, not of 0 and 1',
  )
  texts_per_request: int = config_lib.option(
    5, 'number of texts that are judged in one request', least=1, most=100
  )
  permutations: int = config_lib.option(
    2,
    'number of orders of the texts in which all are judged; answers are '
    'averaged, and their agreement is told',
    least=1,
    most=10,
  )
  control_latents: int = config_lib.option(
    100,
    "most latents whose texts are also judged by another latent's explanation",
    least=1,
  )
  concurrency: int = config_lib.option(
    8, 'number of requests to the endpoint at a time', least=1, most=1024
  )
  timeout_s: int = config_lib.option(
    120, 'seconds that an answer may take', least=1
  )
  retries: int = config_lib.option(
    5,
    'times that a request is sent again after a server error, a lost '
    'connection or a limit on the rate',
    least=0,
  )
  retry_failed: bool = config_lib.option(
    False, 'ask again what has an answer that cannot be used'
  )
  partial: bool = config_lib.option(
    False,
    'without an endpoint: go on with the answers that there are; what has '
    'none is counted',
  )
  import_explanations: str = config_lib.option(
    '',
    "explanations by others to score, in place of asking for one's own: "
    "delphi's folder explanations/, or a .jsonl of Neuronpedia",
  )
  export_delphi: str = config_lib.option(
    '', "folder to which delphi's explanations/ and scores/ are written"
  )
  export_neuronpedia: str = config_lib.option(
    '', 'folder to which rows of Neuronpedia are written'
  )
  neuronpedia_model: str = config_lib.option(
    '', 'id of the subject in Neuronpedia; empty for the name of its file'
  )
  neuronpedia_source: str = config_lib.option(
    '',
    'id of the layer and the set in Neuronpedia, such as 5-res; empty for one '
    'after the site, such as 5-resid_post',
  )
  compare: str = config_lib.option(
    '',
    'workdir of another sae-probe with finished explanations, such as of a '
    'run with a frozen decoder, to which the scores are compared',
  )

  def __post_init__(self):
    super().__post_init__()
    fields(self.settings)
    chosen(self.latents)
    if self.endpoint:
      if not self.model:
        raise errors.UserError('endpoint is given and no model: give --model')
      check_endpoint(self.endpoint)


def chosen(latents: tuple[str, ...]) -> list[int]:
  """The numbers of latents that are asked for, ascending.

  Raises:
    UserError: if one is no number.
  """
  for latent in latents:
    if not latent.strip().isdecimal():
      raise errors.UserError(
        f'latents has {latent!r}, which is no number: give them as 1,2,3'
      )
  return sorted({int(latent) for latent in latents})


def fields(settings: str) -> dict[str, Any]:
  """The fields that `settings` adds to a request.

  Raises:
    UserError: if it is no JSON mapping, or has a field that is given by others.
  """
  try:
    value = json.loads(settings or '{}')
  except ValueError as error:
    raise errors.UserError(f'settings is not JSON ({error})') from None
  if not isinstance(value, dict):
    raise errors.UserError(
      f'settings is {settings}, not a mapping such as {{"max_tokens": 4000}}'
    )
  taken = sorted({'messages', 'model', 'n', 'stream'} & value.keys())
  if taken:
    raise errors.UserError(f'settings has {", ".join(taken)}: leave it out')
  return value


def check_endpoint(endpoint: str) -> None:
  """Raises UserError unless it is an http(s) URL without a password."""
  parts = urllib.parse.urlsplit(endpoint)
  if parts.scheme not in ('http', 'https') or not parts.hostname:
    raise errors.UserError(
      f'endpoint {endpoint} is no URL such as http://host/v1'
    )
  if parts.username or parts.password or parts.query or parts.fragment:
    raise errors.UserError(
      'endpoint has a user, a password, a query or a fragment: give the key by '
      'an environment variable, see --api_key_env'
    )
