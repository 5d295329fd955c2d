"""Token patterns: how they are made, and what they predict."""

import itertools

import numpy as np
import pytest

from sae_jax.probing.suite import patterns
from sae_jax.probing.suite.patterns import Pattern, WILDCARD

PAD = 99


def walk(of_latent, tokens, at):
  """What a walk through the trie of reversed patterns ends in."""
  best = (0, 0.0)
  for pattern in of_latent:
    n = len(pattern.tokens)
    if n > at + 1 or (pattern.at_start and n != at + 1):
      continue
    end = tokens[at + 1 - n : at + 1]
    if all(t in (WILDCARD, e) for t, e in zip(pattern.tokens, end)):
      best = max(best, (n, pattern.value))
  return best[1]


def test_predictions_are_those_of_a_walk():
  rng = np.random.default_rng(0)
  tokens_CT = rng.integers(0, 3, (12, 9))
  length_C = rng.integers(1, 10, 12)
  of_latent = [
    Pattern(
      tuple(rng.choice([WILDCARD, 0, 1, 2], rng.integers(1, 5)).tolist()),
      bool(rng.random() < 0.3),
      float(rng.uniform(1, 2)),
    )
    for _ in range(8)
  ] + [Pattern(tuple(range(12)), False, 1.0)]
  got = patterns.predictions(of_latent, tokens_CT, length_C)
  for c, t in itertools.product(range(12), range(9)):
    want = walk(of_latent, tokens_CT[c], t) if t < length_C[c] else 0
    assert got[c, t] == want
  assert 0.1 < (got > 0).mean() < 0.9
  # Control: without their starts they match elsewhere too.
  free = [Pattern(p.tokens, False, p.value) for p in of_latent]
  other = patterns.predictions(free, tokens_CT, length_C)
  assert (other != got).any()


def made(tokens, activation, longest=16):
  """The pattern of a text for a latent that is a function of texts."""

  def activations(texts):
    return np.array([activation(text) for text in texts])

  value = activation(list(tokens))
  return patterns.trimmed(
    patterns.of_example(list(tokens), value, activations, PAD, longest)
  )


def test_a_latent_of_one_token_needs_no_more():
  got = made([5, 6, 7], lambda text: 2.0 * (text[-1] == 7))
  assert got == Pattern((7,), False, 2.0)


def test_what_does_not_matter_is_a_wildcard():
  def fires(text):
    return 3.0 * (text[-1] == 7 and len(text) > 2 and text[-3] == 5)

  assert made([1, 5, 6, 7], fires) == Pattern((5, WILDCARD, 7), False, 3.0)


def test_half_of_the_activation_is_enough():
  """What adds less than half of it is left out, and what adds more is kept."""

  def weighs(weight):
    return lambda text: (text[-1] == 7) * (1 + weight * (text[-2:-1] == [6]))

  assert made([6, 7], weighs(0.9)).tokens == (7,)
  assert made([6, 7], weighs(1.1)).tokens == (6, 7)


def test_a_latent_of_the_start_says_so():
  got = made([5, 7], lambda text: 2.0 * (text == [5, 7]))
  assert got == Pattern((5, 7), True, 2.0)
  # Its wildcards say how far from the start it is.
  got = made([5, 7], lambda text: 2.0 * (len(text) == 2 and text[-1] == 7))
  assert got == Pattern((WILDCARD, 7), True, 2.0)


def test_a_long_text_is_cut():
  def fires(text):
    return 1.0 * (5 in text)

  tokens = [5, *range(10, 30)]
  got = made(tokens, fires, longest=4)
  assert got.tokens[-1] == 29 and len(got.tokens) <= 4


@pytest.mark.parametrize('longest', [3, 4, 10, 16, 20])
def test_the_shortest_end_is_that_of_all_ends(longest):
  """However few are tried at a time; a latent may lose and gain with length."""
  rng, lengths = np.random.default_rng(longest), set()
  for n_tokens in range(1, 25):
    tokens = rng.integers(0, 9, n_tokens).tolist()
    keeps = rng.random(25) < 0.1
    asked = []

    def activations(texts, keeps=keeps, asked=asked):
      asked.extend(map(len, texts))
      return np.array([float(keeps[len(text)]) for text in texts])

    got = patterns.of_example(tokens, 1.0, activations, PAD, longest)
    most = min(n_tokens, longest)
    kept = [n for n in range(1, most + 1) if keeps[n]]
    want = kept[0] if kept else most
    assert len(got.tokens) == want
    lengths.add(want)
    # And those far beyond it are not read.
    tried = next((n for n in patterns.TRIED if n >= want), longest)
    assert max(asked) <= tried + 1
  assert len(lengths) > min(longest, 5) - 1


def test_patterns_are_shown_as_text():
  names = ['a', ' b', ' c']
  assert patterns.text(Pattern((0, WILDCARD, 2), True, 1.0), names) == (
    '[start]a[any] c'
  )
