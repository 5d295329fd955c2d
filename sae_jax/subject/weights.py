"""GGUF files -> metadata and float32 parameters."""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from typing import Any

from etils import epath
import gguf
import jax
import jax.numpy as jnp
import numpy as np

from sae_jax import config as config_lib
from sae_jax.subject import families, transformer


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An opened GGUF file; its tensors are views of the mapped file.

  Attributes:
    url: where it was read from.
    metadata: key -> value.
    tensors: name -> quantised tensor.
    sha256: hex digest of the whole file.
  """

  url: str
  metadata: dict[str, Any]
  tensors: dict[str, gguf.ReaderTensor]
  sha256: str


def open_gguf(url: str | os.PathLike[str]) -> GgufFile:
  """Opens a local or gs:// GGUF file (a remote one is copied first).

  Raises:
    UserError: if the file is not there, or not a whole little-endian GGUF
      file.
  """
  url = os.fspath(url)
  scheme = url.partition('://')[0] if '://' in url else ''
  if scheme not in ('', 'gs'):
    raise config_lib.UserError(
      f'{url} cannot be opened in place: download it and give its path'
    )
  path = epath.Path(url)
  if not path.is_file():
    raise config_lib.UserError(
      f'no file at {url}: give the path or URL of a .gguf file'
    )
  if not scheme:
    return _open_local(url, url)
  with tempfile.TemporaryDirectory() as folder:
    local = os.path.join(folder, 'model.gguf')
    with path.open('rb') as source, open(local, 'wb') as target:
      shutil.copyfileobj(source, target, 1 << 24)
    # The mapping outlives the name.
    return _open_local(local, url)


def _open_local(local: str, url: str) -> GgufFile:
  try:
    reader = gguf.GGUFReader(local)
    metadata = {key: x.contents() for key, x in reader.fields.items()}
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise config_lib.UserError(
      f'{url} is not a whole GGUF file '
      f'({os.path.getsize(local)} bytes, {_one_line(error)}): '
      'download it again'
    ) from error
  if reader.byte_order != 'I':
    raise config_lib.UserError(
      f'{url} has the byte order of another machine: '
      'convert it with gguf-convert-endian'
    )
  with open(local, 'rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  return GgufFile(url, metadata, {x.name: x for x in reader.tensors}, sha256)


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split()) or type(error).__name__


def load_params(
  file: GgufFile,
) -> tuple[transformer.TransformerConfig, transformer.Params]:
  """Dequantises a model.

  Returns:
    The transformer's shape, and its float32 parameters.

  Raises:
    UserError: if the architecture is not supported, or a tensor is missing,
      misshapen, unknown to the family, or of a type that can't be dequantised.
  """
  family = families.find(file.metadata)
  embed = _tensor(file, family.whole['embed'])
  config = families.transformer_config(file.metadata, int(embed.shape[-1]))
  shapes = transformer.param_shapes(config)

  wanted = [
    (name, family.whole[name], shape)
    for name, shape in (shapes | {'unembed': shapes['embed']}).items()
    if name != 'blocks'
    and not (
      family.whole[name] in family.optional
      and family.whole[name] not in file.tensors
    )
  ]
  block_names = {
    name: [f'blk.{i}.{suffix}' for i in range(config.n_layers)]
    for name, suffix in family.blocks.items()
  }
  known = {tensor for _, tensor, _ in wanted}.union(*block_names.values())
  unknown = sorted(set(file.tensors) - known)
  if unknown:
    raise config_lib.UserError(
      f'{file.url} has {len(unknown)} tensors that the family does not use, '
      f'as {unknown[0]}: its model is of another kind, use a plain one'
    )

  # Tables of tokens stay [V, D]; matrices turn from GGUF's [outputs, inputs].
  params = {
    name: jnp.array(_dequantized(file, tensor, shape))
    for name, tensor, shape in wanted
  }
  params['blocks'] = {}
  for name, tensors in block_names.items():
    shape = shapes['blocks'][name]
    stacked = np.empty(shape, np.float32)
    for i, tensor in enumerate(tensors):
      stacked[i] = _dequantized(file, tensor, shape[:0:-1]).T
    params['blocks'][name] = jnp.asarray(stacked)
  return config, jax.block_until_ready(params)


def _tensor(file: GgufFile, name: str) -> gguf.ReaderTensor:
  if name not in file.tensors:
    raise config_lib.UserError(
      f'{file.url} has no tensor {name} among its {len(file.tensors)}: '
      'download or convert the model again'
    )
  return file.tensors[name]


def _dequantized(
  file: GgufFile, name: str, shape: tuple[int, ...]
) -> np.ndarray:
  tensor = _tensor(file, name)
  found = tuple(int(n) for n in reversed(tensor.shape))
  if found != shape:
    raise config_lib.UserError(
      f'tensor {name} of {file.url} has shape {found}, its metadata asks for '
      f'{shape}: convert the model again'
    )
  try:
    return gguf.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise config_lib.UserError(
      f'tensor {name} of {file.url} is stored as {tensor.tensor_type.name}, '
      'which gguf cannot dequantise: use a file of another quantisation'
    ) from error
