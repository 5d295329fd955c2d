"""Contexts: cut by document, packed whole, the same from any process."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from sae_jax import errors
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus
from sae_jax.text import workers as workers_lib

BOS = 300


def byte_tokenizer():
  """A token a byte, and the special token <s>."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(
    models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
  )
  made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  made.add_special_tokens(['<s>'])
  made.encode_special_tokens = True
  return made


def documents(lengths, seed=0):
  rng = np.random.default_rng(seed)
  for number, length in enumerate(lengths):
    text = ''.join(map(chr, rng.integers(32, 127, length)))
    yield corpus.Document(f'source {number % 3}', number, text)


LENGTHS = [0, 5, 64, 3, 1, 200, 16, 17, 15, 0, 33, 2, 2, 2, 100]


def same(found, wanted):
  found, wanted = list(found), list(wanted)
  assert len(found) == len(wanted)
  for a, b in zip(found, wanted):
    assert a.tokens.dtype == a.documents.dtype == np.int32
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.documents, b.documents)
    assert a.sources == b.sources
    assert a.place == b.place


@pytest.mark.fast
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


@pytest.mark.fast
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


@pytest.mark.fast
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


@pytest.mark.fast
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


@pytest.mark.fast
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


@pytest.mark.fast
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


@pytest.mark.fast
def test_the_text_of_a_tokenizer_is_a_tokenizer():
  made = byte_tokenizer()
  made.encode_special_tokens = False
  same(
    contexts_lib.contexts(documents(LENGTHS), made.to_str(), context_length=16),
    contexts_lib.contexts(documents(LENGTHS), made, context_length=16),
  )


@pytest.mark.slow
@pytest.mark.parametrize(('workers', 'pack'), [(1, True), (3, False)])
def test_any_number_of_processes_gives_the_same(workers, pack):
  lengths = np.random.default_rng(0).integers(0, 400, 300).tolist()
  # More than the line holds, there and back.
  lengths[50:54] = [150_000] * 4

  def run(workers):
    return contexts_lib.contexts(
      documents(lengths),
      byte_tokenizer(),
      context_length=64,
      pack=pack,
      bos=BOS,
      workers=workers,
    )

  same(run(workers), run(0))


@pytest.mark.slow
def test_special_tokens_are_text_in_other_processes_too():
  texts = [corpus.Document('s', 0, 'a<s>b')]
  for special_is_text, tokens in ((True, 5), (False, 3)):
    made = byte_tokenizer()
    made.encode_special_tokens = special_is_text
    for workers in (0, 1):
      ((_, found),) = workers_lib.tokenize(texts, made, workers)
      assert len(found) == tokens


def children():
  """Ids of the processes that this one has started and not waited for."""
  task = pathlib.Path(f'/proc/{os.getpid()}/task')
  return {
    int(child)
    for thread in task.iterdir()
    for child in (thread / 'children').read_text().split()
  }


def counted(source, taken):
  for document in source:
    taken.append(document.number)
    yield document


@pytest.mark.slow
def test_little_is_read_ahead_and_closing_ends_the_processes():
  before, taken = children(), []
  stream = contexts_lib.contexts(
    counted(documents([100] * 5000), taken),
    byte_tokenizer(),
    context_length=64,
    workers=2,
  )
  assert not taken
  assert len(list(itertools.islice(stream, 5))) == 5
  ahead = workers_lib._BATCH_DOCUMENTS * (2 * workers_lib._BATCHES_AHEAD + 1)
  assert 0 < len(taken) <= ahead
  assert len(children() - before) == 2
  stream.close()
  assert children() == before
  assert len(taken) <= ahead


def failing(lengths):
  yield from documents(lengths)
  raise errors.UserError('line 3 is wrong')


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_what_came_before_an_error_is_given(workers):
  stream = workers_lib.tokenize(failing([9] * 100), byte_tokenizer(), workers)
  before = children()
  found = []
  with pytest.raises(errors.UserError, match='line 3 is wrong'):
    for document, _ in stream:
      found.append(document.number)
  assert found == list(range(100))
  assert children() == before


@pytest.mark.slow
@pytest.mark.parametrize('workers', [0, 2])
def test_a_text_that_is_none_is_named(workers):
  texts = [*documents([9] * 40), corpus.Document('odd', 40, 'a\ud83d')]
  found = []
  with pytest.raises(
    errors.UserError, match=r'document 40, of odd, cannot be tokenized \('
  ):
    for document, _ in workers_lib.tokenize(texts, byte_tokenizer(), workers):
      found.append(document.number)
  assert found == list(range(40))


@pytest.mark.slow
def test_a_process_that_is_killed_is_one_line():
  before = children()
  stream = contexts_lib.contexts(
    documents([2000] * 3000), byte_tokenizer(), context_length=64, workers=2
  )
  next(stream)
  os.kill(max(children() - before), signal.SIGKILL)
  with pytest.raises(
    errors.UserError,
    match=r'tokenizing process \d of 2 was ended by SIGKILL.*use fewer',
  ) as caught:
    list(stream)
  assert '\n' not in str(caught.value)
  assert children() == before


_PARENT = """
import itertools, os, pathlib, sys, time
from sae_jax.text import contexts
from tests import test_tokenized
# The long ones take seconds.
stream = contexts.contexts(
  test_tokenized.documents([10] * 64 + [3_000_000] * int(sys.argv[1])),
  test_tokenized.byte_tokenizer(), context_length=4, workers=2)
next(stream)
print(*test_tokenized.children(), flush=True)
time.sleep(60)
"""


def alive(process):
  try:
    state = pathlib.Path(f'/proc/{process}/stat').read_text()
  except OSError:
    return False
  return state.rpartition(')')[2].split()[0] != 'Z'


@pytest.mark.slow
@pytest.mark.parametrize('busy', [0, 2])
@pytest.mark.parametrize('end', [signal.SIGTERM, signal.SIGKILL])
def test_processes_end_with_their_parent(end, busy):
  parent = subprocess.Popen(
    [sys.executable, '-c', _PARENT, str(busy)],
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    workers = [int(child) for child in parent.stdout.readline().split()]
    assert len(workers) == 2
    assert all(map(alive, workers))
    parent.send_signal(end)
    assert parent.wait(20) == -end
    waited = time.monotonic() + 20
    while any(map(alive, workers)) and time.monotonic() < waited:
      time.sleep(0.02)
    assert not any(map(alive, workers))
  finally:
    parent.kill()
    parent.communicate()
