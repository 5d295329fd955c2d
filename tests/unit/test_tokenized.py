"""Contexts: cut by document, packed whole, begun by a BOS."""

import types

import numpy as np
import pytest
from tokenizers import processors

from sae_jax import errors
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus
from tests.support.made_documents import (
  assert_same,
  BOS,
  byte_tokenizer,
  documents,
  LENGTHS,
)


@pytest.mark.parametrize('max_contexts', [1, 3, 100])
@pytest.mark.parametrize('min_tokens', [1, 4])
def test_documents_are_cut_into_contexts(max_contexts, min_tokens):
  want, number = [], 0
  for document in documents(LENGTHS):
    ids = byte_tokenizer().encode(document.text).ids[: 16 * max_contexts]
    pieces = [ids[i : i + 16] for i in range(0, len(ids), 16)]
    pieces = [piece for piece in pieces if len(piece) >= min_tokens]
    want += [(number, document.source, piece) for piece in pieces]
    number += bool(pieces)
  got = list(
    contexts_lib.contexts(
      documents(LENGTHS),
      byte_tokenizer(),
      context_length=16,
      max_contexts_per_document=max_contexts,
      min_context_tokens=min_tokens,
    )
  )
  assert len(got) == len(want) > 5
  for context, (number, source, tokens) in zip(got, want):
    np.testing.assert_array_equal(context.tokens, tokens)
    assert set(context.documents.tolist()) == {number}
    assert context.sources == (source,)
    np.testing.assert_array_equal(context.positions, np.arange(len(tokens)))


def test_packed_contexts_are_the_documents_end_to_end():
  tokenizer = byte_tokenizer()
  texts = [d for d in documents(LENGTHS) if d.text]
  stream, numbers = [], []
  for number, document in enumerate(texts):
    ids = tokenizer.encode(document.text).ids
    stream += ids
    numbers += [number] * len(ids)
  packed = list(
    contexts_lib.contexts(
      documents(LENGTHS), tokenizer, context_length=16, pack=True
    )
  )
  assert [len(c.tokens) for c in packed[:-1]] == [16] * (len(packed) - 1)
  assert np.concatenate([c.tokens for c in packed]).tolist() == stream
  assert np.concatenate([c.documents for c in packed]).tolist() == numbers
  assert max(len(c.sources) for c in packed) > 3
  for context in packed:
    covered = []
    for number, source, segment in context.segments():
      assert set(context.documents[segment].tolist()) == {number}
      assert source == texts[number].source
      covered += range(segment.start, segment.stop)
    assert covered == context.positions.tolist()


@pytest.mark.parametrize('pack', [False, True])
@pytest.mark.parametrize('length', [2, 16])
def test_a_bos_begins_contexts_and_documents(pack, length):
  """The one rule; without the BOS the text is what it is without."""
  settings = {'context_length': length, 'pack': pack}
  got = list(
    contexts_lib.contexts(
      documents(LENGTHS), byte_tokenizer(), bos=BOS, **settings
    )
  )
  texts = [d for d in documents(LENGTHS) if d.text]
  whole = {number: [] for number in range(len(texts))}
  for context in got:
    assert context.tokens[0] == BOS
    assert len(context.tokens) <= length
    for number, source, place in context.segments():
      first, *rest = context.tokens[place].tolist()
      assert first == BOS
      assert BOS not in rest
      assert source == texts[number].source
      whole[number] += rest
  assert list(whole.values()) == [
    byte_tokenizer().encode(document.text).ids for document in texts
  ]


@pytest.mark.parametrize('pack', [False, True])
def test_a_text_s_own_bos_is_not_doubled(pack):
  text = corpus.Document('source', 0, '<s>ab<s>')
  tokenizer = byte_tokenizer()
  tokenizer.encode_special_tokens = False
  own = tokenizer.token_to_id('<s>')
  (context,) = contexts_lib.contexts(
    [text], tokenizer, context_length=16, pack=pack, bos=own
  )
  a, b = (tokenizer.token_to_id(letter) for letter in 'ab')
  assert context.tokens.tolist() == [own, a, b, own]
  # Control: another token is put before it.
  (context,) = contexts_lib.contexts(
    [text], tokenizer, context_length=16, pack=pack, bos=BOS
  )
  assert context.tokens.tolist() == [BOS, own, a, b, own]


def test_what_a_post_processor_adds_is_no_text():
  tokenizer = byte_tokenizer()
  want = tokenizer.encode('ab').ids
  tokenizer.post_processor = processors.TemplateProcessing(
    single='<s> $A', special_tokens=[('<s>', 256)]
  )
  text = [corpus.Document('source', 0, 'ab')]
  for form in (tokenizer, tokenizer.to_str()):
    (context,) = contexts_lib.contexts(text, form, context_length=16)
    assert context.tokens.tolist() == want
  tokenizer.enable_padding(length=9)
  tokenizer.enable_truncation(1)
  (context,) = contexts_lib.contexts(
    text, tokenizer.to_str(), context_length=16
  )
  assert context.tokens.tolist() == want


def test_packed_documents_are_cut_off_and_a_short_end_left_out():
  packed = list(
    contexts_lib.contexts(
      documents([100, 5, 100]),
      byte_tokenizer(),
      context_length=16,
      max_contexts_per_document=2,
      min_context_tokens=6,
      pack=True,
    )
  )
  numbers = np.concatenate([c.documents for c in packed])
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
def test_contexts_go_on_from_the_start_of_any(pack, bos):
  seen = []

  def encode(text, add_special_tokens):
    assert not add_special_tokens
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
    assert_same(contexts(start=context.start), whole[number:])
    # What is before is not tokenized.
    texts = [document.text for document in documents(LENGTHS)]
    assert seen == texts[context.start.document :]
  # Control: an offset or a number that is another is seen.
  wrong = whole[3].start._replace(offset=whole[3].start.offset + 1)
  with pytest.raises(AssertionError):
    assert_same(contexts(start=wrong), whole[3:])


@pytest.mark.parametrize(
  ('wrong', 'message'),
  [
    ({'context_length': 0}, 'context_length 0 must be 1 or more'),
    ({'min_context_tokens': 17}, 'min_context_tokens 17 is above'),
    ({'max_contexts_per_document': -1}, 'max_contexts_per_document -1 must'),
    ({'bos': -1}, 'bos -1 must be 0'),
    ({'bos': 1, 'context_length': 1}, 'has room for a BOS alone'),
    ({'workers': -1}, 'workers -1 must be 0'),
    ({'tokenizer': '{}'}, 'tokenizer cannot be read'),
  ],
)
def test_wrong_numbers(wrong, message):
  settings = {'tokenizer': byte_tokenizer(), 'context_length': 16} | wrong
  with pytest.raises(errors.UserError, match=message):
    contexts_lib.contexts(documents([5]), **settings)


def test_the_text_of_a_tokenizer_is_a_tokenizer():
  tokenizer = byte_tokenizer()
  tokenizer.encode_special_tokens = False
  assert_same(
    *(
      contexts_lib.contexts(documents(LENGTHS), form, context_length=16)
      for form in (tokenizer.to_str(), tokenizer)
    )
  )
