"""Reading answers strictly: what is not one is a failure of some kind.

Nothing is put in the place of an answer that cannot be used: it is counted.
"""

import json
import math
import re
from typing import Any, NamedTuple

from sae_jax import errors
from sae_jax.explaining import prompts

# Kinds of answers that cannot be used.
FAILURES = {
  'null_content': 'the content is null',
  'reasoning_only': 'there is reasoning and no content',
  'not_text': 'the content is no text, such as a list',
  'empty': 'the content is empty',
  'truncated': 'the answer was cut at its most tokens',
  'refused': 'the model or a filter refused',
  'unparsable': 'the content is not of the form that was asked for',
  'wrong_count': 'there are more or fewer answers than texts',
  'too_long': 'the explanation is longer than a short paragraph',
}
_LONGEST = 1000  # characters of an explanation
_REFUSAL = re.compile(
  r"\s*(i'?m sorry|i am sorry|sorry|i can(no|')t|i can not|i am unable|"
  r"i'?m unable|as an ai)\b",
  re.IGNORECASE,
)
_THINKING = re.compile(r'\s*<think>.*?(</think>|\Z)', re.DOTALL)
_DIGIT = re.compile(r'[\s\[\],]*([01])[\s\[\],]*')


class Unusable(NamedTuple):
  """An answer that cannot be used.

  Attributes:
    kind: a key of FAILURES.
  """

  kind: str


def explanation(response: dict[str, Any]) -> str | Unusable:
  """The explanation that an answer gives."""
  content = _content(response)
  if isinstance(content, Unusable):
    return content
  _, mark, text = content.rpartition(prompts.MARK)
  text = errors.printable(' '.join(text.split()), 4 * _LONGEST)
  if not mark or not text:
    return _unparsable(content)
  return Unusable('too_long') if len(text) > _LONGEST else text


def detection(
  response: dict[str, Any], n_texts: int
) -> tuple[list[float], bool] | Unusable:
  """The probability that each text is active, and whether it is a logprob's.

  Args:
    response: the answer.
    n_texts: number of the texts.

  Returns:
    P(1) / (P(0) + P(1)) by the log-probabilities of each digit of the answer if
    they are there, and True; else the digits themselves, and False.
  """
  content = _content(response)
  if isinstance(content, Unusable):
    return content
  try:
    digits = json.loads(content)
  except (ValueError, RecursionError):
    return _unparsable(content)
  if not isinstance(digits, list) or not all(
    type(digit) is int and digit in (0, 1) for digit in digits
  ):
    return _unparsable(content)
  if len(digits) != n_texts:
    return Unusable('wrong_count')
  own = _probabilities(response.get('logprobs'), digits)
  return (list(map(float, digits)), False) if own is None else (own, True)


def _unparsable(content: str) -> Unusable:
  return Unusable('refused' if _REFUSAL.match(content) else 'unparsable')


def _content(response: dict[str, Any]) -> str | Unusable:
  """The text of an answer."""
  content = response.get('content')
  if response.get('refusal'):
    return Unusable('refused')
  if response.get('finish_reason') == 'content_filter':
    return Unusable('refused')
  if content is not None and not isinstance(content, str):
    return Unusable('not_text')
  text = _THINKING.sub('', content, count=1) if content else ''
  if not text.strip():
    if response.get('reasoning') or (content and content.strip()):
      return Unusable('reasoning_only')
    return Unusable('null_content' if content is None else 'empty')
  if response.get('finish_reason') == 'length':
    return Unusable('truncated')
  return text.strip()


def _probabilities(logprobs: Any, digits: list[int]) -> list[float] | None:
  """See `detection`; None if they are absent or not those of the digits."""
  if not isinstance(logprobs, list):
    return None
  places = [(_digit(entry), entry) for entry in logprobs]
  places = [(digit, entry) for digit, entry in places if digit is not None]
  if [digit for digit, _ in places] != digits:
    return None
  out = []
  for _, entry in places:
    share = [0.0, 0.0]
    for other in _alternatives(entry):
      logprob = _number(other)
      if logprob is not None:
        share[_digit(other)] += math.exp(min(0.0, logprob))
    if not sum(share):
      return None
    out.append(share[1] / sum(share))
  return out


def _alternatives(entry: dict[str, Any]) -> list[dict[str, Any]]:
  """The likeliest tokens in a token's place that are digits too."""
  others = entry.get('top_logprobs')
  others = others if isinstance(others, list) else []
  return [other for other in others if _digit(other) is not None]


def _digit(entry: Any) -> int | None:
  """The digit of a token that has one and no more than a list's signs."""
  token = entry.get('token') if isinstance(entry, dict) else None
  match = _DIGIT.fullmatch(token) if isinstance(token, str) else None
  return int(match[1]) if match else None


def _number(entry: dict[str, Any]) -> float | None:
  value = entry.get('logprob')
  is_number = isinstance(value, (int, float)) and not math.isnan(value)
  return float(value) if is_number else None


def kept_logprobs(served: Any) -> list[dict[str, Any]] | None:
  """Of the log-probabilities that a server gives what `detection` reads."""
  content = served.get('content') if isinstance(served, dict) else None
  if not isinstance(content, list):
    return None
  return [
    {
      'token': entry['token'],
      'top_logprobs': [
        {'token': other['token'], 'logprob': other.get('logprob')}
        for other in _alternatives(entry)
      ],
    }
    for entry in content
    if _digit(entry) is not None
  ]
