"""Reading GGUF files: their metadata and parameters."""

import dataclasses
import hashlib
import os
import re
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
# As gguf-split calls the parts of a model.
_PART = re.compile(r'(.*)-(\d{5})-of-(\d{5})\.gguf')
# Entries of an array: the largest vocabularies have 262,144 tokens.
_LONGEST_ARRAY = 2**20


@dataclasses.dataclass(frozen=True)
class GgufFile:
  """An opened GGUF file, or all parts of one that was split.

  Attributes:
    url: where it was read from.
    metadata: key -> value.
    tensors: name -> quantised tensor, a view of the mapped file.
    sha256: hex digest of the whole file. For several parts it is the digest of
      the lines '<digest>  <name>' in the order of the parts, as sha256sum
      prints.
  """

  url: str
  metadata: dict[str, Any]
  tensors: dict[str, gguf.ReaderTensor]
  sha256: str


class _Reader(gguf.GGUFReader):
  """gguf's reader, which believes no size that the file has no bytes for."""

  def _get(self, offset, dtype, count=1, override_order=None):
    end = int(offset) + int(np.dtype(dtype).itemsize) * int(count)
    if end > len(self.data):
      raise ValueError(f'it ends before byte {end:,}')
    return super()._get(offset, dtype, count, override_order)

  def _get_field_parts(self, orig_offs, raw_type):
    if raw_type == gguf.GGUFValueType.ARRAY:
      kind = gguf.GGUFValueType(self._get(orig_offs, np.uint32)[0])
      length = int(self._get(orig_offs + 4, np.uint64)[0])
      if kind == gguf.GGUFValueType.ARRAY or length > _LONGEST_ARRAY:
        raise ValueError(
          f'it has an array of arrays, or of {length:,} values, of which at '
          f'most {_LONGEST_ARRAY:,} are read'
        )
      # A text has its length before it.
      number = self.gguf_scalar_to_np.get(kind, np.uint64)
      self._get(orig_offs + 12, number, length)
    return super()._get_field_parts(orig_offs, raw_type)


def open_gguf(url: str | os.PathLike[str]) -> GgufFile:
  """Opens a GGUF file, or one of the parts of a file and so all of them.

  Files in a bucket are copied first.

  Raises:
    UserError: if a file is missing, or not a whole little-endian GGUF file, or
      the URL is of no known kind.
  """
  url = os.fspath(url)
  part = _PART.fullmatch(url)
  n_parts = int(part[3]) if part else 1
  if n_parts < 2:
    file = _open(url)
    if file.metadata.get('split.count', 1) != 1:
      raise errors.UserError(
        f'{url} is a part of a split file and not called so '
        '(-00001-of-00002.gguf): name its parts as they were, or merge them '
        'with gguf-split --merge'
      )
    return file
  stem = part[1]
  urls = [f'{stem}-{i:05}-of-{n_parts:05}.gguf' for i in range(1, n_parts + 1)]
  parts = []
  for number, one in enumerate(urls):
    file = _open(one, f', one of {n_parts} parts')
    place = tuple(map(file.metadata.get, ('split.no', 'split.count')))
    if place != (number, n_parts):
      raise errors.UserError(
        f'{one} is not part {number + 1} of {n_parts} by its own metadata: '
        'download the parts again, or merge them with gguf-split --merge'
      )
    parts.append(file)
  return _joined(url, urls, parts)


def _joined(url: str, urls: list[str], parts: list[GgufFile]) -> GgufFile:
  tensors = {name: x for part in parts for name, x in part.tensors.items()}
  total = parts[0].metadata.get('split.tensors.count')
  n_tensors = sum(len(part.tensors) for part in parts)
  if not len(tensors) == n_tensors == total:
    raise errors.UserError(
      f'the {len(parts)} parts of {url} hold {n_tensors} tensors by '
      f'{len(tensors)} names, the first says {total}: download them again'
    )
  lines = ''.join(
    f'{part.sha256}  {os.path.basename(one)}\n'
    for one, part in zip(urls, parts)
  )
  digest = hashlib.sha256(lines.encode()).hexdigest()
  return GgufFile(url, parts[0].metadata, tensors, digest)


def _open(url: str, which: str = '') -> GgufFile:
  is_remote = url_lib.is_remote(url)
  path = epath.Path(url)
  if not path.is_file():
    raise errors.UserError(
      f'no file at {url}{which}: give the path or URL of a .gguf file'
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
    # A damaged offset may overflow; then it fits no tensor.
    with np.errstate(over='ignore'):
      reader = _Reader(local)
    metadata = {key: x.contents() for key, x in reader.fields.items()}
    _check_layout(reader)
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


def _check_layout(reader: gguf.GGUFReader) -> None:
  """Raises ValueError unless the tensors lie one behind the other.

  The specification asks for it, and a damaged offset is seen by it alone.
  """
  end = reader.data_offset
  for tensor in reader.tensors:
    if tensor.data_offset != end:
      raise ValueError(
        f'tensor {tensor.name} begins at byte {tensor.data_offset:,}, not at '
        f'{end:,} where the one before it ends'
      )
    end += -(-int(tensor.n_bytes) // int(reader.alignment)) * int(
      reader.alignment
    )


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
  family = gguf_families.find(file.metadata, file.url)
  embed = _tensor(file, 'token_embd.weight')
  config = gguf_families.transformer_config(
    file.metadata,
    vocab_size=int(embed.shape[-1]) if len(embed.shape) else 1,
    tied='output.weight' not in file.tensors,
    rope_factors=_rope_factors(file),
    where=file.url,
  )
  sources = family.sources(config)
  assembly.check_names(
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
  return tuple(_dequantized(file, _ROPE_FACTORS).ravel().tolist())


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
  except (NotImplementedError, ValueError) as error:
    raise errors.UserError(
      f'tensor {name} of {file.url} is stored as {tensor.tensor_type.name}, '
      'which gguf cannot dequantise: use a file of another quantisation'
    ) from error
