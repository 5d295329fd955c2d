"""Settings of a model as its file says them; each is checked as it is read."""

import math
import re
from typing import Any

from sae_jax import errors

_LARGEST = 2**31 - 1
# Blocks are stacked; the deepest models have some hundred.
MOST_BLOCKS = 10_000

# Names of what changes a model's numbers and no tensor's shape.
_SHAPING = re.compile(
  r'rope|rotary|yarn|alibi|interpolat|scal|multiplier|softcap|cap(ping|s)?\b'
  r'|clamp|window|att(ention|n).temp|shared_kv'
)


def changes_model(key: str) -> bool:
  """Whether a key is called as those that change a model's numbers are."""
  return bool(_SHAPING.search(key))


class Settings:
  """Values by their keys, of which it notes those that are read.

  A key that is absent has the default that is given, or that of `defaults`; a
  key that is null has the value `null`, and where none is given, none at all.
  `values`, `where` and `defaults` stay readable.

  Args:
    values: key -> value.
    where: the file, for errors.
    defaults: key -> the value where the key is absent.
    remedy: what to do where a value is missing.

  Raises:
    UserError: in all methods, if the value is missing or not as it should be.
  """

  def __init__(
    self,
    values: dict[str, Any],
    where: str,
    defaults: dict[str, Any] | None = None,
    remedy: str = 'download the model again',
  ):
    self.where = where
    self.values = values
    self.defaults = defaults or {}
    self._remedy = remedy
    self._read: set[str] = set()

  def says(self, *keys: str) -> bool:
    """Whether any of the keys is there and not null; they count as read."""
    self._read.update(keys)
    return any(self.values.get(key) is not None for key in keys)

  def whole(
    self,
    key: str,
    default: Any = None,
    *,
    null: Any = None,
    least: int = 1,
    most: int = _LARGEST,
  ) -> int:
    """A whole number from `least` to `most`."""
    value = self._value(key, default, null)
    fits = _is_number(value, int) and least <= value <= most
    if not fits and value is not null:
      self._refuse(key, value, f'a whole number from {least:,} to {most:,}')
    return int(value)

  def number(
    self,
    key: str,
    default: Any = None,
    *,
    null: Any = None,
    above: float = -math.inf,
    least: float = -math.inf,
    most: float = math.inf,
  ) -> float:
    """A finite number above `above`, from `least` to `most`."""
    value = self._value(key, default, null)
    fits = (
      _is_number(value, (int, float))
      and max(-1e38, least) <= value <= min(1e38, most)
      and value > above
    )
    if not fits and value is not null:
      least_words = [f'above {above:g}'] * (above > -math.inf)
      least_words += [f'at least {least:g}'] * (least > -math.inf)
      most_words = [f'at most {most:g}'] * (most < math.inf)
      words = ' and '.join(least_words + most_words)
      self._refuse(key, value, f'a finite number {words}'.rstrip())
    return float(value)

  def flag(self, key: str, default: bool | None = None) -> bool:
    """True or false; null is false."""
    value = self._value(key, default, False)
    if not isinstance(value, bool):
      self._refuse(key, value, 'true or false')
    return value

  def text(self, key: str, default: Any = None, null: Any = None) -> str:
    """A text."""
    value = self._value(key, default, null)
    if not isinstance(value, str):
      self._refuse(key, value, 'a text')
    return value

  def entries(self, key: str, kind: type, n: int) -> list | None:
    """A list of `n` values of a type; None if absent or null."""
    if not self.says(key):
      return None
    value = self.values[key]
    if not isinstance(value, list) or not all(
      isinstance(x, kind) for x in value
    ):
      self._refuse(key, value, f'a list of values of the type {kind.__name__}')
    if len(value) != n:
      self._refuse(key, value, f'a list of {n} values, one for each block')
    return value

  def group(self, key: str) -> 'Settings | None':
    """The mapping that is nested there; None if absent, null or empty."""
    if not self.says(key):
      return None
    value = self.values[key]
    if not isinstance(value, dict):
      self._refuse(key, value, 'a mapping')
    if not value:
      return None
    return Settings(value, f'{self.where}: {key}', remedy=self._remedy)

  def same(self, key: str, expected: Any) -> None:
    """Refuses another value than the one that is used; it may be absent."""
    if self.says(key) and self.values[key] != expected:
      self._refuse(key, self.values[key], f'{expected!r} as elsewhere')

  def unread(self) -> dict[str, Any]:
    """What nobody has read and is not off."""
    return {
      key: value
      for key, value in self.values.items()
      if key not in self._read and not _is_off(key, value)
    }

  def refuse_unread(self, reader: str, all_keys: bool = False) -> None:
    """Refuses what nobody has read and what would change the model.

    Args:
      reader: what reads the settings, in words.
      all_keys: whether every key changes the model, and not only those that
        are called so.
    """
    for key, value in self.unread().items():
      if all_keys or changes_model(key):
        raise errors.UserError(
          f'{self.where} says {key} {_short(value)}, which {reader} does not '
          'have: use a model without it'
        )

  def _value(self, key: str, default: Any, null: Any) -> Any:
    self._read.add(key)
    if key in self.values:
      value = self.values[key]
      value = null if value is None else value
    else:
      value = self.defaults.get(key) if default is None else default
      value = null if value is None else value
    if value is None:
      raise errors.UserError(f'{self.where} does not say {key}: {self._remedy}')
    return value

  def _refuse(self, key: str, value: Any, expected: str) -> None:
    raise errors.UserError(
      f'{self.where} says {key} {_short(value)}, it must be {expected}: '
      f'{self._remedy}'
    )


def agreed(where: str, said: dict[str, float], default: float) -> float:
  """The value that keys of one meaning have; the default if there is none.

  Args:
    where: the file, for the error.
    said: key in words -> value.
    default: the value without any.

  Raises:
    UserError: if two of them differ.
  """
  if len(set(said.values())) > 1:
    words = ' and '.join(f'{name} {value:g}' for name, value in said.items())
    raise errors.UserError(
      f'{where} says {words}, which are one thing: remove the wrong one'
    )
  return next(iter(said.values()), default)


def _is_number(value: Any, kinds) -> bool:
  return isinstance(value, kinds) and not isinstance(value, bool)


def _is_off(key: str, value: Any) -> bool:
  """Whether a value that is not read changes nothing."""
  if isinstance(value, str):
    return value in ('', 'none', 'default')
  if isinstance(value, (list, dict)):
    return not value
  factor = value == 1 and re.search(r'scal|multiplier|factor', key)
  return not value or bool(factor)


def _short(value: Any) -> str:
  return errors.printable(repr(value), 60)
