"""JSON files that carry a sha256 of their other fields."""

import dataclasses
import hashlib
from typing import Any

from sae_jax import config, errors
from sae_jax.storage import records

# The key of a file's digest of its own content.
DIGEST = 'sha256'


def digest(content: dict[str, Any]) -> str:
  """The sha256 of a record's fields, as JSON in their order."""
  return hashlib.sha256(config.to_json(content).encode()).hexdigest()


def to_file(record: Any) -> bytes:
  """A record, a dataclass, as JSON with its digest."""
  content = dataclasses.asdict(record)
  return config.to_json(content | {DIGEST: digest(content)}).encode()


def check(content: dict[str, Any], where: str, again: str) -> None:
  """Takes the digest out of a file's fields and compares it.

  Args:
    content: the fields, changed in place.
    where: the file that they were read from.
    again: what the user can do, after 'it is damaged'.

  Raises:
    UserError: if the digest is not that of the other fields.
  """
  if content.pop(DIGEST, None) != digest(content):
    raise damaged(where, again)


def damaged(where: str, again: str) -> errors.UserError:
  """The error for a file whose content is not what was written."""
  return errors.UserError(
    f'{where} was edited, its content does not give its sha256, or it is '
    f'damaged: {again}'
  )


def parse(data: bytes, where: str, again: str, longest: int) -> dict[str, Any]:
  """The fields of a file, once its digest is known to be theirs.

  Args:
    data: its bytes.
    where: its name, for the error.
    again: see `check`.
    longest: bytes that it may have.

  Raises:
    UserError: if it is no JSON, or see `check`.
  """
  remedy = f'it is damaged: {again}'
  content = records.parse(data, where, remedy, longest)
  check(content, where, again)
  return content
