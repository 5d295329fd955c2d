"""The file or folder that an autoencoder is in, and what its config says."""

from collections.abc import Collection, Mapping
import dataclasses
import functools
import math
import os
import re
from typing import Any

from etils import epath
import yaml

from sae_jax import errors
from sae_jax.interchange.files import reading
from sae_jax.storage import files, records
from sae_jax.storage import url as url_lib

AGAIN = 'get it from its source again'
_LONGEST_CONFIG = 2**20
# PyYAML takes a second for so much, and for as many brackets as bytes two.
_LONGEST_YAML = 2**15
_MOST_BRACKETS = 200
# More than any model's width, or latents of any autoencoder.
_MOST = 2**40


class Place:
  """A file or folder, whose files are opened once.

  Attributes:
    url: local path or URL.
    is_folder: whether it is a folder.
  """

  def __init__(self, url: str | os.PathLike[str]):
    self.url = os.fspath(url).rstrip('/') or '/'
    url_lib.backend(self.url)
    try:
      self.is_folder = epath.Path(self.url).is_dir()
      is_there = self.is_folder or epath.Path(self.url).exists()
    except Exception as error:  # Of a bucket's client, of many types.
      raise errors.UserError(
        f'{self.url} cannot be read ({errors.reason(error)}): check the path'
      ) from error
    if not is_there:
      raise errors.UserError(
        f'nothing is at {self.url}: give the folder or file of an autoencoder'
      )
    # Of every instance its own: a method's cache would keep all instances.
    self.tensors = functools.cache(self._tensors)

  def path(self, name: str) -> str:
    """The URL of a file of the folder; '' is the place itself."""
    return os.fspath(epath.Path(self.url) / name) if name else self.url

  def has(self, *names: str) -> bool:
    """Whether it is a folder with all these files."""
    return self.is_folder and all(
      files.is_file(self.path(name)) for name in names
    )

  def names(self) -> list[str]:
    """The names of what is in the folder, in order; none of a file."""
    if not self.is_folder:
      return []
    return sorted(path.name for path in epath.Path(self.url).iterdir())

  def _tensors(self, name: str = '') -> reading.TensorFile:
    """The tensors of a file of the folder, or of the file that it is."""
    return reading.open_tensors(self.path(name))

  def _file(self, name: str) -> str:
    """The URL of a file of the folder; UserError unless it is one."""
    if not self.has(name):
      raise errors.UserError(
        f'{self.url} has no {name}: give the folder of an autoencoder'
      )
    return self.path(name)

  def json(self, name: str) -> 'Settings':
    """A config in JSON of the folder."""
    path = self._file(name)
    return Settings(records.read(path, AGAIN, _LONGEST_CONFIG), path)

  def yaml(self, name: str) -> 'Settings':
    """A config in YAML of the folder; references within it are not read."""
    path = self._file(name)
    try:
      with epath.Path(path).open('rb') as file:
        data = file.read(_LONGEST_YAML + 1)
      if len(data) > _LONGEST_YAML:
        raise ValueError(f'it has more than {_LONGEST_YAML:,} bytes')
      if data.count(b'[') + data.count(b'{') > _MOST_BRACKETS:
        raise ValueError(f'it has more than {_MOST_BRACKETS} brackets')
      value = yaml.load(data, _Loader)
      if not isinstance(value, dict):
        raise ValueError(f'it holds a {type(value).__name__}, not a mapping')
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
      raise errors.UserError(
        f'{path} is not YAML as it should be ({errors.reason(error)}): {AGAIN}'
      ) from error
    return Settings(value, path)


class _Loader(yaml.SafeLoader):
  """Mappings, lists, texts and numbers, each in one place."""

  def compose_node(self, parent, index):
    if self.check_event(yaml.events.AliasEvent):
      raise yaml.YAMLError('it refers to its own parts')
    return super().compose_node(parent, index)


@dataclasses.dataclass(frozen=True)
class Settings:
  """The mapping of a config.

  Attributes:
    values: key -> value.
    where: the file, for the errors.
  """

  values: Mapping[str, Any]
  where: str

  def error(self, key: str, words: str) -> errors.UserError:
    """The error of a value that is not understood."""
    value = errors.printable(repr(self.values.get(key)), 100)
    if key not in self.values:
      return errors.UserError(f'{self.where} has no {key}, {words}: {AGAIN}')
    return errors.UserError(f'{self.where} has {key} {value}, {words}')

  def choice(
    self, key: str, choices: Collection[Any], default: Any = None
  ) -> Any:
    """One of some values; of an absent key `default`, if that is one.

    Raises:
      UserError: if it is another; it names the key and the value.
    """
    value = self.values.get(key, default)
    if not isinstance(value, str | bool | None) or value not in choices:
      words = ', '.join(map(repr, choices))
      raise self.error(key, f'which is not read here: {words} would be')
    return value

  def flag(self, key: str, default: bool | None = None) -> bool:
    """A bool."""
    value = self.values.get(key, default)
    if not isinstance(value, bool):
      raise self.error(key, 'where true or false should be')
    return value

  def count(self, key: str, default: int | None = None, least: int = 1) -> int:
    """An integer that is a number of things."""
    value = self.values.get(key, default)
    if type(value) is not int or not least <= value <= _MOST:
      raise self.error(key, f'where a number from {least} on should be')
    return value

  def positive(self, key: str, least: float = 0.0) -> float:
    """A finite number above `least`."""
    value = self.values.get(key)
    if (
      type(value) not in (int, float)
      or not math.isfinite(value)
      or value <= least
    ):
      raise self.error(key, f'where a number above {least:g} should be')
    return float(value)

  def text(self, key: str) -> str | None:
    """A text, None if there is none."""
    value = self.values.get(key)
    if value is not None and not isinstance(value, str):
      raise self.error(key, 'where a text should be')
    return value

  def maybe(self, key: str, kind: type) -> Any:
    """A value of a type, None if there is none of it."""
    value = self.values.get(key)
    return value if type(value) is kind else None

  def inner(self, key: str) -> 'Settings':
    """The settings that a mapping holds."""
    value = self.values.get(key)
    if not isinstance(value, dict):
      raise self.error(key, 'where a mapping should be')
    return Settings(value, f'{self.where}: {key}')


def major_version(text: str) -> int | None:
  """The first number of a version, None if it begins with none."""
  match = re.match(r'(\d{1,6})(\.|$)', text)
  return int(match[1]) if match else None
