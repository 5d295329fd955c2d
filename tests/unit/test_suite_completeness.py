"""Concepts of WordNet's files, and whether each has a latent of its own."""

import dataclasses

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from sae_jax import errors
from sae_jax.probing.suite import context as context_lib
from sae_jax.probing.suite import figures, wordnet
from sae_jax.probing.suite.evaluations import completeness
from tests.support import probed, suites

WORDS = [f'w{a}{b}' for a in 'abcde' for b in 'abcdefghij']


def write_wordnet(folder, below, others=()):
  """Files of WordNet: synsets of words below each root.

  Args:
    folder: where.
    below: root's lemma -> synsets, lists of words, one under the other.
    others: (lemma, its first synset): senses that come before those.
  """
  folder.mkdir(exist_ok=True)
  data, index, number = ['  1 The licence.'], {}, 100

  def add(words, pointers, first=False):
    nonlocal number
    number += 1
    offset = f'{number:08d}'
    fields = [offset, '05', 'n', f'{len(words):02x}']
    fields += [field for word in words for field in (word, '0')]
    fields.append(f'{len(pointers):03d}')
    fields += [f for p in pointers for f in (p[0], p[1], 'n', '0000')]
    data.append(' '.join(fields) + ' | a gloss ~ 00000000')
    for word in words:
      offsets = index.setdefault(word.lower(), [])
      offsets.insert(0 if first else len(offsets), offset)
    return offset

  for lemma, synsets in below.items():
    child = []
    for words in reversed(synsets):
      child = [('~', add(words, child))]
    for _ in range(wordnet.ROOTS[f'{lemma}'][1] - 1):
      add([wordnet.ROOTS[lemma][0]], [])
    add([wordnet.ROOTS[lemma][0]], child)
  for word in others:
    add([word], [], first=True)
  (folder / 'data.noun').write_text('\n'.join(data) + '\n')
  lines = ['  1 The licence.']
  for lemma, offsets in index.items():
    fields = [lemma, 'n', str(len(offsets)), '2', '@', '~', str(len(offsets))]
    lines.append(' '.join([*fields, '1', *offsets]) + '  ')
  (folder / 'index.noun').write_text('\n'.join(lines) + '\n')


def test_concepts_are_words_whose_first_sense_is_there(tmp_path):
  write_wordnet(
    tmp_path,
    {
      'animals': [['cat', 'house_cat'], ['tabby', 'bank', 'As']],
      'foods': [['bread'], ['rye_bread', 'cat', '7up']],
      'elements': [['iron']],
      'cities': [['Rome'], ['Monaco-Ville']],
    },
    others=['bank'],
  )
  assert wordnet.concepts(str(tmp_path)) == {
    # A bank is first of all another thing; As is a word.
    'animals': ['cat', 'house cat', 'tabby'],
    'foods': ['bread', 'rye bread'],
    'elements': ['iron'],
    'cities': ['Monaco-Ville', 'Rome'],
  }
  with pytest.raises(errors.UserError, match='cannot be read'):
    wordnet.concepts(str(tmp_path / 'none'))
  (tmp_path / 'data.noun').write_text('no such thing\n')
  with pytest.raises(errors.UserError, match='does not hold WordNet'):
    wordnet.concepts(str(tmp_path))


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  return suites.write_store(str(tmp_path_factory.mktemp('suite') / 'store'))


@pytest.fixture(scope='module')
def trained(data):
  return probed.make_trained(data)


@pytest.fixture
def context(data, trained, tmp_path):
  """With words of letters: of them twenty are animals, one is of two tokens."""
  write_wordnet(
    tmp_path / 'wn',
    {'animals': [[word] for word in WORDS[:20]], 'foods': [['waa_wab']],
     'elements': [], 'cities': []},
  )  # fmt: skip
  tokenizer = tokenizers.Tokenizer(
    models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token='waa')
  )
  tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
  subject = dataclasses.replace(probed.make_subject(), tokenizer=tokenizer)
  return suites.context(
    trained, data, subject=subject, wordnet=str(tmp_path / 'wn')
  )


