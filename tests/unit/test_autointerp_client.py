"""Servers that fail in every way: no score without an answer, all counted."""

import collections
import contextlib
import dataclasses
import datetime
import email.utils
import io
import json
import socket
import struct
import threading
import time

import pytest

from sae_jax import errors
from sae_jax.explaining import answers, asking, client, requests
from sae_jax.explaining.examples import Drawn, Text
from sae_jax.explaining.requests import Request
from tests.support import explained

KEY = 'sk-secret-0123456789'
SETTINGS = {'model': 'm', 'temperature': 0}


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch):
  monkeypatch.setenv('NO_PROXY', '*')


def request(number=0, n_texts=2):
  messages = [
    {'role': 'system', 'content': 's'},
    {'role': 'user', 'content': f'The unit: {number}\n\n1. a\n2. b'},
  ]
  texts = tuple(range(n_texts))
  return Request(requests.DETECT, number, messages, SETTINGS, texts, 0, number)


def endpoint(url, **changes):
  return client.Endpoint(
    url, **{'timeout_s': 5, 'retries': 2} | changes, key=KEY
  )


def reset(handler, body):
  """Closes the connection without a word."""
  linger = struct.pack('ii', 1, 0)
  handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
  handler.connection.close()
  handler.wfile = io.BytesIO()


def status(code, **headers):
  return lambda handler, _: explained.send(
    handler, code, b'{"error": "no: %s"}' % KEY.encode(), **headers
  )


def cut_body(handler, _):
  data = json.dumps(explained.reply('[1, 0]')).encode()
  explained.send(handler, 200, data[:30], Content_Length=len(data))


def cut_json(handler, _):
  data = json.dumps(explained.reply('[1, 0]')).encode()
  explained.send(handler, 200, data[:30])


def whole(reply):
  return lambda *_: reply


def choice(content, **more):
  reply = explained.reply(content)
  reply['choices'][0] |= more
  return lambda *_: reply


# What a server does -> the kind that it is counted as.
CONTENTS = {
  'null_content': whole(explained.reply(None)),
  'reasoning_only': whole(explained.reply(None, reasoning_content='[1]')),
  'not_text': whole(explained.reply([{'type': 'text', 'text': '[1, 0]'}])),
  'empty': whole(explained.reply(' \n')),
  'truncated': choice('[1, 0]', finish_reason='length'),
  'refused': whole(explained.reply(None, refusal='I will not')),
  'unparsable': whole(explained.reply('1 and 0')),
  'wrong_count': whole(explained.reply('[1, 0, 1]')),
}
TRANSPORT = {
  'rate_limited': status(429),
  'server_error': status(500),
  'rejected': status(400),
  'malformed': cut_json,
  'connection': reset,
}


def test_every_kind_of_failure_is_counted_and_scores_nothing(tmp_path):
  """A server that fails each request in another way, again and again."""
  ways = CONTENTS | TRANSPORT
  asked = [request(number) for number in range(len(ways) + 1)]
  kinds = list(ways)

  def answer(handler, body):
    number = int(body['messages'][1]['content'].split()[2])
    return (
      ways[kinds[number]](handler, body) if number < len(ways) else '[1, 0]'
    )

  config = dataclasses.replace(
    explained.CONFIG, model='m', retries=0, concurrency=4, permutations=1
  )
  with (
    explained.served(answer) as (url, _),
    requests.Responses(tmp_path) as responses,
  ):
    config = dataclasses.replace(config, endpoint=url)
    read = asking.ask(config, KEY, str(tmp_path), responses, asked)
  assert read.failures == dict.fromkeys(sorted(kinds), 1)
  assert read.of == {asked[-1].id: ([1.0, 0.0], False)}
  assert read.asked == len(asked)
  texts = (Text('tenth', 0, 0, (1,)), Text('random', -1, 1, (2,)))
  drawn = {r.latent: Drawn(r.latent, '', scored=texts) for r in asked}
  p_XO = asking.probabilities(config, drawn, asked, read)
  answered = {n for (n, _), p in p_XO.items() if p[0, 0] == p[0, 0]}
  assert answered == {len(ways)}
  stored = (tmp_path / requests.RESPONSES).read_text()
  assert KEY not in stored
  # What the server has not answered is asked again, what cannot be used is not.
  with requests.Responses(tmp_path) as responses:
    left = requests.unanswered(asked, responses)
    assert {kinds[one.latent] for one in left} == set(TRANSPORT)
    again = dataclasses.replace(config, endpoint='', retry_failed=True)
    count = asking.ask(again, '', str(tmp_path), responses, asked)
  assert count == len(ways)


