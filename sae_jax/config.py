"""Configuration: frozen dataclasses whose fields carry their own help.

Every stage defines its config beside the code that uses it; `sae_jax.cli`
turns the fields into flags and the resolved config lands as JSON beside the
stage's output. Library code never reads a flag.
"""

from collections.abc import Iterator, Mapping, Sequence
import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import types
import typing
from typing import Any, TypeVar

from sae_jax.errors import UserError

_Config = TypeVar('_Config')


def option(
  default: Any,
  help: str,
  choices: tuple[str, ...] = (),
  *,
  least: float | None = None,
  most: float | None = None,
  may_change: bool = False,
  shared: bool = False,
  sizes_store: bool = False,
  speed_only: bool = False,
  later: bool = False,
) -> Any:
  """A dataclass field with a default, a help text and allowed values.

  Args:
    default: the field's default.
    help: the flag's help text, which must be clear without the flag's name.
    choices: all values that are allowed; empty for any.
    least: the least number that is allowed.
    most: the greatest number that is allowed.
    may_change: role of a training field that may differ when a run is resumed.
    shared: role of a training field that is the same in all runs that are
      trained on one reading of the data.
    sizes_store: role of a harvest field that sizes the store, or its held-out
      part, and changes no shard.
    speed_only: role of a harvest field that changes how fast the harvest is,
      and no byte of the store.
    later: role of a training field that is younger than runs with names: at
      its default it is no part of a name.
  """
  metadata = {
    'help': help,
    'choices': choices,
    'least': least,
    'most': most,
    'may_change': may_change,
    'shared': shared,
    'sizes_store': sizes_store,
    'speed_only': speed_only,
    'later': later,
  }
  return dataclasses.field(default=default, metadata=metadata)


@dataclasses.dataclass(frozen=True)
class Config:
  """Base of all configs: checks its own values when it is made.

  Raises:
    UserError: if a field's value is not allowed; it names those that are.
  """

  def __post_init__(self):
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      allowed = field.metadata
      if allowed.get('choices') and value not in allowed['choices']:
        raise UserError(
          f'{field.name} {value!r} is not known: use one of '
          f'{", ".join(allowed["choices"])}'
        )
      least, most = allowed.get('least'), allowed.get('most')
      if least is not None and not value >= least:
        raise UserError(f'{field.name} {value} must be {least} or more')
      if most is not None and not value <= most:
        raise UserError(f'{field.name} {value} must be {most} or less')
      if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f'{field.name} {value} must be a finite number')


def to_json(record: Any) -> str:
  """A config or a mapping as indented JSON with a final newline.

  JSON has no number that is not finite: it becomes null.
  """
  if dataclasses.is_dataclass(record):
    record = dataclasses.asdict(record)
  return json.dumps(_finite(record), indent=2, allow_nan=False) + '\n'


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(item) for item in value]
  is_odd = isinstance(value, float) and not math.isfinite(value)
  return None if is_odd else value


def through_json(record: Any) -> Any:
  """The record as it reads back from `to_json`: tuples as lists."""
  return json.loads(to_json(record))


def from_dict(
  kind: type[_Config], values: dict[str, Any], name: str = ''
) -> _Config:
  """Rebuilds a config from `dataclasses.asdict` read back from JSON.

  Args:
    kind: the dataclass.
    values: a mapping of its field names; JSON lists become tuples and nested
      mappings the dataclasses of their fields.
    name: the file that they were read from, for the errors.

  Raises:
    UserError: if a field is unknown (a newer version wrote it), missing, or not
      of its type; it names the field.
  """
  return _converted(kind, values, name or kind.__name__)


