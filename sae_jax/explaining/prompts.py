"""What a language model is asked: to explain a latent, or to judge texts."""

import math
from typing import Any

from sae_jax.explaining.examples import Drawn, Text
from sae_jax.probing import spelling

MARK = 'EXPLANATION:'
_LEVELS = 10
_EXPLAIN = f"""You say what makes one unit of a neural network active.

You are given texts on which it is. An active token is written <<token|n>>, with
n from 1, weak, to {_LEVELS}, the strongest seen. The first texts are the
strongest ones, the later ones are of all strengths: what you say must hold for
both. Texts without marks, if there are any, are alike, but the unit is not
active on them: what you say must not hold for these. Promoted tokens are those
that the unit makes likelier to come next, suppressed ones less likely; they may
tell more than the texts, or nothing.

Name the narrowest property that the active places have in common: a word, a
meaning, a form, a topic, or what comes just before or after. Do not mention
units, activations or marks. End with one line of at most 40 words:
{MARK} the property"""
_DETECT = """You judge texts by a description of what makes one unit of a neural
network active. For each numbered text decide whether the unit is active on at
least one of its tokens: 1 if it is, 0 if it is not. Texts may begin and end in
the middle of a sentence. Answer with a JSON list of one digit for each text, in
their order, such as [0, 1, 1], and with nothing else."""


def explain(
  drawn: Drawn,
  votes: tuple[tuple[int, ...], tuple[int, ...]],
  vocabulary: list[str | bytes],
) -> list[dict[str, str]]:
  """The messages that ask for an explanation.

  Args:
    drawn: the latent's texts.
    votes: tokens that it promotes, and that it suppresses.
    vocabulary: the text or bytes of each token.
  """
  highest = max(max(text.acts) for text in drawn.shown)
  parts = ['Active on:']
  parts += _numbered(_marked(text, highest, vocabulary) for text in drawn.shown)
  if drawn.near:
    parts += ['', 'Not active on:']
    parts += _numbered(plain(text, vocabulary) for text in drawn.near)
  for title, tokens in zip(('Promoted', 'Suppressed'), votes):
    if tokens:
      spelled = ', '.join(spelling.alone(vocabulary[t]) for t in tokens)
      parts += ['', f'{title} tokens: {spelled}']
  return _messages(_EXPLAIN, '\n'.join(parts))


def detect(
  explanation: str, texts: list[Text], vocabulary: list[str | bytes]
) -> list[dict[str, str]]:
  """The messages that ask on which texts a latent is active."""
  parts = [f'The unit is active on: {explanation}', '']
  parts += _numbered(plain(text, vocabulary) for text in texts)
  return _messages(_DETECT, '\n'.join(parts))


def _messages(system: str, user: str) -> list[dict[str, Any]]:
  return [
    {'role': 'system', 'content': system},
    {'role': 'user', 'content': user},
  ]


def _numbered(texts) -> list[str]:
  return [f'{number}. {text}' for number, text in enumerate(texts, 1)]


def plain(text: Text, vocabulary: list[str | bytes]) -> str:
  """A text on one line, without marks."""
  return spelling.visible(vocabulary[token] for token in text.tokens)


def level(act: float, highest: float) -> int:
  """An activation as an integer of 1 to 10, in proportion; 0 for none."""
  return min(_LEVELS, math.ceil(_LEVELS * act / highest)) if act > 0 else 0


def _marked(text: Text, highest: float, vocabulary) -> str:
  """A text with the level of each active token."""
  parts, plain_run = [], []
  for token, act in zip(text.tokens, text.acts):
    number = level(act, highest)
    if not number:
      plain_run.append(vocabulary[token])
      continue
    parts.append(spelling.visible(plain_run))
    plain_run = []
    spelled = spelling.visible([vocabulary[token]])
    # A token that is nothing but spaces is marked as they are.
    kept = spelled.lstrip(' ') or spelled
    # The space before a word is no part of it.
    parts.append(f'{" " * (len(spelled) - len(kept))}<<{kept}|{number}>>')
  parts.append(spelling.visible(plain_run))
  return ''.join(parts)