def test_in_a_bucket_answers_are_written_whole(tmp_path, monkeypatch):
  """Objects cannot be appended to: now and then, and at the end."""
  monkeypatch.setattr(requests.url_lib, 'is_remote', lambda _: True)
  written = []
  write_text = requests.files.write_text

  def write(path, text):
    written.append(text.count('\n'))
    write_text(path, text)

  monkeypatch.setattr(requests.files, 'write_text', write)
  with requests.Responses(tmp_path) as responses:
    responses.add({'id': 'a', 'content': 'x'})
    responses.add({'id': 'b', 'content': 'y'})
    assert written == []
    monkeypatch.setattr(requests, '_SECONDS', -1)
    responses._due = 0
    responses.add({'id': 'c', 'content': None})
    assert written == [3]
  assert written == [3]
  with requests.Responses(tmp_path) as responses:
    assert list(responses.by_id) == ['a', 'b', 'c']


def test_a_timeout_is_told_from_a_lost_connection():
  done = threading.Event()

  def silent(handler, body):
    done.wait(20)

  with explained.served(silent) as (url, _):
    with pytest.raises(client.Failure) as told:
      client.ask(endpoint(url, timeout_s=0.2, retries=0), request())
    done.set()
  assert told.value.kind == 'timeout'
  with pytest.raises(client.Failure) as told:
    client.ask(endpoint('http://127.0.0.1:9/v1', retries=0), request())
  assert told.value.kind == 'connection'


def dripping(spaces):
  """An answer after so many spaces, each a sign of life."""

  def answer(handler, _):
    data = json.dumps(explained.reply('[1, 0]')).encode()
    handler.send_response(200)
    handler.send_header('Content-Length', str(spaces + len(data)))
    handler.end_headers()
    with contextlib.suppress(OSError):
      for _ in range(spaces):
        handler.wfile.write(b' ')
        handler.wfile.flush()
        time.sleep(0.02)
      handler.wfile.write(data)

  return answer


def test_a_reply_that_drips_is_waited_for_but_not_for_ever(monkeypatch):
  with explained.served(dripping(5)) as (url, _):
    said = client.ask(endpoint(url), request())
  assert said['content'] == '[1, 0]'
  monkeypatch.setattr(client, '_SILENCES', 0.1)
  with (
    explained.served(dripping(500)) as (url, _),
    pytest.raises(client.Failure, match=r'whole after 0\.5 s') as told,
  ):
    client.ask(endpoint(url, retries=0), request())
  assert told.value.kind == 'timeout'


@pytest.mark.parametrize('way', [*TRANSPORT.values(), cut_body])
def test_what_may_pass_is_tried_again_and_no_other(way):
  calls = collections.Counter()

  def answer(handler, body):
    calls['all'] += 1
    return way(handler, body) if calls['all'] < 3 else '[1, 0]'

  waits = []
  with explained.served(answer) as (url, _):
    if way is TRANSPORT['rejected']:
      with pytest.raises(client.Failure, match='status 400') as told:
        client.ask(endpoint(url), request(), waits.append)
      assert KEY not in str(told.value)
      assert calls['all'] == 1 and not waits
      return
    said = client.ask(endpoint(url), request(), waits.append)
  assert said['content'] == '[1, 0]' and calls['all'] == 3
  first, second = waits
  assert 0.5 <= first <= 1 and 1 <= second <= 2
  # A run that ends does not send it again.
  calls.clear()
  with explained.served(answer) as (url, _), pytest.raises(client.Failure):
    client.ask(endpoint(url), request(), lambda seconds: True)
  assert calls['all'] == 1


def test_a_wait_that_the_server_asks_for_is_kept():
  soon = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=90)
  for value, low, high in (
    ('7', 7, 7),
    (email.utils.format_datetime(soon, usegmt=True), 60, 90),
    ('soon', 0.5, 1),
  ):
    waits, calls = [], []

    def answer(handler, body, value=value, calls=calls):
      calls.append(body)
      if len(calls) == 1:
        return status(429, Retry_After=value)(handler, body)
      return '[1, 0]'

    with explained.served(answer) as (url, _):
      client.ask(endpoint(url), request(), waits.append)
    assert low <= waits[0] <= high
  with explained.served(status(429, Retry_After='3600')) as (url, bodies):
    with pytest.raises(client.Failure):
      client.ask(endpoint(url), request(), waits.append)
    assert len(bodies) == 1


@pytest.mark.parametrize('code', [401, 403, 404])
def test_a_wrong_key_or_address_stops_the_run(code):
  with explained.served(status(code)) as (url, bodies):
    asked = [request(number) for number in range(50)]
    with pytest.raises(errors.UserError, match=f'status {code}') as told:
      client.ask_all(endpoint(url), asked, 2, None, 'x')
    assert len(bodies) < 10
  assert KEY not in str(told.value)


