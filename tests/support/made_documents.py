"""Documents and a tokenizer of bytes for them."""

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers

from sae_jax.text import corpus

BOS = 300


def byte_tokenizer():
  """A token a byte, and the special token <s>."""
  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  tokenizer = tokenizers.Tokenizer(
    models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
  )
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.add_special_tokens(['<s>'])
  tokenizer.encode_special_tokens = True
  return tokenizer


def documents(lengths, seed=0):
  rng = np.random.default_rng(seed)
  for number, length in enumerate(lengths):
    text = ''.join(map(chr, rng.integers(32, 127, length)))
    yield corpus.Document(f'source {number % 3}', number, text)


LENGTHS = [0, 5, 64, 3, 1, 200, 16, 17, 15, 0, 33, 2, 2, 2, 100]


def assert_same(got, want):
  got, want = list(got), list(want)
  assert len(got) == len(want)
  for a, b in zip(got, want):
    assert a.tokens.dtype == a.documents.dtype == np.int32
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_array_equal(a.documents, b.documents)
    assert a.sources == b.sources
    assert a.start == b.start
