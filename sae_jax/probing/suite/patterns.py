"""Token patterns that explain when a latent fires, after Neuron to Graph.

Foote et al., "Neuron to Graph: interpreting language model neurons at scale"
(2023), in the form of Gao et al. (2024), section 4.3: a pattern is the shortest
end of a text on which the latent still fires at half of its activation, with
wildcards for the tokens in it that do not matter.
"""

from collections.abc import Callable, Sequence
import dataclasses

import numpy as np

WILDCARD = -1
# Share of the activation that a shorter or changed text must keep.
KEPT = 0.5
# Ends up to these lengths are tried together, and longer ones if none of them
# keeps it: most patterns are of few tokens.
TRIED = (4, 8, 16)


@dataclasses.dataclass(frozen=True)
class Pattern:
  """A run of tokens that ends where the latent fires.

  Attributes:
    tokens: ids, or WILDCARD; the last one is that on which it fires.
    at_start: whether the run must begin the context.
    value: the activation that it stands for.
  """

  tokens: tuple[int, ...]
  at_start: bool
  value: float


def of_example(
  tokens: Sequence[int],
  value: float,
  activations: Callable[[list[list[int]]], np.ndarray],
  pad: int,
  longest: int,
) -> Pattern:
  """The pattern of one text on whose last token a latent fires.

  Args:
    tokens: the context up to that token.
    value: the activation there.
    activations: texts -> the latent's activation on the last token of each.
    pad: the token that others are replaced by.
    longest: tokens of a pattern, at most.
  """
  end = _shortest(tokens, KEPT * value, activations, longest)
  n = len(end)
  changed = [[*end[:i], pad, *end[i + 1 :]] for i in range(n - 1)]
  own, moved, *others = activations([end, [pad, *end], *changed])
  if own <= 0:
    own = value
  matters = [other < KEPT * own for other in others] + [True]
  return Pattern(
    tuple(t if m else WILDCARD for t, m in zip(end, matters)),
    # A text as long as the context begins with it whatever happens.
    at_start=bool(moved < KEPT * own),
    value=float(value),
  )


def _shortest(tokens, least, activations, longest) -> list[int]:
  """The shortest end of a text that keeps an activation.

  Where none does, the longest: that is the best that can be said.
  """
  most, shorter = min(len(tokens), longest), 0
  for up_to in sorted({min(n, most) for n in (*TRIED, most)}):
    ends = [list(tokens[-n:]) for n in range(shorter + 1, up_to + 1)]
    kept = activations(ends) >= least
    if kept.any():
      return ends[int(kept.argmax())]
    shorter = up_to
  return ends[-1]


def trimmed(pattern: Pattern) -> Pattern:
  """The pattern without wildcards that it begins with, which say nothing.

  At the start of a context they say how far from it the others are.
  """
  if pattern.at_start:
    return pattern
  tokens = pattern.tokens
  while tokens[0] == WILDCARD:
    tokens = tokens[1:]
  return dataclasses.replace(pattern, tokens=tokens)


def predictions(
  patterns: Sequence[Pattern], tokens_CT: np.ndarray, length_C: np.ndarray
) -> np.ndarray:
  """The activation that patterns predict for each token.

  Where several match, the longest counts, as at the end of a walk through the
  trie of reversed patterns; of equally long ones the highest.

  Args:
    patterns: of one latent.
    tokens_CT: contexts.
    length_C: tokens of each; those behind match nothing.

  Returns:
    [C, T]; 0 where none matches.
  """
  width = tokens_CT.shape[1]
  inside_CT = np.arange(width) < np.asarray(length_C)[:, None]
  value_CT = np.zeros(tokens_CT.shape)
  in_order = sorted(patterns, key=lambda p: (len(p.tokens), p.value))
  for pattern in in_order:
    n = len(pattern.tokens)
    if n > width:
      continue
    matches_CE = np.ones((len(tokens_CT), width - n + 1), bool)
    for i, token in enumerate(pattern.tokens):
      if token != WILDCARD:
        matches_CE &= tokens_CT[:, i : i + width - n + 1] == token
    if pattern.at_start:
      matches_CE[:, 1:] = False
    value_CT[:, n - 1 :][matches_CE] = pattern.value
  return np.where(inside_CT, value_CT, 0)


def text(pattern: Pattern, names: Sequence[str]) -> str:
  """The pattern for a reader, of the vocabulary's texts."""
  parts = [
    '[any]' if token == WILDCARD else names[token] for token in pattern.tokens
  ]
  return ('[start]' if pattern.at_start else '') + ''.join(parts)