def _converted(kind: Any, value: Any, name: str) -> Any:
  """A value from JSON as one of a type; raises UserError if it is not one."""
  if dataclasses.is_dataclass(kind):
    return _dataclass(kind, value, name)
  origin, arguments = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    for choice in arguments:
      with contextlib.suppress(UserError):
        return _converted(choice, value, name)
  elif kind is Any:
    return tuple(value) if isinstance(value, list) else value
  elif origin is tuple and isinstance(value, (list, tuple)):
    if arguments[-1] is Ellipsis:
      return tuple(
        _converted(arguments[0], item, f'an entry of {name}') for item in value
      )
    if len(arguments) == len(value):
      return tuple(map(_converted, arguments, value, [name] * len(value)))
  elif origin is dict and isinstance(value, dict):
    if arguments[1] is Any:
      return value
    return {
      key: _converted(arguments[1], item, f'{name}: {key}')
      for key, item in value.items()
    }
  elif isinstance(value, _JSON.get(kind, ())) and (
    kind is bool or not isinstance(value, bool)
  ):
    return value
  words = getattr(kind, '__name__', kind) if origin is None else kind
  raise UserError(
    f'{name} is {value!r}, not of the type {words}: '
    'it is damaged, or of another version of sae_jax'
  )


# JSON has no NaN, and a float may be written as an integer.
_JSON = {
  int: int,
  float: (int, float),
  str: str,
  bool: bool,
  type(None): type(None),
}


def _dataclass(kind: Any, values: Any, name: str) -> Any:
  if not isinstance(values, dict):
    raise UserError(f'{name} is {values!r}, not a mapping: it is damaged')
  fields = {field.name: field for field in dataclasses.fields(kind)}
  unknown = sorted(values.keys() - fields.keys())
  if unknown:
    raise UserError(
      f'{name} has no field {", ".join(unknown)}: '
      'it was written by another version of sae_jax'
    )
  none = dataclasses.MISSING
  missing = sorted(
    field.name
    for field in fields.values()
    if field.name not in values
    and field.default is none
    and field.default_factory is none
  )
  if missing:
    raise UserError(
      f'{name} lacks {", ".join(missing)}: '
      'it is damaged, or of another version of sae_jax'
    )
  return kind(
    **{
      field: _converted(fields[field].type, value, f'{name}: {field}')
      for field, value in values.items()
    }
  )


def leaves(kind: type) -> list[dataclasses.Field]:
  """The fields of a config, those of nested configs in their place."""
  fields = []
  for field in dataclasses.fields(kind):
    nested = dataclasses.is_dataclass(field.type)
    fields += leaves(field.type) if nested else [field]
  return fields


def names_with(kind: type, role: str) -> tuple[str, ...]:
  """The names of the `leaves` that were given a role, see `option`."""
  return tuple(field.name for field in leaves(kind) if field.metadata[role])


def flat(config: Any) -> dict[str, Any]:
  """The values of `leaves` by name."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    nested = dataclasses.is_dataclass(value)
    values |= flat(value) if nested else {field.name: value}
  return values


def in_a_name(value: Any) -> str:
  """A value as a part of a folder's name: of a path its end, and a digest."""
  text = str(value)
  if '/' not in text:
    return text
  digest = hashlib.sha256(text.encode()).hexdigest()[:6]
  return f'{text.rstrip("/").rpartition("/")[2]}-{digest}'


def from_flat(kind: type[_Config], values: dict[str, Any]) -> _Config:
  """Builds a config, nested ones included, from the values of `leaves`."""
  return kind(
    **{
      field.name: from_flat(field.type, values)
      if dataclasses.is_dataclass(field.type)
      else values[field.name]
      for field in dataclasses.fields(kind)
      if dataclasses.is_dataclass(field.type) or field.name in values
    }
  )


def combinations(
  config: Any, values: Mapping[str, Sequence[Any]]
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
  """Every combination of some fields' values.

  Args:
    config: has the other fields.
    values: of fields by name, those of nested configs included.

  Yields:
    The values that are combined by name, and `flat` values of a whole config.

  Raises:
    UserError: if there is no such field.
  """
  base = flat(config)
  unknown = sorted(set(values) - set(base))
  if unknown:
    raise UserError(
      f'a run has no field {", ".join(unknown)} to sweep: '
      f'use some of {", ".join(sorted(base))}'
    )
  for combination in itertools.product(*values.values()):
    changes = dict(zip(values, combination))
    yield changes, base | changes


def differences(old: Any, new: Any) -> list[str]:
  """Fields in which two configs of one kind differ, as `name: old -> new`."""
  before, after = flat(old), flat(new)
  return [
    f'{name}: {before[name]!r} -> {after[name]!r}'
    for name in after
    if before[name] != after[name]
  ]