def slow_occurrences(data, ids):
  """Rows of the last token of each occurrence, token by token."""
  tokens, documents = data.tokens().tolist(), data.documents().tolist()
  row_at = {p: r for r, p in enumerate(data.stream_index().tolist())}
  out = []
  for at in range(len(ids) - 1, len(tokens)):
    span = range(at - len(ids) + 1, at + 1)
    if [tokens[i] for i in span] == ids and documents[span[0]] == documents[at]:
      out.append(row_at.get(at, -1))
  return np.array([row for row in out if row >= 0])


def test_occurrences_are_those_of_the_text(context, data, monkeypatch):
  # Every token of this vocabulary would go on the word before it.
  monkeypatch.setattr(
    completeness.tokenizer_lib, 'token_texts', lambda tokenizer: [' a'] * 50
  )
  concepts = {of.word: of for of in completeness._occurrences(context)}
  assert len(concepts) > 15
  for word, of in concepts.items():
    ids = [WORDS.index(part) for part in word.split()]
    rows = slow_occurrences(data, ids)
    np.testing.assert_array_equal(of.rows[0], rows[rows < data.n_train])
    np.testing.assert_array_equal(
      of.rows[1], rows[rows >= data.test_rows.start]
    )
    assert of.frequency == pytest.approx(len(of.rows[0]) / data.n_train)
  # Control: where tokens go on words, occurrences before them are none.
  monkeypatch.setattr(
    completeness.tokenizer_lib, 'token_texts', lambda tokenizer: ['a'] * 50
  )
  fewer = completeness._occurrences(context)
  assert sum(map(len, (r for of in fewer for r in of.rows))) < 0.5 * sum(
    map(len, (r for of in concepts.values() for r in of.rows))
  )


def test_own_latents_are_counted_by_hand():
  codes = [
    np.array(active)
    for active in (
      [1, 9], [1, 9], [1, 9], [2, 9], [2, 9], [9], [3, 9], [4, 9], [9, 4], [9],
    )
  ]  # fmt: skip
  # Rows of training and test documents of three concepts.
  parts = [
    np.array(rows) for rows in ([0, 1], [2, 2], [3, 4], [5, 3], [6], [7, 8])
  ]
  # The first has latent 1; the second latent 2, on half of its occurrences; the
  # third's latent 3 is silent on test documents, whatever latent 4 does there.
  # Latent 9, which is always active, is nobody's.
  np.testing.assert_array_equal(completeness._own(codes, parts), [1, 1, 0])
  # With the second's other occurrence on the first's token it is still half.
  parts[3] = np.array([5, 5, 3])
  np.testing.assert_array_equal(completeness._own(codes, parts), [1, 0, 0])


def test_a_dictionary_of_words_is_complete(context, data, monkeypatch):
  """One that has a latent for each token, and one that has none."""
  monkeypatch.setattr(
    completeness.tokenizer_lib, 'token_texts', lambda tokenizer: [' a'] * 50
  )
  outcome = completeness.measure(context)
  share = completeness.STATISTICS['own']
  got = figures.figure(share, outcome.samples['trained'])
  assert 0 <= got.value <= 1 and got.units > 15
  monkeypatch.setattr(
    completeness,
    '_codes',
    lambda context, scored, raw_BD, size, name: [
      np.array([token, 60]) for token in tokens_of(raw_BD, data)
    ],
  )
  outcome = completeness.measure(context)
  assert figures.figure(share, outcome.samples['trained']).value == 1
  assert 'Half of the concepts have a latent from' in outcome.remarks[0]
  monkeypatch.setattr(
    completeness,
    '_codes',
    lambda context, scored, raw_BD, size, name: [np.array([60])] * len(raw_BD),
  )
  outcome = completeness.measure(context)
  assert figures.figure(share, outcome.samples['trained']).value == 0
  assert 'at no frequency' in outcome.remarks[0]


def tokens_of(raw_BD, data):
  """The token that each row is of."""
  rows = data.read_rows(0, data.manifest.n_rows)
  tokens = data.tokens()[data.stream_index()]
  by_bytes = {row.tobytes(): token for row, token in zip(rows, tokens)}
  return [int(by_bytes[row.tobytes()]) for row in raw_BD]


def test_without_words_there_is_no_figure(context):
  bare = dataclasses.replace(context, wordnet='')
  with pytest.raises(context_lib.CannotMeasure, match='--wordnet=/usr/share'):
    completeness.measure(bare)
