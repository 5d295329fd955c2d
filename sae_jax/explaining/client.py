"""Requests to a server with the chat API of OpenAI, many at a time."""

from collections.abc import Callable, Sequence
from concurrent import futures
import dataclasses
import datetime
import email.utils
import http.client
import json
import os
import random
import threading
import time
from typing import Any
import urllib.error
import urllib.request

from sae_jax import errors, progress
from sae_jax.explaining import answers
from sae_jax.explaining.requests import Request
from sae_jax.storage import records

# Why a request has no answer.
FAILURES = {
  'timeout': 'the server was silent, or its reply not whole, for too long',
  'connection': 'the connection was not made, or was lost',
  'rate_limited': 'the server has a limit on the rate (429)',
  'server_error': 'the server has failed (5xx)',
  'rejected': 'the server did not take the request (4xx)',
  'malformed': 'the reply is cut, or has no message',
}
_LONGEST, _PIECE = 16 * 2**20, 2**16  # bytes of a reply
# A server may send signs of life while it works. Times its silence, after which
# its reply has to be whole.
_SILENCES = 10
_FIRST_WAIT, _LONGEST_WAIT = 1.0, 60.0
# A server that asks for a longer wait is given up.
_LONGEST_ASKED = 900.0
# Failures one after the other after which the rest is not tried.
_MOST_IN_A_ROW = 20
# What no other request will change.
_FATAL = {401: 'the key', 403: 'the key', 404: 'the endpoint and the model'}


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """Where requests go.

  Attributes:
    url: such as http://host/v1.
    timeout_s: seconds of silence.
    retries: see `ExplainConfig`.
    key: sent with each request, and shown nowhere.
  """

  url: str
  timeout_s: float
  retries: int
  key: str = dataclasses.field(default='', repr=False)


class Failure(Exception):
  """A request without an answer; `again` if it may be sent once more."""

  def __init__(self, kind: str, reason: str, again: bool, wait: float = 0):
    super().__init__(reason)
    self.kind, self.again, self.wait = kind, again, wait


class _NoRedirect(urllib.request.HTTPRedirectHandler):
  """The key goes to the endpoint alone."""

  def redirect_request(self, *_):
    return None


def key_of(name: str) -> str:
  """The key in an environment variable; '' if it is not set.

  Raises:
    UserError: if it cannot be sent; the key is not shown.
  """
  key = os.environ.get(name, '').strip()
  if not (key.isascii() and key.isprintable()) or ' ' in key:
    raise errors.UserError(
      f'the environment variable {name} holds what is no key: a space or a '
      'sign that no key has'
    )
  return key


def ask_all(
  endpoint: Endpoint,
  requests: Sequence[Request],
  concurrency: int,
  add: Callable[[dict[str, Any]], None],
  desc: str,
  known: bool = False,
) -> dict[str, str]:
  """Sends requests and hands over each answer as it comes.

  Args:
    endpoint: where they go.
    requests: what is asked.
    concurrency: how many at a time.
    add: is given each answer, by the caller's thread, as a line of
      responses.jsonl.
    desc: label of the progress bar.
    known: whether the server has answered such requests before. Then some that
      it does not take are no reason to stop.

  Returns:
    Of each request without an answer its id and why, a key of FAILURES.

  Raises:
    UserError: if the server takes none of them, or no longer answers.
  """
  failed, in_a_row, stop = {}, 0, threading.Event()
  pool = futures.ThreadPoolExecutor(concurrency)
  try:
    asked = {
      pool.submit(ask, endpoint, one, stop.wait): one for one in requests
    }
    with progress.bar(total=len(asked), unit='request', desc=desc) as bar:
      for done in futures.as_completed(asked):
        try:
          add(done.result())
          known, in_a_row = True, 0
        except Failure as failure:
          failed[asked[done].id] = failure.kind
          in_a_row += not known or failure.kind != 'rejected'
          most = len(asked) if not known else _MOST_IN_A_ROW
          if in_a_row >= min(_MOST_IN_A_ROW, most):
            raise errors.UserError(
              f'{endpoint.url} gave no answer to {in_a_row} requests one after '
              f'the other ({failure}): check the endpoint and the model; the '
              'same command goes on'
            ) from None
        bar.update(1)
  finally:
    # Those that wait to be sent again do not go on.
    stop.set()
    pool.shutdown(cancel_futures=True)
  return failed


