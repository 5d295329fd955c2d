"""Safetensors files, read by ranges and written by blocks, of any size.

A file is the length of its header (8 bytes), a header in JSON that gives the
type, shape and place of each tensor, and their values one behind the other
(github.com/huggingface/safetensors). Every size is checked before it is used.
"""

from collections.abc import Mapping
import functools
import json
import math
import os
import struct
from typing import Any

from etils import epath
import ml_dtypes
import numpy as np

from sae_jax import errors
from sae_jax.storage import files, names, records, tensors

# Of the longest headers that are read; that of 80,000 tensors has so much, and
# the objects that Python makes of it two hundred megabytes at the most.
_LONGEST = 8 * 2**20
_LENGTH = 8
_AGAIN = 'download it again'
_METADATA = '__metadata__'
DTYPES = {
  'F64': np.dtype('<f8'),
  'F32': np.dtype('<f4'),
  'F16': np.dtype('<f2'),
  'BF16': tensors.BFLOAT16,
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'I64': np.dtype('<i8'),
  'I32': np.dtype('<i4'),
  'I16': np.dtype('<i2'),
  'I8': np.dtype('i1'),
  'U64': np.dtype('<u8'),
  'U32': np.dtype('<u4'),
  'U16': np.dtype('<u2'),
  'U8': np.dtype('u1'),
  'BOOL': np.dtype(bool),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def read(
  url: str | os.PathLike[str], name: str | None = None
) -> tuple[dict[str, tensors.Tensor], dict[str, str]]:
  """The tensors of a file, none of whose values is read yet, and its metadata.

  Args:
    url: local path or URL.
    name: what errors call it; None for its URL.

  Raises:
    UserError: if it is not a whole safetensors file.
  """
  url = os.fspath(url)
  called = name or url
  size = files.size(url, 'a .safetensors file')
  opener = functools.partial(epath.Path(url).open, 'rb')
  try:
    with opener() as file:
      head = file.read(_LENGTH)
      if len(head) < _LENGTH:
        raise ValueError(f'it ends before byte {_LENGTH}')
      length = struct.unpack('<Q', head)[0]
      if length > min(_LONGEST, size - _LENGTH):
        raise ValueError(
          f'its header would have {length:,} bytes, of which at most '
          f'{min(_LONGEST, size - _LENGTH):,} are there or are read'
        )
      header = file.read(length)
    header = records.parse(
      header, f'the header of {called}', _AGAIN, _LONGEST, is_unique=True
    )
    metadata = header.pop(_METADATA, {})
    _check_metadata(metadata)
    places = {stored: _place(stored, entry) for stored, entry in header.items()}
    _check_layout(places, size - _LENGTH - length)
  except errors.UserError:
    raise
  except (OSError, ValueError) as error:
    raise errors.UserError(
      f'{called} is not a whole safetensors file '
      f'({size} bytes, {errors.reason(error)}): {_AGAIN}'
    ) from error
  base = _LENGTH + length
  return {
    stored: tensors.stored(
      opener, base + start, shape, dtype, f'tensor {stored} of {called}'
    )
    for stored, (dtype, shape, start, _) in places.items()
  }, metadata


def weight_map(url: str | os.PathLike[str]) -> dict[str, str]:
  """Tensor -> name of its file, of a model in several files.

  Args:
    url: local path or URL of the index, which lies beside its files.

  Raises:
    UserError: if it is no index, or names a file in another folder.
  """
  file_of = records.read(url, _AGAIN).get('weight_map')
  if not isinstance(file_of, dict) or not file_of:
    raise errors.UserError(
      f'{url} has no weight_map of tensors to files: {_AGAIN}'
    )
  return {
    tensor: names.plain(name, str(url)) for tensor, name in file_of.items()
  }


def read_index(
  url: str | os.PathLike[str],
) -> tuple[dict[str, tensors.Tensor], dict[str, str]]:
  """`read` of all files of a `weight_map`; there is no metadata.

  Raises:
    UserError: see there, or if a file or a tensor that it names is absent.
  """
  file_of = weight_map(url)
  folder = epath.Path(url).parent
  stored = {
    name: read(folder / name)[0] for name in sorted(set(file_of.values()))
  }
  for tensor, name in file_of.items():
    if tensor not in stored[name]:
      raise errors.UserError(
        f'{folder / name} has no tensor {tensor}, which {url} names: {_AGAIN}'
      )
  return {tensor: stored[name][tensor] for tensor, name in file_of.items()}, {}


def _check_metadata(metadata: Any) -> None:
  if not isinstance(metadata, dict) or not all(
    isinstance(value, str) for value in metadata.values()
  ):
    raise ValueError(f'its {_METADATA} is no mapping of texts')


def _place(name: str, entry: Any) -> tuple[np.dtype, tuple[int, ...], int, int]:
  """Type, shape, start and end of a tensor, by its entry of the header."""
  keys = ('dtype', 'shape', 'data_offsets')
  if not isinstance(entry, dict) or set(entry) != set(keys):
    raise ValueError(f'tensor {name} has no entry of {", ".join(keys)}')
  kind, shape, offsets = (entry[key] for key in keys)
  if not isinstance(kind, str) or kind not in DTYPES:
    raise ValueError(
      f'tensor {name} is of the type {kind!r}, none of {", ".join(DTYPES)}'
    )
  if not _are_sizes(shape) or len(shape) > tensors.MOST_AXES:
    raise ValueError(f'tensor {name} has no shape but {_words(shape)}')
  if not _are_sizes(offsets) or len(offsets) != 2:
    raise ValueError(f'tensor {name} has no offsets but {_words(offsets)}')
  start, end = offsets
  dtype = DTYPES[kind]
  if end - start != math.prod(shape) * dtype.itemsize:
    raise ValueError(
      f'tensor {name}, {kind} of {_words(shape)}, has {end - start:,} bytes'
    )
  return dtype, tuple(shape), start, end


def _words(value: Any) -> str:
  """A value of the header; what follows a bracket is no reason of an error."""
  return errors.printable(repr(value).replace('[', '(').replace(']', ')'), 100)


def _are_sizes(values: Any) -> bool:
  return isinstance(values, list) and all(
    type(size) is int and 0 <= size < tensors.LARGEST for size in values
  )


def _check_layout(places: dict[str, Any], size: int) -> None:
  """Raises ValueError unless the tensors fill the file without a gap."""
  end = 0
  for name, (_, _, start, stop) in sorted(
    places.items(), key=lambda item: item[1][2:]
  ):
    if start != end:
      raise ValueError(
        f'tensor {name} begins at byte {start:,} of the data, not at {end:,} '
        'where the one before it ends'
      )
    end = stop
  if end != size:
    raise ValueError(f'its tensors have {end:,} bytes, the file has {size:,}')


def write(
  url: str | os.PathLike[str],
  content: Mapping[str, tensors.Tensor],
  metadata: Mapping[str, str] | None = None,
) -> None:
  """Writes a file, a block of rows at a time.

  Args:
    url: local path or URL.
    content: tensors by name, of `DTYPES`.
    metadata: texts by name.

  Raises:
    OSError: if it cannot be written.
    ValueError: if a type is none of the format's, or a block is not of the
      shape that its tensor has.
  """
  for name, tensor in content.items():
    if tensor.dtype not in _NAMES:
      raise ValueError(f'{name} is of {tensor.dtype}, which the format lacks')
  # The widest first, so that each begins at a multiple of its own width.
  order = sorted(
    content, key=lambda name: (-content[name].dtype.itemsize, name)
  )
  header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
  end = 0
  for name in order:
    tensor = content[name]
    start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
    header[name] = {
      'dtype': _NAMES[tensor.dtype],
      'shape': list(tensor.shape),
      'data_offsets': [start, end],
    }
  text = json.dumps(header, separators=(',', ':'), allow_nan=False).encode()
  text += b' ' * (-len(text) % _LENGTH)

  def write_all(file) -> None:
    file.write(struct.pack('<Q', len(text)) + text)
    for name in order:
      write_values(file, name, content[name])

  files.write_stream(url, write_all)


def write_values(file, name: str, tensor: tensors.Tensor) -> None:
  """Writes all values of a tensor; ValueError if they are not of its shape."""
  size, n_bytes = math.prod(tensor.shape) * tensor.dtype.itemsize, 0
  for block in tensor.blocks():
    if block.dtype != tensor.dtype or block.shape[1:] != tensor.shape[1:]:
      raise ValueError(
        f'{name} gave {block.dtype} of {block.shape}, not rows of '
        f'{tensor.dtype} of {tensor.shape}'
      )
    n_bytes += file.write(tensors.as_bytes(block))
  if n_bytes != size:
    raise ValueError(f'{name} gave {n_bytes:,} bytes, not {size:,}')
