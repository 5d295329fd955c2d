"""Contexts: cut by document, packed whole."""

import types

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.text import contexts as contexts_lib
from tests.support.made_documents import (
  BOS,
  byte_tokenizer,
  documents,
  LENGTHS,
  same,
)


@pytest.mark.parametrize('most', [1, 3, 100])
@pytest.mark.parametrize('least', [1, 4])
def test_documents_are_cut_into_contexts(most, least):
  wanted, number = [], 0
  for document in documents(LENGTHS):
    ids = byte_tokenizer().encode(document.text).ids[: 16 * most]
    pieces = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    pieces = [piece for piece in pieces if len(piece) >= least]
    wanted += [(number, document.source, piece) for piece in pieces]
    number += bool(pieces)
  found = list(
    contexts_lib.contexts(
      documents(LENGTHS),
      byte_tokenizer(),
      context_length=16,
      max_contexts_per_document=most,
      min_context_tokens=least,
    )
  )
  assert len(found) == len(wanted) > 5
  for context, (number, source, tokens) in zip(found, wanted):
    np.testing.assert_array_equal(context.tokens, tokens)
    assert set(context.documents.tolist()) == {number}
    assert context.sources == (source,)
    np.testing.assert_array_equal(context.positions, np.arange(len(tokens)))


@pytest.mark.parametrize('bos', [None, BOS])
def test_packed_contexts_are_the_documents_end_to_end(bos):
  made = byte_tokenizer()
  texts = [d for d in documents(LENGTHS) if d.text]
  stream, numbers = [], []
  for number, document in enumerate(texts):
    ids = [*([] if bos is None else [bos]), *made.encode(document.text).ids]
    stream += ids
    numbers += [number] * len(ids)
  found = list(
    contexts_lib.contexts(
      documents(LENGTHS), made, context_length=16, pack=True, bos=bos
    )
  )
  assert [len(c.tokens) for c in found[:-1]] == [16] * (len(found) - 1)
  assert np.concatenate([c.tokens for c in found]).tolist() == stream
  assert np.concatenate([c.documents for c in found]).tolist() == numbers
  assert max(len(c.sources) for c in found) > 3
  for context in found:
    covered = []
    for number, source, place in context.segments():
      assert set(context.documents[place].tolist()) == {number}
      assert source == texts[number].source
      covered += range(place.start, place.stop)
    assert covered == context.positions.tolist()
  if bos is not None:
    starts = [c.tokens[s] for c in found for *_, s in c.segments()]
    assert sum(part[0] == BOS for part in starts) == len(texts)


def test_packed_documents_are_cut_off_and_a_short_end_left_out():
  found = list(
    contexts_lib.contexts(
      documents([100, 5, 100]),
      byte_tokenizer(),
      context_length=16,
      max_contexts_per_document=2,
      min_context_tokens=6,
      pack=True,
    )
  )
  numbers = np.concatenate([c.documents for c in found])
  # 32 + 5 + 32 tokens, of which the last 5 fill no context.
  assert [int((numbers == i).sum()) for i in range(3)] == [32, 5, 27]
  kept = contexts_lib.contexts(
    documents([100, 5, 100]),
    byte_tokenizer(),
    context_length=16,
    max_contexts_per_document=2,
    min_context_tokens=5,
    pack=True,
  )
  assert [len(c.tokens) for c in kept] == [16, 16, 16, 16, 5]


@pytest.mark.parametrize('bos', [None, BOS])
@pytest.mark.parametrize('pack', [False, True])
def test_contexts_go_on_from_the_place_of_any(pack, bos):
  seen = []

  def encode(text):
    seen.append(text)
    return byte_tokenizer().encode(text)

  def contexts(**start):
    return contexts_lib.contexts(
      documents(LENGTHS),
      types.SimpleNamespace(encode=encode),
      context_length=16,
      max_contexts_per_document=5,
      min_context_tokens=2,
      pack=pack,
      bos=bos,
      **start,
    )

  whole = list(contexts())
  assert len(whole) > 15
  for number, context in enumerate(whole):
    seen.clear()
    same(contexts(start=context.place), whole[number:])
    # What is before is not tokenized.
    texts = [document.text for document in documents(LENGTHS)]
    assert seen == texts[context.place.document :]
  # Control: an offset or a number that is another is seen.
  wrong = whole[3].place._replace(offset=whole[3].place.offset + 1)
  with pytest.raises(AssertionError):
    same(contexts(start=wrong), whole[3:])


def test_a_bos_is_before_a_document_that_is_cut():
  first, second = contexts_lib.contexts(
    documents([20]), byte_tokenizer(), context_length=16, bos=BOS
  )
  assert (first.tokens[0], len(first.tokens), len(second.tokens)) == (
    BOS,
    16,
    5,
  )
  assert BOS not in second.tokens


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'context_length': 0}, 'context_length 0 must be 1 or more'),
    ({'min_context_tokens': 17}, 'min_context_tokens 17 is above'),
    ({'max_contexts_per_document': -1}, 'max_contexts_per_document -1 must'),
    ({'bos': -1}, 'bos -1 must be 0'),
    ({'workers': -1}, 'workers -1 must be 0'),
    ({'tokenizer': '{}'}, 'tokenizer cannot be read'),
  ],
)
def test_wrong_numbers(wrong, message):
  settings = {'tokenizer': byte_tokenizer(), 'context_length': 16} | wrong
  with pytest.raises(errors.UserError, match=message):
    contexts_lib.contexts(documents([5]), **settings)


def test_the_text_of_a_tokenizer_is_a_tokenizer():
  made = byte_tokenizer()
  made.encode_special_tokens = False
  same(
    contexts_lib.contexts(documents(LENGTHS), made.to_str(), context_length=16),
    contexts_lib.contexts(documents(LENGTHS), made, context_length=16),
  )