def ask(
  endpoint: Endpoint,
  request: Request,
  wait_for: Callable[[float], Any] = time.sleep,
) -> dict[str, Any]:
  """Sends a request, again if need be, for a line of responses.jsonl.

  Args:
    endpoint: where it goes.
    request: what is asked.
    wait_for: waits so many seconds; true if it is not to be sent again.

  Raises:
    Failure: if there is no answer.
    UserError: if the server will take no request at all.
  """
  wait = _FIRST_WAIT
  for left in reversed(range(endpoint.retries + 1)):
    try:
      return {'id': request.id, **_answer(_post(endpoint, request))}
    except Failure as failure:
      if not failure.again or not left or failure.wait > _LONGEST_ASKED:
        raise
      # Spread, so that not all come back at once.
      spread = wait * (0.5 + random.random() / 2)
      if wait_for(max(failure.wait, spread)):
        raise
      wait = min(2 * wait, _LONGEST_WAIT)
  raise AssertionError


def _post(endpoint: Endpoint, request: Request) -> bytes:
  """The body of the server's reply."""
  body = {**request.settings, 'messages': request.messages}
  headers = {'Content-Type': 'application/json', 'User-Agent': 'sae_jax'}
  if endpoint.key:
    headers['Authorization'] = f'Bearer {endpoint.key}'
  post = urllib.request.Request(
    f'{endpoint.url.rstrip("/")}/chat/completions',
    json.dumps(body, allow_nan=False).encode(),
    headers,
  )
  opener = urllib.request.build_opener(_NoRedirect)
  try:
    with opener.open(post, timeout=endpoint.timeout_s) as reply:
      return _read(reply, _SILENCES * endpoint.timeout_s)
  except urllib.error.HTTPError as error:
    raise _refusal(endpoint, error) from None
  except http.client.IncompleteRead:
    raise Failure('malformed', 'the reply is cut', True) from None
  except (OSError, http.client.HTTPException) as error:
    # urllib wraps what happens until the request is sent.
    cause = getattr(error, 'reason', error)
    kind = 'timeout' if isinstance(cause, TimeoutError) else 'connection'
    reason = errors.reason(error) or FAILURES[kind]
    raise Failure(kind, _without_key(endpoint, reason), True) from None


def _read(reply: http.client.HTTPResponse, seconds: float) -> bytes:
  """The body of a reply that has to be whole after so many seconds."""
  end, body = time.monotonic() + seconds, b''
  while len(body) < _LONGEST and (piece := reply.read1(_PIECE)):
    body += piece
    if time.monotonic() > end:
      raise Failure(
        'timeout', f'the reply was not whole after {seconds:g} s', True
      )
  return body


def _refusal(endpoint: Endpoint, error: urllib.error.HTTPError) -> Exception:
  """What a reply with an error's status is."""
  with error:
    try:
      text = error.read(2000).decode(errors='replace')
    except (OSError, http.client.HTTPException):
      text = ''
  reason = f'status {error.code}: {" ".join(text.split())[:300]}'
  reason = _without_key(endpoint, reason)
  if error.code in _FATAL:
    return errors.UserError(
      f'{endpoint.url} answers with {reason}: check {_FATAL[error.code]}'
    )
  wait = _retry_after(error.headers.get('Retry-After'))
  if error.code == 429:
    return Failure('rate_limited', reason, True, wait)
  if error.code >= 500:
    return Failure('server_error', reason, True, wait)
  # 408 and 409 are of a moment.
  return Failure('rejected', reason, error.code in (408, 409), wait)


def _without_key(endpoint: Endpoint, text: str) -> str:
  return text.replace(endpoint.key, '***') if endpoint.key else text


def _retry_after(value: str | None) -> float:
  """Seconds that a server asks to wait, given so or as a date; else 0."""
  if not value:
    return 0
  if value.strip().isdecimal():
    return float(value)
  try:
    date = email.utils.parsedate_to_datetime(value)
  except ValueError:
    return 0
  if date.tzinfo is None:
    return 0
  left = date - datetime.datetime.now(datetime.UTC)
  return max(0, left.total_seconds())


def _answer(body: bytes) -> dict[str, Any]:
  """What a line of responses.jsonl has of a reply."""
  try:
    reply = records.parse(body, 'reply')
    choice = reply['choices'][0]
    message = choice['message']
    content = message.get('content')
  except (errors.UserError, LookupError, TypeError, AttributeError):
    raise Failure('malformed', FAILURES['malformed'], True) from None
  answer = {'content': content, 'finish_reason': choice.get('finish_reason')}
  if message.get('refusal'):
    answer['refusal'] = str(message['refusal'])
  if not content and any(
    message.get(name) for name in ('reasoning_content', 'reasoning')
  ):
    answer['reasoning'] = True
  logprobs = answers.kept_logprobs(choice.get('logprobs'))
  if logprobs:
    answer['logprobs'] = logprobs
  return answer
