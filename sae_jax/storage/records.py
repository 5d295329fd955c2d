"""JSON that is read from files: by these functions, wherever it comes from."""

import collections
import json
import re
from typing import Any

from etils import epath
import numpy as np

from sae_jax import errors

# More than any record has, less than what parsers of C++ and Rust can bear.
DEEPEST = 100
# A large model's index of tensors has some megabytes.
LONGEST = 64 * 2**20

_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)
_ESCAPED_SURROGATE = re.compile(rb'\\u[dD][89a-fA-F]')

DAMAGED = 'it is damaged: delete it and run its stage again'


def read(
  path: epath.PathLike, remedy: str = DAMAGED, longest: int = LONGEST
) -> dict[str, Any]:
  """Reads a JSON file that holds a mapping.

  Args:
    path: local path or URL.
    remedy: what the user can do if it cannot be understood.
    longest: bytes that it may have.

  Raises:
    UserError: if the file is not there, or see `parse`.
  """
  path = epath.Path(path)
  try:
    with path.open('rb') as file:
      # A device or a pipe has no length that could be asked for.
      data = file.read(longest + 1)
  except FileNotFoundError:
    raise errors.UserError(f'{path} is not there') from None
  return parse(data, str(path), remedy, longest)


def parse(
  data: bytes,
  name: str,
  remedy: str = DAMAGED,
  longest: int = LONGEST,
  is_unique: bool = False,
) -> dict[str, Any]:
  """The mapping that JSON text holds; a byte order mark is read over.

  Args:
    data: the text in UTF-8.
    name: the file that it was read from, for the error.
    remedy: what the user can do if it cannot be understood.
    longest: bytes that it may have.
    is_unique: whether a mapping must not have a key twice.

  Raises:
    UserError: if it is too long, not UTF-8, no JSON, nested more than `DEEPEST`
      deep, or holds half a surrogate pair or something else than a mapping.
  """
  try:
    check(data, longest)
    value = json.loads(
      data.decode('utf-8-sig'),
      object_pairs_hook=_unique if is_unique else None,
    )
    if _ESCAPED_SURROGATE.search(data):
      _check_characters(value)
    if not isinstance(value, dict):
      raise ValueError(f'it holds a {type(value).__name__}, not a mapping')
  except ValueError as error:
    raise errors.UserError(
      f'{name} is not JSON as it should be ({error}): {remedy}'
    ) from None
  return value


def check(data: bytes, longest: int = LONGEST) -> None:
  """Raises ValueError if a parser could run out of stack or memory on JSON.

  Args:
    data: the JSON text.
    longest: bytes that it may have.
  """
  if len(data) > longest:
    raise ValueError(f'it has more than {longest:,} bytes')
  if data.count(b'[') + data.count(b'{') <= DEEPEST:
    return
  text = np.frombuffer(_STRING.sub(b'', data), np.uint8)
  step = np.zeros(text.shape, np.int32)
  step[(text == ord('[')) | (text == ord('{'))] = 1
  step[(text == ord(']')) | (text == ord('}'))] = -1
  depth = int(np.cumsum(step).max(initial=0))
  if depth > DEEPEST:
    raise ValueError(f'it is nested {depth:,} deep, more than {DEEPEST}')


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  """The mapping of pairs; ValueError if a key is there twice."""
  mapping = dict(pairs)
  if len(mapping) < len(pairs):
    keys = collections.Counter(key for key, _ in pairs)
    raise ValueError(f'it has the key {keys.most_common(1)[0][0]!r} twice')
  return mapping


def _check_characters(value: Any) -> None:
  """Raises ValueError if a string holds half a surrogate pair."""
  if isinstance(value, str):
    value.encode()
  elif isinstance(value, dict):
    for key, item in value.items():
      _check_characters(key)
      _check_characters(item)
  elif isinstance(value, list):
    for item in value:
      _check_characters(item)


def parse_lines(data: bytes) -> tuple[list[dict[str, Any]], int]:
  """The mappings of JSON lines, and how many other lines were left out.

  Args:
    data: the lines; blank ones are not counted.
  """
  lines = [line for line in data.split(b'\n') if line.strip()]
  records = []
  for line in lines:
    try:
      records.append(parse(line, ''))
    except errors.UserError:
      continue
  return records, len(lines) - len(records)
