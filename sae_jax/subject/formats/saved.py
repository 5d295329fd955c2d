"""Folders that this package writes: a subject with Orbax parameters."""

import dataclasses
import hashlib
import json
import os

from etils import epath
import jax
import jax.numpy as jnp
import tokenizers

from sae_jax import config as config_lib
from sae_jax import errors
from sae_jax.storage import orbax as orbax_lib
from sae_jax.storage import records
from sae_jax.subject import transformer

_RECORD = 'subject.json'
_PARAMS = 'params'
_AGAIN = 'save the subject again'


def is_saved(url: str) -> bool:
  """Whether `save` wrote this folder."""
  return (epath.Path(url) / _RECORD).is_file()


def save(
  url: str,
  config: transformer.TransformerConfig,
  params: transformer.Params,
  tokenizer: tokenizers.Tokenizer,
  weights_sha256: str,
) -> None:
  """Writes subject.json, tokenizer.json and the Orbax folder params.

  Args:
    url: the folder, local or in a bucket; there must be no subject in it.
    config: the transformer's shape.
    params: its parameters, on any devices.
    tokenizer: its tokenizer.
    weights_sha256: digest of the files that the parameters came from; the copy
      keeps it, since the weights are the same.

  Raises:
    UserError: if the folder holds a subject already.
  """
  folder = epath.Path(url)
  if is_saved(url):
    raise errors.UserError(
      f'{url} holds a subject already: use another folder or delete this one'
    )
  orbax_lib.save_tree(os.fspath(folder / _PARAMS), params)
  if jax.process_index() == 0:
    record = _Record(weights_sha256, config, _identity(config, weights_sha256))
    (folder / 'tokenizer.json').write_text(tokenizer.to_str())
    # Last: a folder without it is not finished.
    (folder / _RECORD).write_text(config_lib.to_json(record))


def load(
  url: str, dtype: str = 'float32', shardings=None
) -> tuple[transformer.TransformerConfig, transformer.Params, str]:
  """Reads a subject back; every process reads its own shards.

  Args:
    url: the folder.
    dtype: type of the parameters; they may have been saved in another.
    shardings: config -> shardings of the parameters; None for one device.

  Returns:
    The transformer's shape, its parameters and the digest of their files.

  Raises:
    UserError: if the folder is damaged, or of another version of this package.
  """
  record = _read(url)
  config = record.config
  shapes = transformer.param_shapes(config)
  if shardings is None:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    param_shardings = jax.tree.map(
      lambda shape: device, shapes, is_leaf=lambda x: isinstance(x, tuple)
    )
  else:
    param_shardings = shardings(config)
  target = jax.tree.map(
    lambda shape, sharding: jax.ShapeDtypeStruct(
      shape, jnp.dtype(dtype), sharding=sharding
    ),
    shapes,
    param_shardings,
    is_leaf=lambda x: isinstance(x, tuple),
  )
  params = orbax_lib.load_tree(
    os.fspath(epath.Path(url) / _PARAMS), target, _AGAIN
  )
  return config, params, record.weights_sha256


def digest(url: str) -> str:
  """The digest of the files that a subject's parameters came from."""
  return _read(url).weights_sha256


@dataclasses.dataclass(frozen=True)
class _Record:
  """What subject.json holds; `sha256` is the digest of the rest."""

  weights_sha256: str
  config: transformer.TransformerConfig
  sha256: str


def _identity(
  config: transformer.TransformerConfig, weights_sha256: str
) -> str:
  said = [weights_sha256, dataclasses.asdict(config)]
  return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read(url: str) -> _Record:
  """Reads subject.json; UserError unless it is as it was written."""
  path = epath.Path(url) / _RECORD
  record = config_lib.from_dict(_Record, records.read(path, _AGAIN), str(path))
  if record.sha256 != _identity(record.config, record.weights_sha256):
    raise errors.UserError(
      f'{path} is not as it was written, its sha256 is another: {_AGAIN}'
    )
  return record
