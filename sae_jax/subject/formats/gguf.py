"""Reading GGUF files: their metadata and parameters."""

import dataclasses
import hashlib
import os
import shutil
import tempfile
from typing import Any

from etils import epath
import gguf
import numpy as np

from sae_jax import errors
from sae_jax.storage import url as url_lib
from sae_jax.subject import transformer
from sae_jax.subject.formats import assembly, gguf_families

# The tensor of divisors of rotary frequencies, by which Llama 3.1 stretches.
_ROPE_FACTORS = 'rope_freqs.weight'


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
  """Opens a GGUF file (one in a bucket is copied first).

  Raises:
    UserError: if the file is missing, or not a whole little-endian GGUF file,
      or the URL is of no known kind.
  """
  url = os.fspath(url)
  is_remote = url_lib.is_remote(url)
  path = epath.Path(url)
  if not path.is_file():
    raise errors.UserError(
      f'no file at {url}: give the path or URL of a .gguf file'
    )
  if not is_remote:
    return _open_local(url, url)
  with tempfile.TemporaryDirectory() as folder:
    local = os.path.join(folder, 'model.gguf')
    with path.open('rb') as source, open(local, 'wb') as target:
      shutil.copyfileobj(source, target, 1 << 24)
    # The mapped file stays readable when its folder is deleted.
    return _open_local(local, url)


def _open_local(local: str, url: str) -> GgufFile:
  try:
    reader = gguf.GGUFReader(local)
    metadata = {key: x.contents() for key, x in reader.fields.items()}
  except (ArithmeticError, LookupError, TypeError, ValueError) as error:
    raise errors.UserError(
      f'{url} is not a whole GGUF file '
      f'({os.path.getsize(local)} bytes, {errors.reason(error)}): '
      'download it again'
    ) from error
  if reader.byte_order != 'I':
    raise errors.UserError(
      f'{url} has the byte order of another machine: '
      'convert it with gguf-convert-endian'
    )
  with open(local, 'rb') as file:
    sha256 = hashlib.file_digest(file, 'sha256').hexdigest()
  return GgufFile(url, metadata, {x.name: x for x in reader.tensors}, sha256)


def load_params(
  file: GgufFile, dtype: str = 'float32', shardings=None
) -> tuple[transformer.TransformerConfig, transformer.Params]:
  """Dequantises a model.

  Args:
    file: the opened file.
    dtype: type of the parameters.
    shardings: config -> shardings of the parameters; None for one device.

  Returns:
    The transformer's shape, and its parameters.

  Raises:
    UserError: if the architecture is not supported, or a tensor is missing,
      misshapen, not used by the family, or of a type that can't be dequantised.
  """
  family = gguf_families.find(file.metadata)
  embed = _tensor(file, 'token_embd.weight')
  config = gguf_families.transformer_config(
    file.metadata,
    vocab_size=int(embed.shape[-1]),
    tied='output.weight' not in file.tensors,
    rope_factors=_rope_factors(file),
  )
  sources = family.sources(config)
  assembly.check_all_used(
    config, sources, set(file.tensors) - {_ROPE_FACTORS}, file.url
  )
  params = assembly.assemble(
    config,
    sources,
    lambda name: _dequantized(file, name),
    file.url,
    dtype,
    shardings(config) if shardings else None,
  )
  return config, params


def _rope_factors(file: GgufFile) -> tuple[float, ...]:
  if _ROPE_FACTORS not in file.tensors:
    return ()
  return tuple(_dequantized(file, _ROPE_FACTORS).tolist())


def _tensor(file: GgufFile, name: str) -> gguf.ReaderTensor:
  if name not in file.tensors:
    raise errors.UserError(
      f'{file.url} has no tensor {name} among its {len(file.tensors)}: '
      'download or convert the model again'
    )
  return file.tensors[name]


def _dequantized(file: GgufFile, name: str) -> np.ndarray:
  tensor = _tensor(file, name)
  try:
    return gguf.dequantize(tensor.data, tensor.tensor_type)
  except NotImplementedError as error:
    raise errors.UserError(
      f'tensor {name} of {file.url} is stored as {tensor.tensor_type.name}, '
      'which gguf cannot dequantise: use a file of another quantisation'
    ) from error