def test_a_server_that_answers_nothing_stops_the_run_and_one_that_did_not():
  """A few that are never taken are no reason to stop once others were."""
  added = []
  with explained.served(status(400)) as (url, bodies):
    asked = [request(number) for number in range(50)]
    with pytest.raises(errors.UserError, match='20 requests one after'):
      client.ask_all(endpoint(url), asked, 1, added.append, 'x')
    assert len(bodies) < 30
    failed = client.ask_all(
      endpoint(url), asked[:25], 1, added.append, 'x', known=True
    )
  assert set(failed.values()) == {'rejected'} and len(failed) == 25
  assert not added


def test_the_key_goes_to_the_endpoint_alone(monkeypatch):
  """A server that sends one elsewhere gets no second request."""
  with explained.served(lambda *_: '[1, 0]') as (other, stolen):
    moved = status(307, Location=f'{other}/chat/completions')
    with explained.served(moved) as (url, _), pytest.raises(client.Failure):
      client.ask(endpoint(url), request())
  assert stolen == []
  assert KEY not in repr(endpoint('http://h/v1'))
  for value in ('a b', 'a\nb', 'ä'):
    monkeypatch.setenv('A_KEY', value)
    with pytest.raises(errors.UserError) as told:
      client.key_of('A_KEY')
    assert value not in str(told.value)
  monkeypatch.setenv('A_KEY', f' {KEY}\n')
  assert client.key_of('A_KEY') == KEY
  assert client.key_of('NO_SUCH_KEY') == ''


def logprobs(*tokens):
  """As a server gives them, of tokens and their alternatives."""
  return [
    {
      'token': token,
      'logprob': -0.1,
      'bytes': [1],
      'top_logprobs': [{'token': t, 'logprob': l} for t, l in others.items()],
    }
    for token, others in tokens
  ]


def detection(content, n_texts=2, **more):
  return answers.detection({'content': content, **more}, n_texts)


def test_probabilities_are_those_of_the_digits():
  served = logprobs(
    ('[', {'[': 0}),
    (' 1', {' 1': -0.5, '0': -1.5, 'x': -3}),
    (',', {}),
    ('0', {'0': -0.1}),
    (']', {}),
  )
  kept = answers.kept_logprobs({'content': served})
  assert len(kept) == 2 and 'bytes' not in kept[0]
  for of in (served, kept):
    p, own = detection('[1, 0]', logprobs=of)
    # 1 / (1 + exp(-1)), by hand.
    assert own and p == pytest.approx([0.7310585786300049, 0.0])
  # Of other digits than those of the content, or not of all: the digits.
  for of in (served[:2], [], None, 'x', [{'token': 1}]):
    assert detection('[1, 0]', logprobs=of) == ([1.0, 0.0], False)
  assert detection('[0, 0]', logprobs=served) == ([0.0, 0.0], False)
  assert answers.kept_logprobs(None) is None
  for odd in (5, [5, {'token': '1', 'top_logprobs': 2}]):
    answers.kept_logprobs({'content': odd})


@pytest.mark.parametrize(
  ('content', 'want'),
  [
    ('[1,0]', [1.0, 0.0]),
    ('\n[1, 0] ', [1.0, 0.0]),
    ('<think>[0, 0]</think> [1, 0]', [1.0, 0.0]),
    ('<think>[0, 0]', 'reasoning_only'),
    ('[1]', 'wrong_count'),
    ('[]', 'wrong_count'),
    ('[true, false]', 'unparsable'),
    ('[1.0, 0.0]', 'unparsable'),
    ('["1", "0"]', 'unparsable'),
    ('[2, 0]', 'unparsable'),
    ('[1, 0', 'unparsable'),
    ('{"a": 1}', 'unparsable'),
    ('[1, 0] as the word is there', 'unparsable'),
    ("I'm sorry, I can't help with that.", 'refused'),
    ('[' * 100_000, 'unparsable'),
    (7, 'not_text'),
  ],
)
def test_judgements_are_read_strictly(content, want):
  got = detection(content)
  assert (got.kind if isinstance(got, answers.Unusable) else got[0]) == want


@pytest.mark.parametrize(
  ('content', 'want'),
  [
    ('EXPLANATION: dogs', 'dogs'),
    ('So:\nEXPLANATION: cats\nEXPLANATION:  two\nlines ', 'two lines'),
    ('dogs', 'unparsable'),
    ('EXPLANATION: \n', 'unparsable'),
    ('I cannot do that', 'refused'),
    ('EXPLANATION: ' + 'x' * 1001, 'too_long'),
  ],
)
def test_explanations_are_read_strictly(content, want):
  got = answers.explanation({'content': content})
  assert (got.kind if isinstance(got, answers.Unusable) else got) == want
