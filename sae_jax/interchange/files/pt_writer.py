"""PyTorch's `.pt` files of state dicts, written without torch.

`torch.load(path, weights_only=True)` reads them: a zip archive of stored
members as PyTorch writes since 1.6, its values at multiples of 64 bytes.
"""

from collections.abc import Mapping
import math
import os
import struct
from typing import Any
import zipfile

from sae_jax.interchange.files import pickles
from sae_jax.storage import files, safetensors, tensors

_ROOT = 'archive'
_ALIGNMENT = 64
_HEADER = 30
# The field of a local header that gives sizes in 64 bits.
_ZIP64 = 20
_TYPES = {dtype: name for name, dtype in pickles.STORAGES.items()}
_PROTOCOL = b'\x80\x02'


def write(url: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
  """Writes a state dict, a block of rows at a time.

  Args:
    url: local path or URL.
    content: name -> `Tensor`, text, integer, float, bool, None, or a mapping,
      list or tuple of them.

  Raises:
    OSError: if it cannot be written.
    ValueError: if a value is of another type, or a block of values is not of
      the shape that its tensor has.
  """
  placed: list[tensors.Tensor] = []
  description = _PROTOCOL + _pickled(content, placed) + b'.'

  def write_all(file) -> None:
    with zipfile.ZipFile(file, 'w', zipfile.ZIP_STORED) as target:
      _write_bytes(target, 'data.pkl', description)
      _write_bytes(target, 'byteorder', b'little')
      for key, tensor in enumerate(placed):
        size = math.prod(tensor.shape) * tensor.dtype.itemsize
        with _member(target, f'data/{key}', size) as member:
          safetensors.write_values(member, f'tensor {key}', tensor)
      _write_bytes(target, 'version', b'3\n')

  files.write_stream(url, write_all)


def _write_bytes(target: zipfile.ZipFile, name: str, data: bytes) -> None:
  with _member(target, name, len(data)) as member:
    member.write(data)


def _member(target: zipfile.ZipFile, name: str, size: int):
  """A member to be written, whose data begins at a multiple of 64 bytes."""
  info = zipfile.ZipInfo(f'{_ROOT}/{name}')
  is_large = size >= zipfile.ZIP64_LIMIT
  start = target.fp.tell() + _HEADER + len(info.filename) + 4
  start += _ZIP64 if is_large else 0
  padding = -start % _ALIGNMENT
  # A field that PyTorch writes for the same purpose.
  info.extra = struct.pack('<2sH', b'FB', padding) + b'Z' * padding
  return target.open(info, 'w', force_zip64=is_large)


def _pickled(value: Any, placed: list[tensors.Tensor]) -> bytes:
  """The instructions that make a value; its tensors are added to `placed`."""
  if isinstance(value, tensors.Tensor):
    return _pickled_tensor(value, placed)
  if isinstance(value, Mapping):
    items = b''.join(
      _pickled(key, placed) + _pickled(item, placed)
      for key, item in value.items()
    )
    return b'}(' + items + b'u'
  if isinstance(value, (list, tuple)):
    items = b''.join(_pickled(item, placed) for item in value)
    return (
      b'](' + items + b'e' if isinstance(value, list) else b'(' + items + b't'
    )
  if value is None or isinstance(value, bool):
    return {None: b'N', True: b'\x88', False: b'\x89'}[value]
  if type(value) is int:
    return _pickled_integer(value)
  if type(value) is float:
    return b'G' + struct.pack('>d', value)
  if type(value) is str:
    text = value.encode()
    return b'X' + struct.pack('<I', len(text)) + text
  raise ValueError(f'a state dict holds no {type(value).__name__}')


def _pickled_integer(value: int) -> bytes:
  if 0 <= value < 2**31:
    return b'J' + struct.pack('<i', value)
  size = value.bit_length() // 8 + 1
  return b'\x8a' + bytes([size]) + value.to_bytes(size, 'little', signed=True)


def _pickled_tensor(
  tensor: tensors.Tensor, placed: list[tensors.Tensor]
) -> bytes:
  if tensor.dtype not in _TYPES:
    raise ValueError(f'a state dict holds no tensor of {tensor.dtype}')
  key = str(len(placed))
  placed.append(tensor)
  storage = (
    b'('
    + _pickled('storage', placed)
    + _pickled_name('torch', _TYPES[tensor.dtype])
    + _pickled(key, placed)
    + _pickled('cpu', placed)
    + _pickled(math.prod(tensor.shape), placed)
    + b'tQ'
  )
  return (
    _pickled_name('torch._utils', '_rebuild_tensor_v2')
    + b'('
    + storage
    + _pickled(0, placed)
    + _pickled(tensor.shape, placed)
    + _pickled(tensors.contiguous(tensor.shape), placed)
    # It needs no gradient, and has no hooks.
    + b'\x89'
    + _pickled_name('collections', 'OrderedDict')
    + b')Rt'
    + b'R'
  )


def _pickled_name(module: str, name: str) -> bytes:
  return b'c' + f'{module}\n{name}\n'.encode()
