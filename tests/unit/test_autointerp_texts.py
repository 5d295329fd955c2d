"""The texts of latents: windows, activations, draws, by their definitions."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.explaining import (
  activations,
  examples,
  interchange,
  prompts,
  windows,
)
from sae_jax.explaining.config import Protocol
from sae_jax.explaining.examples import Drawn, Text
from tests.support import probed

WIDTH = 3
LATENTS = np.array([1, 5, 9, 23])


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  """Contexts of many lengths, tokens masked anywhere."""
  rng = np.random.default_rng(3)
  lengths = tuple(
    tuple(rng.integers(1, 13, rng.integers(1, 4)).tolist()) for _ in range(40)
  )
  url = str(tmp_path_factory.mktemp('texts') / 'store')
  return probed.write_store(url, lengths, 30, share_kept=0.85)


@pytest.fixture(scope='module')
def cut(data):
  return windows.cut(data, 10**6, WIDTH)


def stream(data):
  """Tokens, documents, positions, and rows (-1 if masked) of the stream."""
  place_R = data.stream_index()
  row_L = np.full(len(data.tokens()), -1)
  row_L[place_R] = np.arange(len(place_R))
  return data.tokens(), data.documents(), data.positions(), row_L


def windows_by_hand(data):
  """The first token in the stream and the length of each window."""
  tokens, documents, positions, row_L = stream(data)
  begins = [
    place
    for place in range(len(tokens))
    if positions[place] == 0 or documents[place] != documents[place - 1]
  ]
  out = []
  for begin, end in itertools.pairwise([*begins, len(tokens)]):
    kept = [place for place in range(begin, end) if row_L[place] >= 0]
    kept = [place for place in kept if row_L[place] in data.test_rows]
    for start in range(kept[0], end, WIDTH) if kept else ():
      own = row_L[start : min(start + WIDTH, end)]
      if (own >= 0).all():
        out.append((start, len(own)))
  return out


def test_windows_are_those_of_the_definition(data, cut):
  first = data.stream_index()[data.test_rows.start]
  got = list(zip(cut.start_W + first, cut.stop_W - cut.start_W))
  assert got == windows_by_hand(data)
  assert len(got) > 40 and {length for _, length in got} == {1, 2, 3}
  tokens, documents, _, row_L = stream(data)
  for window, (start, length) in enumerate(got):
    own = slice(start, start + length)
    np.testing.assert_array_equal(cut.tokens(window), tokens[own])
    rows = np.array(cut.rows(window)) + cut.first_row
    np.testing.assert_array_equal(rows, row_L[own])
    assert set(documents[own]) == {cut.document_W[window]}
    is_of_document = documents == documents[start]
    is_of_document[:first] = False
    assert cut.side_W[window] == windows.side(tokens[is_of_document])
  assert set(cut.side_W) == {windows.EXPLAINER, windows.SCORER}


def test_fewer_rows_end_with_a_whole_document(data, cut):
  rows = len(data.test_rows) * 3 // 5
  few = windows.cut(data, rows, WIDTH)
  n = len(few.start_W)
  assert few.place_R.size <= rows and 0 < n < len(cut.start_W)
  for name in ('start_W', 'stop_W', 'document_W', 'side_W'):
    np.testing.assert_array_equal(getattr(few, name), getattr(cut, name)[:n])
  last = few.document_W[-1]
  assert (cut.document_W == last).sum() == (few.document_W == last).sum()
  with pytest.raises(errors.UserError, match='less than its first test'):
    windows.cut(data, 1, WIDTH)


def test_equal_texts_are_on_one_side():
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 50, 20) for _ in range(200)]
  sides = [windows.side(text) for text in texts]
  assert sides == [windows.side(text.astype(np.int64)) for text in texts]
  assert 60 < sum(sides) < 140
  # Pinned: it may depend on no version of Python or numpy.
  assert [windows.side(np.arange(n)) for n in range(12)] == [
    0, 0, 0, 1, 0, 0, 1, 1, 0, 1, 1, 0,
  ]  # fmt: skip


@pytest.mark.parametrize(
  'activation', ['topk', 'batchtopk', 'relu', 'jumprelu']
)
def test_activations_are_those_of_the_definition(data, cut, activation):
  """In float64; batches that cut windows, and the last one not full."""
  trained = probed.make_trained(data, activation=activation)
  got = activations.peaks(trained, data, cut, LATENTS, 16, 4)
  rows = cut.first_row + np.arange(len(cut.place_R))
  raw_RD = data.gather(rows)
  x_RD, _ = probed.inputs(trained, raw_RD)
  act_RU = probed.latents(trained, x_RD)[:, LATENTS]
  sae = probed.wide(trained)
  pre_RU = (x_RD - sae.b_pre_D) @ sae.w_enc_ND[LATENTS].T + sae.b_lat_N[LATENTS]
  assert (act_RU > 0).any(0).sum() > 2
  counts = [{} for _ in LATENTS]
  for window in range(len(cut.start_W)):
    own = list(cut.rows(window))
    np.testing.assert_allclose(
      got.peak_WU[window], act_RU[own].max(0), rtol=2e-4, atol=1e-6
    )
    np.testing.assert_allclose(
      got.near_WU[window], pre_RU[own].max(0), rtol=2e-4, atol=1e-4
    )
    if cut.side_W[window] == windows.EXPLAINER:
      for row, token in zip(own, cut.tokens(window).tolist()):
        for u in np.flatnonzero(act_RU[row] > 0):
          counts[u][token] = counts[u].get(token, 0) + 1
  for tokens, want in zip(got.frequent, counts):
    best = sorted(want, key=lambda token: (-want[token], token))[:4]
    assert tokens.tolist() == best
  wanted = [(window, u) for window in range(0, 30, 3) for u in (0, 2)]
  acts = activations.of_windows(trained, data, cut, LATENTS, wanted, 8)
  assert set(acts) == set(wanted)
  for (window, u), of in acts.items():
    np.testing.assert_allclose(
      of, act_RU[list(cut.rows(window)), u], rtol=2e-4, atol=1e-6
    )


PROTOCOL = Protocol(3, 1, 2, 0, 2, 6, 4, 4, 2)


def made_windows(n=600, seed=0, distinct=True):
  """Windows of one document in three, of two tokens."""
  rng = np.random.default_rng(seed)
  tokens_L = rng.integers(0, 40, 2 * n).astype(np.int32)
  if distinct:
    tokens_L[1::2] = 100 + np.arange(n)
  document_W = np.arange(n) // 3
  side_W = rng.integers(0, 2, n)[document_W]
  start_W = 2 * np.arange(n)
  place_R = np.arange(2 * n)
  return windows.Windows(
    0, tokens_L, place_R, place_R // 2, start_W, start_W + 2, document_W, side_W
  )


def draw(peak_W, near_W, made=None, seed=0):
  made, tokens = made or made_windows(), (7, 9)
  return examples.places(
    PROTOCOL, 10, made, 4, peak_W, near_W, np.array(tokens), seed
  )


def test_texts_are_drawn_by_rank():
  made, rng = made_windows(), np.random.default_rng(1)
  active_W = rng.random(600) < 0.4
  peak_W = np.where(active_W, rng.random(600), 0).astype(np.float32)
  near_W = rng.standard_normal(600)
  got = draw(peak_W, near_W)
  assert got.drawn == Drawn(4, '', tokens=(7, 9))
  by_kind = {}
  for window, kind, tenth in got.scored:
    assert made.side_W[window] == windows.SCORER
    assert active_W[window] == (kind == examples.TENTH)
    by_kind.setdefault((kind, tenth), []).append(window)
  positives = np.flatnonzero(active_W & (made.side_W == windows.SCORER))
  order = positives[np.argsort(-peak_W[positives])]
  for tenth in range(10):
    own = by_kind[examples.TENTH, tenth]
    assert len(own) == PROTOCOL.scored_of_tenth
    for window in own:
      rank = int(np.flatnonzero(order == window)[0])
      assert 9 - 10 * rank // len(order) == tenth
  assert len(by_kind[examples.RANDOM, -1]) == PROTOCOL.scored_random
  negatives = np.flatnonzero(~active_W & (made.side_W == windows.SCORER))
  random = by_kind[examples.RANDOM, -1]
  left = [w for w in negatives if w not in random]
  nearest = sorted(left, key=lambda w: -near_W[w])[: PROTOCOL.scored_near]
  assert by_kind[examples.NEAR, -1] == nearest
  with_token = by_kind[examples.TOKEN, -1]
  assert len(with_token) == PROTOCOL.scored_token
  assert all(7 in made.tokens(window) for window in with_token)
  # The explainer's: the highest, one of each document, then of all tenths.
  shown = [window for window, _, _ in got.shown]
  assert (made.side_W[shown] == windows.EXPLAINER).all()
  active = np.flatnonzero(active_W & (made.side_W == windows.EXPLAINER))
  top, documents = [], set()
  for window in active[np.argsort(-peak_W[active])]:
    if made.document_W[window] not in documents:
      top.append(window)
      documents.add(made.document_W[window])
  assert shown[:3] == top[:3]
  assert [tenth for _, _, tenth in got.shown[3:]] == list(range(9, -1, -1))
  assert all(not active_W[window] for window, _, _ in got.near)
  # The draw is the latent's and the seed's own.
  assert draw(peak_W, near_W) == got != draw(peak_W, near_W, seed=1)


def test_texts_of_one_wording_are_taken_once():
  made = made_windows(distinct=False)
  peak_W = np.where(np.arange(600) % 2, 1.0, 0.0).astype(np.float32)
  got = draw(peak_W, np.zeros(600), made)
  texts = [made.tokens(window).tobytes() for window in got.all()]
  assert len(texts) == len(set(texts))
  # Control: among those that could be drawn wordings recur.
  every = [made.tokens(window).tobytes() for window in range(600)]
  assert len(set(every)) < 600


def test_latents_with_too_few_texts_are_skipped():
  made = made_windows()
  few_W, all_W = np.zeros(600, np.float32), np.ones(600, np.float32)
  few_W[:12] = 1
  assert draw(few_W, few_W).drawn.skipped == examples.FEW
  assert draw(all_W, all_W).drawn.skipped == examples.DENSE
  # All texts alike: none is left to score.
  same = made._replace(tokens_L=np.full_like(made.tokens_L, 7))
  half_W = (np.arange(600) % 2).astype(np.float32)
  assert draw(half_W, few_W, same).drawn.skipped == examples.FEW
  for window in np.flatnonzero(half_W):
    same.tokens_L[2 * window] = 100 + window
  # The one wording without activations is a near miss of the explainer's.
  assert draw(half_W, few_W, same).drawn.skipped == examples.DENSE
  for window in np.flatnonzero(half_W == 0):
    same.tokens_L[2 * window] = 1000 + window
  assert draw(half_W, few_W, same).drawn.skipped == ''
  one_side_W = (made.side_W == windows.EXPLAINER).astype(np.float32)
  assert draw(one_side_W, few_W).drawn.skipped == examples.FEW


TEXTS = (
  Text('tenth', 9, 3, (0, 1, 2, 3), (0.0, 5.0, 2.4, 0.0)),
  Text('random', -1, 4, (4, 0), (0.0, 0.0)),
)
VOCABULARY = ['The', ' cat', ' sat', b'\xf0\x9f', '\n']


def test_marks_are_tenths_of_the_highest_activation():
  drawn = Drawn(0, '', shown=TEXTS[:1], near=TEXTS[1:])
  system, user = prompts.explain(drawn, ((1,), ()), VOCABULARY)
  assert system['role'] == 'system' and user['role'] == 'user'
  lines = user['content'].splitlines()
  assert '1. The <<cat|10>> <<sat|5>>⟨xF0⟩⟨x9F⟩' in lines
  assert '1. ↵The' in lines
  space = Text('tenth', 9, 3, (0, 0), (0.0, 1.0))
  drawn = Drawn(0, '', shown=(space,))
  _, user = prompts.explain(drawn, ((), ()), ['  '])
  assert '1.   <<  |10>>' in user['content']
  assert 'Promoted tokens: ·cat' in lines
  assert 'Suppressed' not in user['content']
  _, user = prompts.detect('cats', list(TEXTS), VOCABULARY)
  assert '<<' not in user['content'] and 'cats' in user['content']
  assert [prompts.level(act, 5) for act in (0, 1e-9, 0.5, 0.51, 5)] == [
    0, 1, 1, 2, 10,
  ]  # fmt: skip


def test_texts_read_back():
  drawn = [Drawn(3, '', TEXTS, TEXTS[1:], TEXTS, (5, 6)), Drawn(4, 'few')]
  lines = examples.to_lines(drawn)
  assert examples.from_lines(lines, 'f') == drawn
  with pytest.raises(errors.UserError, match='no field more'):
    examples.from_lines([lines[0] | {'more': 1}], 'f')
  examples.check_split(drawn[1:])
  with pytest.raises(errors.DefectError, match='2 documents, such as 3'):
    examples.check_split(drawn)
  other = dataclasses.replace(drawn[1], scored=TEXTS[:1])
  with pytest.raises(errors.DefectError, match='1 documents'):
    # Of another latent too: its near misses would tell.
    examples.check_split([dataclasses.replace(drawn[0], scored=()), other])


def test_explanations_go_to_delphi_and_neuronpedia_and_come_back(tmp_path):
  explanation = {3: 'cats  and\n"dogs"', 14: 'ä'}
  p_X = np.array([0.8, np.nan])
  interchange.write_delphi(
    str(tmp_path / 'D'),
    'blocks.0.resid_post',
    explanation,
    {3: (TEXTS, p_X)},
    VOCABULARY,
  )
  want = {3: 'cats and "dogs"', 14: 'ä'}
  assert interchange.read(str(tmp_path / 'D')) == want
  assert interchange.read(str(tmp_path / 'D' / 'explanations')) == want
  (path,) = (tmp_path / 'D' / 'scores' / 'detection').iterdir()
  assert path.name == 'blocks.0.resid_post_latent3.txt'
  first, second = json.loads(path.read_text())
  assert first == {
    'str_tokens': ['The', ' cat', ' sat', '�'],
    'activations': [0, 5, 2.4, 0],
    'distance': 10,
    'activating': True,
    'prediction': True,
    'probability': 0.8,
    'correct': True,
  }
  assert second['distance'] == -1 and second['correct'] is None
  score = {'balanced_accuracy': [0.7, 0.6, 0.8]}
  lines = [
    {'latent': 3, 'explanation': 'cats', 'model': 'm', 'score': score},
    {'latent': 4, 'explanation': None, 'model': 'm', 'score': None},
    {'latent': 5, 'explanation': 'dogs', 'model': 'm', 'score': None},
  ]
  interchange.write_neuronpedia(str(tmp_path / 'N'), 'gpt2', '3-x', 'j', lines)
  path = tmp_path / 'N' / 'explanations.jsonl'
  assert interchange.read(str(path)) == {3: 'cats', 5: 'dogs'}
  rows = [json.loads(line) for line in path.open()]
  (scored,) = map(json.loads, (tmp_path / 'N' / 'scores.jsonl').open())
  assert scored['value'] == 0.7 and scored['explanationId'] == rows[0]['id']
  assert rows[0]['modelId'] == 'gpt2' and rows[0]['layer'] == '3-x'


@pytest.mark.parametrize(
  ('name', 'text', 'message'),
  [
    ('x.jsonl', '{"index": "a"}\n', 'holds no explanations'),
    ('x.jsonl.gz', 'no gzip', 'cannot be read'),
    ('a_latent3.txt', '[1]', 'no JSON string'),
    ('a_latent3.txt', '{', 'cannot be read'),
  ],
)
def test_what_holds_no_explanations_is_told(tmp_path, name, text, message):
  (tmp_path / name).write_text(text)
  path = tmp_path if name.endswith('.txt') else tmp_path / name
  with pytest.raises(errors.UserError, match=message):
    interchange.read(str(path))
