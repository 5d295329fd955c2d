"""Configuration: frozen dataclasses whose fields carry their own help.

Every stage defines its config beside the code that uses it; `sae_jax.cli`
turns the fields into flags and the resolved config lands as JSON beside the
stage's output. Library code never reads a flag.
"""

import dataclasses
import json
from typing import Any, TypeVar

_Config = TypeVar('_Config')


class UserError(ValueError):
  """Input a user can mend; its message is one line: what, numbers, remedy."""


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
  """A dataclass field with a default, a help text and optional choices."""
  return dataclasses.field(
    default=default, metadata={'help': help, 'choices': choices}
  )


def check_choices(config: Any) -> None:
  """Raises UserError where a field's value is not among its choices."""
  for field in dataclasses.fields(config):
    choices = field.metadata.get('choices')
    value = getattr(config, field.name)
    if choices and value not in choices:
      raise UserError(
        f'{field.name} {value!r} is not known: use one of {", ".join(choices)}'
      )


def to_json(config: Any) -> str:
  """The config as indented JSON with a final newline."""
  return json.dumps(dataclasses.asdict(config), indent=2) + '\n'


def from_dict(kind: type[_Config], values: dict[str, Any]) -> _Config:
  """Rebuilds a config from `dataclasses.asdict` read back from JSON.

  Args:
    kind: the dataclass.
    values: a mapping of its field names; JSON lists become tuples.

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
  return kind(
    **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
  )


def differences(old: Any, new: Any) -> list[str]:
  """Fields in which two configs of one kind differ, as `name: old -> new`."""
  return [
    f'{f.name}: {getattr(old, f.name)!r} -> {getattr(new, f.name)!r}'
    for f in dataclasses.fields(new)
    if getattr(old, f.name) != getattr(new, f.name)
  ]
