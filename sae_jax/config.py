"""Configuration: frozen dataclasses whose fields carry their own help.

Every stage defines its config beside the code that uses it; `sae_jax.cli`
turns the fields into flags and the resolved config lands as JSON beside the
stage's output. Library code never reads a flag.
"""

import dataclasses
import json
from typing import Any, TypeVar

from etils import epath

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


def to_json(record: Any) -> str:
  """A config or a mapping as indented JSON with a final newline."""
  if dataclasses.is_dataclass(record):
    record = dataclasses.asdict(record)
  return json.dumps(record, indent=2) + '\n'


def through_json(record: Any) -> Any:
  """The record as it reads back from JSON: tuples as lists."""
  return json.loads(json.dumps(record))


def read_json(path: epath.PathLike) -> Any:
  """Reads a JSON file.

  Raises:
    UserError: if the file is not there or not JSON.
  """
  path = epath.Path(path)
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    raise UserError(f'{path} is not there') from None
  except json.JSONDecodeError as error:
    raise UserError(
      f'{path} is not JSON ({error}), it is damaged: '
      'delete it and run its stage again'
    ) from None


def from_dict(kind: type[_Config], values: dict[str, Any]) -> _Config:
  """Rebuilds a config from `dataclasses.asdict` read back from JSON.

  Args:
    kind: the dataclass.
    values: a mapping of its field names; JSON lists become tuples and nested
      mappings the dataclasses of their fields.

  Raises:
    UserError: if a field is unknown, naming it (a newer version wrote it).
  """
  known = {field.name for field in dataclasses.fields(kind)}
  unknown = sorted(set(values) - known)
  if unknown:
    raise UserError(
      f'{kind.__name__} has no field {", ".join(unknown)}: '
      'it was written by another version of sae_jax'
    )
  rebuilt = {}
  for field in dataclasses.fields(kind):
    if field.name in values:
      value = values[field.name]
      if dataclasses.is_dataclass(field.type):
        value = from_dict(field.type, value)
      rebuilt[field.name] = tuple(value) if isinstance(value, list) else value
  return kind(**rebuilt)


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


def differences(old: Any, new: Any) -> list[str]:
  """Fields in which two configs of one kind differ, as `name: old -> new`."""
  before, after = flat(old), flat(new)
  return [
    f'{name}: {before[name]!r} -> {after[name]!r}'
    for name in after
    if before[name] != after[name]
  ]
