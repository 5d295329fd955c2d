"""Contexts from any number of processes, which end when they should."""

import itertools
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from sae_jax import errors
from sae_jax.processes import _JOBS_AHEAD as JOBS_AHEAD
from sae_jax.text import contexts as contexts_lib
from sae_jax.text import corpus
from sae_jax.text import workers as workers_lib
from tests.support import processes
from tests.support.made_documents import (
  assert_same,
  BOS,
  byte_tokenizer,
  documents,
)


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

  assert_same(run(workers), run(0))


def test_special_tokens_are_text_in_other_processes_too():
  texts = [corpus.Document('s', 0, 'a<s>b')]
  for special_is_text, n_tokens in ((True, 5), (False, 3)):
    tokenizer = byte_tokenizer()
    tokenizer.encode_special_tokens = special_is_text
    for workers in (0, 1):
      ((_, tokens),) = workers_lib.tokenize(texts, tokenizer, workers)
      assert len(tokens) == n_tokens


def test_a_terminal_s_ctrl_c_does_not_reach_them():
  before = processes.children()
  tokens = workers_lib.tokenize(documents([5] * 100), byte_tokenizer(), 2)
  next(tokens)
  theirs = processes.children() - before
  assert len(theirs) == 2
  # From their first moment on; a terminal sends it to the group in front.
  assert os.getpgid(0) not in map(os.getpgid, theirs)
  tokens.close()
  assert not processes.children() - before


def counted(source, taken):
  for document in source:
    taken.append(document.number)
    yield document


def test_little_is_read_ahead_and_closing_ends_the_processes():
  before, taken = processes.children(), []
  stream = contexts_lib.contexts(
    counted(documents([100] * 5000), taken),
    byte_tokenizer(),
    context_length=64,
    workers=2,
  )
  assert not taken
  assert len(list(itertools.islice(stream, 5))) == 5
  ahead = workers_lib._BATCH_DOCUMENTS * (2 * JOBS_AHEAD + 1)
  assert 0 < len(taken) <= ahead
  assert len(processes.children() - before) == 2
  stream.close()
  assert processes.children() == before
  assert len(taken) <= ahead


def failing(lengths):
  yield from documents(lengths)
  raise errors.UserError('line 3 is wrong')


@pytest.mark.parametrize('workers', [0, 2])
def test_what_came_before_an_error_is_given(workers):
  stream = workers_lib.tokenize(failing([9] * 100), byte_tokenizer(), workers)
  before = processes.children()
  numbers = []
  with pytest.raises(errors.UserError, match='line 3 is wrong'):
    for document, _ in stream:
      numbers.append(document.number)
  assert numbers == list(range(100))
  assert processes.children() == before


@pytest.mark.parametrize('workers', [0, 2])
def test_a_text_that_is_none_is_named(workers):
  texts = [*documents([9] * 40), corpus.Document('odd', 40, 'a\ud83d')]
  numbers = []
  with pytest.raises(
    errors.UserError, match=r'document 40, of odd, cannot be tokenized \('
  ):
    for document, _ in workers_lib.tokenize(texts, byte_tokenizer(), workers):
      numbers.append(document.number)
  assert numbers == list(range(40))


def test_a_process_that_is_killed_is_one_line():
  before = processes.children()
  stream = contexts_lib.contexts(
    documents([2000] * 3000), byte_tokenizer(), context_length=64, workers=2
  )
  next(stream)
  os.kill(max(processes.children() - before), signal.SIGKILL)
  with pytest.raises(
    errors.UserError,
    match=r'tokenizing process \d of 2 was ended by SIGKILL.*use fewer',
  ) as caught:
    list(stream)
  assert '\n' not in str(caught.value)
  assert processes.children() == before


_PARENT = """
import sys, time
from sae_jax.text import contexts
from tests.support import made_documents, processes
# The long ones take seconds.
stream = contexts.contexts(
  made_documents.documents([10] * 64 + [3_000_000] * int(sys.argv[1])),
  made_documents.byte_tokenizer(), context_length=4, workers=2)
next(stream)
print(*processes.children(), flush=True)
time.sleep(60)
"""


def alive(process):
  try:
    state = pathlib.Path(f'/proc/{process}/stat').read_text()
  except OSError:
    return False
  return state.rpartition(')')[2].split()[0] != 'Z'


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
