"""The packaged model's tokenizer."""

import inspect
import json
import random

import pytest

from sae_jax import subject
from sae_jax.subject.formats import gguf
from sae_jax.subject.formats import tokenizer as tokenizer_lib
from tests.support.pieces import pieces


@pytest.fixture(scope='module')
def packaged():
  file = gguf.open_gguf(subject.find('smollm2-135m'))
  return tokenizer_lib.from_metadata(file.metadata)


def test_packaged_token_ids(packaged):
  # Recorded from another implementation on the same file.
  text = 'The capital of France is'
  assert tokenizer_lib.encode(packaged, text) == [504, 3575, 282, 4649, 314]
  tokens = [254, 216, 33, 40, 38, 35, 15486, 46494]
  assert tokenizer_lib.encode(packaged, 'in 1863 naïve') == tokens
  assert pieces(packaged, 'in 1863 naïve') == (
    ['in', ' ', '1', '8', '6', '3', ' na', 'ïve']
  )


def test_packaged_round_trip(packaged):
  source = inspect.getsource(json)
  for text in (source, 'naïve 日本語 🙂 x=12345 \t\r\n  end', '<|im_start|>'):
    tokens = tokenizer_lib.encode(packaged, text)
    assert tokenizer_lib.decode(packaged, tokens) == text
  # A different cut of the text must not decode to it.
  assert tokenizer_lib.decode(packaged, tokens[1:]) != text


def test_packaged_token_texts_equal_decoding_one_token(packaged):
  strings = tokenizer_lib.token_texts(packaged)
  assert len(strings) == 49_152
  broken = 0
  for i in random.Random(0).sample(range(49_152), 5_000):
    decoded = tokenizer_lib.decode(packaged, [i])
    if '\ufffd' in decoded:
      broken += 1
      assert isinstance(strings[i], bytes)
    else:
      assert strings[i] == decoded
  assert broken > 10
