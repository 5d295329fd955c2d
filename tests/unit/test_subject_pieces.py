"""Tokenizers of pieces from GGUF metadata, against a slow search."""

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
import pytest

from sae_jax import errors
from sae_jax.subject.formats import tokenizer as tokenizer_lib


def pieces_metadata(scores, kinds=None, **changes):
  """A vocabulary of pieces without bytes, given each piece's score."""
  return {
    'tokenizer.ggml.model': 'llama',
    'tokenizer.ggml.tokens': list(scores),
    'tokenizer.ggml.scores': list(scores.values()),
    'tokenizer.ggml.token_type': kinds or [1] * len(scores),
  } | {f'tokenizer.ggml.{key}': value for key, value in changes.items()}


def best_neighbours(scores, text):
  """SentencePiece's rule: the best score, and the leftmost of equals."""
  symbols = list('▁' + text.replace(' ', '▁'))
  while True:
    merges = [
      (-scores[a + b], i)
      for i, (a, b) in enumerate(itertools.pairwise(symbols))
      if a + b in scores
    ]
    if not merges:
      return symbols
    _, i = min(merges)
    symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


def test_runs_of_spaces_with_equal_scores():
  # The lengths that Llama 2 and Mistral have, all below every other piece.
  lengths = (2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 16)
  scores = {'▁a': -1.0, 'ab': -2.0, '▁ab': -3.0, '▁': -4.0, 'a': -5.0}
  scores |= {'b': -6.0} | {'▁' * n: -1e9 for n in lengths}
  tokenizer = tokenizer_lib.from_metadata(pieces_metadata(scores))
  for n in range(60):
    for text in (' ' * n, ' ' * n + 'ab', 'b' + ' ' * n + 'abb'):
      pieces = [
        tokenizer.id_to_token(i) for i in tokenizer_lib.encode(tokenizer, text)
      ]
      assert pieces == (best_neighbours(scores, text) if text else [])
  assert [len(x) for x in best_neighbours(scores, ' ' * 31)] == [16, 16]


@settings(deadline=None, max_examples=100)
@given(st.text('ab ', min_size=1, max_size=40))
def test_pieces_are_the_best_neighbours(text):
  scores = {'▁': -9.0, 'a': -8.0, 'b': -7.0}
  names = ('ab', 'ba', '▁a', 'bb', '▁ab', 'bba', 'abba', '▁abba', 'ba▁')
  scores |= {name: -i for i, name in enumerate(names)}
  tokenizer = tokenizer_lib.from_metadata(pieces_metadata(scores))
  pieces = [
    tokenizer.id_to_token(i) for i in tokenizer_lib.encode(tokenizer, text)
  ]
  assert pieces == best_neighbours(scores, text)


def test_no_text_makes_a_control_token():
  scores = dict.fromkeys(['<', '/', 's', '>', '▁'], -9.0)
  scores |= {'</': -1.0, 's>': -2.0, '</s>': 0.0, '<unk>': 0.0}
  kinds = [1] * 7 + [3, 2]
  metadata = pieces_metadata(scores, kinds)
  tokenizer = tokenizer_lib.from_metadata(metadata)
  pieces = [
    tokenizer.id_to_token(i) for i in tokenizer_lib.encode(tokenizer, '</s>')
  ]
  assert pieces == ['▁', '</', 's>']
  # Control: if the file calls it a piece it is merged.
  tokenizer = tokenizer_lib.from_metadata(
    pieces_metadata(scores, [1] * 8 + [2])
  )
  pieces = [
    tokenizer.id_to_token(i) for i in tokenizer_lib.encode(tokenizer, '</s>')
  ]
  assert pieces == ['▁', '</s>']


@pytest.mark.parametrize(
  'kind, changes', [(2, {}), (3, {'unknown_token_id': 0})]
)
def test_unknown_characters_without_bytes(kind, changes):
  scores = {'<unk>': 0.0, '▁': -1.0, 'a': -2.0}
  metadata = pieces_metadata(scores, [kind, 1, 1], **changes)
  tokenizer = tokenizer_lib.from_metadata(metadata)
  assert tokenizer_lib.encode(tokenizer, 'aéé a') == [1, 2, 0, 1, 2]


def test_merges_of_a_file_with_pieces_go_before_its_scores():
  # CodeLlama's has both.
  scores = {'▁': -9.0, 'a': -9.0, 'b': -9.0, 'ab': -1.0, '▁a': -2.0}
  by_score = tokenizer_lib.from_metadata(pieces_metadata(scores))
  assert tokenizer_lib.encode(by_score, 'ab') == [0, 3]
  metadata = pieces_metadata(scores, merges=['▁ a', 'a b'])
  by_merges = tokenizer_lib.from_metadata(metadata)
  assert tokenizer_lib.encode(by_merges, 'ab') == [4, 2]


def test_scores_that_say_nothing_are_refused():
  scores = dict.fromkeys(['▁', 'a', 'b', 'ab', '▁a'], -1000.0)
  with pytest.raises(errors.UserError) as error:
    tokenizer_lib.from_metadata(pieces_metadata(scores))
  assert str(error.value) == (
    'the GGUF file gives every piece of its tokenizer the same score: '
    'convert the model again with its tokenizer.model'
  )


@pytest.mark.parametrize('name', ['tokens', 'scores', 'token_type'])
def test_a_missing_part_is_named(name):
  metadata = pieces_metadata({'a': 0.0})
  del metadata[f'tokenizer.ggml.{name}']
  with pytest.raises(errors.UserError) as error:
    tokenizer_lib.from_metadata(metadata)
  assert str(error.value) == (
    f'the GGUF file does not hold tokenizer.ggml.{name}: '
    'convert the model again'
  )
